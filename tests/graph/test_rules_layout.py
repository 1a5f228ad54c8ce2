"""Rules of layout: what splits, joins, moves and repeats axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from programs import checked, inputs, net
from torch import Tensor

X = inputs(2, 5, 6)


def test_fused_qkv_of_segments() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, p.qkv, p.bias).split(12, dim=-1)
        q, k, v = (t.view(2, 5, 3, 4).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
        return F.linear(y, p.o)

    assert_expected_inline(
        checked(net(forward, qkv=(36, 6), bias=(36,), o=(6, 12)), X),
        """\
head 3: qkv[0] bias[0] o[1]
qk_dim 4: qkv[0] bias[0]; companions head
value_dim 4: qkv[0] bias[0] o[1]; companions head
pinned qkv[1] 6: an axis of the input
pinned o[0] 6: an axis of the output
""",
    )


def test_fused_qkv_interleaved_by_head() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, p.qkv).view(2, 5, 3, 12).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
        return F.linear(y, p.o)

    assert_expected_inline(
        checked(net(forward, qkv=(36, 6), o=(6, 12)), X),
        """\
head 3: qkv[0] o[1]
qk_dim 4: qkv[0]; companions head
value_dim 4: qkv[0] o[1]; companions head
pinned qkv[1] 6: an axis of the input
pinned o[0] 6: an axis of the output
""",
    )


def test_fused_qkv_unbound() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, p.qkv).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
        return F.linear(y, p.o)

    assert_expected_inline(
        checked(net(forward, qkv=(36, 6), o=(6, 12)), X),
        """\
head 3: qkv[0] o[1]
head_dim 4: qkv[0] o[1]; companions head
pinned qkv[1] 6: an axis of the input
pinned o[0] 6: an axis of the output
""",
    )


def test_rotary_halves() -> None:
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., :2], x[..., 2:]
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(p: object, x: Tensor) -> Tensor:
        angle = torch.arange(5.0)[:, None].double() * p.frequency
        angle = torch.cat([angle, angle], -1)
        q, k = (F.linear(x, w).view(2, 5, 3, 4).transpose(1, 2) for w in (p.q, p.k))
        q, k = (rotated(t, angle.cos(), angle.sin()) for t in (q, k))
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        return scores @ F.linear(x, p.v)[:, None]

    assert_expected_inline(
        checked(net(forward, q=(12, 6), k=(12, 6), v=(4, 6), frequency=(2,)), X),
        """\
rope_pair 2: q[0] k[0] frequency[0]
pinned q[0] 3: an axis of the output
pinned q[1] 6: an axis of the input
pinned k[0] 3: an axis of the output
pinned k[1] 6: an axis of the input
pinned v[0] 4: an axis of the output
pinned v[1] 6: an axis of the input
""",
    )


def test_rotary_interleaved() -> None:
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return x * cos + torch.stack((-b, a), -1).flatten(-2) * sin

    def forward(p: object, x: Tensor) -> Tensor:
        angle = (torch.arange(5.0)[:, None].double() * p.frequency).repeat_interleave(2, -1)
        q, k = (F.linear(x, w).view(2, 5, 3, 6).transpose(1, 2) for w in (p.q, p.k))
        q, k = (rotated(t, angle.cos(), angle.sin()) for t in (q, k))
        return (q @ k.transpose(-1, -2)).softmax(-1) @ F.linear(x, p.v)[:, None]

    assert_expected_inline(
        checked(net(forward, q=(18, 6), k=(18, 6), v=(4, 6), frequency=(3,)), X),
        """\
rope_pair 3: q[0] k[0] frequency[0]
pinned q[0] 3: an axis of the output
pinned q[1] 6: an axis of the input
pinned k[0] 3: an axis of the output
pinned k[1] 6: an axis of the input
pinned v[0] 4: an axis of the output
pinned v[1] 6: an axis of the input
""",
    )


def test_gate_and_up_in_one_weight() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        gate, up = F.linear(x, p.both).chunk(2, -1)
        return F.linear(F.silu(gate) * up, p.down)

    assert_expected_inline(
        checked(net(forward, both=(20, 6), down=(4, 10)), X),
        """\
ffn_channel 10: both[0] down[1]
pinned both[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_glu() -> None:
    assert_expected_inline(
        checked(
            net(
                lambda p, x: F.linear(F.glu(F.linear(x, p.both), -1), p.down),
                both=(20, 6),
                down=(4, 10),
            ),
            X,
        ),
        """\
ffn_channel 10: both[0] down[1]
pinned both[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_uneven_slices() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        return F.linear(torch.cat([y[..., 3:].relu(), y[..., :3], x], -1), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 16)), X),
        """\
ffn_channel 3: up[0] down[1]
ffn_channel#2 7: up[0] down[1]
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
pinned down[1] 6: an axis of the input
""",
    )


def test_negative_bounds() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        return F.linear(y[..., :-4], p.a) + F.linear(y[..., -4:], p.b)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), a=(4, 6), b=(4, 4)), X),
        """\
ffn_channel 6: up[0] a[1]
ffn_channel#2 4: up[0] b[1]
pinned up[1] 6: an axis of the input
pinned a[0] 4: an axis of the output
pinned b[0] 4: an axis of the output
""",
    )


def test_select_of_a_stack() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = torch.stack([F.linear(x, p.a), F.linear(x, p.b)], 1)
        return F.linear(y[:, 0] * y[:, 1], p.down)

    assert_expected_inline(
        checked(net(forward, a=(10, 6), b=(10, 6), down=(4, 10)), X),
        """\
ffn_channel 10: a[0] b[0] down[1]
pinned a[1] 6: an axis of the input
pinned b[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_one_position_picked_is_pinned() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        return F.linear(y * y[..., :1] * y[..., 3, None], p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_expand_and_repeat() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up) * p.gain.expand(2, 5, 10)
        return F.linear(y.repeat(1, 1, 2), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), gain=(10,), down=(4, 20)), X),
        """\
ffn_channel 10: up[0] gain[0] down[1]
ffn_channel#2 2: down[1]
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_tensors_broadcast_together() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y, gain = torch.broadcast_tensors(F.linear(x, p.up), p.gain)
        return F.linear(torch.multiply(y, gain), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), gain=(10,), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] gain[0] down[1]
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_order_that_changes_is_pinned() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, p.up).flip(-1).roll(1, -1), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
pinned up[0] 10: its order changes
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
pinned down[1] 10: its order changes
""",
    )


def test_a_view_after_slicing_may_need_a_copy() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up).view(2, 5, 5, 2)
        return F.linear(y.view(10, 10), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
ffn_channel 5: up[0] down[1]
ffn_channel#2 2: up[0] down[1]; companions ffn_channel
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_complex_pairs_of_a_tensor_that_became_narrower() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        rest, pairs = F.linear(x, p.up).split([6, 4], -1)
        turned = torch.view_as_complex(pairs.unflatten(-1, (2, 2))) * torch.polar(p.one, p.angle)
        return F.linear(torch.cat([rest, torch.view_as_real(turned).flatten(-2)], -1), p.down)

    module = net(forward, up=(10, 6), one=(2,), angle=(2,), down=(4, 10))
    assert_expected_inline(
        checked(module, X),
        """\
ffn_channel 6: up[0] down[1]
ffn_channel#2 2: up[0] one[0] angle[0] down[1]
pinned up[0] 2: real and imaginary part
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
pinned down[1] 2: real and imaginary part
""",
    )

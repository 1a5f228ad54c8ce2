"""Every family of rules on the smallest program that needs it: its groups, and both oracles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from programs import assert_exact, coupled, describe, inputs, net
from torch import Tensor, nn

from prunec.errors import MissingRule
from prunec.graph.coupling import couple
from prunec.graph.trace import trace

X = inputs(2, 5, 6)
IMAGE = inputs(2, 3, 8, 8)


def checked(module: nn.Module, example: Tensor) -> str:
    """The groups of a module as text, after both oracles passed on each."""
    coupling = coupled(module, example)
    if coupling.groups:
        assert_exact(coupling)
    return describe(coupling)


# contractions


def test_linear() -> None:
    assert_expected_inline(
        checked(
            net(
                lambda p, x: F.linear(F.relu(F.linear(x, p.up, p.bias)), p.down),
                up=(10, 6),
                bias=(10,),
                down=(4, 10),
            ),
            X,
        ),
        """\
ffn_channel 10: up[0] bias[0] down[1]
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_transposed_weights() -> None:
    assert_expected_inline(
        checked(
            net(
                lambda p, x: torch.tanh(x @ p.up + p.bias) @ p.down,
                up=(6, 10),
                bias=(10,),
                down=(10, 4),
            ),
            X,
        ),
        """\
ffn_channel 10: up[1] bias[0] down[0]
pinned up[0] 6: an axis of the input
pinned down[1] 4: an axis of the output
""",
    )


def test_addmm_on_a_view() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        flat = x.view(-1, 6)
        return torch.addmm(p.b, torch.addmm(p.a, flat, p.up).sigmoid(), p.down).view(2, 5, 4)

    assert_expected_inline(
        checked(net(forward, a=(10,), b=(4,), up=(6, 10), down=(10, 4)), X),
        """\
ffn_channel 10: a[0] up[1] down[0]
pinned b[0] 4: an axis of the output
pinned up[0] 6: an axis of the input
pinned down[1] 4: an axis of the output
""",
    )


def test_einsum_with_heads() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsi,ihd->bhsd", x, w) for w in (p.q, p.k, p.v))
        scores = torch.einsum("bhsd,bhtd->bhst", q, k).softmax(-1)
        return torch.einsum("bhst,bhtd,hdo->bso", scores, v, p.o)

    assert_expected_inline(
        checked(net(forward, q=(6, 3, 4), k=(6, 3, 4), v=(6, 3, 4), o=(3, 4, 6)), X),
        """\
head 3: q[1] k[1] v[1] o[0]
qk_dim 4: q[2] k[2]
value_dim 4: v[2] o[1]
pinned q[0] 6: an axis of the input
pinned k[0] 6: an axis of the input
pinned v[0] 6: an axis of the input
pinned o[2] 6: an axis of the output
""",
    )


def test_einsum_with_dots() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return torch.einsum("...h,oh->...o", torch.einsum("...i,hi->...h", x, p.up).cos(), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] down[1]
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def attention(p: object, x: Tensor, **options: object) -> Tensor:
    """Grouped-query attention: 6 query heads, 3 key and value heads, of 4."""
    q = F.linear(x, p.q).view(2, 5, 6, 4).transpose(1, 2)
    k = F.linear(x, p.k).view(2, 5, 3, 4).transpose(1, 2)
    v = F.linear(x, p.v).view(2, 5, 3, 4).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    return F.linear(y.transpose(1, 2).reshape(2, 5, 24), p.o)


GQA = {"q": (24, 6), "k": (12, 6), "v": (12, 6), "o": (6, 24)}


def test_grouped_query_attention() -> None:
    assert_expected_inline(
        checked(net(attention, **GQA), X),
        """\
kv_group 3: q[0] k[0] v[0] o[1]
query_head 2: q[0] o[1]; companions kv_group
qk_dim 4: q[0] k[0]; companions kv_group
value_dim 4: v[0] o[1]; companions kv_group
pinned q[1] 6: an axis of the input
pinned k[1] 6: an axis of the input
pinned v[1] 6: an axis of the input
pinned o[0] 6: an axis of the output
""",
    )


def test_causal_attention_with_a_mask() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return attention(p, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril())

    assert describe(coupled(net(forward, **GQA), X)) == describe(coupled(net(attention, **GQA), X))
    assert_exact(coupled(net(forward, **GQA), X))


def repeated(x: Tensor, times: int) -> Tensor:
    """Keys shared by the query heads of a group, written out."""
    batch, heads, length, width = x.shape
    x = x[:, :, None].expand(batch, heads, times, length, width)
    return x.reshape(batch, heads * times, length, width)


def test_grouped_query_attention_written_out() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        q = F.linear(x, p.q).view(2, 5, 6, 4).transpose(1, 2)
        k = repeated(F.linear(x, p.k).view(2, 5, 3, 4).transpose(1, 2), 2)
        v = repeated(F.linear(x, p.v).view(2, 5, 3, 4).transpose(1, 2), 2)
        y = ((q @ k.transpose(-1, -2)) * 0.5).softmax(-1) @ v
        return F.linear(y.transpose(1, 2).reshape(2, 5, 24), p.o)

    assert_expected_inline(
        checked(net(forward, **GQA), X),
        """\
kv_group 3: q[0] k[0] v[0] o[1]
query_head 2: q[0] o[1]; companions kv_group
qk_dim 4: q[0] k[0]; companions kv_group
value_dim 4: v[0] o[1]; companions kv_group
pinned q[1] 6: an axis of the input
pinned k[1] 6: an axis of the input
pinned v[1] 6: an axis of the input
pinned o[0] 6: an axis of the output
""",
    )


# layout


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


# norms and reductions


def test_layer_norm() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(F.linear(x, p.up), (10,), p.w, p.b), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), w=(10,), b=(10,), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] w[0] b[0] down[1]; normalised
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_rms_norm_written_out() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * p.w
        return F.linear(y, p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), w=(10,), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] w[0] down[1]; normalised
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_group_norm_keeps_whole_groups_or_equal_parts_of_them() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(x, p.stem)
        return F.conv2d(F.group_norm(y, 3, p.w, p.b).relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(12, 3, 3, 3), w=(12,), b=(12,), head=(2, 12, 1, 1)), IMAGE),
        """\
conv_channel 3: stem[0] w[0] b[0] head[1]
conv_channel#2 4: stem[0] w[0] b[0] head[1]; companions conv_channel; normalised
pinned stem[1] 3: an axis of the input
pinned stem[2] 3: a kernel position
pinned stem[3] 3: a kernel position
pinned head[0] 2: an axis of the output
""",
    )


def test_batch_norm() -> None:
    module = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 2, 1))
    module[1].running_mean = torch.randn(10, generator=torch.Generator().manual_seed(2))
    assert_expected_inline(
        checked(module.double(), IMAGE),
        """\
conv_channel 10: 0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0] 3.weight[1] 1.running_mean[0]
    1.running_var[0]
pinned 0.weight[1] 3: an axis of the input
pinned 0.weight[2] 3: a kernel position
pinned 0.weight[3] 3: a kernel position
pinned 3.weight[0] 2: an axis of the output
pinned 3.bias[0] 2: an axis of the output
""",
    )


def test_weights_standardised_by_a_batch_norm() -> None:
    """Over all of a kernel, its input channels included: fewer of them have other statistics."""

    def standard(weight: Tensor) -> Tensor:
        flat = weight.reshape(1, weight.shape[0], -1)
        return F.batch_norm(flat, None, None, training=True).reshape_as(weight)

    def forward(p: object, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, standard(p.stem)).relu(), standard(p.head))

    assert_expected_inline(
        checked(net(forward, stem=(12, 3, 3, 3), head=(4, 12, 1, 1)), IMAGE),
        """\
conv_channel 12: stem[0] head[1]; normalised
pinned stem[1] 3: an axis of the input
pinned stem[2] 3: a kernel position
pinned stem[3] 3: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_softmax_and_variance_over_units() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        return F.linear(y.softmax(-1) / y.std(-1, keepdim=True), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] down[1]; minimum 2; normalised
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_an_unbiased_spread_needs_two_units() -> None:
    """Found by the random programs: of one channel a group the deviation was 0 / 0."""

    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        y = (y * y.std(-1, keepdim=True)).transpose(1, 2)
        return F.linear(F.conv1d(y, p.mix, groups=2).transpose(1, 2), p.down)

    module = net(forward, up=(6, 6), mix=(4, 3, 1), down=(3, 4))
    assert_expected_inline(
        checked(module, X),
        """\
conv_channel 2: mix[0] down[1]
pinned up[0] 2: at least 2 positions must stay
pinned up[0] 3: at least 2 positions must stay
pinned up[1] 6: an axis of the input
pinned mix[0] 2: at least 2 positions must stay
pinned mix[1] 3: at least 2 positions must stay
pinned down[0] 3: an axis of the output
pinned down[1] 2: at least 2 positions must stay
""",
    )


def test_weight_norm() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 10))
    assert_expected_inline(
        checked(nn.Sequential(layer, nn.Tanh(), nn.Linear(10, 4)).double(), X),
        """\
ffn_channel 10: 0.bias[0] 0.parametrizations.weight.original0[0]
    0.parametrizations.weight.original1[0] 2.weight[1]
pinned 0.parametrizations.weight.original1[1] 6: an axis of the input
pinned 2.weight[0] 4: an axis of the output
pinned 2.bias[0] 4: an axis of the output
""",
    )


def test_maximum_over_units() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        return F.linear(y - y.amax(-1, keepdim=True), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] down[1]; normalised
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


# indices


def test_token_ids_pin_the_table_they_index() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return F.linear(F.embedding(x, p.table), p.head)

    assert_expected_inline(
        checked(net(forward, table=(11, 6), head=(4, 6)), torch.randint(0, 11, (2, 5))),
        """\
ffn_channel 6: table[1] head[1]
pinned table[0] 11: addressed by position
pinned head[0] 4: an axis of the output
""",
    )


def experts(p: object, x: Tensor) -> Tensor:
    """Two of five experts a token."""
    weight, chosen = F.linear(x, p.router).softmax(-1).topk(2, -1)
    hidden = torch.einsum("bsi,eih->bseh", x, p.up).relu()
    every = torch.einsum("bseh,eho->bseo", hidden, p.down)
    mask = F.one_hot(chosen, 5).to(x.dtype) * weight[..., None]
    return (every * mask.sum(-2)[..., None]).sum(-2)


def test_experts() -> None:
    assert_expected_inline(
        checked(net(experts, router=(5, 6), up=(5, 6, 7), down=(5, 7, 6)), X),
        """\
expert 5: router[0] up[0] down[0]; minimum 2; normalised
ffn_channel 7: up[2] down[1]
pinned router[1] 6: an axis of the input
pinned up[1] 6: an axis of the input
pinned down[2] 6: an axis of the output
""",
    )


def test_gathered_experts() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        scores = F.linear(x, p.router)
        chosen = scores.topk(2, -1).indices
        weight = scores.sigmoid().gather(-1, chosen)
        y = torch.einsum("bsi,bskio->bsko", x, p.up[chosen])
        return (y * weight[..., None]).sum(-2)

    assert_expected_inline(
        checked(net(forward, router=(5, 6), up=(5, 6, 4)), X),
        """\
expert 5: router[0] up[0]; minimum 2; normalised
pinned router[1] 6: an axis of the input
pinned up[1] 6: an axis of the input
pinned up[2] 4: an axis of the output
""",
    )


def test_scattered_gates() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        scores = F.linear(x, p.router)
        best, chosen = scores.topk(2, -1)
        gates = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))
        return torch.einsum("bse,eo->bso", gates, p.values)

    assert_expected_inline(
        checked(net(forward, router=(5, 6), values=(5, 4)), X),
        """\
expert 5: router[0] values[0]; minimum 2; normalised
pinned router[1] 6: an axis of the input
pinned values[1] 4: an axis of the output
""",
    )


def test_indices_that_are_computed_with_are_pinned() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        chosen = F.linear(x, p.router).topk(2, -1).indices
        return F.embedding(chosen // 2, p.table).sum(-2)

    assert_expected_inline(
        checked(net(forward, router=(5, 6), table=(3, 4)), X),
        """\
pinned router[0] 5: its indices are used as numbers
pinned router[1] 6: an axis of the input
pinned table[0] 3: addressed by position
pinned table[1] 4: an axis of the output
""",
    )


def test_a_route_that_is_looked_up_pins_what_it_leads_to() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        table = torch.tensor([[0, 2], [1, 3], [4, 0]])
        chosen = table[x]
        mask = F.one_hot(chosen, 5).to(p.up.dtype).sum(-2)
        return torch.einsum("bse,eo->bso", mask, p.up)

    assert_expected_inline(
        checked(net(forward, up=(5, 4)), torch.randint(0, 3, (2, 5))),
        """\
pinned up[0] 5: addressed by position
pinned up[1] 4: an axis of the output
""",
    )


def test_sorted_units_are_pinned() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, p.up).sort(-1).values, p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
pinned up[0] 10: its order changes
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
pinned down[1] 10: its order changes
""",
    )


# positions


def test_slopes_by_head_keep_their_numbers() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        slopes = torch.pow(2.0, -torch.arange(1, 4)).double()
        q, k, v = (F.linear(x, w).view(2, 5, 3, 4).transpose(1, 2) for w in (p.q, p.k, p.v))
        bias = slopes[:, None, None] * torch.arange(5)
        y = ((q @ k.transpose(-1, -2)) + bias).softmax(-1) @ v
        return F.linear(y.transpose(1, 2).reshape(2, 5, 12), p.o)

    assert_expected_inline(
        checked(net(forward, q=(12, 6), k=(12, 6), v=(12, 6), o=(6, 12)), X),
        """\
head 3: q[0] k[0] v[0] o[1]
qk_dim 4: q[0] k[0]; companions head
value_dim 4: v[0] o[1]; companions head
pinned q[1] 6: an axis of the input
pinned k[1] 6: an axis of the input
pinned v[1] 6: an axis of the input
pinned o[0] 6: an axis of the output
""",
    )


# convolutions


def test_convolution_pooled_and_flattened() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.conv2d(x, p.stem, p.bias, padding=1).relu(), 2)
        return F.linear(F.adaptive_avg_pool2d(y, 2).flatten(1), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(10, 3, 3, 3), bias=(10,), head=(4, 40)), IMAGE),
        """\
conv_channel 10: stem[0] bias[0] head[1]
pinned stem[1] 3: an axis of the input
pinned stem[2] 3: a kernel position
pinned stem[3] 3: a kernel position
pinned head[0] 4: an axis of the output
pinned head[1] 2: a position
pinned head[1] 2: a position
""",
    )


def test_depthwise_convolution() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(F.conv2d(x, p.stem), p.depth, groups=10)
        return F.conv2d(y.relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(10, 3, 1, 1), depth=(10, 1, 3, 3), head=(4, 10, 1, 1)), IMAGE),
        """\
conv_channel 10: stem[0] depth[0] head[1]
pinned stem[1] 3: an axis of the input
pinned depth[2] 3: a kernel position
pinned depth[3] 3: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_depthwise_convolution_with_a_multiplier() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(F.conv2d(x, p.stem), p.depth, groups=5)
        return F.conv2d(y.relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(5, 3, 1, 1), depth=(10, 1, 3, 3), head=(4, 10, 1, 1)), IMAGE),
        """\
conv_channel 5: stem[0] depth[0] head[1]
conv_channel#2 2: depth[0] head[1]; companions conv_channel
pinned stem[1] 3: an axis of the input
pinned depth[2] 3: a kernel position
pinned depth[3] 3: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_grouped_convolution() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(F.conv2d(x, p.stem), p.middle, groups=3)
        return F.conv2d(y.relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(12, 3, 1, 1), middle=(15, 4, 3, 3), head=(4, 15, 1, 1)), IMAGE),
        """\
conv_channel 3: stem[0] middle[0] head[1]
conv_channel#2 4: stem[0] middle[1]
conv_channel#3 5: middle[0] head[1]; companions conv_channel
pinned stem[1] 3: an axis of the input
pinned middle[2] 3: a kernel position
pinned middle[3] 3: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_transposed_convolution() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(F.conv2d(x, p.stem).relu(), p.up, p.bias, stride=2)
        return F.conv2d(y.relu(), p.head)

    assert_expected_inline(
        checked(
            net(forward, stem=(10, 3, 1, 1), up=(10, 7, 2, 2), bias=(7,), head=(4, 7, 1, 1)), IMAGE
        ),
        """\
conv_channel 10: stem[0] up[0]
conv_channel#2 7: up[1] bias[0] head[1]
pinned stem[1] 3: an axis of the input
pinned up[2] 2: a kernel position
pinned up[3] 2: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_concatenated_branches_and_a_gate() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        a = F.conv2d(x, p.a)
        y = torch.cat([a.relu(), F.conv2d(a, p.b)], 1)
        gate = F.conv2d(F.conv2d(y.mean((2, 3), keepdim=True), p.squeeze).relu(), p.excite)
        return F.conv2d(y * gate.sigmoid(), p.head)

    module = net(
        forward,
        a=(4, 3, 1, 1),
        b=(5, 4, 1, 1),
        squeeze=(3, 9, 1, 1),
        excite=(9, 3, 1, 1),
        head=(2, 9, 1, 1),
    )
    assert_expected_inline(
        checked(module, IMAGE),
        """\
conv_channel 4: a[0] b[1] squeeze[1] excite[0] head[1]
conv_channel#2 5: b[0] squeeze[1] excite[0] head[1]
conv_channel#3 3: squeeze[0] excite[1]
pinned a[1] 3: an axis of the input
pinned head[0] 2: an axis of the output
""",
    )


def test_shuffled_channels() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(x, p.stem)
        y = y.view(2, 2, 5, 8, 8).transpose(1, 2).reshape(2, 10, 8, 8)
        return F.conv2d(y, p.head)

    assert_expected_inline(
        checked(net(forward, stem=(10, 3, 1, 1), head=(4, 10, 1, 1)), IMAGE),
        """\
conv_channel 2: stem[0] head[1]
conv_channel#2 5: stem[0] head[1]
pinned stem[1] 3: an axis of the input
pinned head[0] 4: an axis of the output
""",
    )


def test_resampled_and_padded_images() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.interpolate(F.pad(F.conv2d(x, p.stem), (1, 1, 1, 1)), scale_factor=2.0)
        return F.conv2d(F.pixel_shuffle(y, 1).relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(10, 3, 1, 1), head=(4, 10, 1, 1)), IMAGE),
        """\
pinned stem[0] 10: mixed with positions
pinned stem[1] 3: an axis of the input
pinned head[0] 4: an axis of the output
pinned head[1] 10: mixed with positions
""",
    )


def test_windows_cut_out_and_put_back() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.unfold(F.conv2d(x, p.stem), 2, stride=2).view(2, 10, 4, 16)
        y = F.fold((y * p.gate[:, None, None]).view(2, 40, 16), (8, 8), 2, stride=2)
        return F.conv2d(y, p.head)

    module = net(forward, stem=(10, 3, 1, 1), gate=(10,), head=(4, 10, 1, 1))
    assert_expected_inline(
        checked(module, IMAGE),
        """\
conv_channel 10: stem[0] gate[0] head[1]
pinned stem[1] 3: an axis of the input
pinned head[0] 4: an axis of the output
""",
    )


def test_fourier_transforms_mix_the_axes_that_they_run_over() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = torch.fft.rfft(F.linear(x, p.up), dim=1).real
        return torch.fft.fft(F.linear(F.linear(y, p.mix), p.down)).imag

    assert_expected_inline(
        checked(net(forward, up=(10, 6), mix=(7, 10), down=(4, 7)), X),
        """\
ffn_channel 10: up[0] mix[1]
ffn_channel#2 7: mix[0] down[1]
pinned up[1] 6: an axis of the input
pinned down[0] 4: mixed by a Fourier transform
""",
    )


def test_a_recurrent_state_that_is_read_out() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        step, state = F.softplus(F.linear(x, p.dt)), -p.a.exp()
        inner, read, write = (F.linear(x, w) for w in (p.inner, p.read, p.write))
        memory = inner.new_zeros(2, 7, 3)
        outputs = []
        for t in range(5):
            decay = (step[:, t, :, None] * state).exp()
            memory = memory * decay + (step[:, t] * inner[:, t])[..., None] * write[:, t, None]
            outputs.append((memory * read[:, t, None]).sum(-1))
        return F.linear(torch.stack(outputs, 1), p.out)

    module = net(forward, dt=(7, 6), a=(7, 3), inner=(7, 6), read=(3, 6), write=(3, 6), out=(4, 7))
    assert_expected_inline(
        checked(module, X),
        """\
ffn_channel 7: dt[0] a[0] inner[0] out[1]
ffn_channel#2 3: a[1] read[0] write[0]
pinned dt[1] 6: an axis of the input
pinned inner[1] 6: an axis of the input
pinned read[1] 6: an axis of the input
pinned write[1] 6: an axis of the input
pinned out[0] 4: an axis of the output
""",
    )


def test_rows_that_differ_by_a_companion_that_itself_differs() -> None:
    """Widths by query head, query heads by group: three nested choices."""

    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up).view(2, 5, 3, 4, 5)
        y = y * p.outer[:, None, None] + y * p.middle[:, :, None] * p.inner
        return F.linear(y.reshape(2, 5, 60), p.down)

    module = net(forward, up=(60, 6), outer=(3,), middle=(3, 4), inner=(3, 4, 5), down=(4, 60))
    assert_expected_inline(
        checked(module, X),
        """\
ffn_channel 3: up[0] outer[0] middle[0] inner[0] down[1]
ffn_channel#2 4: up[0] middle[1] inner[1] down[1]
ffn_channel#3 5: up[0] inner[2] down[1]
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


# what has no rule


def test_an_operator_without_a_rule_pins_and_says_so() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        return F.linear(torch.linalg.matrix_exp(y.mT @ y)[:, :5], p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
pinned up[0] 10: no dim rule for aten.linalg_matrix_exp.default
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
pinned down[1] 10: no dim rule for aten.linalg_matrix_exp.default
""",
    )


def test_strict_makes_a_missing_rule_an_error() -> None:
    module = net(lambda p, x: torch.linalg.matrix_exp(x[:, :5, :5]) @ p.w, w=(5, 4))
    with pytest.raises(MissingRule, match=r"no dim rule for aten\.linalg_matrix_exp") as caught:
        couple(trace(module, X), strict=True)
    assert caught.value.where

"""Rules of products: linear layers, einsum, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from programs import assert_exact, checked, coupled, describe, inputs, net
from torch import Tensor

X = inputs(2, 5, 6)


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

"""Rules of indices and positions: tables, experts, order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from programs import checked, inputs, net
from torch import Tensor

X = inputs(2, 5, 6)


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

"""Rows that take the place of marked ones, as an image's features do among tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from programs import assert_exact, coupled, describe, inputs, net
from torch import Tensor

X = inputs(2, 5, 6)
SIZES = {"rows": (4, 10), "up": (10, 6), "down": (4, 10)}


def merged(p: object, x: Tensor, mask: Tensor) -> Tensor:
    return F.linear(F.linear(x, p.up).masked_scatter(mask, p.rows).tanh(), p.down)


def some(x: Tensor) -> Tensor:
    return torch.tensor([[True, False, False, True, False], [False, True, True, False, False]])


@pytest.mark.parametrize("wide", [False, True])
def test_the_units_of_rows_put_in_by_a_mask_go_together(wide: bool) -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        mask = some(x).unsqueeze(-1)
        return merged(p, x, mask.expand(2, 5, 10).clone() if wide else mask)

    coupling = coupled(net(forward, **SIZES), X)
    assert_exact(coupling)
    assert_expected_inline(
        describe(coupling),
        """\
ffn_channel 10: rows[1] up[0] down[1]
pinned rows[0] 4: chosen by a mask
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_a_mask_that_tells_units_apart_pins_them() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return merged(p, x, torch.arange(10).expand(2, 5, 10) % 3 == 1)

    coupling = coupled(net(forward, **SIZES), X)
    assert not coupling.groups
    assert "up[0] 10: chosen by a mask" in describe(coupling)

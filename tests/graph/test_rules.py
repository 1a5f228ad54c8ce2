"""What an operator without a rule does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from programs import checked, inputs, net
from torch import Tensor

from prunec.errors import MissingRule
from prunec.graph.coupling import couple
from prunec.graph.trace import trace

X = inputs(2, 5, 6)


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

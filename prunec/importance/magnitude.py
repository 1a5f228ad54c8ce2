"""Magnitude: units with small weights go first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from prunec.importance.curves import RemovalCurve
from prunec.importance.members import Aggregation, member_curve
from prunec.importance.problem import Axis, FloatArray, SiteProblem
from prunec.importance.scores import check_option, to_array

Norm = Literal["l2", "l1"]


@dataclass(frozen=True)
class Magnitude:
    """Score of a unit: the size of the weights that go with it.

    Per member the sum of squares (``l2``) or of absolute values (``l1``) of the unit's slice, so
    that scores of parts add up to the score of the whole; then aggregated over the members of the
    group as LLM-Pruner does (arXiv 2305.11627, METHODS 3.2). Its baseline is ``l2`` and ``sum``.

    Attributes:
        norm: ``l2`` or ``l1``.
        aggregation: Over members, see :mod:`prunec.importance.members`.
    """

    norm: Norm = "l2"
    aggregation: Aggregation = "sum"

    statistics: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_option("magnitude", "norm", self.norm, get_args(Norm))
        check_option("magnitude", "aggregation", self.aggregation, get_args(Aggregation))

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units by the size of their weights."""
        return member_curve(
            problem, lambda axis: self._salience(problem, axis), self.aggregation, limit=limit
        )

    def _salience(self, problem: SiteProblem, member: Axis) -> FloatArray:
        """Per position on the member's axis, the norm's power of everything at that position."""
        name, axis = member
        weight = problem.parameters[name].detach()
        others = [other for other in range(weight.ndim) if other != axis]
        # abs() keeps the model's dtype, so only the sum needs room in fp64.
        powered = weight.abs() if self.norm == "l1" else weight.double().square()
        summed = powered.sum(dim=others, dtype=torch.float64) if others else powered
        return to_array(summed)

"""Magnitude: units with small weights go first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prunec.errors import PlanError
from prunec.importance.curves import RemovalCurve, Survivors
from prunec.importance.problem import Axis, FloatArray, SiteProblem, UnitSet
from prunec.importance.scores import members, static_curve, to_array

Norm = Literal["l2", "l1"]
Aggregation = Literal["sum", "mean", "max", "prod", "first", "last"]

_FOLDS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "sum": lambda scores: scores.sum(axis=0),
    "mean": lambda scores: scores.mean(axis=0),
    "max": lambda scores: scores.max(axis=0),
    "prod": lambda scores: scores.prod(axis=0),
    "first": lambda scores: scores[0],
    "last": lambda scores: scores[-1],
}


@dataclass(frozen=True)
class Magnitude:
    """Score of a unit: the size of the weights that go with it.

    Per member the sum of squares (``l2``) or of absolute values (``l1``) of the unit's slice, so
    that scores of parts add up to the score of the whole; then aggregated over the members of the
    group as LLM-Pruner does (arXiv 2305.11627, METHODS 3.2). Its baseline is ``l2`` and ``sum``.

    Attributes:
        norm: ``l2`` or ``l1``.
        aggregation: ``sum``, ``mean``, ``max``, ``prod``, ``first`` or ``last`` member.
    """

    norm: Norm = "l2"
    aggregation: Aggregation = "sum"

    statistics: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("norm", self.norm, get_args(Norm)),
            ("aggregation", self.aggregation, get_args(Aggregation)),
        ):
            if value not in allowed:
                raise PlanError(
                    f"magnitude: {option} {value!r} is not possible",
                    fix=f"use {' or '.join(allowed)}",
                )

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units by the size of their weights."""
        salience = {axis: self._salience(problem, axis) for axis in members(problem)}
        fold = _FOLDS[self.aggregation]

        def score(unit_set: UnitSet, survivors: Survivors) -> FloatArray:
            return fold(
                np.stack(
                    [
                        np.where(survivors.positions[member], salience[member], 0.0)[index].sum(2)
                        for member, index in unit_set.positions.items()
                    ]
                )
            )

        return static_curve(problem, score, limit=limit)

    def _salience(self, problem: SiteProblem, member: Axis) -> FloatArray:
        """Per position on the member's axis, the norm's power of everything at that position."""
        name, axis = member
        weight = problem.parameters[name].detach()
        others = [other for other in range(weight.ndim) if other != axis]
        # abs() keeps the model's dtype, so only the sum needs room in fp64.
        powered = weight.abs() if self.norm == "l1" else weight.double().square()
        summed = powered.sum(dim=others, dtype=torch.float64) if others else powered
        return to_array(summed)

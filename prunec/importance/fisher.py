"""Fisher: the second-order loss of a unit, with the empirical Fisher information as curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from prunec.errors import PlanError
from prunec.importance.curves import RemovalCurve, Survivors
from prunec.importance.members import Aggregation, member_curve
from prunec.importance.problem import Axis, FloatArray, SiteProblem, UnitSet
from prunec.importance.scores import Scorer, check_option, static_curve, to_array
from prunec.importance.statistics import statistic_of

Of = Literal["weights", "masks"]


@dataclass(frozen=True)
class Fisher:
    """Score of a unit: half the curvature of the loss along its removal.

    ``weights``: ``1/2 sum_k f_k w_k^2`` over all weights that go, with f the mean over samples of
    the squared gradient of each sample's loss: optimal brain damage with the diagonal of the
    Fisher information. ``masks``: ``1/2 mean_n (sum_k w_k g_nk)^2`` over the weights that read the
    unit (where none sums over it, the last matrix that has it), the Fisher information of a mask
    on it (Kwon et al., arXiv 2204.09656), which knows that the weights of a unit go together.

    Attributes:
        of: ``weights`` or ``masks``.
        aggregation: Over members, with ``weights``; see :mod:`prunec.importance.members`.
    """

    of: Of = "weights"
    aggregation: Aggregation = "sum"

    def __post_init__(self) -> None:
        check_option("fisher", "of", self.of, get_args(Of))
        check_option("fisher", "aggregation", self.aggregation, get_args(Aggregation))
        if self.of == "masks":  # one number a unit: there is nothing to fold
            check_option("fisher of masks", "aggregation", self.aggregation, ("sum",))

    @property
    def statistics(self) -> frozenset[str]:
        """One number per position, or per sample and position."""
        return frozenset({"taylor_element2" if self.of == "weights" else "mask_grad"})

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units by the curvature of the loss along their removal."""
        if self.of == "masks":
            return static_curve(problem, _mask_scorer(problem, statistics), limit=limit)

        def salience(axis: Axis) -> FloatArray:
            return 0.5 * to_array(statistics[statistic_of("taylor_element2", *axis)])

        return member_curve(problem, salience, self.aggregation, limit=limit)


def _mask_scorer(problem: SiteProblem, statistics: Mapping[str, Tensor]) -> Scorer:
    reading = {unit_set.group: _reading(problem, unit_set) for unit_set in problem.unit_sets}
    dots = {
        axis: to_array(statistics[statistic_of("mask_grad", *axis)])
        for axes in reading.values()
        for axis in axes
    }

    def score(unit_set: UnitSet, survivors: Survivors) -> FloatArray:
        by_unit = [
            np.where(survivors.positions[axis], dots[axis], 0.0)[:, unit_set.positions[axis]].sum(3)
            for axis in reading[unit_set.group]
        ]
        return np.asarray(0.5 * np.square(np.sum(by_unit, axis=0)).mean(axis=0))

    return score


def _reading(problem: SiteProblem, unit_set: UnitSet) -> list[Axis]:
    """The weights that read the units; where none sums over them, the last matrix that has them.

    Raises:
        PlanError: there is none.
    """
    held = unit_set.positions
    matrices = [axis for axis in held if problem.parameters[axis[0]].ndim > 1]
    found = [axis for axis in problem.readers if axis in held] or matrices[-1:]
    if not found:
        raise PlanError(
            f"fisher of masks needs a weight that reads the units of {unit_set.group}",
            where=problem.name,
            fix="use importance.of=weights",
        )
    return found

"""Static scores: a number per unit that the removal of other units does not change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from prunec.errors import PlanError, VerifyError
from prunec.importance.curves import Removal, RemovalCurve, Survivors, greedy_curve
from prunec.importance.problem import FloatArray, IntArray, SiteProblem, UnitSet

Scorer = Callable[[UnitSet, Survivors], FloatArray]
"""Scores ``[C, U]`` of a group's units, counting only what survives at the site."""


def static_curve(problem: SiteProblem, scorer: Scorer, *, limit: int | None = None) -> RemovalCurve:
    """Remove units by score, least first; several groups compete by score per parameter.

    A step's loss is the sum of its units' scores. Where groups overlap (a head in a KV group) the
    scores are taken again after every step, as a unit is worth less once parts of it are gone.

    Raises:
        VerifyError: a score is NaN or infinite.
    """
    return greedy_curve(problem, _Ranking(problem, scorer), limit=limit)


def sum_columns(salience: FloatArray) -> Scorer:
    """Score a unit by the salience ``[columns]`` of the columns that it has left."""

    def score(unit_set: UnitSet, survivors: Survivors) -> FloatArray:
        left = np.where(survivors.columns, salience, 0.0)
        return np.asarray(left[unit_set.columns].sum(axis=2))

    return score


def to_array(values: Tensor) -> FloatArray:
    """A tensor as a float64 array on the CPU."""
    return np.asarray(values.detach().double().cpu().numpy(), dtype=np.float64)


def check_option(criterion: str, option: str, value: object, allowed: Sequence[str]) -> None:
    """Raises PlanError where an option of a criterion is none of the allowed ones."""
    if value not in allowed:
        raise PlanError(
            f"{criterion}: {option} {value!r} is not possible", fix=f"use {' or '.join(allowed)}"
        )


class _Ranking:
    """Proposes the units of least score from orders that are sorted once where nothing overlaps."""

    def __init__(self, problem: SiteProblem, scorer: Scorer) -> None:
        self._site = problem.name
        self._scorer = scorer
        self._overlap = len(problem.unit_sets) > 1
        self._scores: dict[str, FloatArray] = {}
        self._orders: dict[str, IntArray] = {}
        self._next: dict[str, int] = {}

    def propose(self, unit_set: UnitSet, survivors: Survivors) -> tuple[Removal, float]:
        group = unit_set.group
        if group not in self._orders:
            self._sort(unit_set, survivors)
        rows = survivors.open_rows(group)
        units = np.full(unit_set.rows, -1)
        units[rows] = self._orders[group][rows, self._next[group]]
        loss = float(self._scores[group][rows, units[rows]].sum())
        return Removal(group, tuple(units.tolist())), loss

    def accept(self, removal: Removal, survivors: Survivors) -> None:
        self._next[removal.group] += 1
        if self._overlap:
            self._orders.clear()

    def _sort(self, unit_set: UnitSet, survivors: Survivors) -> None:
        scores = self._scorer(unit_set, survivors)
        if not np.isfinite(scores).all():
            row, unit = np.argwhere(~np.isfinite(scores))[0].tolist()
            where = f"unit {unit}" if unit_set.rows == 1 else f"unit {unit} of row {row}"
            raise VerifyError(
                f"the score of {where} of {unit_set.group} is {scores[row, unit]}",
                where=self._site,
                fix="look for NaN or Inf in the weights and in the calibration activations",
            )
        group = unit_set.group
        left = np.where(survivors.kept[group], scores, np.inf)
        self._scores[group] = scores
        self._orders[group] = left.argsort(axis=1, kind="stable")
        self._next[group] = 0

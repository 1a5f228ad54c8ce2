"""Scores from the members of a group: the weights that are cut when a unit goes.

A member has a salience per position on its axis. The score of a unit adds up its positions in
every member, then folds the members into one number, as LLM-Pruner does (METHODS 3.2):

    sum, mean, max, prod    over all members
    first                   the member that comes first in the model: the first producer
    last                    the member that the site reads the units with: the paper's "Last-only"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from prunec.importance.curves import RemovalCurve, Survivors
from prunec.importance.problem import Axis, FloatArray, SiteProblem, UnitSet
from prunec.importance.scores import static_curve

Aggregation = Literal["sum", "mean", "max", "prod", "first", "last"]

_FOLDS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "sum": lambda scores: scores.sum(axis=0),
    "mean": lambda scores: scores.mean(axis=0),
    "max": lambda scores: scores.max(axis=0),
    "prod": lambda scores: scores.prod(axis=0),
}


def member_curve(
    problem: SiteProblem,
    salience: Callable[[Axis], FloatArray],
    aggregation: Aggregation,
    *,
    limit: int | None = None,
) -> RemovalCurve:
    """The static curve of scores that are aggregated over members.

    Args:
        salience: ``[positions]`` of a member; asked once a member.
    """
    chosen = {s.group: _chosen(problem, s, aggregation) for s in problem.unit_sets}
    saliences = {axis: salience(axis) for axes in chosen.values() for axis in dict.fromkeys(axes)}

    def score(unit_set: UnitSet, survivors: Survivors) -> FloatArray:
        parts = [
            np.where(survivors.positions[axis], saliences[axis], 0.0)[unit_set.positions[axis]]
            for axis in chosen[unit_set.group]
        ]
        summed = np.stack([part.sum(axis=2) for part in parts])
        return summed[0] if len(parts) == 1 else _FOLDS[aggregation](summed)

    return static_curve(problem, score, limit=limit)


def _chosen(problem: SiteProblem, unit_set: UnitSet, aggregation: Aggregation) -> list[Axis]:
    axes = list(unit_set.positions)
    if aggregation == "first":
        return [next((axis for axis in problem.producers if axis in axes), axes[0])]
    if aggregation == "last":
        return [next((axis for axis in reversed(problem.readers) if axis in axes), axes[-1])]
    return axes

"""Swap search: exchange a removed unit for a kept one where that loses less.

A greedy order never takes a removal back. After it, each removed unit is put back for trial and the
unit whose removal loses least goes instead: SlimLLM's greedy search (arXiv 2505.22689 Alg. 1,
METHODS 2.2) and, one unit at a time, OSSCAR's local search (arXiv 2403.12983, METHODS 4.2).
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np

from prunec.importance.curves import Removal, RemovalCurve
from prunec.importance.problem import FloatArray, IntArray, SiteProblem, UnitSet

# A smaller gain is rounding, and could be exchanged back and forth.
_GAIN = 1e-9


class Exchange(Protocol):
    """A site with some columns removed; values are never changed in place."""

    @property
    def loss(self) -> float:
        """Of what is removed now."""

    def restore(self, columns: IntArray) -> Self:
        """The state with these removed columns ``[width]`` back."""

    def losses_without(self, columns: IntArray) -> FloatArray:
        """``[N]``: the loss if these kept columns ``[N, width]`` of one unit each went too."""

    def drop(self, columns: IntArray) -> Self:
        """The state without these columns ``[width]``."""


def only_group(problem: SiteProblem, removals: tuple[Removal, ...]) -> UnitSet | None:
    """The one unit set that the removals take from; None where there are several, or none.

    What a swap would mean for groups that overlap is not defined in the papers.
    """
    groups = {removal.group for removal in removals}
    if len(groups) != 1:
        return None
    return next(s for s in problem.unit_sets if s.group in groups)


def swap_search(
    unit_set: UnitSet, removals: tuple[Removal, ...], state: Exchange
) -> tuple[Removal, ...]:
    """The same number of removals, after one pass of strictly improving swaps.

    Each removed unit is tried once, in the order of removal, against every kept unit of its row;
    the best swap is made. A unit that was swapped out is not tried again.
    """
    kept = np.ones(unit_set.columns.shape[:2], dtype=bool)
    taken = [list(removal.units) for removal in removals]
    for units in taken:
        kept[np.arange(unit_set.rows), units] = False
    for units in taken:
        for row, unit in enumerate(units):
            rivals = np.flatnonzero(kept[row])
            restored = state.restore(unit_set.columns[row, unit])
            losses = restored.losses_without(unit_set.columns[row, rivals])
            best = int(losses.argmin())
            if losses[best] < state.loss * (1 - _GAIN):
                rival = int(rivals[best])
                state = restored.drop(unit_set.columns[row, rival])
                kept[row, unit], kept[row, rival] = True, False
                units[row] = rival
    return tuple(Removal(unit_set.group, tuple(units)) for units in taken)


def steps_to(curve: RemovalCurve, limit: int | None) -> int:
    """The number of steps whose set is worth searching: where the curve will be cut.

    Without a limit there is no such set, so none.
    """
    return 0 if limit is None else curve.steps_for(limit)


def removed_columns(unit_set: UnitSet, removals: tuple[Removal, ...]) -> list[IntArray]:
    """Per removal its columns, unit after unit."""
    rows = np.arange(unit_set.rows)
    return [unit_set.columns[rows, list(removal.units)].ravel() for removal in removals]

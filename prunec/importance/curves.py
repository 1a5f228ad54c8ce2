"""Removal curves: in which order a site's units go, and what each step costs and frees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from prunec.errors import PlanError
from prunec.importance.problem import BoolArray, FloatArray, IntArray, SiteProblem, UnitSet


@dataclass(frozen=True)
class Removal:
    """One step of a curve: one unit of `group` goes under every companion index.

    Attributes:
        group: The group that loses a unit.
        units: Index of the unit per companion index, -1 where that companion went before.
    """

    group: str
    units: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """An order of removal of a site's units, and the totals after each step.

    Attributes:
        removals: The steps, in order.
        loss: ``[steps]`` float64, accumulated loss, in the criterion's own unit.
        parameters: ``[steps]`` int64, accumulated number of parameters removed.
    """

    removals: tuple[Removal, ...]
    loss: FloatArray
    parameters: IntArray

    def steps_for(self, parameters: int) -> int:
        """Number of steps that removes nearest to `parameters` parameters; of two, the fewer."""
        removed = np.concatenate(([0], self.parameters))
        return int(np.argmin(np.abs(removed - parameters)))

    def keep(self, problem: SiteProblem, steps: int) -> dict[str, BoolArray]:
        """Which units stay after the first `steps` steps.

        Returns:
            Per group ``[C, U]``; all False in the row of a companion that is gone.
        """
        if not 0 <= steps <= len(self.removals):
            raise PlanError(
                f"cannot take {steps} steps of removal",
                where=problem.name,
                fix=f"there are {len(self.removals)}",
            )
        survivors = Survivors(problem)
        for removal in self.removals[:steps]:
            survivors.remove(removal)
        return {group: kept.copy() for group, kept in survivors.kept.items()}


class Criterion(Protocol):
    """What an importance plug-in implements: a frozen dataclass whose fields are its options."""

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the statistics of the site's input that :meth:`rank` reads."""

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order the units of a site, the least important first.

        Args:
            problem: The site; nothing in it is changed.
            statistics: One tensor for each name in :attr:`statistics`.
            limit: Stop once this many parameters are removed (the last step may pass it);
                None goes on until every group is at its minimum.
        """


class Survivors:
    """The units, columns and positions of a site that are left while removals are applied.

    Attributes:
        kept: Per group, bool ``[C, U]``.
        counts: Per group, units left in each row whose companion is left.
        columns: bool ``[columns]`` of the site's weight.
        positions: Per member, bool over that axis of the parameter.
    """

    def __init__(self, problem: SiteProblem) -> None:
        self.kept = {s.group: np.ones(s.columns.shape[:2], dtype=bool) for s in problem.unit_sets}
        self.counts = {s.group: s.units for s in problem.unit_sets}
        self.columns = np.ones(problem.weight.shape[1], dtype=bool)
        self.positions = {
            (name, axis): np.ones(problem.parameters[name].shape[axis], dtype=bool)
            for s in problem.unit_sets
            for name, axis in s.positions
        }
        self._problem = problem
        self._sets = {s.group: s for s in problem.unit_sets}
        self._sizes: dict[tuple[int, ...], int] = {}
        self._full_size = self._size(self.counts)

    @property
    def removed(self) -> int:
        """Parameters removed so far."""
        return self._full_size - self._size(self.counts)

    def removable(self) -> list[UnitSet]:
        """The unit sets that are above their minimum."""
        return [s for s in self._problem.unit_sets if self.counts[s.group] > s.minimum]

    def open_rows(self, group: str) -> IntArray:
        """Companion indices that are left."""
        return np.flatnonzero(self.kept[group].any(axis=1))

    def cost(self, group: str) -> int:
        """Parameters that the next removal from `group` frees."""
        fewer = self.counts | {group: self.counts[group] - 1}
        cost = self._size(self.counts) - self._size(fewer)
        if cost <= 0:
            raise PlanError(
                f"removing a unit of {group} frees no parameters", where=self._problem.name
            )
        return cost

    def remove(self, removal: Removal) -> None:
        """Apply one step; the rows of other groups whose companion this was go with it."""
        unit_set = self._sets[removal.group]
        self.counts[removal.group] -= 1
        for row, unit in enumerate(removal.units):
            if unit < 0:
                continue
            self.kept[removal.group][row, unit] = False
            self.columns[unit_set.columns[row, unit]] = False
            for member, positions in unit_set.positions.items():
                self.positions[member][positions[row, unit]] = False
        for other in self._problem.unit_sets:
            # Minima keep every row non-empty, so a row without columns lost its companion.
            if other is not unit_set:
                self.kept[other.group][~self.columns[other.columns].any(axis=(1, 2))] = False

    def _size(self, counts: Mapping[str, int]) -> int:
        # The same counts are asked for when a step is weighed and when it is taken.
        key = tuple(counts.values())
        if key not in self._sizes:
            self._sizes[key] = self._problem.size(counts)
        return self._sizes[key]


class CurveBuilder:
    """Collects the steps of a curve while it is walked."""

    def __init__(self, problem: SiteProblem, limit: int | None) -> None:
        self.survivors = Survivors(problem)
        self._limit = limit
        self._removals: list[Removal] = []
        self._losses: list[float] = []
        self._parameters: list[int] = []

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._limit is not None and self.survivors.removed >= self._limit

    def add(self, removal: Removal, loss: float) -> None:
        """Take one step that adds `loss`."""
        self.survivors.remove(removal)
        self._removals.append(removal)
        self._losses.append(loss)
        self._parameters.append(self.survivors.removed)

    def curve(self) -> RemovalCurve:
        """The curve so far."""
        loss: npt.NDArray[np.float64] = np.cumsum(np.asarray(self._losses, dtype=np.float64))
        return RemovalCurve(
            tuple(self._removals), loss, np.asarray(self._parameters, dtype=np.int64)
        )


class Proposer(Protocol):
    """How a greedy criterion looks one step ahead."""

    def propose(self, unit_set: UnitSet, survivors: Survivors) -> tuple[Removal, float]:
        """The cheapest next removal from a unit set and the loss it adds."""

    def accept(self, removal: Removal, survivors: Survivors) -> None:
        """Take note that this proposal was carried out; `survivors` have it applied."""


def greedy_curve(problem: SiteProblem, proposer: Proposer, *, limit: int | None) -> RemovalCurve:
    """Remove, step by step, from the unit set whose cheapest removal loses least per parameter.

    Ties go to the unit set that comes first in the problem.
    """
    steps = CurveBuilder(problem, limit)
    while not steps.full and (candidates := steps.survivors.removable()):
        proposals = [proposer.propose(s, steps.survivors) for s in candidates]
        rates = [loss / steps.survivors.cost(removal.group) for removal, loss in proposals]
        removal, loss = proposals[int(np.argmin(rates))]
        steps.add(removal, loss)
        proposer.accept(removal, steps.survivors)
    return steps.curve()

"""Optimal brain surgeon: structured pruning by exact least-squares loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prunec.errors import PlanError
from prunec.importance.curves import (
    CurveBuilder,
    Removal,
    RemovalCurve,
    Survivors,
    greedy_curve,
)
from prunec.importance.elimination import BlockScore, Elimination
from prunec.importance.eliminations import Eliminations, begin
from prunec.importance.problem import FloatArray, IntArray, SiteProblem, UnitSet
from prunec.importance.scores import to_array
from prunec.importance.swap import only_group, removed_columns, steps_to, swap_search

Schedule = Literal["geometric", "slimgpt"]
_State = Elimination | Eliminations

# Below this many units (heads, experts) one at a time costs nothing.
_BATCHED_FROM = 256
# Of the surviving units, one in so many goes in a batch; see batch_sizes.
_FRACTION = 32


@dataclass(frozen=True)
class Obs:
    """Greedy removal by the exact block loss of the optimal brain surgeon, with compensation.

    SlimGPT (arXiv 2412.18110), METHODS 1.1-1.3. After each removal the surviving weights are the
    least-squares optimum and the inverse is down-dated, never recomputed, so the curve's loss is
    the true residual ``||W X - W' X||^2`` (in the scale of the Gram matrix, damping included)
    whatever the order was chosen by. One group of many units goes in batches, as SlimGPT's dynamic
    group size does; several groups at one site compete by loss per parameter.

    Attributes:
        score: What chooses the next unit, see :meth:`Elimination.block_scores`. We default to the
            exact loss; ``slimgpt`` is the paper's approximation of it.
        damping: Added to the diagonal of the Gram matrix, times its mean.
        first_batch: Most units that go in one batch.
        last_batch: Fewest units that go in one batch, but for the last.
        schedule: Sizes of the batches, see :func:`batch_sizes`.
        swap: After that, search for swaps that lower the loss of the set that the target leaves
            (OSSCAR, METHODS 4.2), where one group of the site loses units.
    """

    score: BlockScore = "exact"
    damping: float = 0.01
    first_batch: int = 1024
    last_batch: int = 8
    schedule: Schedule = "geometric"
    swap: bool = False

    statistics: ClassVar[frozenset[str]] = frozenset({"input_gram"})
    takes_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.score in get_args(BlockScore), f"score {self.score!r}", get_args(BlockScore))
        _check(
            self.schedule in get_args(Schedule), f"schedule {self.schedule!r}", get_args(Schedule)
        )
        _check(self.damping >= 0, f"damping {self.damping}", ("0 or more",))
        ordered = 1 <= self.last_batch <= self.first_batch
        _check(
            ordered,
            f"batches from {self.first_batch} to {self.last_batch}",
            ("first_batch >= last_batch >= 1",),
        )

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units by the least-squares loss of removing them.

        Raises:
            VerifyError: the Gram matrix or the weight is not finite.
        """
        state = begin(problem, statistics, self.damping)
        if len(problem.unit_sets) == 1 and problem.unit_sets[0].rows == 1:
            curve = self._batched(problem, state, limit)
        else:
            curve = greedy_curve(problem, _Surgeon(state, self.score), limit=limit)
        return _swapped(problem, state, curve, limit) if self.swap else curve

    @property
    def depends_on_limit(self) -> bool:
        """Whether the order of the first removals depends on how many follow."""
        return self.swap or self.schedule == "slimgpt"

    def _batched(self, problem: SiteProblem, state: _State, limit: int | None) -> RemovalCurve:
        """One group, one row: remove the units of least score, a batch at a time."""
        (unit_set,) = problem.unit_sets
        columns = torch.as_tensor(unit_set.columns[0], device=state.columns.device)
        alive = torch.arange(unit_set.units, device=columns.device)
        steps = CurveBuilder(problem, limit)
        wanted = _steps_to(problem, unit_set, limit)
        sizes = batch_sizes(
            unit_set.units,
            wanted,
            schedule=self.schedule,
            first=self.first_batch,
            last=self.last_batch,
        )
        for size in sizes:
            order = state.block_scores(columns[alive], self.score).argsort(stable=True)
            batch = alive[order[:size]]
            alive = alive[order[size:].sort().values]
            state, losses = state.eliminate(columns[batch].flatten())
            for unit, loss in zip(
                batch.tolist(), losses.view(size, -1).sum(dim=1).tolist(), strict=True
            ):
                steps.add(Removal(unit_set.group, (unit,)), loss)
        return steps.curve()


def batch_sizes(units: int, remove: int, *, schedule: Schedule, first: int, last: int) -> list[int]:
    """How many of `units` units go in each batch until `remove` are gone.

    ``geometric``: a fixed fraction of the survivors (1/32), so sizes fall geometrically, and the
    curve to a smaller target is the beginning of the curve to a larger one. Groups of fewer than
    256 units go one at a time.
    ``slimgpt``: the recurrence of SlimGPT's code (METHODS 1.2), which depends on the target; with
    ``last=64`` as published (its paper says 8).

    >>> batch_sizes(11008, 2202, schedule="slimgpt", first=1024, last=64)[:4]
    [845, 166, 64, 64]
    """
    sizes: list[int] = []
    left = remove
    group = (remove - 512) // 2
    while left > 0:
        if units < _BATCHED_FROM:
            size = 1
        elif schedule == "slimgpt":
            size = max(group, last)
            group = (group - 512) // 2
        else:
            size = max((units - (remove - left)) // _FRACTION, last)
        size = min(size, first, left)
        sizes.append(size)
        left -= size
    return sizes


class _Surgeon:
    """Looks one removal ahead by eliminating it for trial; an accepted trial becomes the state."""

    def __init__(self, state: _State, score: BlockScore) -> None:
        self._state = state
        self._score = score
        self._trials: dict[Removal, _State] = {}

    def propose(self, unit_set: UnitSet, survivors: Survivors) -> tuple[Removal, float]:
        """The unit of least score goes, then that of the next row given the first, and so on."""
        state = self._state
        device = state.columns.device
        units = np.full(unit_set.rows, -1)
        open_rows = survivors.open_rows(unit_set.group)
        kept = torch.as_tensor(survivors.kept[unit_set.group], device=device)
        columns = torch.as_tensor(unit_set.columns, device=device)
        closed = torch.ones(unit_set.rows, dtype=torch.bool, device=device)
        closed[torch.as_tensor(open_rows, device=device)] = False
        total = 0.0
        for _ in open_rows:
            candidates = (kept & ~closed[:, None]).nonzero()
            chosen = columns[candidates[:, 0], candidates[:, 1]]
            row, unit = candidates[state.block_scores(chosen, self._score).argmin()].tolist()
            state, losses = state.eliminate(_surviving(state, columns[row, unit]))
            total += float(losses.sum())
            units[row] = unit
            closed[row] = True
        removal = Removal(unit_set.group, tuple(units.tolist()))
        self._trials[removal] = state
        return removal, total

    def accept(self, removal: Removal, survivors: Survivors) -> None:
        self._state = self._trials[removal]
        self._trials.clear()


@dataclass(frozen=True)
class _Trial:
    """A state of elimination as an exchange of units."""

    state: _State
    loss: float

    def restore(self, columns: IntArray) -> _Trial:
        state, gain = self.state.restore(torch.as_tensor(columns, device=self.state.columns.device))
        return _Trial(state, self.loss - gain)

    def losses_without(self, columns: IntArray) -> FloatArray:
        units = torch.as_tensor(columns, device=self.state.columns.device)
        return self.loss + to_array(self.state.block_scores(units))

    def drop(self, columns: IntArray) -> _Trial:
        gone = torch.as_tensor(columns, device=self.state.columns.device)
        state, losses = self.state.eliminate(gone)
        return _Trial(state, self.loss + float(losses.sum()))


def _swapped(
    problem: SiteProblem, start: _State, curve: RemovalCurve, limit: int | None
) -> RemovalCurve:
    """The curve up to its limit, with a set of removals that no single swap improves on."""
    steps = steps_to(curve, limit)
    unit_set = only_group(problem, curve.removals[:steps])
    if unit_set is None:
        return curve
    trial = _Trial(start, 0.0).drop(
        np.concatenate(removed_columns(unit_set, curve.removals[:steps]))
    )
    swapped = swap_search(unit_set, curve.removals[:steps], trial)
    columns = np.stack(removed_columns(unit_set, swapped))
    _, losses = start.eliminate(torch.as_tensor(columns.ravel(), device=start.columns.device))
    by_step = to_array(losses).reshape(columns.shape).sum(axis=1)
    return RemovalCurve(swapped, by_step.cumsum(), curve.parameters[:steps])


def _surviving(state: _State, columns: Tensor) -> Tensor:
    return columns[state.locate(columns) >= 0]


def _steps_to(problem: SiteProblem, unit_set: UnitSet, limit: int | None) -> int:
    """Fewest units of a site's only group whose removal reaches the limit."""
    most = unit_set.units - unit_set.minimum
    if limit is None:
        return most
    full = problem.size({unit_set.group: unit_set.units})

    def freed(units: int) -> int:
        return full - problem.size({unit_set.group: unit_set.units - units})

    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if freed(middle) >= limit else (middle + 1, high)
    return low


def _check(valid: bool, what: str, allowed: tuple[str, ...]) -> None:
    if not valid:
        raise PlanError(f"obs: {what} is not possible", fix=f"use {' or '.join(allowed)}")

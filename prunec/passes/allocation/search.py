"""Search: the allocation that loses least, judged on held-out data by pruning for trial."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import inf
from typing import ClassVar, Literal, get_args

import numpy as np

from prunec.errors import PlanError
from prunec.passes.allocation.context import Context
from prunec.passes.allocation.evolution import Pool, Shares, evolve
from prunec.passes.allocation.space import Space
from prunec.passes.allocation.uniform import LogIncrease
from prunec.passes.distributed import processes
from prunec.passes.targets.room import Room

logger = logging.getLogger(__name__)

Effort = Literal["fast", "normal", "max"]


@dataclass(frozen=True)
class _Extent:
    """How much an effort does: trials by re-pruning, generations of children on the database."""

    trials: int
    generations: int
    children: int


_EXTENTS: Mapping[Effort, _Extent] = {
    "fast": _Extent(trials=4, generations=0, children=0),
    "normal": _Extent(trials=32, generations=4, children=6),
    "max": _Extent(trials=80, generations=24, children=12),
}
# Parts of its share that a kind of site is left with, one after the other as long as it helps.
_PARTS = (0.5, 0.25, 0.0)
# Logarithms of the factors that waves over depth begin and end with.
_LARGEST_WAVE, _SMALLEST_WAVE = 0.4, 0.05
# Parts of its features that the residual stream keeps, one after the other as long as it helps.
_STREAM_PARTS = (31 / 32, 15 / 16, 7 / 8, 3 / 4)
# The level database, and what it is tried for, cost about as much time as so many trials.
_DATABASE_TRIALS = 12


@dataclass(frozen=True)
class Search:
    """Shares found by dynamic programming and evolution, and judged by pruning for trial.

    Candidates, each pruned on one part of the calibration batches, site after site on what the
    pruned part before it gives, and judged on another part by ``KL(dense || pruned)``:

    1. log-increase over the blocks with one kind of site (the attention layers, the FFN layers)
       giving a half of its share, log-increase as it is, and, for as long as less is better, a
       quarter, nothing: separate budgets;
    2. waves over depth, kind by kind, on the best so far: slopes, then bends, in both directions
       (pattern search of Hooke and Jeeves, 1961);
    3. the optimum of a level database (ZipLM, arXiv 2302.04089): each site of the dense model at
       `levels` sizes, the loss of each level calibrated by the divergence that the site alone
       causes at one of them, minimised by dynamic programming within the kinds' best budgets; and
       what an evolution of levels on the divergence of the stitched database finds from there
       (EvoPress, arXiv 2410.14649; Tyr, arXiv 2503.09657). Both predict optimistically (each level
       knows the dense model only), so they are tried half-way to the best as well as whole;
    4. waves again, of half the size each time that none helps.

    With `hidden`, before 4: a narrower residual stream, see :func:`narrow`.

    The best by trial is returned, and log-increase is tried second: where there is time for two
    trials, the result is never worse than it on the held-out part.

    A branch (the attention or the FFN of a block) that is left out whole is one more level of its
    site, where the graph shows it to be one.

    Attributes:
        effort: How many candidates: fast tries 4 and builds no database.
        minutes: Bounds the search and the pruning after it, of which the first trial tells what it
            will take here: no trial begins that would probably end too late for both. None for no
            bound. With a bound the result depends on the speed of the machine.
        fit_tokens, held_tokens: About how many calibration tokens a trial prunes and is judged on.
        levels: Sizes per site in the database.
        depth: Whether branches may be left out.
        hidden: Whether the residual stream may lose features, those of the smallest weights.
        seed: Of everything drawn.
    """

    effort: Effort = "normal"
    minutes: float | None = None
    fit_tokens: int = 8192
    held_tokens: int = 8192
    levels: int = 9
    depth: bool = True
    hidden: bool = False
    seed: int = 0

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.effort not in get_args(Effort):
            raise PlanError(
                f"search: effort {self.effort!r} is not possible",
                fix=f"use {', '.join(get_args(Effort))}",
            )
        if self.minutes is not None and not self.minutes > 0:
            raise PlanError(
                f"search: minutes {self.minutes!r} are not possible", fix="use more than 0"
            )
        if min(self.fit_tokens, self.held_tokens) < 1 or self.levels < 2:
            raise PlanError("search: token counts of at least 1 and 2 levels are needed")
        if self.seed < 0:
            raise PlanError(f"search: seed {self.seed} is not possible", fix="use 0 or more")

    def shares(self, context: Context) -> Mapping[str, float]:
        """The best shares that were tried.

        Raises:
            PlanError: the stream is to be narrowed beside biases that the model lacks.
        """
        if self.hidden and context.narrower is None:
            raise PlanError(
                "search: the stream cannot be narrowed beside biases that the model lacks",
                fix="use compensation=obs, or compensation.bias=false",
            )
        end = inf if self.minutes is None else time.monotonic() + 60 * self.minutes
        trials = context.seen("search").trials(
            fit_tokens=self.fit_tokens,
            held_tokens=self.held_tokens,
            levels=self.levels,
            branches={r.site: r.branch for r in context.rooms if r.branch and self.depth},
            seed=self.seed,
        )
        space = Space(context, trials)
        extent = _EXTENTS[self.effort]

        def left() -> float:
            return end - time.monotonic() - trials.final_seconds

        with trials.progress.task("pruning for trial", extent.trials) as task:

            def trial(shares: Shares) -> float:
                divergence = trials.repruned(context.budget(shares))
                task.advance()
                return divergence

            pool = Pool(trial, extent.trials, left)
            spare(pool, space, LogIncrease().shares(context))
            bend(pool, space, smallest=_LARGEST_WAVE)
            if extent.generations and pool.open and pool.affords(_DATABASE_TRIALS):
                base = pool.best
                for found in self._predicted(space, base, extent, pool):
                    pool.try_(space.blend(base, found, 0.5))
                    pool.try_(found)
            if self.hidden:
                space = narrow(pool, space)
            bend(pool, space)
        return pool.best

    def _predicted(
        self, space: Space, base: Shares, extent: _Extent, pool: Pool
    ) -> list[dict[str, float]]:
        """What the level database takes for best: within the budgets of `base`, and evolved."""
        losses = space.calibrated(base)
        genes = space.optimum(losses, base)
        found = [space.shares_of(genes)]
        generator = np.random.default_rng(self.seed)
        with space.trials.progress.task("evolution of levels", extent.generations) as task:
            evolved = evolve(
                [space.nearest(base), genes],
                mutate=lambda genes: space.mutated(genes, generator),
                score=space.score,
                generations=extent.generations,
                children=extent.children,
                expired=lambda: not pool.affords(4),
                on_generation=task.advance,
            )
        found.append(space.shares_of(evolved))
        return processes().agreed(lambda: found)


def spare(pool: Pool, space: Space, start: Shares) -> None:
    """Try `start`, and what comes of it when a kind of site gives less of it and the others more.

    That the kind which holds least, in most models attention, gives half comes first: of the
    guesses that need no trial it was the best (docs/auto.md), so that no time for a second one
    does not mean no gain.
    """
    rooms = space.context.rooms
    least, *others = kinds_of(rooms)

    def tries(kind: Kind, parts: Iterable[float]) -> Iterator[dict[str, float]]:
        return (space.scaled(scaled_kind(start, rooms, kind, part)) for part in parts)

    if others:
        pool.try_(next(tries(least, _PARTS)))
    if not pool.try_(start):
        list(takewhile(pool.try_, tries(least, _PARTS[1:])))
        return
    for kind in others:
        if list(takewhile(pool.try_, tries(kind, _PARTS))):
            return


def narrow(pool: Pool, space: Space) -> Space:
    """Let the residual stream lose features, for as long as that helps; the space of the best."""
    dense = space.context
    assert dense.narrower, "a context without a run"
    for part in _STREAM_PARTS:
        try:
            narrower = Space(dense.narrower(part), space.trials, part)
        except PlanError as error:
            logger.info("%s", error)
            break
        if not pool.try_(narrower.scaled(pool.best)):
            break
        space = narrower
    return space


def bend(pool: Pool, space: Space, smallest: float = _SMALLEST_WAVE) -> None:
    """Pattern search along waves over depth, from the best of the pool, until it closes.

    Args:
        smallest: where no wave helps, their size is halved down to this.
    """
    rooms = space.context.rooms
    directions = list(waves(rooms))
    signs = dict.fromkeys(directions, 1.0)
    step = _LARGEST_WAVE
    while pool.open and step >= smallest:
        better = False
        for direction in directions:
            for sign in (signs[direction], -signs[direction]):
                change = waved(pool.best, rooms, *direction, sign * step)
                if pool.try_(space.scaled(change)):
                    better, signs[direction] = True, sign
                    break
        if not better:
            step /= 2


Kind = tuple[str, ...]


def kinds_of(rooms: Sequence[Room]) -> list[Kind]:
    """The kinds of site, those that hold less first."""
    held: dict[Kind, int] = {}
    for room in rooms:
        held[room.kinds] = held.get(room.kinds, 0) + room.parameters
    return sorted(held, key=held.__getitem__)


def scaled_kind(shares: Shares, rooms: Sequence[Room], kind: Kind, part: float) -> dict[str, float]:
    """These shares, those of one kind times `part`."""
    return {r.site: shares[r.site] * (part if r.kinds == kind else 1.0) for r in rooms}


def waves(rooms: Sequence[Room]) -> Iterator[tuple[Kind, int]]:
    """Directions of change: a kind and a number of half-waves over depth, 0 being all alike."""
    kinds = kinds_of(rooms)
    for number in (1, 2, 0, 3):
        # One kind alike in all layers is the others the other way round.
        yield from ((kind, number) for kind in reversed(kinds if number else kinds[:-1]))


def waved(
    shares: Shares, rooms: Sequence[Room], kind: Kind, number: int, size: float
) -> dict[str, float]:
    """Shares of a kind times ``exp(size cos(pi number depth))``, depth going from 0 to 1.

    Branches that are left out stay so.
    """
    inside = [room for room in rooms if room.kinds == kind]
    depth = (np.arange(len(inside)) + 0.5) / len(inside)
    factors = np.exp(size * np.cos(np.pi * number * depth))
    changed = {
        room.site: shares[room.site] * float(factor)
        for room, factor in zip(inside, factors, strict=True)
        if not room.left_out(shares[room.site])
    }
    return {**shares, **changed}

"""Search: the allocation that loses least, judged on held-out data by pruning for trial."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import numpy as np

from prunec.errors import PlanError
from prunec.importance.problem import FloatArray
from prunec.passes.allocation.context import Context, Room, Trials
from prunec.passes.allocation.evolution import Genes, Pool, Shares, evolve
from prunec.passes.allocation.levels import cheapest_levels
from prunec.passes.allocation.uniform import LogIncrease

Effort = Literal["fast", "normal", "max"]


@dataclass(frozen=True)
class _Extent:
    """How much an effort does: trials by re-pruning, generations of children on the database."""

    trials: int
    generations: int
    children: int


_EXTENTS: Mapping[Effort, _Extent] = {
    "fast": _Extent(trials=4, generations=0, children=0),
    "normal": _Extent(trials=12, generations=6, children=8),
    "max": _Extent(trials=40, generations=24, children=12),
}
# Parts of the removed cost are counted in this many steps by the dynamic programme.
_RESOLUTION = 1000


@dataclass(frozen=True)
class Search:
    """Shares found by dynamic programming and evolution, and judged by pruning for trial.

    Candidates, each pruned on one part of the calibration batches, site after site on what the
    pruned part before it gives, and judged on another part by ``KL(dense || pruned)``:

    1. log-increase over the blocks, and the same with the attention layers, or the FFN layers
       (each kind of site), spared by a half or wholly: separate budgets;
    2. the optimum of a level database (ZipLM, arXiv 2302.04089): each site of the dense model at
       `levels` sizes, the loss of each level calibrated by the divergence that the site alone
       causes at one of them, minimised by dynamic programming within the best budgets of 1 and over
       all sites together;
    3. what an evolution of levels on the divergence of the stitched database finds from there
       (EvoPress, arXiv 2410.14649; Tyr, arXiv 2503.09657);
    4. smooth random changes of the best so far.

    2 and 3 predict optimistically (each level knows the dense model only), so they are tried
    half-way to the best of 1 as well as whole. The best by trial is returned, and log-increase is
    always tried: the result is never worse than it, on the held-out part.

    Attributes:
        effort: How many candidates: fast tries step 1 only.
        minutes: No trial begins that would probably end later than this after the start; None for
            no bound. With a bound the result depends on the speed of the machine.
        fit_tokens, held_tokens: About how many calibration tokens a trial prunes and is judged on.
        levels: Sizes per site in the database.
        seed: Of everything drawn.
    """

    effort: Effort = "normal"
    minutes: float | None = None
    fit_tokens: int = 16384
    held_tokens: int = 8192
    levels: int = 9
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

    def shares(self, context: Context) -> Mapping[str, float]:
        """The best shares that were tried."""
        deadline = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        trials = context.seen("search").trials(
            fit_tokens=self.fit_tokens,
            held_tokens=self.held_tokens,
            levels=self.levels,
            seed=self.seed,
        )
        space = _Space(context, trials)
        extent = _EXTENTS[self.effort]
        with trials.progress.task("pruning for trial", extent.trials) as task:

            def trial(shares: Shares) -> float:
                divergence = trials.repruned(context.budget(shares))
                task.advance()
                return divergence

            pool = Pool(trial, extent.trials, deadline)
            for candidate in spared(LogIncrease().shares(context), context.rooms):
                pool.try_(space.scaled(candidate))
            base = pool.best
            if extent.generations and pool.open:
                for found in self._predicted(space, base, extent, deadline):
                    pool.try_(space.blend(base, found, 0.5))
                    pool.try_(found)
            generator = np.random.default_rng(self.seed)
            while self.effort != "fast" and pool.open:
                pool.try_(space.scaled(perturbed(pool.best, context.rooms, generator)))
        return pool.best

    def _predicted(
        self, space: _Space, base: Shares, extent: _Extent, deadline: float | None
    ) -> list[Shares]:
        """What the level database takes for best: within the budgets of `base`, and evolved."""
        losses = space.calibrated(base)
        genes = space.optimum(losses, base)
        found = [space.shares_of(genes)]
        generator = np.random.default_rng(self.seed)
        half = None if deadline is None else (time.monotonic() + deadline) / 2
        with space.trials.progress.task("evolution of levels", extent.generations) as task:
            evolved = evolve(
                [space.nearest(base), genes],
                mutate=lambda genes: space.mutated(genes, generator),
                score=space.score,
                generations=extent.generations,
                children=extent.children,
                expired=lambda: half is not None and time.monotonic() > half,
                on_generation=task.advance,
            )
        return [*found, space.shares_of(evolved)]


def spared(shares: Shares, rooms: Sequence[Room]) -> list[dict[str, float]]:
    """These shares, and for each kind of site the same with its share halved, and nothing.

    What one kind does not give the others are to give, see `_Space.scaled`.
    """
    kinds = list(dict.fromkeys(room.kinds for room in rooms))
    found = [dict(shares)]
    if len(kinds) > 1:
        for kind in kinds:
            for part in (0.5, 0.0):
                found.append(
                    {r.site: shares[r.site] * (part if r.kinds == kind else 1.0) for r in rooms}
                )
    return found


def perturbed(
    shares: Shares, rooms: Sequence[Room], generator: np.random.Generator
) -> dict[str, float]:
    """Shares with a smooth random factor over depth, one for each kind of site.

    The logarithm of the factor is a random walk's lowest three cosines, of standard deviation 0.15.
    """
    result = dict(shares)
    for kind in dict.fromkeys(room.kinds for room in rooms):
        inside = [room.site for room in rooms if room.kinds == kind]
        depth = (np.arange(len(inside)) + 0.5) / len(inside)
        waves = np.stack([np.cos(np.pi * k * depth) for k in range(3)])
        change = generator.normal(0, 0.15, 3) @ waves
        for site, factor in zip(inside, np.exp(change), strict=True):
            result[site] *= float(factor)
    return result


@dataclass(frozen=True)
class _Space:
    """The level database of one search, and the arithmetic of levels and shares."""

    context: Context
    trials: Trials
    need: float = field(init=False)

    def __post_init__(self) -> None:
        total = self.context.target * sum(self.context.blocks.values())
        object.__setattr__(self, "need", total)

    def scaled(self, shares: Shares) -> dict[str, float]:
        """Shares that add up to the target, none above what its site can give."""
        result = {room.site: max(0.0, shares[room.site]) for room in self.context.rooms}
        most = {room.site: float(room.most) for room in self.context.rooms}
        for _ in range(len(result)):
            free = {site for site, share in result.items() if 0 < share < most[site]}
            taken = sum(share for site, share in result.items() if site not in free)
            given = sum(result[site] for site in free)
            if not free or given <= 0:
                break
            factor = max(0.0, (self.need - taken) / given)
            result = {
                site: min(share * factor, most[site]) if site in free else share
                for site, share in result.items()
            }
            if abs(sum(result.values()) - self.need) < 1:
                return result
        # Those that were spared have to help out.
        missing = self.need - sum(result.values())
        room_left = sum(most[site] - share for site, share in result.items())
        part = min(1.0, max(0.0, missing / room_left)) if room_left > 0 else 0.0
        return {site: share + part * (most[site] - share) for site, share in result.items()}

    def blend(self, base: Shares, found: Shares, part: float) -> dict[str, float]:
        """``part`` of the way from `base` to `found`."""
        return self.scaled({s: (1 - part) * base[s] + part * found[s] for s in base})

    def nearest(self, shares: Shares) -> Genes:
        """The levels nearest to shares."""
        return tuple(
            int(np.argmin(np.abs(self.trials.levels[room.site].removed - shares[room.site])))
            for room in self.context.rooms
        )

    def shares_of(self, genes: Genes) -> dict[str, float]:
        """What levels remove, scaled to the target."""
        return self.scaled(
            {
                room.site: float(self.trials.levels[room.site].removed[level])
                for room, level in zip(self.context.rooms, genes, strict=True)
            }
        )

    def score(self, genes: Genes, generation: int) -> float:
        """Divergence of the stitched levels on one held-out batch, another each generation."""
        chosen = {r.site: g for r, g in zip(self.context.rooms, genes, strict=True)}
        return self.trials.stitched(chosen, [generation % self.trials.parts])

    def calibrated(self, base: Shares) -> list[FloatArray]:
        """The loss of every level, in nats.

        A site's curve is scaled to the divergence that the site alone causes at the level nearest
        to its share in `base`.
        """
        losses = []
        with self.trials.progress.task("each site alone", len(self.context.rooms)) as task:
            for room, near in zip(self.context.rooms, self.nearest(base), strict=True):
                levels = self.trials.levels[room.site]
                level = min(max(near, 1), len(levels.loss) - 1)
                alone = self.trials.stitched({room.site: level}, [0])
                scale = alone / levels.loss[level] if levels.loss[level] > 0 else 0.0
                losses.append(levels.loss * max(scale, 0.0))
                task.advance()
        return losses

    def optimum(self, losses: Sequence[FloatArray], base: Shares) -> Genes:
        """Least calibrated loss within the budget that `base` gives each kind of site."""
        rooms = self.context.rooms
        genes = [0] * len(rooms)
        for kind in dict.fromkeys(room.kinds for room in rooms):
            inside = [i for i, room in enumerate(rooms) if room.kinds == kind]
            need = sum(base[rooms[i].site] for i in inside)
            unit = max(need / _RESOLUTION, 1.0)
            costs = [
                np.floor(
                    np.minimum(self.trials.levels[rooms[i].site].removed, rooms[i].most) / unit
                ).astype(np.int64)
                for i in inside
            ]
            most = sum(int(cost.max()) for cost in costs)
            found = cheapest_levels([losses[i] for i in inside], costs, min(int(need / unit), most))
            for i, level in zip(inside, found, strict=True):
                genes[i] = level
        return tuple(genes)

    def mutated(self, genes: Genes, generator: np.random.Generator) -> Genes:
        """One site gives a level more; others, mostly of its kind, less until the total is met."""
        rooms, levels = self.context.rooms, self.trials.levels
        child = list(genes)
        wanted = self._removed(genes)
        up = int(generator.integers(len(rooms)))
        child[up] = min(child[up] + 1, len(levels[rooms[up].site].removed) - 1)
        for _ in range(4 * len(rooms)):
            excess = self._removed(child) - wanted
            down = int(generator.integers(len(rooms)))
            stays_in_kind = rooms[down].kinds == rooms[up].kinds or generator.random() < 0.2
            if excess <= 0:
                break
            if down == up or not child[down] or not stays_in_kind:
                continue
            removed = levels[rooms[down].site].removed
            if removed[child[down]] - removed[child[down] - 1] <= 2 * excess:
                child[down] -= 1
        return tuple(child)

    def _removed(self, genes: Sequence[int]) -> int:
        rooms, levels = self.context.rooms, self.trials.levels
        return sum(int(levels[r.site].removed[g]) for r, g in zip(rooms, genes, strict=True))

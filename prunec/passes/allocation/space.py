"""The space of a search: shares of sites, levels of the database, and the way between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from prunec.importance.problem import FloatArray, IntArray
from prunec.passes.allocation.context import Context, Trials
from prunec.passes.allocation.evolution import Genes, Shares
from prunec.passes.allocation.levels import cheapest_levels
from prunec.passes.channels import HIDDEN
from prunec.passes.targets.room import Room

# Parts of the removed cost are counted in this many steps by the dynamic programme.
_RESOLUTION = 1000


@dataclass(frozen=True)
class Space:
    """The level database of one search, and the arithmetic of levels and shares."""

    context: Context
    trials: Trials
    hidden: float | None = None
    need: float = field(init=False)

    def __post_init__(self) -> None:
        total = self.context.target * sum(self.context.blocks.values())
        object.__setattr__(self, "need", total)

    def scaled(self, shares: Shares) -> dict[str, float]:
        """Shares that add up to the target, none above what its site can give.

        Branches that are left out stay so.
        """
        rooms = self.context.rooms
        result = {room.site: max(0.0, shares[room.site]) for room in rooms}
        most = {
            room.site: float(room.branch if room.left_out(result[room.site]) else room.most)
            for room in rooms
        }
        result = {site: min(share, most[site]) for site, share in result.items()}
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
                return self._named(result)
        # Those that were spared have to help out.
        missing = self.need - sum(result.values())
        room_left = sum(most[site] - share for site, share in result.items())
        part = min(1.0, max(0.0, missing / room_left)) if room_left > 0 else 0.0
        return self._named(
            {site: share + part * (most[site] - share) for site, share in result.items()}
        )

    def _named(self, shares: dict[str, float]) -> dict[str, float]:
        return shares if self.hidden is None else {**shares, HIDDEN: self.hidden}

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
            costs = [np.floor(self._given(rooms[i]) / unit).astype(np.int64) for i in inside]
            most = sum(int(cost.max()) for cost in costs)
            found = cheapest_levels([losses[i] for i in inside], costs, min(int(need / unit), most))
            for i, level in zip(inside, found, strict=True):
                genes[i] = level
        return tuple(genes)

    def _given(self, room: Room) -> IntArray:
        """What each level of a site removes, no more than the site can give."""
        removed = self.trials.levels[room.site].removed
        left_out = (removed == room.branch) & (room.branch > 0)
        return np.where(left_out, removed, np.minimum(removed, room.most))

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

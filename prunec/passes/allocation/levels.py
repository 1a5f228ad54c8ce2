"""The level database: each site of the dense model pruned to a few sizes, ready to be combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from prunec.graph.coupling import CouplingGraph
from prunec.graph.dims import Dim
from prunec.graph.selection import Keep
from prunec.importance.curves import RemovalCurve
from prunec.importance.problem import FloatArray, IntArray
from prunec.passes.slice import Weights

LEFT_OUT = -1
"""In place of a number of steps: the site's whole branch goes."""


@dataclass(frozen=True, eq=False)
class Levels:
    """What one site can give, from nothing to all that it can.

    Attributes:
        removed: int ``[levels]``, parameters removed; the first is 0; where the site's branch can
            be left out, the last is what the branch holds.
        loss: ``[levels]``, the criterion's accumulated loss.
        steps: int ``[levels]``, the number of steps along the site's removal curve; `LEFT_OUT`.
    """

    removed: IntArray
    loss: FloatArray
    steps: IntArray

    @classmethod
    def of(cls, curve: RemovalCurve, held: int, count: int) -> Levels:
        """About `count` points of a curve, evenly spaced over the `held` parameters."""
        removed = np.concatenate(([0], curve.parameters))
        loss = np.concatenate(([0.0], curve.loss))
        wanted = np.linspace(0, min(held, int(removed[-1])), count)
        steps = np.unique([int(np.argmin(np.abs(removed - want))) for want in wanted])
        return cls(removed[steps], np.maximum.accumulate(loss[steps]), steps)

    def and_left_out(self, branch: int, energy: float) -> Levels:
        """With one more level, that leaves a branch out: all the `energy` of its output is lost."""
        return Levels(
            np.append(self.removed, branch),
            np.append(self.loss, max(energy, self.loss[-1])),
            np.append(self.steps, LEFT_OUT),
        )


@dataclass(frozen=True, eq=False)
class Cut:
    """One site at one level: the masks of its groups, and its mended weight."""

    keeps: Mapping[Dim, Keep]
    updated: Mapping[str, Tensor]


def stitch(coupling: CouplingGraph, cuts: Sequence[Cut]) -> Weights:
    """The dense model with these sites replaced; no site knows what was done to another."""
    weights = Weights(coupling)
    for cut in cuts:
        weights.select(weights.selection.with_keeps(cut.keeps), cut.updated)
    return weights


def cheapest_levels(
    losses: Sequence[FloatArray], costs: Sequence[IntArray], need: int
) -> list[int]:
    """One level per site of least total loss, among those whose costs add up to `need` or more.

    Exact, by dynamic programming over the cost removed so far (everything beyond `need` counts as
    `need`): time sites x levels x need. Ties go to the lower level at the earlier site.

    >>> cheapest_levels([np.array([0.0, 1, 5])] * 2, [np.array([0, 2, 4])] * 2, 4)
    [1, 1]

    Raises:
        ValueError: all of it is not enough.
    """
    best = np.full(need + 1, np.inf)
    best[0] = 0.0
    chosen: list[tuple[IntArray, IntArray]] = []  # per site: level, and the state it came from
    for loss, cost in zip(losses, costs, strict=True):
        reached = np.full(need + 1, np.inf)
        level = np.zeros(need + 1, dtype=np.int64)
        source = np.zeros(need + 1, dtype=np.int64)
        for index in range(len(cost)):
            step = int(cost[index])
            totals = best + loss[index]
            for start, end in ((0, max(need - step, 0)), (max(need - step, 0), need + 1)):
                states = np.arange(start, end)
                if not len(states):
                    continue
                if end <= max(need - step, 0):
                    goal, value, came = states + step, totals[start:end], states
                else:
                    nearest = start + int(np.argmin(totals[start:end]))
                    goal, came = np.array([need]), np.array([nearest])
                    value = totals[came]
                better = value < reached[goal]
                reached[goal[better]] = value[better]
                level[goal[better]] = index
                source[goal[better]] = came[better]
        chosen.append((level, source))
        best = reached
    if not np.isfinite(best[need]):
        raise ValueError(f"the levels do not add up to {need}")
    result: list[int] = []
    state = need
    for level, source in reversed(chosen):
        result.append(int(level[state]))
        state = int(source[state])
    return result[::-1]

"""Search by trial: a pool that remembers the best, and an evolution of levels."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf

import numpy as np

from prunec.errors import PlanError
from prunec.passes.distributed import processes

logger = logging.getLogger(__name__)

Shares = Mapping[str, float]
"""Parameters asked of each site, by name."""

Genes = tuple[int, ...]
"""A level per site."""


class Pool:
    """Candidates that were tried, and the best of them.

    Args:
        trial: the divergence of shares, less is better; PlanError where they cannot be met.
        most: how many are tried.
        left: seconds that are left for trials; one that would take longer, if it took as long as
            the longest before, is not begun. The first always is.
    """

    def __init__(
        self, trial: Callable[[Shares], float], most: int, left: Callable[[], float] = lambda: inf
    ):
        self._trial = trial
        self._most = most
        self._left = left
        self._longest = 0.0
        self._tried: list[tuple[float, Shares]] = []

    @property
    def open(self) -> bool:
        """Whether one more may be tried."""
        if not self._tried:
            return True
        return len(self._tried) < self._most and self.affords(1)

    def affords(self, trials: float) -> bool:
        """Whether the time is left for as much work as so many trials."""
        return processes().agreed(lambda: trials * self._longest <= self._left())

    def try_(self, shares: Shares) -> bool:
        """Try these shares, unless the pool is closed or they were tried before.

        Returns:
            Whether they are better than all before.
        """
        if not self.open or any(_same(shares, seen) for _, seen in self._tried):
            return False
        start = time.monotonic()
        try:
            found = self._trial(shares)
        except PlanError as error:
            logger.info("a candidate cannot be met: %s", error)
            found = inf
        score = processes().agreed(lambda: found)
        self._longest = max(self._longest, time.monotonic() - start)
        logger.info("candidate %d: divergence %.4f", len(self._tried), score)
        better = score < min((other for other, _ in self._tried), default=inf)
        self._tried.append((score, shares))
        return better

    @property
    def best(self) -> Shares:
        """The first of those with the least divergence."""
        return min(self._tried, key=lambda item: item[0])[1]


def _same(a: Shares, b: Shares) -> bool:
    return a.keys() == b.keys() and all(abs(a[name] - b[name]) < 0.5 for name in a)


def evolve(
    parents: Sequence[Genes],
    *,
    mutate: Callable[[Genes], Genes],
    score: Callable[[Genes, int], float],
    generations: int,
    children: int,
    expired: Callable[[], bool] = lambda: False,
    on_generation: Callable[[], None] = lambda: None,
) -> Genes:
    """The fittest after some generations: each, the best parent and its mutated children compete.

    Each generation scores all of its competitors anew on the same sample, so that what was lucky on
    one does not stay. The first generation is between the parents alone.
    """
    best, competitors = parents[0], list(dict.fromkeys(parents))
    for generation in range(generations):
        scores: list[float] = []
        for genes in competitors:
            if expired() and scores:
                break
            scores.append(score(genes, generation))
        best = competitors[int(np.argmin(scores))]
        on_generation()
        if expired():
            break
        competitors = list(dict.fromkeys([best, *(mutate(best) for _ in range(children))]))
    return best

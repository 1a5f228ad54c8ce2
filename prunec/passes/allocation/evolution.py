"""Search by trial: a pool that remembers the best, and an evolution of levels."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from prunec.errors import PlanError

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
        deadline: monotonic time; a trial that would take as long as the longest before and end
            later is not begun, the first always is.
    """

    def __init__(self, trial: Callable[[Shares], float], most: int, deadline: float | None = None):
        self._trial = trial
        self._most = most
        self._deadline = deadline
        self._longest = 0.0
        self._tried: list[tuple[float, Shares]] = []

    @property
    def open(self) -> bool:
        """Whether one more may be tried."""
        if not self._tried:
            return True
        late = self._deadline is not None and time.monotonic() + self._longest > self._deadline
        return len(self._tried) < self._most and not late

    def try_(self, shares: Shares) -> None:
        """Try these shares, unless the pool is closed or they were tried before."""
        if not self.open or any(_same(shares, seen) for _, seen in self._tried):
            return
        start = time.monotonic()
        try:
            score = self._trial(shares)
        except PlanError as error:
            logger.info("a candidate cannot be met: %s", error)
            score = float("inf")
        self._longest = max(self._longest, time.monotonic() - start)
        logger.info("candidate %d: divergence %.4f", len(self._tried), score)
        self._tried.append((score, shares))

    @property
    def best(self) -> Shares:
        """The first of those with the least divergence."""
        return min(self._tried, key=lambda item: item[0])[1]


def _same(a: Shares, b: Shares) -> bool:
    return all(abs(a[name] - b[name]) < 0.5 for name in a)


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

"""Random: the baseline that knows nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar

import numpy as np
from torch import Tensor

from prunec.importance.curves import RemovalCurve, Survivors
from prunec.importance.problem import FloatArray, SiteProblem, UnitSet
from prunec.importance.scores import static_curve


@dataclass(frozen=True)
class Random:
    """Score of a unit: uniform noise, times what it frees so that size favours no group.

    The noise depends on the seed and the group's name alone, so the order of sites does not matter.

    Attributes:
        seed: Any integer.
    """

    seed: int = 0

    statistics: ClassVar[frozenset[str]] = frozenset()

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units at random."""
        noise = {s.group: self._noise(s) for s in problem.unit_sets}

        def score(unit_set: UnitSet, survivors: Survivors) -> FloatArray:
            freed = survivors.cost(unit_set.group) / len(survivors.open_rows(unit_set.group))
            return noise[unit_set.group] * freed

        return static_curve(problem, score, limit=limit)

    def _noise(self, unit_set: UnitSet) -> FloatArray:
        digest = sha256(f"{self.seed}/{unit_set.group}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        return generator.random(unit_set.columns.shape[:2])

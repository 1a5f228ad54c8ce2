"""A criterion that removes the units of the highest index first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from prunec.importance.curves import RemovalCurve, Survivors
from prunec.importance.problem import FloatArray, SiteProblem, UnitSet
from prunec.importance.scores import static_curve


@dataclass(frozen=True)
class LastUnits:
    scale: float = 1.0

    statistics: ClassVar[frozenset[str]] = frozenset()

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        def score(unit_set: UnitSet, survivors: Survivors) -> FloatArray:
            before = np.arange(unit_set.units, 0, -1, dtype=np.float64) * self.scale
            return np.broadcast_to(before, (unit_set.rows, unit_set.units))

        return static_curve(problem, score, limit=limit)

"""SlimLLM: one criterion for heads, another for channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunec.importance.curves import RemovalCurve
from prunec.importance.feature_space import FeatureSpace
from prunec.importance.pearson import Pearson
from prunec.importance.problem import SiteProblem


@dataclass(frozen=True)
class SlimLLM:
    """``pearson`` where a unit is several columns (heads), ``feature-space`` where it is one.

    SlimLLM, arXiv 2505.22689 (METHODS 2.1 and 2.2).

    Attributes:
        keep_bottom: see :class:`FeatureSpace`.
        swap: see :class:`Pearson`.
    """

    keep_bottom: float = 0.0
    swap: bool = True

    statistics: ClassVar[frozenset[str]] = Pearson.statistics | FeatureSpace.statistics
    depends_on_limit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        FeatureSpace(self.keep_bottom)

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units."""
        if all(unit_set.columns.shape[2] == 1 for unit_set in problem.unit_sets):
            return FeatureSpace(self.keep_bottom).rank(problem, statistics, limit=limit)
        return Pearson(self.swap).rank(problem, statistics, limit=limit)

"""Wanda, structured: weights times the norm of what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunec.importance.curves import RemovalCurve
from prunec.importance.problem import SiteProblem
from prunec.importance.scores import static_curve, sum_columns, to_array


@dataclass(frozen=True)
class Wanda:
    """Score of a column j: ``sum_r |W_rj| ||x_j||_2``; of a unit, the sum over its columns.

    Wanda-sp, the structured form of Wanda (arXiv 2306.11695) that FLAP compares with
    (arXiv 2312.11983). The norm is per token, so its scale does not depend on their number.
    """

    statistics: ClassVar[frozenset[str]] = frozenset({"input_square"})

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units by weight times input norm."""
        norm = statistics["input_square"].sqrt()
        weight = problem.weight.detach().to(norm.device).double().abs().sum(dim=0)
        return static_curve(problem, sum_columns(to_array(weight * norm)), limit=limit)

"""Fluctuation: how much the input of a column varies, weighted by what reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunec.importance.curves import RemovalCurve
from prunec.importance.problem import SiteProblem
from prunec.importance.scores import static_curve, sum_columns, to_array


@dataclass(frozen=True)
class Fluctuation:
    """Score of a column j: ``Var(x_j) ||W_:j||_2^2``; of a unit, the sum over its columns.

    FLAP's weighted input feature variance (arXiv 2312.11983, METHODS 4.2): the squared error that
    is left when the mean of a removed column goes into a bias. The variance is the plain one over
    all tokens; FLAP's code skips its first sample and updates its mean too early.
    """

    statistics: ClassVar[frozenset[str]] = frozenset({"input_var"})

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units by the variance of what they pass on."""
        variance = statistics["input_var"]
        weight = problem.weight.detach().to(variance.device).double().square().sum(dim=0)
        return static_curve(problem, sum_columns(to_array(weight * variance)), limit=limit)

"""A new importance in 20 lines: a unit is worth the energy that it adds to the site's output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunec.importance.curves import RemovalCurve
from prunec.importance.problem import SiteProblem
from prunec.importance.scores import static_curve, sum_columns, to_array


@dataclass(frozen=True)
class OutputEnergy:
    """``E[x_j^2] ||W_:j||^2`` of each column j; a unit has the sum over its columns."""

    root: bool = False  # an option: --set importance.root=true

    statistics: ClassVar[frozenset[str]] = frozenset({"input_square"})

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        weight = problem.weight.detach().double().square().sum(dim=0)
        energy = to_array(weight * statistics["input_square"].to(weight.device))
        return static_curve(problem, sum_columns(energy**0.5 if self.root else energy), limit=limit)

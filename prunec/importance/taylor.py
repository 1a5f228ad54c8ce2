"""Taylor: how much the loss changes when a unit's weights become zero, to first or second order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from prunec.importance.curves import RemovalCurve
from prunec.importance.members import Aggregation, member_curve
from prunec.importance.problem import Axis, FloatArray, SiteProblem
from prunec.importance.scores import check_option, to_array
from prunec.importance.statistics import statistic_of

Term = Literal["vector", "element1", "element2", "mixed"]


@dataclass(frozen=True)
class Taylor:
    """Score of a unit: its weights times their gradients (LLM-Pruner, arXiv 2305.11627 Eq 3 and 5).

    With w a weight, g the gradient of the mean loss and f the mean over samples of the squared
    gradient of each sample's loss (METHODS 3.2), per position on a member's axis, the sums over
    everything at that position::

        vector     | sum w g |
        element1   sum | w g |                 Element^1; ``param_first``, the code's default
        element2   sum | w f w |               Element^2; ``param_second``
        mixed      sum | w g - w f w / 2 |     Eq 5; ``param_mix``

    ``vector`` has no second-order term, as in the paper's code. The gradients are those of the
    dense model, taken once.

    Attributes:
        term: which of these.
        aggregation: Over members, see :mod:`prunec.importance.members`.
    """

    term: Term = "element1"
    aggregation: Aggregation = "sum"

    def __post_init__(self) -> None:
        check_option("taylor", "term", self.term, get_args(Term))
        check_option("taylor", "aggregation", self.aggregation, get_args(Aggregation))

    @property
    def statistics(self) -> frozenset[str]:
        """One number per position, reduced while the gradients are taken."""
        return frozenset({f"taylor_{self.term}"})

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units by what the loss is expected to change without them."""

        def salience(axis: Axis) -> FloatArray:
            return abs(to_array(statistics[statistic_of(f"taylor_{self.term}", *axis)]))

        return member_curve(problem, salience, self.aggregation, limit=limit)

"""What a prune pass works on and by what method: what budgets, surveys and passes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from prunec.events import Progress, silent
from prunec.graph.coupling import CouplingGraph

if TYPE_CHECKING:
    from prunec.importance.curves import Criterion
    from prunec.passes.compensation.closed_form import Compensation
    from prunec.passes.sites import Site
    from prunec.passes.slice import Weights
    from prunec.passes.statistics.measure import Statistics
    from prunec.passes.statistics.scores import Scores


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything but how much of each site goes.

    Attributes:
        sites: in graph order.
        criterion: ranks the sites' units.
        compensation: mends what is pruned.
        batches: calibration inputs by name.
        weights: the tensors to begin with; a pass slices them as it goes.
        prior: statistics that were taken before, such as those of gradients.
        scores: of the dense model, saved before: then no batch is read, and every site is pruned
            as the dense model had it.
    """

    coupling: CouplingGraph
    sites: Sequence[Site]
    criterion: Criterion
    compensation: Compensation
    batches: Sequence[Mapping[str, Tensor]]
    weights: Weights
    prior: Statistics = field(default_factory=dict)
    scores: Scores | None = None
    progress: Progress = silent

    def afresh(self, batches: Sequence[Mapping[str, Tensor]]) -> Setup:
        """The same method on other data, from the dense weights, whatever was saved."""
        return replace(self, batches=batches, weights=self.weights.dense(), scores=None)

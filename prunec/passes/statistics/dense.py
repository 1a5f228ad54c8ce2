"""The dense model's sites: their statistics in one pass, and what each unit is worth there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prunec.importance.blocks import joined
from prunec.importance.curves import Criterion
from prunec.importance.gradients import GRADIENT_STATISTICS
from prunec.importance.problem import FloatArray, SiteProblem, UnitSet
from prunec.passes.compensation.regression import Regression
from prunec.passes.distributed import processes
from prunec.passes.problems import site_problem
from prunec.passes.setup import Setup
from prunec.passes.sites import Site
from prunec.passes.statistics.measure import Measurement, Statistics


def dense_sites(
    setup: Setup, names: Collection[str], *, regression: Regression | None = None
) -> Iterator[tuple[Site, SiteProblem, Statistics]]:
    """Each site of the dense model with its statistics, one at a time.

    Each of several processes streams its share of the batches.

    Args:
        names: the statistics to take; where all are in the prior, the batches are not read.
        regression: the moments that a compensation asks for beside them.

    Raises:
        VerifyError: NaN or Inf at a site.
    """
    with setup.progress.task("scoring", total=len(setup.sites)) as task:
        measurement = _measurement(setup, set(names) - set(GRADIENT_STATISTICS), regression)
        for site in setup.sites:
            task.update(f"scoring {site.name}")
            taken = measurement.take(site) if measurement else {}
            problem = site_problem(site, setup.coupling, setup.weights)
            yield site, problem, {**setup.prior, **taken}
            setup.weights.release()
            task.advance()


def _measurement(
    setup: Setup, names: Collection[str], regression: Regression | None
) -> Measurement | None:
    if not setup.sites or not (names or regression):
        return None

    batches = processes().share(setup.batches)
    stream = setup.weights.stream(batches)
    dense = setup.weights.stream(batches) if regression and regression.needs_dense else None
    return Measurement(stream, setup.sites, names, regression=regression, dense=dense)


@dataclass(frozen=True, eq=False)
class GroupScores:
    """What the units of one group are worth where they are the only ones to go.

    Attributes:
        group: its name.
        site: where its units are read.
        scores: ``[C, U]``, the loss that each unit adds when its turn comes, NaN for those that
            must stay; the units of one step (one in every row) share its loss alike.
        loss: of all steps together.
        parameters: that they free.
    """

    group: str
    site: str
    scores: FloatArray
    loss: float
    parameters: int

    def to_json(self, share: float) -> dict[str, Any]:
        """Plain data; `share` of the loss of all groups. None stands for units that must stay."""
        counted = self.scores[np.isfinite(self.scores)]
        known = len(counted) > 0
        return {
            "minimum": float(counted.min()) if known else None,
            "median": float(np.median(counted)) if known else None,
            "maximum": float(counted.max()) if known else None,
            "loss": self.loss,
            "share": share,
            "scores": [
                [None if np.isnan(value) else value for value in row]
                for row in self.scores.tolist()
            ],
        }


def loss_shares(groups: Sequence[GroupScores]) -> list[float]:
    """The part of each group in the loss of all, every group cut to its minimum."""
    total = sum(abs(group.loss) for group in groups)
    return [abs(group.loss) / total if total > 0 else 0.0 for group in groups]


def score_groups(
    site: Site, problem: SiteProblem, criterion: Criterion, statistics: Statistics
) -> list[GroupScores]:
    """Rank each group of a site by itself, down to its minimum."""
    found = []
    given = joined(problem, statistics)
    for unit_set in problem.unit_sets:
        curve = criterion.rank(_alone(problem, unit_set), given)
        scores = np.full(unit_set.columns.shape[:2], np.nan)
        steps = np.diff(curve.loss, prepend=0.0)
        for removal, loss in zip(curve.removals, steps, strict=True):
            scores[np.arange(unit_set.rows), list(removal.units)] = loss / unit_set.rows
        total = float(curve.loss[-1]) if len(curve.loss) else 0.0
        freed = int(curve.parameters[-1]) if len(curve.parameters) else 0
        found.append(GroupScores(unit_set.group, site.name, scores, total, freed))
    return found


def _alone(problem: SiteProblem, unit_set: UnitSet) -> SiteProblem:
    """The site with only this group to choose from."""
    whole = {other.group: other.units for other in problem.unit_sets}

    def size(counts: Mapping[str, int]) -> int:
        return problem.size({**whole, **counts})

    return replace(problem, unit_sets=(unit_set,), size=size)

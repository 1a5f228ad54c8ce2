"""The prune pass: batches stream through the model, each site is pruned as it is reached."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph
from prunec.graph.dims import Dim
from prunec.graph.memory import release_freed, settled_heap
from prunec.graph.selection import BoolArray, Keep, Selection
from prunec.importance.blocks import block_key, joined, moments_of
from prunec.importance.curves import RemovalCurve
from prunec.importance.gradients import GRADIENT_STATISTICS
from prunec.importance.gram import energy
from prunec.importance.problem import SiteProblem
from prunec.passes.checkpoint import Decision, Journal, temporary_journal
from prunec.passes.distributed import processes
from prunec.passes.problems import Mender, site_problem
from prunec.passes.setup import Setup
from prunec.passes.sites import Site
from prunec.passes.slice import Weights
from prunec.passes.statistics.measure import Measured, Measurement, Statistics
from prunec.passes.targets.budget import Budget


@dataclass(frozen=True)
class SiteReport:
    """What happened at one site.

    Attributes:
        site, block: where.
        parameters: held by the site's groups before.
        wanted, removed: parameters asked for (what earlier sites could not express included) and
            removed.
        kept: units kept per group.
        error: accumulated loss over the energy of the site's dense output, 0 to 1 (None where the
            statistics do not tell).
        curve: (parameters removed, error then) at a few steps of the site's removal curve.
        bias: whether the site can carry a bias; None where none is wanted.
    """

    site: str
    block: str | None
    parameters: int
    wanted: int
    removed: int
    kept: Mapping[str, int]
    error: float | None
    curve: tuple[tuple[int, float], ...] = ()
    bias: bool | None = None

    def cells(self) -> dict[str, str]:
        """The site as a line of a table."""
        kept = (f"{count} {name.rpartition('/')[2]}" for name, count in self.kept.items())
        return {
            "site": self.site,
            "removed": f"{self.removed / self.parameters:.1%}",
            "kept": ", ".join(kept),
            "error": "" if self.error is None else f"{self.error:.4f}",
        }


@dataclass(frozen=True)
class Pruned:
    """Weights at their new sizes, the selection they follow, and a report per site.

    Attributes:
        streaming: seconds that the batches took, which grow with their number; the rest does not.
    """

    weights: Weights
    selection: Selection
    sites: tuple[SiteReport, ...]
    streaming: float = 0.0


def prune_sites(setup: Setup, budget: Budget, *, journal: Journal | None = None) -> Pruned:
    """Prune every site in the order of the graph, each on inputs that all earlier ones have shaped.

    A weight that several calls share is pruned first, on the dense model's inputs at all of them.

    Args:
        journal: where decisions are kept, and taken from where it already has them.

    Raises:
        VerifyError: NaN or Inf at a site.
        PlanError: what is left over at the end is more than whole units explain.
    """
    weights = setup.weights
    if budget.narrowed:
        _check_narrowed(setup)
        weights.select(budget.narrowed, {})
    if weights.stored and journal is None:
        journal = temporary_journal()
    worker = _Worker(setup, budget, journal)
    shared = [site for site in setup.sites if site.is_shared]
    single = [site for site in setup.sites if not site.is_shared]
    with settled_heap(), setup.progress.task("pruning", total=len(setup.sites)) as task:
        for site in shared:
            worker.visit(site, worker.measurement([site]))
            worker.release()
            task.row(worker.reports[-1].cells())
            task.advance()
        measurement = worker.measurement(single)
        for site in single:
            task.update(f"pruning {site.name}")
            worker.visit(site, measurement)
            worker.release()
            task.row(worker.reports[-1].cells())
            task.advance()
    budget.close()
    return Pruned(weights, weights.selection, tuple(worker.reports), worker.streaming)


def _check_narrowed(setup: Setup) -> None:
    """Raises PlanError where the dense model's stream, of another width, would be needed."""
    regression = setup.compensation.regression
    if setup.scores is not None or (regression is not None and regression.needs_dense):
        raise PlanError(
            "with a narrower residual stream nothing can be held against the dense model's",
            fix="set allocation.hidden=false, or use compensation obs and no saved scores",
        )


def keeps_of(coupling: CouplingGraph, kept: Mapping[str, BoolArray]) -> dict[Dim, Keep]:
    """Masks per leaf from those per group, ``[companion indices, units]`` each."""
    keeps = {}
    for name, mask in kept.items():
        group = coupling[name]
        companions = tuple(coupling[companion].dim for companion in group.companions)
        shape = (*(dim.size for dim in companions), -1)
        keeps[group.dim] = Keep(mask.reshape(shape), companions)
    return keeps


def silenced(site: Site, weights: Weights) -> dict[str, Tensor]:
    """The weights of a site that computes nothing any more, and their biases, by name."""
    biases = [reading.bias for reading in site.readings if reading.bias is not None]
    names = [*(reading.parameter for reading in site.readings), *biases]
    return {name: torch.zeros_like(weights[name]) for name in names}


class _Worker:
    """Carries one criterion and one compensation from site to site."""

    def __init__(self, setup: Setup, budget: Budget, journal: Journal | None):
        self._setup = setup
        self._coupling = setup.coupling
        self._criterion = setup.criterion
        self._compensation = setup.compensation
        self._weights = setup.weights
        self._dense = setup.weights.dense()
        self._scores = setup.scores
        self._budget = budget
        self._journal = journal
        self.reports: list[SiteReport] = []
        self.streaming = 0.0

    def measurement(self, sites: Sequence[Site]) -> Measured:
        if self._scores is not None:
            return self._scores
        regression = self._compensation.regression
        dense = None
        if regression is not None and regression.needs_dense:
            dense = self._dense.stream(self._setup.batches)
        names = self._criterion.statistics | self._compensation.statistics
        return Measurement(
            self._weights.stream(self._setup.batches),
            sites,
            names - set(GRADIENT_STATISTICS),
            regression=regression,
            dense=dense,
            tokens=all(
                getattr(part, "takes_tokens", False)
                for part in (self._criterion, self._compensation)
                if "input_gram" in part.statistics
            ),
        )

    def release(self) -> None:
        """Hold no tensor that can be had again."""
        self._weights.release()
        self._dense.release()

    def visit(self, site: Site, measurement: Measured) -> None:
        selection = self._weights.selection
        problem = site_problem(site, self._coupling, self._weights, selection)
        wanted = self._budget.want(site)
        if self._budget.leaves_out(site):
            measurement.skip(site)
            self._budget.leave_out(site)
            self._weights.select(self._weights.selection, silenced(site, self._weights))
            gone = {group.name: np.zeros((1, group.size), dtype=bool) for group in site.groups}
            self._report(site, problem, wanted, Decision(wanted, self._budget.spent, kept=gone))
            return
        if self._budget.stays_whole(site):
            measurement.skip(site)
            self._budget.skip(site)
            self._report(site, problem, wanted, Decision(0, self._budget.spent))
            return
        decision = self._decision(site, problem, measurement)
        self._budget.restore(decision.spent, _counts(decision.kept))
        if decision.removed:
            selection = self._selection(decision.kept)
            self._weights.select(selection, decision.updated)
            measurement.select(selection)
            release_freed()
        self._report(site, problem, wanted, decision)

    def _decision(self, site: Site, problem: SiteProblem, measurement: Measured) -> Decision:
        """From the journal, or made now by the first process for all."""
        number, together = len(self.reports), processes()
        recalled = together.agreed(lambda: self._recalled(number, loaded=together.size > 1))
        if recalled is not None:
            measurement.pass_by(site)
            return recalled
        start = time.monotonic()
        measured = measurement.take(site)
        self.streaming += time.monotonic() - start
        decision = together.agreed(lambda: self._decide(site, problem, measured))
        if self._journal is None:
            return decision
        self._journal.record(number, decision)
        return (self._recalled(number) if self._weights.stored else None) or decision

    def _recalled(self, number: int, *, loaded: bool = False) -> Decision | None:
        decision = self._journal.recall(number) if self._journal else None
        if decision is None or not loaded:
            return decision
        return replace(decision, updated=dict(decision.updated))

    def _decide(self, site: Site, problem: SiteProblem, measured: Statistics) -> Decision:
        statistics = {**self._setup.prior, **measured}
        curve = self._curve(site, problem, statistics)
        steps = self._budget.choose(site, curve)
        removed = int(curve.parameters[steps - 1]) if steps else 0
        loss = float(curve.loss[steps - 1]) if steps else 0.0
        kept = curve.keep(problem, steps)
        whole = output_energy(problem, statistics)
        error = None if whole is None else loss / whole if whole > 0 else 0.0
        updated = self._mend(site, statistics, kept) if steps else {}
        points = _points(curve, whole) if whole else ()
        return Decision(removed, self._budget.spent, error, kept, updated, points)

    def _curve(self, site: Site, problem: SiteProblem, statistics: Statistics) -> RemovalCurve:
        # Where the order depends on how much goes, the saved statistics rank again.
        if self._scores is None or getattr(self._criterion, "depends_on_limit", False):
            given = joined(problem, statistics)
            return self._criterion.rank(problem, given, limit=self._budget.limit(site))
        return self._scores.curve(site)

    def _selection(self, kept: Mapping[str, BoolArray]) -> Selection:
        return self._weights.selection.with_keeps(keeps_of(self._coupling, kept))

    def _mend(
        self, site: Site, statistics: Statistics, kept: Mapping[str, BoolArray]
    ) -> dict[str, Tensor]:
        """The weights that read the units, and their biases, without those that go."""
        selection = self._selection(kept)
        mender = Mender(self._coupling, self._compensation, selection, self._weights)
        return mender.mend(site, statistics)

    def _report(self, site: Site, problem: SiteProblem, wanted: int, decision: Decision) -> None:
        whole = {group.name: group.size for group in site.groups}
        self.reports.append(
            SiteReport(
                site=site.name,
                block=site.block,
                parameters=problem.size(whole),
                wanted=wanted,
                removed=decision.removed,
                kept=whole | _counts(decision.kept),
                error=decision.error,
                curve=decision.curve,
                bias=site.takes_bias if self._compensation.bias else None,
            )
        )


def _counts(kept: Mapping[str, BoolArray]) -> dict[str, int]:
    """Units kept by group, of masks ``[companion indices, units]``."""
    return {name: int(mask.sum(axis=1).max()) for name, mask in kept.items()}


def output_energy(problem: SiteProblem, statistics: Statistics) -> float | None:
    """The energy ``tr(W C W^T)`` of the site's dense output, where the statistics tell."""
    if statistics.keys().isdisjoint({"input_gram", "input_tokens", block_key("input_gram", 0)}):
        return None
    moments = moments_of(problem, joined(problem, statistics))
    return sum(energy(problem.weight[:, span], moment) for span, moment in moments)


def _points(curve: RemovalCurve, energy: float) -> tuple[tuple[int, float], ...]:
    """At most 24 points of a removal curve, evenly spread over its steps, the last among them."""
    if not len(curve.loss):
        return ()
    steps = np.unique(np.linspace(0, len(curve.loss) - 1, 24).astype(int))
    return tuple((int(curve.parameters[i]), float(curve.loss[i]) / energy) for i in steps)

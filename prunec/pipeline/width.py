"""The run that removes units inside blocks, site by site: heads, channels, experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from prunec.graph.coupling import CouplingGraph, couple
from prunec.models import state_digest
from prunec.models.digest import tensor_digest
from prunec.passes.allocation.context import Context
from prunec.passes.allocation.survey import DenseSurvey
from prunec.passes.allocation.uniform import Allocation
from prunec.passes.checkpoint import Journal, opened_journal
from prunec.passes.compensation.biases import with_biases
from prunec.passes.depth import drop
from prunec.passes.distributed import processes
from prunec.passes.plan import Plan
from prunec.passes.prune import prune_sites
from prunec.passes.setup import Setup
from prunec.passes.sites import Site, Skipped, check_found, find_sites
from prunec.passes.slice import Weights, weights_of
from prunec.passes.statistics.dense import dense_sites
from prunec.passes.statistics.prior import prior_statistics, reads_no_input
from prunec.passes.statistics.scores import Origin, Scores, Shelf
from prunec.passes.targets.budget import Budget
from prunec.passes.targets.goal import Goal
from prunec.passes.targets.latency import paired_ratio
from prunec.passes.targets.question import block_budget, not_whole
from prunec.pipeline.deliver import Outcome
from prunec.pipeline.foresight import check_class
from prunec.pipeline.result import Result
from prunec.pipeline.run import Run, described
from prunec.pipeline.scoring import check_width


def thin(run: Run) -> Result:
    """Units inside blocks go, each site ranked on what the pruned part before it produces."""
    check_width(run.criterion)
    coupling, sites, skipped = _sites(run)
    goal = Goal.on(coupling, run.aim)
    counted = goal.concerned(sites)
    skipped += _left_out(sites, counted, f"the target ({goal.target}) does not count it")
    limits = run.recipe.constraints
    open_ = limits.free(counted)
    skipped += _left_out(counted, open_, "the constraints keep it whole")
    check_class(run.model, coupling, not_whole(coupling, open_, goal, limits), limits)
    setup = replace(_measured(run, coupling, sites), sites=open_)
    together = processes()
    journal = opened_journal(
        run.checkpoint if together.first else None, _identity(run, setup), resume=run.resume
    )
    with journal as kept:
        with run.clock("allocate"):
            budget = block_budget(
                coupling,
                setup.sites,
                _Resumed(run.allocation, kept),
                goal,
                survey=DenseSurvey(setup),
                constraints=run.recipe.constraints,
            )
        with run.clock("prune"):
            shared = replace(setup, batches=together.share(run.batches))
            pruned = prune_sites(shared, budget, journal=kept)
    result = run.deliver(
        _outcome(coupling, Plan.of(coupling, pruned.selection, budget.dropped), pruned.weights),
        sites=pruned.sites,
        skipped=tuple(skipped),
        calibration=described(run.calibration) if setup.scores is None else _reported(setup.scores),
        aim=_aim(goal, budget),
        run=kept and kept.run,
    )
    return _timed(run, coupling, result) if run.aim.kind == "latency" else result


@dataclass(frozen=True)
class _Resumed:
    """An allocation that looks at data only once, also when the run is killed and goes on.

    That takes its time, and a search bound by minutes finds something else each time.
    """

    allocation: Allocation
    journal: Journal | None

    @property
    def needs_data(self) -> bool:
        return self.allocation.needs_data

    def shares(self, context: Context) -> Mapping[str, float]:
        """Those of the journal, or those found now by all processes alike."""
        journal = self.journal if self.needs_data else None
        together = processes()
        known = together.agreed(lambda: journal.recall_shares() if journal else None)
        if known is not None:
            return known
        found = self.allocation.shares(context)
        shares = together.agreed(lambda: found)
        if journal:
            journal.record_shares(shares)
        return shares


def _sites(run: Run) -> tuple[CouplingGraph, list[Site], list[Skipped]]:
    """Where units go; the graph has room for a bias at each where one is fitted."""
    coupling = run.couple()
    with run.clock("trace"):
        by_weight = reads_no_input(run.criterion, run.compensation)
        sites, skipped = find_sites(coupling, run.recipe.units, by_weight=by_weight)
        if run.compensation.bias:
            coupling = couple(with_biases(coupling.program, sites))
            sites, skipped = find_sites(coupling, run.recipe.units)
    check_found(coupling, sites, skipped)
    return coupling, sites, skipped


def _left_out(sites: Sequence[Site], kept: Sequence[Site], reason: str) -> list[Skipped]:
    """The groups that are among the first sites alone."""
    staying = {group.name for site in kept for group in site.groups}
    names = [group.name for site in sites for group in site.groups]
    return [Skipped(name, reason) for name in names if name not in staying]


def _measured(run: Run, coupling: CouplingGraph, sites: Sequence[Site]) -> Setup:
    """What is known of the dense model: gradients, and with a shelf every site's statistics."""
    setup = Setup(
        coupling,
        sites,
        run.criterion,
        run.compensation,
        run.batches,
        weights_of(coupling, run.weights, run.device, place=run.place),
        scores=run.saved,
        progress=run.progress,
    )
    names = run.criterion.statistics | run.compensation.statistics
    with run.clock("score"):
        if run.saved is None:
            prior = prior_statistics(
                run.model,
                sites,
                names,
                run.samples,
                loss=run.loss,
                weights=setup.weights.read,
                device=setup.weights.device,
                progress=run.progress,
            )
            setup = replace(setup, prior=prior)
        if run.shelf:
            setup = replace(setup, scores=_scores(run, run.shelf, setup, names))
    return setup


def _scores(run: Run, shelf: Shelf, setup: Setup, names: Collection[str]) -> Scores:
    """The scores on the shelf, taken now if it holds none.

    Raises:
        PlanError: what is there is of another model, method or data.
    """
    origin = Origin.of(
        run.model, run.criterion, run.compensation, run.loss, run.samples, run.weights
    )
    scores = shelf.scores(
        origin,
        described(run.calibration),
        dense_sites(setup, names, regression=run.compensation.regression),
        run.criterion,
        setup.coupling.program.example,
    )
    scores.check(origin, setup.sites, names)
    return scores


def _identity(run: Run, setup: Setup) -> dict[str, Any]:
    """What must be the same in the run that goes on from a checkpoint."""
    identity: dict[str, Any] = {
        "recipe": run.recipe.to_dict(),
        "target": str(run.aim),
        "seed": run.seed,
        "data": _digest(run.samples),
    }
    if setup.scores is not None:
        identity["scores"] = vars(setup.scores.origin)
    if run.checkpoint is not None:
        identity["model"] = state_digest(run.model, run.weights)
        identity["device"] = str(setup.weights.device)
    return identity


def _outcome(coupling: CouplingGraph, plan: Plan, weights: Weights) -> Outcome:
    """What is left when the plan's branches, which are silent by now, are dropped."""
    if not plan.dropped:
        return Outcome(coupling, coupling, weights, plan)
    shorter = drop(coupling, plan.dropped)
    left = Weights(shorter, shorter.program.state)
    names = shorter.program.parameters | shorter.program.added
    left.select(plan.selection(shorter), {name: weights[name] for name in sorted(names)})
    return Outcome(coupling, shorter, left, plan)


def _timed(run: Run, coupling: CouplingGraph, result: Result) -> Result:
    """The result of a latency target, with what it measures."""
    with run.progress.task("measure the latency reached"), run.clock("measure latency"):
        factor, spread = paired_ratio(coupling.program, result.program)
    aim = {**result.report.aim, "measured_factor": factor, "measured_spread": spread}
    return replace(result, report=replace(result.report, aim=aim))


def _aim(goal: Goal, budget: Budget) -> dict[str, Any]:
    return {
        "target": str(goal.target),
        "before": goal.of,
        "asked": goal.of - goal.remove,
        "reached": budget.goal.of - budget.removed,
        "rounding": budget.rounding,
    }


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """One digest of all calibration inputs."""
    return tensor_digest(batch[name] for batch in batches for name in sorted(batch))


def _reported(scores: Scores) -> dict[str, Any]:
    return {**scores.calibration, "scores": str(scores.directory), "one_shot": True}

"""The run that removes units inside blocks, site by site: heads, channels, experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from prunec.graph.coupling import CouplingGraph, couple
from prunec.models import state_digest
from prunec.models.digest import tensor_digest
from prunec.passes.allocation.survey import DenseSurvey
from prunec.passes.checkpoint import opened_journal
from prunec.passes.compensation.biases import with_biases
from prunec.passes.distributed import processes
from prunec.passes.plan import Plan
from prunec.passes.prune import Pruned, prune_sites
from prunec.passes.sites import Site, Skipped, find_sites
from prunec.passes.slice import Weights, weights_of
from prunec.passes.statistics.dense import dense_sites
from prunec.passes.statistics.measure import Statistics
from prunec.passes.statistics.prior import prior_statistics
from prunec.passes.statistics.scores import Origin, Scores
from prunec.passes.targets.budget import Budget, block_budget
from prunec.passes.targets.goal import Goal
from prunec.passes.targets.latency import paired_ratio
from prunec.pipeline.result import Result
from prunec.pipeline.run import Run, described
from prunec.pipeline.scoring import check_width


def thin(run: Run, checkpoint: str | Path | None = None, *, resume: bool = False) -> Result:
    """Units inside blocks go, each site ranked on what the pruned part before it produces.

    Args:
        checkpoint, resume: where progress is kept, and whether to go on from it.
    """
    check_width(run.criterion)
    coupling, sites, skipped = _sites(run)
    weights = weights_of(coupling, run.weights, run.device)
    prior, scores = _measured(run, coupling, sites, weights)
    goal = Goal.on(coupling, run.aim)
    sites = goal.concerned(sites)
    budget = _budget(run, coupling, sites, goal, prior, scores, weights)
    pruned = _pruned(run, coupling, sites, budget, prior, scores, weights, checkpoint, resume)
    result = run.deliver(
        coupling,
        coupling,
        pruned.weights,
        Plan.of(coupling, pruned.selection),
        sites=pruned.sites,
        skipped=tuple(skipped),
        calibration=described(run.calibration) if scores is None else _reported(scores),
        aim=_aim(budget),
    )
    return _timed(run, coupling, result) if run.aim.kind == "latency" else result


def _sites(run: Run) -> tuple[CouplingGraph, list[Site], list[Skipped]]:
    """Where units go; the graph has room for a bias at each where one is fitted."""
    coupling = run.couple()
    with run.clock("trace"):
        sites, skipped = find_sites(coupling, run.recipe.units)
        if run.compensation.bias:
            coupling = couple(with_biases(coupling.program, sites))
            sites, skipped = find_sites(coupling, run.recipe.units)
    return coupling, sites, skipped


def _measured(
    run: Run, coupling: CouplingGraph, sites: Sequence[Site], weights: Weights
) -> tuple[Statistics, Scores | None]:
    """What is known of the dense model: gradients, and with a shelf every site's statistics."""
    names = run.criterion.statistics | run.compensation.statistics
    scores = run.saved
    prior: Statistics = {}
    with run.clock("score"):
        if scores is None:
            prior = prior_statistics(
                run.model,
                sites,
                names,
                run.batches,
                loss=run.loss,
                weights=weights.read,
                device=weights.device,
                progress=run.progress,
            )
        if run.shelf:
            origin = Origin.of(
                run.model, run.criterion, run.compensation, run.loss, run.batches, run.weights
            )
            measured = dense_sites(
                coupling,
                sites,
                names,
                run.batches,
                prior=prior,
                regression=run.compensation.regression,
                weights=weights,
                progress=run.progress,
            )
            scores = run.shelf.scores(
                origin,
                described(run.calibration),
                measured,
                run.criterion,
                coupling.program.example,
            )
            scores.check(origin, sites, names)
    return prior, scores


def _budget(
    run: Run,
    coupling: CouplingGraph,
    sites: Sequence[Site],
    goal: Goal,
    prior: Statistics,
    scores: Scores | None,
    weights: Weights,
) -> Budget:
    with run.clock("allocate"):
        survey = DenseSurvey(
            coupling,
            sites,
            run.criterion,
            run.compensation,
            run.batches,
            prior=prior,
            weights=weights,
            scores=scores,
            progress=run.progress,
        )
        return block_budget(
            coupling,
            sites,
            run.allocation,
            goal,
            survey=survey,
            constraints=run.recipe.constraints,
        )


def _pruned(
    run: Run,
    coupling: CouplingGraph,
    sites: Sequence[Site],
    budget: Budget,
    prior: Statistics,
    scores: Scores | None,
    weights: Weights,
    checkpoint: str | Path | None,
    resume: bool,
) -> Pruned:
    identity: dict[str, Any] = {
        "recipe": run.recipe.to_dict(),
        "target": str(run.aim),
        "seed": run.seed,
        "data": _digest(run.batches),
    }
    if scores is not None:
        identity["scores"] = vars(scores.origin)
    if checkpoint is not None:
        identity["model"] = state_digest(run.model, run.weights)
        identity["device"] = str(weights.device)
    together = processes()
    kept = checkpoint if together.first else None
    with run.clock("prune"), opened_journal(kept, identity, resume=resume) as journal:
        return prune_sites(
            coupling,
            sites,
            budget,
            run.criterion,
            run.compensation,
            together.share(run.batches),
            prior=prior,
            weights=weights,
            journal=journal,
            scores=scores,
            progress=run.progress,
        )


def _timed(run: Run, coupling: CouplingGraph, result: Result) -> Result:
    """The result of a latency target, with what it measures."""
    with run.progress.task("measure the latency reached"), run.clock("measure latency"):
        factor, spread = paired_ratio(coupling.program, result.program)
    aim = {**result.report.aim, "measured_factor": factor, "measured_spread": spread}
    return replace(result, report=replace(result.report, aim=aim))


def _aim(budget: Budget) -> dict[str, Any]:
    goal = budget.goal
    return {
        "target": str(goal.target),
        "before": goal.of,
        "asked": goal.of - goal.remove,
        "reached": goal.of - budget.removed,
        "rounding": budget.rounding,
    }


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """One digest of all calibration inputs."""
    return tensor_digest(batch[name] for batch in batches for name in sorted(batch))


def _reported(scores: Scores) -> dict[str, Any]:
    return {**scores.calibration, "scores": str(scores.directory), "one_shot": True}

"""Runs that remove whole branches or blocks, or features of the residual stream."""

from __future__ import annotations

from collections.abc import Collection

from prunec.errors import PlanError
from prunec.passes.channels import HIDDEN, prune_channels, stream_sites
from prunec.passes.depth import drop, loaded
from prunec.passes.plan import Plan
from prunec.passes.recipe import Recipe
from prunec.passes.shallow import DEPTH_KINDS, prune_depth
from prunec.passes.slice import Weights
from prunec.passes.statistics.prior import prior_statistics
from prunec.passes.targets.goal import Goal
from prunec.pipeline.deliver import Outcome
from prunec.pipeline.result import Result
from prunec.pipeline.run import Run


def shorten(run: Run) -> Result:
    """Whole branches or blocks go."""
    _only(run.recipe, DEPTH_KINDS)
    dense = loaded(run.couple(), run.weights)
    with run.clock("prune"):
        goal, units = Goal.on(dense, run.aim), run.recipe.units
        names, dropped = prune_depth(
            dense, units, goal, run.criterion, run.batches, progress=run.progress
        )
        coupling = drop(dense, names)
    weights = Weights(coupling)
    return run.deliver(Outcome(dense, coupling, weights, Plan(dropped=names)), dropped=dropped)


def narrow(run: Run) -> Result:
    """Features of the residual stream go."""
    _only(run.recipe, {HIDDEN})
    coupling = loaded(run.couple(), run.weights)
    with run.clock("prune"):
        sites, names = stream_sites(coupling), run.criterion.statistics
        prior = prior_statistics(
            run.model, sites, names, run.samples, loss=run.loss, progress=run.progress
        )
        selection = prune_channels(
            coupling,
            sites,
            Goal.on(coupling, run.aim),
            run.criterion,
            run.compensation,
            coupling.program.state,
            prior,
            constraints=run.recipe.constraints,
        )
    weights = Weights(coupling, selection=selection)
    return run.deliver(Outcome(coupling, coupling, weights, Plan.of(coupling, selection)))


def _only(recipe: Recipe, kinds: Collection[str]) -> None:
    """Depth, the width of the stream and units inside blocks are runs of their own."""
    others = [unit for unit in recipe.units if unit not in kinds]
    if others:
        raise PlanError(
            f"units {', '.join(recipe.units)} cannot go in one run",
            fix="prune one, then prune the result: prunec opens what it wrote",
        )

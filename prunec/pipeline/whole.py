"""Runs that remove whole branches or blocks, features of the stream, or what a plug-in says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph
from prunec.passes.channels import HIDDEN, prune_channels, stream_sites
from prunec.passes.decision import Pass
from prunec.passes.depth import drop, loaded
from prunec.passes.plan import Plan
from prunec.passes.recipe import Recipe
from prunec.passes.shallow import DEPTH_KINDS, prune_depth
from prunec.passes.slice import Weights
from prunec.passes.statistics.prior import prior_statistics
from prunec.passes.targets.costs import measure_for
from prunec.passes.targets.goal import Goal, block_parameters
from prunec.pipeline.deliver import Outcome
from prunec.pipeline.result import Result
from prunec.pipeline.run import Run


def decided(run: Run, decision: Pass) -> Result:
    """What a plug-in's pass says goes."""
    _check_options(run, constraints=run.recipe.constraints.to_dict())
    dense = loaded(run.couple(), run.weights, run.device)
    with run.clock("prune"):
        goal = Goal.on(dense, run.aim)
        plan = decision.plan(dense, goal, run.batches)
    dense = _to_deliver(run, dense)
    coupling = drop(dense, plan.dropped)
    weights = Weights(coupling, selection=plan.selection(coupling))
    outcome = Outcome(dense, coupling, weights, plan)
    return run.deliver(outcome, aim=_reached(goal, outcome))


def shorten(run: Run) -> Result:
    """Whole branches or blocks go."""
    _only(run.recipe, DEPTH_KINDS)
    _check_options(run, constraints=run.recipe.constraints.to_dict())
    dense = loaded(run.couple(), run.weights, run.device)
    with run.clock("prune"):
        goal, units = Goal.on(dense, run.aim), run.recipe.units
        names, dropped = prune_depth(
            dense, units, goal, run.criterion, run.batches, progress=run.progress
        )
    dense = _to_deliver(run, dense)
    coupling = drop(dense, names)
    weights = Weights(coupling)
    return run.deliver(Outcome(dense, coupling, weights, Plan(dropped=names)), dropped=dropped)


def narrow(run: Run) -> Result:
    """Features of the residual stream go."""
    _only(run.recipe, {HIDDEN})
    limits = run.recipe.constraints.to_dict()
    rounding = {"multiple_of", "tensor_parallel"}
    _check_options(run, constraints={k: v for k, v in limits.items() if k not in rounding})
    coupling = loaded(run.couple(), run.weights, run.device)
    with run.clock("prune"):
        sites, names = stream_sites(coupling), run.criterion.statistics
        prior = prior_statistics(
            run.model,
            sites,
            names,
            run.samples,
            loss=run.loss,
            weights=coupling.program.state.__getitem__,
            device=Weights(coupling).device,
            progress=run.progress,
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
        plan = Plan.of(coupling, selection)
    coupling = _to_deliver(run, coupling)
    weights = Weights(coupling, selection=plan.selection(coupling))
    return run.deliver(Outcome(coupling, coupling, weights, plan))


def _to_deliver(run: Run, coupling: CouplingGraph) -> CouplingGraph:
    """What the result is made of: on the CPU, where a model on meta is delivered."""
    if run.weights is None or torch.device(run.device or "cpu").type == "cpu":
        return coupling
    return loaded(run.couple("cpu"), run.weights)


def _reached(goal: Goal, outcome: Outcome) -> dict[str, Any]:
    """What is left, as the target counts it; not of a target that is told site by site."""
    kind, coupling = goal.target.kind, outcome.coupling
    if kind in ("kv-cache", "latency"):
        return {}
    counts = outcome.weights.selection.counts
    left: float = sum(block_parameters(coupling, counts).values())
    if kind != "ratio":
        left = measure_for(kind, coupling, counts).whole()
    return {
        "target": str(goal.target),
        "before": goal.of,
        "asked": goal.of - goal.remove,
        "reached": left,
        "rounding": goal.of - left - goal.remove,
    }


def _check_options(run: Run, *, constraints: Mapping[str, Any]) -> None:
    """Refuse what this kind of run could only ignore; `align` is a wish, not a rule."""
    idle = [f"the constraint {name}" for name in constraints if name != "align"]
    idle += ["scores"] if run.shelf else []
    idle += ["a checkpoint to resume from"] if run.resume else []
    idle += ["a place for activations"] if run.activations != "auto" else []
    if idle:
        raise PlanError(
            f"a run that {_what(run.recipe)} has no use for {', '.join(idle)}",
            so="it would be without effect",
            fix="leave it out; such a run takes one pass over the data and keeps no progress",
        )


def _what(recipe: Recipe) -> str:
    if recipe.decision is not None:
        return f"does as the pass {recipe.decision.name} says"
    return f"removes {', '.join(recipe.units)}"


def _only(recipe: Recipe, kinds: Collection[str]) -> None:
    """Depth, the width of the stream and units inside blocks are runs of their own."""
    others = [unit for unit in recipe.units if unit not in kinds]
    if others:
        raise PlanError(
            f"units {', '.join(recipe.units)} cannot go in one run",
            fix="prune one, then prune the result: prunec opens what it wrote",
        )

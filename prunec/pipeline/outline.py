"""What a run would do, without weights and without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from prunec.graph.cost import parameter_count
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import Example, trace
from prunec.passes.allocation.uniform import Allocation, Uniform
from prunec.passes.channels import HIDDEN, check_channels
from prunec.passes.recipe import Recipe
from prunec.passes.shallow import DEPTH_KINDS, depth_units
from prunec.passes.sites import Skipped, check_found, find_sites
from prunec.passes.statistics.prior import reads_no_input
from prunec.passes.targets.goal import Goal, block_parameters
from prunec.passes.targets.question import block_budget, not_whole
from prunec.passes.targets.target import Target
from prunec.pipeline.foresight import check_class


@dataclass(frozen=True)
class Outline:
    """What a run would be asked to do: the part of a report that needs no weights and no data.

    Attributes:
        block_parameters: of all repeated blocks, before.
        goal: the target as it was asked for.
        target: what is to go, in the goal's unit.
        wanted: per site, (parameters it holds, parameters it is asked for); empty for an allocation
            that looks at data first, and where whole branches or features of the stream go.
        skipped: groups of the wanted kinds that have no site, and why.
    """

    block_parameters: int
    goal: str
    target: float
    wanted: Mapping[str, tuple[int, int]]
    skipped: tuple[Skipped, ...]


def outline(
    model: nn.Module, *, recipe: Recipe, target: float | Target, example: Example
) -> Outline:
    """How a run would split its target over the sites; weights may be on meta.

    `target` is one, or a ratio of the repeated blocks' parameters.

    Raises:
        PlanError: the target cannot be reached.
        ExportError: the model's class can do without no unit of a kind that may go.
    """
    coupling = couple(trace(model, example))
    depth = not DEPTH_KINDS.isdisjoint(recipe.units)
    if depth or HIDDEN in recipe.units or recipe.decision is not None:
        return _whole(coupling, recipe, target)
    parts = recipe.importance.build("importance"), recipe.compensation.build("compensation")
    sites, skipped = find_sites(coupling, recipe.units, by_weight=reads_no_input(*parts))
    check_found(coupling, sites, skipped)
    goal = Goal.on(coupling, target)
    limits = recipe.constraints
    sites = limits.free(goal.concerned(sites))
    check_class(model, coupling, not_whole(coupling, sites, goal, limits), limits)
    allocation: Allocation = recipe.allocation.build("allocation")
    looks = allocation.needs_data
    budget = block_budget(
        coupling, sites, Uniform() if looks else allocation, goal, constraints=limits
    )
    return Outline(
        block_parameters=sum(block_parameters(coupling).values()),
        goal=str(goal.target),
        target=goal.remove,
        wanted={}
        if looks
        else {
            site.name: (parameter_count(coupling, names=site.parameters), budget.share(site))
            for site in sites
        },
        skipped=tuple(skipped),
    )


def _whole(coupling: CouplingGraph, recipe: Recipe, target: float | Target) -> Outline:
    """Of a run that has no sites: whole branches go, features of the stream, what a pass says."""
    goal = Goal.on(coupling, target)
    if recipe.decision is None and HIDDEN in recipe.units:
        check_channels(coupling, goal, recipe.constraints)
    elif recipe.decision is None:
        depth_units(coupling, recipe.units)
    held = sum(block_parameters(coupling).values())
    return Outline(held, str(goal.target), goal.remove, {}, ())

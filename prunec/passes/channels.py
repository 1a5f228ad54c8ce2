"""The channel pass: features of the residual stream go, everywhere at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prunec.errors import PlanError
from prunec.graph.cost import Counts, flops, parameter_count
from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.selection import Keep, Selection
from prunec.importance.curves import Criterion
from prunec.importance.gradients import GRADIENT_STATISTICS
from prunec.importance.magnitude import Magnitude
from prunec.passes.problems import site_problem
from prunec.passes.sites import STREAM, Site
from prunec.passes.targets.constraints import Constraints
from prunec.passes.targets.goal import Goal, amount, block_parameters

HIDDEN = STREAM


def stream_sites(coupling: CouplingGraph) -> list[Site]:
    """One for each group of features of the stream, which all weights read: a site without input.

    Raises:
        PlanError: the stream cannot lose features.
    """
    groups = [group for group in coupling.groups if group.kind == HIDDEN]
    if not groups:
        raise PlanError(
            "the features of the residual stream cannot be pruned",
            fix="see `prunec analyze --why`",
        )
    return [Site(group.name, (), (group,), group.block) for group in groups]


def prune_channels(
    coupling: CouplingGraph,
    sites: Sequence[Site],
    goal: Goal,
    criterion: Criterion,
    compensation: Any,
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    *,
    constraints: Constraints,
) -> Selection:
    """Keep the features that the criterion ranks highest, as many as come nearest to the target.

    Several streams lose the same part of their features.

    Args:
        statistics: of gradients, where the criterion reads them (LLM-Pruner's "channel" mode:
            the score of a feature adds up over embeddings, norms, every matrix and the head).

    Raises:
        PlanError: a criterion or compensation that looks at the input of one weight, or a target
            that features do not change.
    """
    names = criterion.statistics | compensation.statistics
    if names - set(GRADIENT_STATISTICS):
        raise PlanError(
            "features of the residual stream are read by many weights, not at one site",
            so=f"{', '.join(sorted(names))} cannot be taken",
            fix="use importance=magnitude, random, taylor or fisher, and compensation=none",
        )
    left = _numbers_left(coupling, [site.groups[0] for site in sites], goal, constraints)
    return _best(coupling, sites, left, criterion, tensors, statistics)


def check_channels(coupling: CouplingGraph, goal: Goal, constraints: Constraints) -> None:
    """Raises PlanError if the streams can lose no features, or no number meets the target."""
    groups = [site.groups[0] for site in stream_sites(coupling)]
    _numbers_left(coupling, groups, goal, constraints)


def heaviest(
    coupling: CouplingGraph, part: float, constraints: Constraints, tensors: Mapping[str, Tensor]
) -> Selection:
    """Keep about this part of the features of each residual stream, those of largest weights (L2).

    Raises:
        PlanError: the streams cannot lose features, or none would go, or all.
    """
    sites, heads = stream_sites(coupling), _heads(coupling)
    groups = [site.groups[0] for site in sites]
    left = {group.name: _rounded(group, part, constraints, heads) for group in groups}
    if not all(max(1, group.minimum) <= left[group.name] < group.size for group in groups):
        raise PlanError(f"{part:.0%} of the residual stream's features are none, or all of them")
    return _best(coupling, sites, left, Magnitude(), tensors, {})


def _best(
    coupling: CouplingGraph,
    sites: Sequence[Site],
    left: Mapping[str, int],
    criterion: Criterion,
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
) -> Selection:
    """The features that a criterion ranks highest, as many of each group as are to be left."""
    keeps = {}
    for site in sites:
        (group,) = site.groups
        problem = site_problem(site, coupling, tensors)
        curve = criterion.rank(problem, statistics)
        kept = curve.keep(problem, group.size - left[group.name])[group.name]
        keeps[group.dim] = Keep(kept.reshape(-1))
    return Selection(keeps)


def _numbers_left(
    coupling: CouplingGraph, groups: Sequence[Group], goal: Goal, constraints: Constraints
) -> dict[str, int]:
    """Features kept of each group: the part for which the cost is nearest to what is to be left."""
    heads = _heads(coupling)
    largest = max(groups, key=lambda group: group.size)
    wanted, best, found = goal.of - goal.remove, goal.of, dict[str, int]()
    for units in range(1, largest.size):
        counts = {g.name: _rounded(g, units / largest.size, constraints, heads) for g in groups}
        if any(counts[group.name] < max(1, group.minimum) for group in groups):
            continue
        cost = _cost(coupling, goal, {group.dim: counts[group.name] for group in groups})
        if abs(cost - wanted) < abs(best - wanted):
            best, found = cost, counts
    if not found:
        raise PlanError(
            f"{goal.target}: no number of features comes nearer than all of them",
            so=f"{amount(goal.target.kind, goal.remove)} were to go",
            fix="ask for more, or loosen the constraints",
        )
    goal.check_left(best)
    return found


def _rounded(group: Group, part: float, constraints: Constraints, heads: int) -> int:
    step = math.lcm(constraints.step(group), heads if group.size % heads == 0 else 1)
    return round(part * group.size / step) * step


def _heads(coupling: CouplingGraph) -> int:
    """Heads of an attention, of which config classes want the width of the stream a multiple."""
    sizes = [
        math.prod([group.size, *(coupling[name].size for name in group.companions)])
        for group in coupling.groups
        if group.kind in ("head", "query_head")
    ]
    return math.lcm(*sizes) if sizes else 1


def _cost(coupling: CouplingGraph, goal: Goal, counts: Counts) -> float:
    kind = goal.target.kind
    if kind == "ratio":
        return sum(block_parameters(coupling, counts).values())
    if kind == "params":
        return parameter_count(coupling, counts)
    if kind == "flops":
        return flops(coupling, counts)
    raise PlanError(
        f"{goal.target}: the width of the stream is chosen by ratio, params or flops",
        fix="use --ratio",
    )

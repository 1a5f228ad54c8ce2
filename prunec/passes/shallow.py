"""The depth pass: whole branches or blocks go until the target is reached."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunec.errors import PlanError
from prunec.events import Progress, silent
from prunec.graph.branches import Branch, blocks
from prunec.graph.coupling import CouplingGraph
from prunec.importance.influence import DepthCriterion, Units
from prunec.passes.depth import drop
from prunec.passes.targets.costs import measure_for
from prunec.passes.targets.goal import Goal, amount, block_parameters

BLOCK = "block"
DEPTH_KINDS = frozenset({BLOCK, "attention", "mixer", "experts", "convolution", "mlp"})
"""Kinds of units that are branches, or whole blocks of them."""


@dataclass(frozen=True)
class Dropped:
    """A unit that was left out.

    Attributes:
        unit: its name: of a branch, or of a block's module.
        score: what the criterion said of it.
        left: cost of the model without it and those before, in the target's measure.
    """

    unit: str
    score: float
    left: float


def depth_units(coupling: CouplingGraph, kinds: Collection[str]) -> Units:
    """The units of these kinds, in the order of the graph.

    Raises:
        PlanError: there are none, or blocks together with branches that are parts of them.
    """
    if BLOCK in kinds and len(kinds) > 1:
        raise PlanError("whole blocks and branches inside them cannot be units of one run")
    units = (
        blocks(coupling.branches)
        if BLOCK in kinds
        else {branch.name: (branch,) for branch in coupling.branches if branch.kind in kinds}
    )
    if not units:
        known = sorted({branch.kind for branch in coupling.branches})
        raise PlanError(
            f"the model has no residual branches of kind {', '.join(sorted(kinds))}",
            fix=f"it has {', '.join(known)}" if known else "prune its width",
        )
    return units


def prune_depth(
    coupling: CouplingGraph,
    kinds: Collection[str],
    goal: Goal,
    criterion: Any,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    progress: Progress = silent,
) -> tuple[tuple[str, ...], tuple[Dropped, ...]]:
    """Leave units out in the criterion's order, as many as come nearest to the target.

    Returns:
        Names of the branches that go, in the order of the graph, and a report a unit.

    Raises:
        PlanError: a criterion that does not rank depth, or a target that no number of whole units
            comes near (it says what the nearest is).
    """
    if not isinstance(criterion, DepthCriterion):
        raise PlanError(
            f"{type(criterion).__name__} ranks units of width, not branches or blocks",
            fix="use importance=block-influence, divergence or last-first",
        )
    units = depth_units(coupling, kinds)
    wanted, before = goal.of - goal.remove, goal.of
    found: list[Dropped] = []
    gone: list[Branch] = []
    for unit, score in criterion.removals(coupling.program, units, batches, progress):
        if len(gone) + len(units[unit]) == len(coupling.branches):
            break
        names = _in_order(coupling, [*gone, *units[unit]])
        left = _cost(drop(coupling, names), goal)
        if abs(left - wanted) > abs(before - wanted):
            break
        gone, before = [*gone, *units[unit]], left
        found.append(Dropped(unit, score, left))
        if left <= wanted:
            break
    if not found:
        raise PlanError(
            f"{goal.target}: leaving out one unit goes further past the target than none",
            so=f"{amount(goal.target.kind, goal.remove)} were to go",
            fix="ask for more, or prune width",
        )
    goal.check_left(before)
    return _in_order(coupling, gone), tuple(found)


def _in_order(coupling: CouplingGraph, branches: Collection[Branch]) -> tuple[str, ...]:
    names = {branch.name for branch in branches}
    return tuple(branch.name for branch in coupling.branches if branch.name in names)


def _cost(coupling: CouplingGraph, goal: Goal) -> float:
    if goal.target.kind == "ratio":
        return sum(block_parameters(coupling).values())
    return measure_for(goal.target.kind, coupling).whole()

"""Depth: a program without some of its residual branches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx

from prunec.errors import PlanError, VerifyError
from prunec.graph.branches import Branch
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.program import Program
from prunec.graph.sums import operator_name
from prunec.passes.verify import relative_difference


def choose_branches(coupling: CouplingGraph, names: Sequence[str]) -> tuple[Branch, ...]:
    """Branches by name, in the order of the graph.

    Raises:
        PlanError: an unknown name (the nearest are given), a repeated one, or every branch.
    """
    for name in names:
        coupling.branch(name)
    if len(set(names)) < len(names):
        raise PlanError("the plan drops a branch twice", where=", ".join(names))
    if names and len(names) == len(coupling.branches):
        raise PlanError("every branch would go", fix="keep at least one")
    return tuple(branch for branch in coupling.branches if branch.name in names)


def drop(coupling: CouplingGraph, names: Sequence[str]) -> CouplingGraph:
    """The coupling of what is left of a program without the branches of these names.

    Names of groups and parameters stay, so that a plan can go on from here.

    Raises:
        PlanError: as `choose_branches`.
    """
    branches = choose_branches(coupling, names)
    return couple(drop_branches(coupling.program, branches)) if branches else coupling


def drop_branches(program: Program, branches: Iterable[Branch]) -> Program:
    """A program whose residual sums pass the stream on in place of these branches.

    Parameters that only they read are gone from it.
    """
    gone = {node for branch in branches for node in branch.nodes}
    zero = {branch.exit for branch in branches}
    names = {name for branch in branches for name in branch.parameters}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in gone or (node.op == "placeholder" and program.bindings.get(node.name) in names):
            continue
        if zero.isdisjoint(node.all_input_nodes):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        elif (kept := _left_of_sum(node, zero)) is None:
            zero.add(node)
        else:
            copies[node] = _like(node, kept, copies[kept], graph)
    graph.eliminate_dead_code()
    graph.lint()
    return replace(
        program,
        graph_module=fx.GraphModule(program.graph_module, graph),
        bindings={node: name for node, name in program.bindings.items() if name not in names},
        state={name: value for name, value in program.state.items() if name not in names},
        parameters=program.parameters - names,
        tied={alias: name for alias, name in program.tied.items() if name not in names},
    )


def _left_of_sum(node: fx.Node, zero: Collection[fx.Node]) -> fx.Node | None:
    """The other operand of an addition of zero; None where the result is zero too."""
    if operator_name(node) != "add":
        return None
    return next((operand for operand in node.all_input_nodes if operand not in zero), None)


def _like(node: fx.Node, kept: fx.Node, copy: fx.Node, graph: fx.Graph) -> fx.Node:
    """What stands for a sum: its one operand, in the number format of the sum."""
    dtype = node.meta["val"].dtype
    if kept.meta["val"].dtype == dtype:
        return copy
    cast = graph.call_function(torch.ops.aten.to.dtype, (copy, dtype))
    cast.meta = dict(node.meta)
    return cast


def silence(program: Program, branches: Iterable[Branch]) -> Program:
    """The oracle of `drop_branches`: the same program, what these branches add times zero."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    ends = {branch.exit for branch in branches}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node in ends:
            copies[node] = graph.call_function(torch.ops.aten.mul.Scalar, (copies[node], 0.0))
    return replace(program, graph_module=fx.GraphModule(program.graph_module, graph))


def verify_dropped(
    coupling: CouplingGraph, names: Sequence[str], *, tolerance: float = 1e-4
) -> float:
    """How far dropping is from multiplying by zero on the traced inputs; VerifyError if too far."""
    program, branches = coupling.program, choose_branches(coupling, names)
    reference = silence(program, branches).run(None, **dict(program.example))
    result = drop_branches(program, branches).run(None, **dict(program.example))
    difference = relative_difference(result, reference)
    if not difference <= tolerance:
        raise VerifyError(
            f"the model without {', '.join(names)} differs from the masked one by "
            f"{difference:.2g} (relative)",
            so="nothing was written",
            fix="please report the model: a branch was found that is none",
        )
    return difference

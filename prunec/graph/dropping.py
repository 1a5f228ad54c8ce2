"""Programs without some of their residual branches, and the oracle that they are held to."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import fx

from prunec.graph.branches import Branch
from prunec.graph.program import Program
from prunec.graph.sums import operator_name


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

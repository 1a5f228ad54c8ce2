"""One walk over a Program that gives every axis of every value its Dim."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunec.errors import DimError, MissingRule
from prunec.graph.dims import Dim
from prunec.graph.program import Program, source_line
from prunec.graph.rules import Call, Rule, Rules, Value, installed_rules
from prunec.graph.rules.registry import Result, known_size, result_tensors


@dataclass
class Layout:
    """The axes of every value in a Program.

    Attributes:
        values: per node, one Value a result.
        parameters: canonical parameter (buffer, constant) name -> its axes.
        data: nodes that depend on the user's inputs.
        missing: operators without a rule -> how often they occur.
        problems: node name -> why its axes could not be followed.
    """

    values: dict[fx.Node, list[Value]] = field(default_factory=dict)
    parameters: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    data: set[fx.Node] = field(default_factory=set)
    missing: Counter[str] = field(default_factory=Counter)
    problems: dict[str, str] = field(default_factory=dict)

    def dims(self, node: fx.Node) -> tuple[Dim, ...]:
        return self.values[node][0].dims

    def call(self, node: fx.Node) -> Call:
        return Call(node, self.values, self.data)


def propagate(program: Program, *, rules: Rules | None = None, strict: bool = False) -> Layout:
    """Walk the graph once and relate all axes.

    Args:
        strict: raise where an operator has no rule, instead of pinning what it touches.

    Raises:
        MissingRule: with ``strict``, naming the operator and the source line.
    """
    layout = Layout()
    read = {program.bindings.get(node.name) for node in program.graph.nodes if node.users}
    rules = installed_rules() if rules is None else rules
    for node in program.graph.nodes:
        if node.op == "placeholder":
            _placeholder(layout, program, node, read)
        elif node.op == "output":
            _output(layout, node)
        elif node.op == "call_function":
            if any(source in layout.data for source in node.all_input_nodes):
                layout.data.add(node)
            _visit(layout, node, rules, strict)
    return layout


def _placeholder(
    layout: Layout, program: Program, node: fx.Node, read: Collection[str | None]
) -> None:
    """Axes of an input, or of a parameter; of one that nothing reads, nothing is known."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return
    name = program.bindings.get(node.name)
    if name is None:
        layout.data.add(node)
        dims = tuple(Dim(int(size), f"{node.name}[{i}]") for i, size in enumerate(value.shape))
        for dim in dims:
            dim.pin("an axis of the input", node.name)
    elif name in layout.parameters:
        dims = layout.parameters[name]
    else:
        dims = tuple(Dim(int(size), f"{name}[{i}]") for i, size in enumerate(value.shape))
        layout.parameters[name] = dims
        if name not in read:
            _pin_all(dims, "the traced forward does not read it", node.name)
    layout.values[node] = [Value(dims)]


def _output(layout: Layout, node: fx.Node) -> None:
    for result in pytree.tree_leaves(node.args):
        if isinstance(result, fx.Node) and result in layout.values:
            for value in layout.values[result]:
                for dim in value.dims:
                    dim.pin("an axis of the output", node.name)


def _visit(layout: Layout, node: fx.Node, rules: Rules, strict: bool) -> None:
    if node.target is operator.getitem:
        source, position = node.args
        if isinstance(source, fx.Node) and source in layout.values:
            layout.values[node] = [layout.values[source][int(str(position))]]
        return
    if not result_tensors(node):
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        _barrier(layout, node, f"no dim rule for {node.target}")
        layout.missing[str(node.target)] += 1
        return
    rule = rules.find(node.target)
    if rule is None:
        _missing(layout, node, strict)
        return
    call = layout.call(node)
    try:
        layout.values[node] = _results(call, rule)
    except DimError as error:
        layout.problems[node.name] = str(error)
        _barrier(layout, node, str(error))


def _results(call: Call, rule: Rule) -> list[Value]:
    """Run a rule, settle what integers mean, and hold the rule to the shapes of the results."""
    values = _as_values(rule.propagate(call))
    if rule.usage == "move" and values and values[0].domain is None:
        domains = [d for node in call.operands if (d := call.domain(node)) is not None]
        if domains:
            for other in domains[1:]:
                call.unify(domains[0].dim, other.dim)
            values = [Value(value.dims, domains[0]) for value in values]
    elif rule.usage == "compute":
        for node in call.operands:
            call.use_as_number(call.domain(node))
    _pin_unknown_sizes(call, values)
    sizes = [[dim.size for dim in value.dims] for value in values]
    if sizes != call.shapes:
        raise DimError(f"the rule of {call.name} says {sizes} for results of {call.shapes}")
    return values


def _pin_unknown_sizes(call: Call, values: Sequence[Value]) -> None:
    for value, tensor in zip(values, result_tensors(call.node), strict=False):
        sizes: Iterable[object] = tensor.shape
        for dim, size in zip(value.dims, sizes, strict=False):
            if not isinstance(size, int):
                dim.pin("its size depends on the data", call.node.name)


def _as_values(result: Result) -> list[Value]:
    if isinstance(result, Value):
        return [result]
    if result and isinstance(result[0], Value):
        return [value for value in result if isinstance(value, Value)]
    return [Value(tuple(dim for dim in result if isinstance(dim, Dim)))]


def _missing(layout: Layout, node: fx.Node, strict: bool) -> None:
    name = str(node.target)
    layout.missing[name] += 1
    if strict:
        raise MissingRule(
            f"no dim rule for {name}",
            where=source_line(node),
            fix=f'RULES.spec("{name}", "... a -> ... a"), see docs/rules.md',
        )
    _barrier(layout, node, f"no dim rule for {name}")


def _barrier(layout: Layout, node: fx.Node, reason: str) -> None:
    """Never guess: pin every axis that this node reads or writes."""
    for source in node.all_input_nodes:
        for value in layout.values.get(source, []):
            _pin_all(value.dims, reason, node.name)
            if value.domain is not None:
                value.domain.dim.pin(reason, node.name)
    results = []
    for position, tensor in enumerate(result_tensors(node)):
        label = f"{node.name}.{position}"
        dims = tuple(Dim(known_size(size), f"{label}[{i}]") for i, size in enumerate(tensor.shape))
        _pin_all(dims, reason, node.name)
        results.append(Value(dims))
    layout.values[node] = results


def _pin_all(dims: Sequence[Dim], reason: str, node: str) -> None:
    for dim in dims:
        dim.pin(reason, node)

"""A sliced graph that takes any batch size, where the module itself cannot have the new sizes.

A traced graph holds the batch size as numbers in its calls. Traced and sliced at two batch sizes
it is twice the same graph, but for those numbers; each is then `a * batch + b`. The graph with
these formulas in it is run at two further sizes and compared with what is traced and sliced there.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prunec.errors import PrunecError
from prunec.graph.coupling import couple
from prunec.graph.program import Program
from prunec.graph.trace import in_eval, of_containers, result_tensors, trace
from prunec.passes.depth import drop
from prunec.passes.oracles.mask import relative_difference
from prunec.passes.plan import Plan
from prunec.passes.slice import bound_module, slice_program

log = logging.getLogger(__name__)

_TRACED, _TRIED = (2, 3), (1, 5)  # batch sizes
_EXACT = 1e-5


def as_graph(model: nn.Module, plan: Plan, program: Program) -> tuple[fx.GraphModule, bool]:
    """A sliced program as a module of its own, and whether it takes any batch size.

    It is called as the model is and returns what the model does, where that is a tensor or a tuple,
    list or dict of tensors. It is in eval mode: dropout is gone, statistics of norms are fixed.

    Args:
        program: sliced; its tensors become the module's.
    """
    free = None if program.added else _for_any_batch(model, plan, program)
    module = bound_module(free or program)
    _return_as(module, model, program.example)
    return module, free is not None


def _for_any_batch(model: nn.Module, plan: Plan, program: Program) -> Program | None:
    try:
        first, second = (_sliced_at(batch, model, plan, program) for batch in _TRACED)
        found = replace(program, graph_module=_Joint(first, second).graph_module())
        for batch in _TRIED:
            wanted = _sliced_at(batch, model, plan, program)
            outputs = found.graph_module(*wanted.arguments(None, wanted.example))
            difference = relative_difference(outputs[0], wanted.run(None, **wanted.example))
            if not difference <= _EXACT:
                raise _DifferentError(f"off by {difference:.1e} at a batch of {batch}")
    except (PrunecError, _DifferentError, RuntimeError) as error:
        log.info("the graph holds for one batch size alone: %s", error)
        return None
    return found


class _DifferentError(Exception):
    """Two traces differ in more than numbers that follow the batch size."""


def _sliced_at(batch: int, model: nn.Module, plan: Plan, program: Program) -> Program:
    """The model traced at this batch size, sliced as the program is, with its tensors."""
    size = next((len(value) for value in program.example.values() if value.ndim), 0)
    example = {
        name: value[torch.arange(batch) % size] if value.ndim and len(value) == size else value
        for name, value in program.example.items()
    }
    coupling = drop(couple(trace(model, example)), plan.dropped)
    state = {
        name: program.state.get(name, tensor) for name, tensor in coupling.program.state.items()
    }
    return slice_program(coupling, plan.selection(coupling), state)


@dataclass
class _Joint:
    """Two graphs of the same calls as one whose numbers follow the batch size."""

    first: Program
    second: Program
    graph: fx.Graph = field(default_factory=fx.Graph)
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict)
    twins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    batch: fx.Node | None = None

    def graph_module(self) -> fx.GraphModule:
        """Raises _DifferentError where they are not the same calls."""
        ours, theirs = list(self.first.graph.nodes), list(self.second.graph.nodes)
        if len(ours) != len(theirs):
            raise _DifferentError("other calls")
        for node, twin in zip(ours, theirs, strict=True):
            if (node.op, node.target) != (twin.op, twin.target):
                raise _DifferentError(f"{node.target} and {twin.target}")
            if node.op == "call_function" and self.batch is None:
                self.batch = self._batch()
            args = self._joined(node.args, twin.args)
            kwargs = self._joined(dict(node.kwargs), dict(twin.kwargs))
            self.copies[node] = self.graph.create_node(
                node.op, node.target, args, kwargs, node.name
            )
            self.twins[twin] = node
        self._check_constants()
        self.graph.lint()
        return fx.GraphModule(self.first.graph_module, self.graph)

    def _batch(self) -> fx.Node:
        wanted = next(name for name, value in self.first.example.items() if value.ndim)
        given = next(n for n in self.copies if self.first.inputs.get(n.name) == wanted)
        return self.graph.call_function(torch.ops.aten.sym_size.int, (self.copies[given], 0))

    def _joined(self, ours: Any, theirs: Any) -> Any:
        if isinstance(ours, fx.Node):
            if self.twins.get(theirs) is not ours:
                raise _DifferentError(f"another operand than {ours.name}")
            return self.copies[ours]
        if isinstance(ours, tuple | list) and len(ours) == len(theirs):
            made = [self._joined(a, b) for a, b in zip(ours, theirs, strict=True)]
            return tuple(made) if isinstance(ours, tuple) else made
        if isinstance(ours, dict) and ours.keys() == theirs.keys():
            return {key: self._joined(value, theirs[key]) for key, value in ours.items()}
        if ours == theirs:
            return ours
        if type(ours) is int and type(theirs) is int:
            return self._formula(ours, theirs)
        raise _DifferentError(f"{ours} and {theirs}")

    def _formula(self, ours: int, theirs: int) -> fx.Node:
        slope, rest = divmod(theirs - ours, _TRACED[1] - _TRACED[0])
        offset = ours - slope * _TRACED[0]
        if rest or self.batch is None:
            raise _DifferentError(f"{ours} and {theirs}")
        node = self.batch
        if slope != 1:
            node = self.graph.call_function(operator.mul, (node, slope))
        return self.graph.call_function(operator.add, (node, offset)) if offset else node

    def _check_constants(self) -> None:
        """What is no parameter must not follow the batch size either."""
        for name, tensor in self.first.state.items():
            other = self.second.state.get(name)
            if other is not tensor and not (other is not None and torch.equal(tensor, other)):
                raise _DifferentError(f"another constant {name}")


@torch.no_grad()
def _return_as(module: fx.GraphModule, model: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Let the graph return its results in the containers in which the model does."""
    place = next((parameter.device for parameter in model.parameters()), None)
    with in_eval(model):
        output = model(**{name: value.to(place) for name, value in example.items()})
    leaves, form = pytree.tree_flatten(output)
    picked = result_tensors(output)
    (node,) = module.graph.find_nodes(op="output")
    results = node.args[0]
    same = [id(leaf) for leaf in leaves] == [id(tensor) for tensor in picked]
    if same and len(picked) == len(results) and of_containers(output):
        node.args = (pytree.tree_unflatten(list(results), form),)
        module.recompile()

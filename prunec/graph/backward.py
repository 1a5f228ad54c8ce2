"""Gradients of a scalar program by parameter, one segment of the graph at a time.

Reverse mode over a whole model holds its activations and a gradient of every parameter. Here a
first pass keeps only what crosses from one repeated block to the next; then the blocks are run
again from the last to the first, each for all samples, and the gradients of a block are handed on
before the next block's begin. So at any time one block's gradients exist: activation
checkpointing (Chen et al., arXiv 1604.06174) at the borders that the graph itself has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunec.errors import TraceError, VerifyError
from prunec.events import Progress, silent
from prunec.graph.inline import has_gradient
from prunec.graph.paths import block_of
from prunec.graph.program import Program, module_path, source_line

Values = dict[fx.Node, Any]
Sensitivity = dict[fx.Node, dict[int, Tensor]]
"""d loss / d value, by the value's node and the tensor's place in it."""


class GradientVisitor(Protocol):
    """Who is shown the gradients."""

    def update(self, parameter: str, gradient: Tensor) -> None:
        """The gradient of one sample's loss by a parameter, on the device of the computation."""

    def finish(self, parameter: str) -> None:
        """All samples of this parameter were shown."""


@dataclass(frozen=True)
class _Segment:
    """A stretch of calls.

    Attributes:
        inputs: values from earlier stretches that it reads.
        results: values of it that later stretches read, the loss among them.
        wanted: the parameters that are differentiated in it.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    wanted: tuple[str, ...]


def differentiate(
    program: Program,
    samples: Sequence[Mapping[str, Tensor]],
    weight: Callable[[str], Tensor],
    wanted: Collection[str],
    visitor: GradientVisitor,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> None:
    """Show a visitor d loss / d parameter of every sample, parameter by parameter.

    Args:
        program: one floating-point scalar output, see :func:`prunec.graph.trace.trace_loss`.
        samples: inputs by name, each of the traced shapes.
        weight: a parameter, buffer or constant by canonical name; not changed.
        wanted: the parameters; one that the program does not read is shown no gradient.

    Raises:
        VerifyError: a loss is NaN or infinite, naming the sample.
        TraceError: an operator has no derivative, or none of `wanted` has a gradient.
    """
    _Reverse(program, weight, wanted, torch.device(device)).run(samples, visitor, progress)


class _Reverse:
    def __init__(
        self,
        program: Program,
        weight: Callable[[str], Tensor],
        wanted: Collection[str],
        device: torch.device,
    ):
        self._program = program
        self._weight = weight
        self._wanted = wanted
        self._device = device
        names = program.bindings
        data = _reached(program, lambda node: node.name in program.inputs)
        self._varied = _reached(program, lambda node: names.get(node.name) in wanted)
        (output,) = program.graph.find_nodes(op="output")
        self._loss: fx.Node = output.args[0][0]
        if self._loss not in self._varied:
            raise _no_gradient()
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        # What depends on neither is the same for all samples and has no gradient.
        self._calls = [node for node in calls if node in data or node in self._varied]
        self._constants = [n for n in calls if n not in data and n not in self._varied]
        # A value at a border is read again on the way back, so no call may write into it.
        self._writes = any(_is_mutating(node) for node in calls)
        self._segments = self._cut()
        self._shared: Values = {}

    def run(
        self, samples: Sequence[Mapping[str, Tensor]], visitor: GradientVisitor, progress: Progress
    ) -> None:
        count, shown = len(self._segments), not samples
        with progress.task("gradients", total=len(samples) + count) as task:
            with torch.no_grad():
                self._execute(self._constants, self._shared, {})
            kept = []
            for number, sample in enumerate(samples):
                kept.append(self._forward(sample, number))
                task.advance()
            sensitivities: list[Sensitivity] = [{} for _ in samples]
            for segment in reversed(self._segments):
                leaves = {
                    name: self._tensor(name).detach().requires_grad_() for name in segment.wanted
                }
                for borders, sensitivity in zip(kept, sensitivities, strict=True):
                    entering = _moved(borders.pop(), self._device)
                    found = self._backward(segment, entering, sensitivity, leaves)
                    for name, gradient in found.items():
                        visitor.update(name, gradient)
                    shown = shown or bool(found)
                for name in segment.wanted:
                    visitor.finish(name)
                task.advance()
        if not shown:
            raise _no_gradient()

    def _cut(self) -> list[_Segment]:
        """Cut where the repeated block changes, but never between two uses of one parameter."""
        places = [block_of(module_path(node)) for node in self._calls]
        number = list(accumulate((a != b for a, b in pairwise(places)), initial=0))
        uses: dict[str, list[int]] = {}
        for node, here in zip(self._calls, number, strict=True):
            for name in self._wanted_by(node):
                uses.setdefault(name, []).append(here)
        merged = _merge(number[-1] + 1, [(found[0], found[-1]) for found in uses.values()])
        stretches: dict[int, list[fx.Node]] = {}
        for node, here in zip(self._calls, number, strict=True):
            stretches.setdefault(merged[here], []).append(node)
        return [self._segment(nodes) for nodes in stretches.values()]

    def _segment(self, nodes: list[fx.Node]) -> _Segment:
        inside = set(nodes)
        here = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
        computed = set(self._calls)
        return _Segment(
            nodes=tuple(nodes),
            inputs=tuple(
                node
                for node in here
                if node not in inside and (node in computed or node.name in self._program.inputs)
            ),
            results=tuple(
                node
                for node in nodes
                if node is self._loss or any(user not in inside for user in node.users)
            ),
            wanted=tuple(dict.fromkeys(name for node in nodes for name in self._wanted_by(node))),
        )

    def _wanted_by(self, node: fx.Node) -> list[str]:
        names = (self._program.bindings.get(source.name) for source in node.all_input_nodes)
        return [name for name in names if name is not None and name in self._wanted]

    def _forward(self, sample: Mapping[str, Tensor], number: int) -> list[Values]:
        """What enters each segment, for one sample."""
        self._program.check_inputs(sample)
        names = self._program.inputs
        live: Values = {
            node: sample[names[node.name]].to(self._device)
            for node in self._program.graph.find_nodes(op="placeholder")
            if node.name in names
        }
        kept = []
        with torch.no_grad():
            for segment in self._segments:
                entering = {node: live[node] for node in segment.inputs}
                kept.append(_moved(entering, torch.device("cpu")))
                inner = self._writable(entering)
                self._execute(segment.nodes, inner, {})
                live.update({node: inner[node] for node in segment.results})
        if not bool(live[self._loss].isfinite().all()):
            raise VerifyError(
                f"the loss of calibration sample {number} is {float(live[self._loss])}",
                where=source_line(self._loss),
                fix="look at its labels (are all of them masked?) and at the weights",
            )
        return kept

    def _backward(
        self,
        segment: _Segment,
        entering: Values,
        sensitivity: Sensitivity,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Gradients by the segment's parameters; those by its inputs join ``sensitivity``."""
        leaves = {
            node: pytree.tree_map(_leaf, value) if node in self._varied else value
            for node, value in entering.items()
        }
        inputs = [
            (node, i, tensor)
            for node, value in leaves.items()
            for i, tensor in enumerate(_tensors(value))
            if tensor.requires_grad
        ]
        if not weights and not inputs:
            return {}
        with torch.enable_grad():
            live = self._writable(leaves)
            self._execute(segment.nodes, live, weights)
        pairs = [
            (tensor, cotangent)
            for node in segment.results
            for tensor, cotangent in self._cotangents(node, live[node], sensitivity)
        ]
        if not pairs:
            return {}
        results, cotangents = zip(*pairs, strict=True)
        sources = [*weights.values(), *(tensor for _, _, tensor in inputs)]
        found = _grad(results, sources, cotangents, segment)
        for (node, i, _), gradient in zip(inputs, found[len(weights) :], strict=True):
            if gradient is not None:
                known = sensitivity.setdefault(node, {})
                known[i] = known[i] + gradient if i in known else gradient
        by_weight = zip(weights, found, strict=False)
        return {name: gradient for name, gradient in by_weight if gradient is not None}

    def _writable(self, entering: Values) -> Values:
        return (
            pytree.tree_map_only(Tensor, Tensor.clone, entering) if self._writes else dict(entering)
        )

    def _cotangents(
        self, node: fx.Node, value: Any, sensitivity: Sensitivity
    ) -> list[tuple[Tensor, Tensor]]:
        if node is self._loss:
            return [(value, torch.ones_like(value))] if value.requires_grad else []
        tensors = _tensors(value)
        found = sensitivity.pop(node, {}).items()
        return [(tensors[i], cotangent) for i, cotangent in found if tensors[i].requires_grad]

    def _execute(
        self, nodes: Sequence[fx.Node], live: Values, weights: Mapping[str, Tensor]
    ) -> None:
        def fetch(node: fx.Node) -> Any:
            if node in live:
                return live[node]
            if node in self._shared:
                return self._shared[node]
            name = self._program.bindings[node.name]
            return weights[name] if name in weights else self._tensor(name)

        enabled = torch.is_grad_enabled()
        for node in nodes:
            target: Any = node.target
            with torch.set_grad_enabled(enabled and has_gradient(node)):
                live[node] = target(*fx.map_arg(node.args, fetch), **fx.map_arg(node.kwargs, fetch))

    def _tensor(self, name: str) -> Tensor:
        return self._weight(name).to(self._device)


def _grad(
    results: Sequence[Tensor],
    sources: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    segment: _Segment,
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(results, sources, cotangents, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        if "out of memory" in str(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise TraceError(
            f"this part of the model cannot be differentiated: {first}",
            where=source_line(segment.nodes[0]),
            fix="use a criterion without gradients, such as obs or wanda",
        ) from error


def _no_gradient() -> TraceError:
    return TraceError(
        "the loss has no gradient in any weight that could go",
        fix="return what follows from the model's output, without detach() or item()",
    )


def _reached(program: Program, start: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The placeholders for which ``start`` holds, and everything computed from them."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if start(node):
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _merge(count: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """New number of each of ``count`` stretches once those that a span covers are one.

    >>> _merge(5, [(1, 2), (2, 3)])
    [0, 1, 1, 1, 2]
    """
    joined = [False] * count  # to the one before
    for first, last in spans:
        for i in range(first + 1, last + 1):
            joined[i] = True
    merged: list[int] = []
    for joins in joined:
        merged.append(merged[-1] if joins else merged[-1] + 1 if merged else 0)
    return merged


def _is_mutating(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _moved(values: Values, device: torch.device) -> Values:
    moved: Values = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values)
    return moved


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value

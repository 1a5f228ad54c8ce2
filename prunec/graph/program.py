"""A traced model: one flat graph of ATen calls, the tensors it reads, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from prunec.errors import TraceError


@dataclass(frozen=True)
class Program:
    """A model as a flat graph.

    Attributes:
        graph_module: a static export: every parameter, buffer, constant and input is a placeholder,
            every other node an ATen call with literal sizes; the output node holds a tuple.
        bindings: placeholder name -> name of the parameter, buffer or constant that it stands for.
            Tied parameters share one canonical name.
        inputs: placeholder name -> name of the user's input.
        state: the bound tensors by canonical name.
        parameters: names of the bound tensors that are parameters (trainable or not).
        tied: other names of a parameter -> its canonical name.
        example: the inputs the program was traced with; the graph holds for their shapes only.
        buffers: names of the bound tensors that are buffers (saved with the model or not).
        vacant: names of parameters that the model's modules have a place for but lack, such as
            the bias of a linear layer without one.
    """

    graph_module: fx.GraphModule
    bindings: Mapping[str, str]
    inputs: Mapping[str, str]
    state: Mapping[str, Tensor]
    parameters: frozenset[str]
    tied: Mapping[str, str]
    example: Mapping[str, Tensor] = field(repr=False)
    buffers: frozenset[str] = frozenset()
    vacant: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def added(self) -> frozenset[str]:
        """Names of bound tensors that fill a vacant place: the model itself lacks them."""
        return self.vacant & self.state.keys()

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Raises TraceError where names or shapes differ from those traced."""
        wanted = {name: tuple(value.shape) for name, value in self.example.items()}
        given = {name: tuple(value.shape) for name, value in inputs.items()}
        if wanted != given:
            raise TraceError(
                f"the program was traced for inputs {wanted}, not {given}",
                fix="trace the model again with inputs of these shapes",
            )

    def arguments(
        self, state: Mapping[str, Tensor] | None, inputs: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """What the graph's placeholders stand for, in order; TraceError for other inputs.

        Inputs come to the device of the tensors.
        """
        self.check_inputs(inputs)
        tensors = self.state if state is None else state
        first = next(iter(sorted(self.parameters)), None)
        device = None if first is None else tensors[first].device
        return [
            tensors[self.bindings[node.name]]
            if node.name in self.bindings
            else inputs[self.inputs[node.name]].to(device)
            for node in self.graph.nodes
            if node.op == "placeholder"
        ]

    def run(self, state: Mapping[str, Tensor] | None = None, **inputs: Tensor) -> Tensor:
        """The first output for these inputs; ``state`` stands in for the program's own tensors."""
        with torch.no_grad():
            outputs = self.graph_module(*self.arguments(state, inputs))
        first = outputs[0]
        if not isinstance(first, Tensor):
            raise TraceError("the program's first output is no tensor")
        return first


def source_line(node: fx.Node) -> str:
    """``module.path (file.py:12)  code`` of the call that made this node, as far as recorded."""
    path = module_path(node)
    lines = [line.strip() for line in str(node.meta.get("stack_trace", "")).strip().splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ")]
    # A functional call ends in torch's own file; the user's line is the last one outside it.
    own = [i for i in frames if "/torch/" not in lines[i]] or frames
    if not own:
        return path
    frame, *code = lines[own[-1] : own[-1] + 2]
    file, _, rest = frame.removeprefix("File ").partition(", line ")
    name = file.strip('"').rsplit("/", 1)[-1]
    shown = f"{path} ({name}:{rest.partition(',')[0]})"
    return f"{shown}  {code[0]}" if code and not code[0].startswith("File ") else shown


def module_path(node: fx.Node) -> str:
    """The path of the innermost module in which this node was traced, in the model's own names."""
    return str(node.meta.get("module", ""))

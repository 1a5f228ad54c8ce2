"""Run a program over many batches at once, stopping where a decision is due.

Layer-wise pruning needs the inputs of each site after everything before it was pruned. A Stream
keeps the live values of every batch, advances all of them to the next site, and when units are
removed it slices the live values that carry them: time linear in depth, for any architecture,
without a hook or a list of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from prunec.errors import CalibrationError, TraceError, VerifyError
from prunec.graph.dims import Dim
from prunec.graph.padding import Padding
from prunec.graph.program import Program, source_line
from prunec.graph.propagate import Layout
from prunec.graph.resize import ResizedCall, resized_call
from prunec.graph.selection import Selection
from prunec.graph.waiting import Either, Environment, Place, of_tensors, present

Visitor = Callable[[int, Tensor], None]
Reader = Callable[[fx.Node], Tensor]


class Stream:
    """All calibration batches on their way through one program.

    Args:
        batches: inputs by name, each of the traced shapes.
        weight: gives the present tensor of a parameter, buffer or constant by canonical name,
            already at the size that the present selection leaves.
        device: where values are computed.
        place: where the batches' values wait between two stops, by default `Either`.
        hold_bytes: how much the values held between two stops may take before they are computed
            twice instead; by default half of what the program's tensors take.
    """

    def __init__(
        self,
        program: Program,
        layout: Layout,
        batches: Sequence[Mapping[str, Tensor]],
        weight: Callable[[str], Tensor],
        *,
        device: torch.device | str = "cpu",
        place: Place | None = None,
        hold_bytes: int | None = None,
        selection: Selection | None = None,
    ):
        self.program = program
        self.layout = layout
        self.selection = selection or Selection()
        self._weight = weight
        self._device = torch.device(device)
        self._place = place or Either()
        self._nodes = [node for node in program.graph.nodes if node.op != "output"]
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._last_use = self._find_last_uses()
        self._live_elements = self._count_live()
        self._cursor = 0
        self._last_stop = -1
        self._shared_until = 0
        self._anchors: dict[str, int] = {}
        sizes = [tensor.nbytes for tensor in program.state.values()]
        self._hold_bytes = sum(sizes) // 2 if hold_bytes is None else hold_bytes
        self._shared: Environment = {}
        self._live = [self._place.keep(self._start(batch), {}) for batch in batches]
        self._padding = Padding(program, batches)

    def _start(self, batch: Mapping[str, Tensor]) -> Environment:
        self.program.check_inputs(batch)
        names = self.program.inputs
        return {
            node: batch[names[node.name]]
            for node in self._nodes
            if node.op == "placeholder" and node.name in names
        }

    def _find_last_uses(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(self._nodes):
            for source in node.all_input_nodes:
                last[source] = i
        for output in self.program.graph.find_nodes(op="output"):
            for source in output.all_input_nodes:
                last[source] = len(self._nodes)
        return last

    def _count_live(self) -> list[int]:
        """Per node, the elements of a batch's values that wait when it is about to run."""
        steps = [0] * (len(self._nodes) + 1)
        for node in self._nodes:
            if node in self.layout.data and node in self._last_use:
                values = self.layout.values.get(node, [])
                elements = sum(math.prod(dim.size for dim in value.dims) for value in values)
                steps[self._position[node] + 1] += elements
                if self._last_use[node] + 1 < len(steps):
                    steps[self._last_use[node] + 1] -= elements
        return list(accumulate(steps))

    @property
    def batches(self) -> int:
        return len(self._live)

    def weight(self, name: str) -> Tensor:
        """The present tensor of that name, on the device where values are computed."""
        return self._weight(name).to(self._device)

    def advance(self, stop: fx.Node, operand: fx.Node, visit: Visitor) -> None:
        """Run every batch up to, not including, ``stop``; show each its value of ``operand``.

        Raises:
            VerifyError: if a batch produces NaN or Inf there, naming the node.
        """
        for number, read in enumerate(self.walk(stop)):
            visit(number, read(operand))

    @torch.no_grad()
    def walk(self, stop: fx.Node) -> Iterator[Reader]:
        """Run every batch up to, not including, ``stop``; per batch, what reads its values there.

        Two streams that walk side by side show the same batch at the same time. Each walk is to be
        finished before the next begins.

        Where the values of all batches at ``stop`` would take more than ``hold_bytes``, they are
        dropped after the visit and computed again on the next advance, from the place behind the
        last stop where least is alive: a wide site then costs time instead of memory. So they are
        where the walk has passed a place that is held (see `hold`).
        """
        end = self._position.get(stop, len(self._nodes))  # the output comes after all
        held_at = min((at for at in self._anchors.values() if at < end), default=end)
        places = range(min(self._last_stop + 1, end), end + 1)
        restart = min(reversed(places), key=self._live_elements.__getitem__)
        restart = max(self._cursor, min(restart, held_at))
        before, after = self._nodes[self._cursor : restart], self._nodes[restart:end]
        self._run_shared(self._nodes[max(self._cursor, self._shared_until) : end])
        calls = self._calls([*before, *after])
        hold = held_at == end
        for number, waiting in enumerate(self._live):
            live = present(waiting, self._device)
            self._run(before, live, calls)
            held = dict(live)
            self._run(after, live, calls)
            yield partial(self._checked, live, number)
            if number == 0:
                hold = hold and _bytes(live) * len(self._live) <= self._hold_bytes
                self._place.expect(_bytes(live if hold else held) * len(self._live))
            self._live[number] = self._place.keep(live if hold else held, waiting)
        self._last_stop = end
        self._cursor = end if hold else restart
        self._drop_shared(self._cursor)

    def hold(self, name: str, start: fx.Node) -> None:
        """Do not go beyond ``start`` for good until `release`: what a later choice changes there
        is computed anew.
        """
        self._anchors[name] = self._position[start]

    def release(self, name: str) -> None:
        """Nothing is held by that name any more."""
        self._anchors.pop(name, None)

    def keep_for(self, stop: fx.Node, values: Iterable[fx.Node]) -> None:
        """Keep values that were computed before until ``stop``, so that they can be read there."""
        for node in values:
            self._last_use[node] = max(self._last_use.get(node, 0), self._position[stop])

    def real_tokens(self, batch: int, node: fx.Node, value: Tensor) -> Tensor | None:
        """Bool over the leading axes of a node's value: which tokens are no padding."""
        return self._padding.real_tokens(batch, node, value)

    @torch.no_grad()  # no context in the body: one that is left half-way would stay
    def finish(self) -> Iterator[Tensor]:
        """Run every batch to the end; yields the program's first output for each."""
        segment = self._nodes[self._cursor :]
        fresh = self._nodes[max(self._cursor, self._shared_until) :]
        (output,) = self.program.graph.find_nodes(op="output")
        result = output.args[0][0]
        self._run_shared(fresh)
        calls = self._calls(segment)
        for waiting in self._live:
            live = present(waiting, self._device)
            waiting.clear()
            self._run(segment, live, calls)
            yield self._value(result, live)
        self._cursor = len(self._nodes)

    def select(self, selection: Selection) -> None:
        """Remove units: every live value that carries them is sliced.

        What depends on weights alone is computed anew, for a weight may have changed otherwise.
        """
        before, self.selection = self.selection, selection
        self._shared.clear()
        for number, waiting in enumerate(self._live):
            carry = {
                node: value
                for node, value in waiting.items()
                if any(self.selection.touches(dim) for dim in self._dims(node))
            }
            live = present(carry, self._device)
            sliced = {node: self._slice(node, value, before) for node, value in live.items()}
            self._live[number] = waiting | self._place.keep(sliced, {})

    def _dims(self, node: fx.Node) -> list[Dim]:
        return [dim for value in self.layout.values.get(node, []) for dim in value.dims]

    def _slice(self, node: fx.Node, value: Any, before: Selection) -> Any:
        dims = [v.dims for v in self.layout.values.get(node, [])]
        if isinstance(value, Tensor):
            return self.selection.take(value, dims[0], before) if dims else value
        if isinstance(value, (list, tuple)):
            return [
                self.selection.take(item, item_dims, before)
                for item, item_dims in zip(value, dims, strict=True)
            ]
        return value

    def _run_shared(self, segment: Sequence[fx.Node]) -> None:
        """What depends on weights and constants only is computed once for all batches."""
        for node in segment:
            if node.op == "call_function" and node not in self.layout.data:
                self._value(node, self._shared)
        if segment:
            self._shared_until = self._position[segment[-1]] + 1

    def _drop_shared(self, end: int) -> None:
        for node in [n for n in self._shared if self._last_use.get(n, -1) < end]:
            del self._shared[node]

    def _calls(self, segment: Sequence[fx.Node]) -> dict[fx.Node, ResizedCall]:
        return {
            node: resized_call(node, self.layout, self.selection)
            for node in segment
            if node.op == "call_function" and node in self.layout.data
        }

    def _run(
        self, segment: Sequence[fx.Node], live: Environment, calls: Mapping[fx.Node, ResizedCall]
    ) -> None:
        for node in segment:
            call = calls.get(node)
            if call is None:
                continue
            live[node] = self._execute(call, live)
            for source in node.all_input_nodes:
                if self._last_use[source] <= self._position[node]:
                    live.pop(source, None)

    def _execute(self, call: ResizedCall, live: Environment) -> Any:
        def fetch(node: fx.Node) -> Any:
            return self._value(node, live)

        args = fx.map_arg(call.args, fetch)
        kwargs = fx.map_arg(call.kwargs, fetch)
        try:
            result = call.target(*args, **kwargs)
        except IndexError as error:
            raise CalibrationError(
                f"the calibration addresses what the model does not have: {error}",
                where=source_line(call.node),
                fix="check its token ids, and that the tokenizer is the model's",
            ) from error
        if call.select and isinstance(result, Tensor):
            return self.selection.take(result, self.layout.dims(call.node))
        return result

    def _value(self, node: fx.Node, live: Environment) -> Any:
        """Of a batch, or shared by all; weights are read here, so that none outlives its call."""
        if node in live:
            return live[node]
        name = self.program.bindings.get(node.name) if node.op == "placeholder" else None
        if name is not None:
            return self.weight(name)
        if node.op != "call_function" or node in self.layout.data:
            raise TraceError(f"the value of {node.name} is gone", where=source_line(node))
        if node not in self._shared:
            call = resized_call(node, self.layout, self.selection)
            self._shared[node] = self._execute(call, self._shared)
        return self._shared[node]

    def _checked(self, live: Environment, number: int, operand: fx.Node) -> Tensor:
        value = self._value(operand, live)
        if not bool(torch.isfinite(value).all()):
            raise VerifyError(
                f"NaN or Inf in {operand.name} for calibration batch {number}",
                where=source_line(operand),
                fix="check the weights and the calibration data, or compute in float32",
            )
        assert isinstance(value, Tensor)
        return value


def _bytes(live: Environment) -> int:
    sizes: list[int] = []
    for value in live.values():
        of_tensors(value, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)

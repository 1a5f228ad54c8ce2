"""Measured latency: a table of what each call takes on this machine at a few widths."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from prunec.errors import PlanError
from prunec.graph.branches import Branch
from prunec.graph.coupling import CouplingGraph
from prunec.graph.program import Program
from prunec.graph.resize import resized_call
from prunec.graph.selection import Keep, Selection
from prunec.importance.problem import FloatArray
from prunec.passes.sites import Site

_WIDTHS = 6
_REPEATS = 7


class LatencyMeasure:
    """Seconds of one forward pass at the traced shape, on this machine, with torch's threads.

    Every call that carries a site's units is timed at six widths of a single group, or at each
    numbers of units that are asked for where several groups share the site; between widths the
    time is interpolated. Calls of equal shapes are timed once. What counts is the part of its
    dense time that a call takes, of the time that it has in a whole pass: alone, it finds its
    weights in the processor's cache.
    """

    def __init__(self, coupling: CouplingGraph):
        self._coupling = coupling
        self._times: dict[object, float] = {}
        self._tables: dict[str, tuple[list[int], list[float]]] = {}

    @cached_property
    def _dense(self) -> Mapping[fx.Node, float]:
        return call_seconds(self._coupling.program)

    def whole(self) -> float:
        """Raises PlanError for a model without weights."""
        if any(tensor.is_meta for tensor in self._coupling.program.state.values()):
            raise PlanError(
                "latency is measured, and a model without weights does not run",
                fix="use another target, or leave out --dry-run",
            )
        return sum(self._dense.values())

    def at(self, site: Site, counts: Mapping[str, int]) -> float:
        full = {group.name: group.size for group in site.groups} | dict(counts)
        if len(site.groups) > 1:
            return self._seconds(site, full)
        (group,) = site.groups
        if site.name not in self._tables:
            grid = np.linspace(group.minimum, group.size, _WIDTHS).round().astype(int)
            widths = sorted({int(width) for width in grid})
            times = [self._seconds(site, {group.name: width}) for width in widths]
            self._tables[site.name] = widths, times
        widths, times = self._tables[site.name]
        return float(np.interp(full[group.name], widths, times))

    def branch(self, site: Site, branch: Branch) -> float:
        return self.at(site, {})

    def added(self, site: Site) -> float:
        return 0.0

    def _seconds(self, site: Site, counts: Mapping[str, int]) -> float:
        selection = Selection(
            {group.dim: Keep(np.arange(group.size) < counts[group.name]) for group in site.groups}
        )
        return sum(
            self._dense[node] * self._alone(node, selection) / self._alone(node, Selection())
            for node in _calls(self._coupling, site)
        )

    def _alone(self, node: fx.Node, selection: Selection) -> float:
        call = resized_call(node, self._coupling.layout, selection)
        sources = list(node.all_input_nodes)
        shapes = {n: self._shape(n, selection) for n in sources}
        literal = fx.map_arg((call.args, dict(call.kwargs)), lambda n: shapes[n])
        key = (str(call.target), repr(literal))
        if key not in self._times:
            tensors = {n: _stand_in(n, shapes[n]) for n in sources}
            args = fx.map_arg(call.args, lambda n: tensors[n])
            kwargs = fx.map_arg(dict(call.kwargs), lambda n: tensors[n])
            with torch.no_grad():
                self._times[key] = fastest(lambda: call.target(*args, **kwargs))
        return self._times[key]

    def _shape(self, node: fx.Node, selection: Selection) -> tuple[int, ...]:
        return tuple(selection.size(dim) for dim in self._coupling.layout.dims(node))


def _calls(coupling: CouplingGraph, site: Site) -> list[fx.Node]:
    """The calls that carry a site's units and take single tensors."""
    leaves = {group.dim.root for group in site.groups}

    def carries(node: fx.Node) -> bool:
        values = coupling.layout.values.get(node, [])
        return any(leaf in leaves for v in values for dim in v.dims for leaf in dim.leaves())

    return [
        node
        for node in coupling.program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and (carries(node) or any(map(carries, node.all_input_nodes)))
        and all(isinstance(source.meta.get("val"), Tensor) for source in node.all_input_nodes)
    ]


def _stand_in(node: fx.Node, shape: tuple[int, ...]) -> Tensor:
    val = node.meta["val"]
    if val.dtype.is_floating_point:
        return torch.randn(shape, dtype=val.dtype)
    return torch.zeros(shape, dtype=val.dtype)


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of some runs, after one to warm up: what a quiet machine takes."""
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


class _Timed(fx.Interpreter):
    """A pass that notes the seconds of every call."""

    def __init__(self, program: Program):
        super().__init__(program.graph_module)
        self._program = program
        self._seconds: list[float] = []

    def seconds(self) -> FloatArray:
        """Of the calls of one pass on the example inputs, in the order of the graph."""
        self._seconds = []
        with torch.no_grad():
            self.run(*self._program.arguments(None, self._program.example))
        return np.array(self._seconds)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super().call_function(target, args, kwargs)
        self._seconds.append(time.perf_counter() - start)
        return result


def call_seconds(program: Program) -> dict[fx.Node, float]:
    """Seconds of every call of a program on its example inputs, each the fastest of some passes.

    So a machine with other work, on which no whole pass is undisturbed, comes to the same.
    """
    passes = _Timed(program)
    taken = [passes.seconds() for _ in range(_REPEATS + 1)][1:]
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return dict(zip(calls, np.min(taken, axis=0).tolist(), strict=True))


def paired_ratio(before: Program, after: Program, pairs: int = 5) -> tuple[float, float]:
    """Time of one program over that of another, measured in turn.

    Returns:
        The ratio, every call at its fastest, and half the spread between the quartiles of the
        pairs' ratios over their median: how disturbed the machine was.
    """
    both = _Timed(before), _Timed(after)
    turns = [[passes.seconds() for passes in both] for _ in range(pairs + 1)][1:]
    ratios = [late.sum() / early.sum() for early, late in turns]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    early, late = (float(np.min(p, axis=0).sum()) for p in zip(*turns, strict=True))
    return late / early, float((high - low) / 2 / middle)

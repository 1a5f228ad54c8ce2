"""The picture of one block: parameters with their axes, each group in its colour."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from torch import fx

from prunec.errors import ExportError
from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.dims import Dim
from prunec.graph.render import palette
from prunec.graph.render.flow import Flow, Step, find_flow, groups_in
from prunec.graph.render.fold import Block, Folding, fold, is_sum
from prunec.graph.render.labels import Key, cell, table, text
from prunec.graph.render.picture import Canvas, Picture

MAX_STEPS = 250


def draw_groups(
    coupling: CouplingGraph, block: str | None = None, values: Mapping[str, float] | None = None
) -> Picture:
    """Draw the groups of one block along its dataflow.

    Args:
        block: path of any module; by default the one that repeats most often.
        values: a figure per group name, to colour by.

    Raises:
        ExportError: if there is no such module, or it holds too much for one picture.
    """
    flow = find_flow(coupling)
    folding = fold(coupling, flow)
    chosen, title = _choose(flow, folding, block)
    return _Groups(coupling, flow, chosen, title, values).draw()


def _choose(flow: Flow, folding: Folding, wanted: str | None) -> tuple[list[int], str]:
    """The steps to draw, and what they are called."""
    blocks = list(folding.blocks())
    if wanted is None:
        if not blocks:
            return [step.index for step in flow.steps if step.module], "the whole model"
        block = max(blocks, key=lambda b: (b.times, len(list(b.steps()))))
        return list(block.steps()), name_block(block)
    for block in blocks:
        if block.module == wanted:
            return list(block.steps()), name_block(block)
    steps = [s.index for s in flow.steps if s.module == wanted or s.module.startswith(wanted + ".")]
    if not steps:
        known = {s.module.rsplit(".", n)[0] for s in flow.steps if s.module for n in range(3)}
        near = get_close_matches(wanted, sorted(known), n=3, cutoff=0.3)
        raise ExportError(
            f"no module {wanted!r} takes part in the model's forward",
            fix=f"nearest: {', '.join(near)}" if near else None,
        )
    if len(steps) > MAX_STEPS:
        raise ExportError(
            f"{wanted} has {len(steps)} steps, too many for one picture",
            fix="name a block inside it",
        )
    return steps, wanted


def name_block(block: Block, below: str = "") -> str:
    """``model.layers.0 to 29 (30 alike)``, relative to the block that it lies in."""
    first, last = block.modules[0][0], block.modules[-1][-1]
    end = last.removeprefix(first.rpartition(".")[0] + ".")
    start = first.removeprefix(below + ".")
    if block.times == 1:
        return start
    if first == last:
        return f"{start} (run {block.times} times)"
    period = len(block.modules[0])
    alike = f"{block.times} alike" if period == 1 else f"{block.times} times {period}"
    return f"{start} to {end} ({alike})"


class _Groups:
    def __init__(
        self,
        coupling: CouplingGraph,
        flow: Flow,
        chosen: list[int],
        title: str,
        values: Mapping[str, float] | None,
    ):
        self.coupling = coupling
        self.flow = flow
        self.inside = [flow.steps[i] for i in chosen]
        self.chosen = set(chosen)
        shared = [s.module for s in self.inside if s.module]
        self.root = _common_module(shared)
        self.tables = [
            flow.steps[source]
            for source, target in flow.edges
            if target in self.chosen
            and source not in self.chosen
            and flow.steps[source].kind == "table"
        ]
        key = Key(coupling, self._groups(), values)
        self.canvas = Canvas(key, title, f"{len(key.groups)} groups of weights that go together")

    def _groups(self) -> list[Group]:
        found: dict[Group, None] = {}
        for step in [*self.inside, *self.tables]:
            for name in step.tensors:
                for dim in self.coupling.layout.parameters[name]:
                    for leaf in dim.leaves():
                        if leaf in self.coupling.by_dim:
                            found.setdefault(self.coupling.by_dim[leaf])
        for (source, target), values in self.flow.edges.items():
            if source in self.chosen or target in self.chosen:
                found.update(dict.fromkeys(groups_in(self.coupling, values)))
        return list(found)

    def draw(self) -> Picture:
        for step in self.inside:
            self._step(step)
        for index in dict.fromkeys(step.index for step in self.tables):
            self._weights(self.flow.steps[index], dashed=True)
        leaving: set[int] = set()
        for (source, target), values in self.flow.edges.items():
            through = [name for value in values for name in self.flow.through.get(value, ())]
            ends = self.flow.steps[source], self.flow.steps[target]
            if target in self.chosen:
                if source not in self.chosen and ends[0].kind != "table":
                    self._terminal(f"in{source}", "in", values[0])
                    self.canvas.edge(f"in{source}", f"s{target}", values, through)
                else:
                    self.canvas.edge(f"s{source}", f"s{target}", values, through)
            elif source in self.chosen and source not in leaving:
                leaving.add(source)
                self._terminal(f"out{source}", "out", values[0])
                self.canvas.edge(f"s{source}", f"out{source}", values, through)
        return self.canvas.finish()

    def _step(self, step: Step) -> None:
        if is_sum(step):
            self.canvas.plus(f"s{step.index}", self.canvas.describe(step.nodes[0]))
        elif step.kind == "weights":
            self._weights(step)
        else:
            rows = [[cell(text(self._local(step.module) or "join", size=10, bold=True))]]
            rows += [[cell(text(op, size=9, colour=palette.MUTED))] for op in step.operators[-3:]]
            self.canvas.box(f"s{step.index}", rows, hint=self.canvas.describe(step.nodes[-1]))

    def _weights(self, step: Step, dashed: bool = False) -> None:
        key = self.canvas.key
        words = "table" if dashed else step.operators[-1]
        title = text(self._local(step.module) or "(root)", bold=True)
        words = text(words, size=9, colour=palette.MUTED)
        rows = [[cell(f"{title}  {words}", align="left", colspan=2)]]
        rows += _axes(step, key)
        hint = "\n".join([*map(self._shape, step.tensors), *map(self.canvas.describe, step.nodes)])
        self.canvas.box(f"s{step.index}", rows, hint=hint, dashed=dashed)

    def _shape(self, tensor: str) -> str:
        sizes = " x ".join(str(dim.size) for dim in self.coupling.layout.parameters[tensor])
        return f"{tensor}: {sizes}"

    def _terminal(self, name: str, words: str, value: fx.Node) -> None:
        rows = [[cell(text(words, size=10, colour=palette.MUTED))]]
        dims = self.coupling.layout.dims(value)
        grouped = [d for d in dims if any(leaf in self.coupling.by_dim for leaf in d.leaves())]
        for dim in grouped[:1] or dims[-1:]:
            rows[0] += self.canvas.key.axis(dim)[0]
        self.canvas.box(name, rows, dashed=True, column="stream")

    def _local(self, module: str) -> str:
        if module == self.root:
            return module.rpartition(".")[2]
        return module.removeprefix(self.root + ".") if self.root else module


def _axes(step: Step, key: Key) -> list[list[str]]:
    """A line an axis; tensors that share it (weight, bias, running mean) are named together."""
    layout = key.coupling.layout
    names: dict[Dim, list[str]] = {}
    for tensor in sorted(step.tensors, key=lambda name: -len(layout.parameters[name])):
        dims = layout.parameters[tensor]
        for axis, dim in enumerate(dims):
            if dim.size == 1 and len(dims) > 1:
                continue
            place = f"[{axis}]" if len(dims) > 1 else ""
            names.setdefault(dim.root, []).append(_tensor_name(tensor, step.module) + place)
    rows: list[list[str]] = []
    for dim, places in names.items():
        pairs = [", ".join(places[i : i + 2]) for i in range(0, len(places), 2)]
        for i, line in enumerate(key.axis(dim)):
            head = text(",\n".join(pairs), size=10) if i == 0 else ""
            bar = table([line], cellspacing=1, cellpadding=3)
            rows.append([cell(head, align="left"), cell(bar, align="left", cellpadding=0)])
    return rows


def _tensor_name(name: str, module: str) -> str:
    if name.startswith(module + "."):
        return name.removeprefix(module + ".")
    return f"{name} (tied)"


def _common_module(paths: list[str]) -> str:
    """The innermost module that holds all of these."""
    if not paths:
        return ""
    parts = [path.split(".") for path in paths]
    same = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        same.append(names[0])
    return ".".join(same)

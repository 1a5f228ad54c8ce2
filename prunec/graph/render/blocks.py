"""The picture of a whole model on a page: repeated blocks folded, sizes of what is prunable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import graphviz
from torch import fx

from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.render import palette
from prunec.graph.render.figures import short, span
from prunec.graph.render.flow import Flow, Step, find_flow, groups_in
from prunec.graph.render.fold import (
    Block,
    Folding,
    Item,
    fold,
    indexed_module,
    is_sum,
    quotient,
)
from prunec.graph.render.groups import name_block
from prunec.graph.render.labels import Key, cell, label, table, text
from prunec.graph.render.picture import Canvas, Picture

CHIPS_A_LINE = 2


def draw_blocks(coupling: CouplingGraph, values: Mapping[str, float] | None = None) -> Picture:
    """Draw the whole model: its modules, the residual stream, and what is prunable in each.

    Args:
        values: a figure per group name, to colour by (the mean of groups folded together).
    """
    flow = find_flow(coupling)
    return _Blocks(coupling, flow, fold(coupling, flow), values).draw()


class _Blocks:
    def __init__(
        self,
        coupling: CouplingGraph,
        flow: Flow,
        folding: Folding,
        values: Mapping[str, float] | None,
    ):
        self.coupling = coupling
        self.flow = flow
        self.folding = folding
        self.home: dict[int, Block] = {}  # the innermost block of every drawn step
        self._find_homes(folding.items, None)
        self.drawn = sorted(set(folding.shown.values()))
        self.boxes = quotient(self._inputs(), lambda index: self._box_name(flow.steps[index]))
        self.alike = self._groups_alike()
        key = Key(coupling, self._groups(), self._means(values), number=False)
        self.canvas = Canvas(key, "The whole model", self._subtitle(), folded=True)
        self.streams = {
            group.name
            for step in flow.steps
            if is_sum(step)
            for group in groups_in(coupling, step.nodes)
        }
        self.members: dict[int, list[int]] = {}
        for step in self.drawn:
            self.members.setdefault(self.boxes[step], []).append(step)

    def _find_homes(self, items: Iterable[Item], block: Block | None) -> None:
        for item in items:
            if isinstance(item, Block):
                self._find_homes(item.items, item)
            elif block is not None:
                self.home[item] = block

    def _inputs(self) -> dict[int, set[int]]:
        shown = self.folding.shown
        inputs: dict[int, set[int]] = {step: set() for step in self.drawn}
        for source, target in self.flow.edges:
            if shown[target] == target and shown[source] != target:
                inputs[target].add(shown[source])
        return inputs

    def _box_name(self, step: Step) -> str:
        """Steps of one name become one box: the child of the block, or of the model."""
        if is_sum(step) or step.kind == "table" or not step.module:
            return f"#{step.index}"
        block = self.home.get(step.index)
        if block is not None:
            inside = [m for m in block.modules[0] if step.module.startswith(m + ".")]
            return _child(step.module, inside[0] if inside else block.module)
        stems = {m.rpartition(".")[0] for b in self.home.values() for m in b.modules[0]}
        name = ""
        for part in step.module.split("."):
            name = f"{name}.{part}" if name else part
            if not any(stem == name or stem.startswith(name + ".") for stem in stems):
                break
        return name

    def _groups_alike(self) -> dict[str, list[Group]]:
        """The name of every drawn group -> the groups of all repetitions that it stands for."""
        found: dict[str, dict[str, Group]] = {}
        by_dim = self.coupling.by_dim
        for step in self.flow.steps:
            ours = self.flow.steps[self.folding.shown[step.index]]
            for name, theirs in zip(ours.tensors, step.tensors, strict=True):
                layout = self.coupling.layout.parameters
                for a, b in zip(layout[name], layout[theirs], strict=True):
                    for left, right in zip(a.leaves(), b.leaves(), strict=False):
                        if left in by_dim and right in by_dim:
                            group = by_dim[right]
                            found.setdefault(by_dim[left].name, {})[group.name] = group
        return {name: list(groups.values()) for name, groups in found.items()}

    def _groups(self) -> list[Group]:
        return [group for group in self.coupling.groups if group.name in self.alike]

    def _means(self, values: Mapping[str, float] | None) -> dict[str, float]:
        means: dict[str, float] = {}
        for name, groups in self.alike.items():
            found = [values[g.name] for g in groups if g.name in values] if values else []
            if found:
                means[name] = sum(found) / len(found)
        return means

    def _subtitle(self) -> str:
        program = self.coupling.program
        total = sum(program.state[name].numel() for name in program.parameters)
        groups = len(self.coupling.groups)
        return f"{short(total, 'kMBT')} parameters, {groups} groups of weights that go together"

    def draw(self) -> Picture:
        self._items(self.folding.items, self.canvas.graph)
        drawn: dict[tuple[int, int], list[fx.Node]] = {}
        for (source, target), values in self.flow.edges.items():
            a = self.boxes[self.folding.shown[source]]
            b = self.boxes[self.folding.shown[target]]
            repeated = self.folding.shown[target] != target
            if a != b and not (repeated and self._is_inner(source, target)):
                drawn.setdefault((a, b), []).extend(values)
        for (a, b), found in drawn.items():
            if a < b or self.flow.steps[a].kind == "table":
                self.canvas.edge(f"s{a}", f"s{b}", found)
        return self.canvas.finish()

    def _is_inner(self, source: int, target: int) -> bool:
        """Whether an edge lies within a repetition that is not drawn."""
        shown = self.folding.shown
        return self.home.get(shown[source]) is self.home.get(shown[target])

    def _items(self, items: Sequence[Item], onto: graphviz.Digraph, below: str = "") -> None:
        for item in items:
            if isinstance(item, Block):
                with onto.subgraph(name=f"cluster{next(item.steps())}") as cluster:
                    cluster.attr(
                        label=label(text(name_block(item, below), bold=True)),
                        style="rounded,filled" if item.times > 1 else "rounded",
                        color=palette.FRAME,
                        fillcolor=palette.PAGE,
                        penwidth="2" if item.times > 1 else "1",
                        labeljust="l",
                        labelloc="t",
                        margin="12",
                        tooltip=" ",
                    )
                    self._items(item.items, cluster, item.module)
            elif self.boxes[item] == item:
                self._box(item, onto)

    def _box(self, index: int, onto: graphviz.Digraph) -> None:
        step = self.flow.steps[index]
        name, hint = f"s{index}", self.canvas.describe(step.nodes[-1]) if step.nodes else ""
        if is_sum(step):
            self.canvas.plus(name, hint, onto)
            return
        if step.kind in ("input", "output"):
            words = step.nodes[0].name if step.kind == "input" else "output"
            if step.kind == "input":
                words = self.coupling.program.inputs.get(words, words)
            rows = [[cell(text(words, size=10, colour=palette.MUTED))]]
            self.canvas.box(name, rows, hint=hint, dashed=True, column="stream", onto=onto)
            return
        steps = [self.flow.steps[i] for i in self.members[index]]
        tensors = list(dict.fromkeys(name for s in steps for name in s.tensors))
        count = self._parameters(tensors)
        title = text(self._title(steps), bold=True)
        note = text(
            f"{short(count, 'kMBT')} parameters" if count else "", size=9, colour=palette.MUTED
        )
        rows = [[cell(f"{title}  {note}" if count else title, align="left")]]
        chips = self._chips(tensors)
        if chips:
            lines = [chips[i : i + CHIPS_A_LINE] for i in range(0, len(chips), CHIPS_A_LINE)]
            rows += [
                [cell(table([line], cellspacing=2, cellpadding=3), align="left")] for line in lines
            ]
        self.canvas.box(name, rows, hint=hint, dashed=step.kind == "table", onto=onto)

    def _parameters(self, tensors: Sequence[str]) -> int:
        program = self.coupling.program
        return sum(program.state[n].numel() for n in tensors if n in program.parameters)

    def _title(self, steps: Sequence[Step]) -> str:
        modules = [step.module.split(".") for step in steps]
        common = modules[0]
        for other in modules[1:]:
            same = [a == b for a, b in zip(common, other, strict=False)]
            common = common[: same.index(False) if False in same else len(same)]
        path = ".".join(common)
        block = self.home.get(steps[0].index)
        if block is None:
            return path
        inside = [m for m in block.modules[0] if path.startswith(m + ".")]
        return path.removeprefix(inside[0] + ".") if inside else path.rpartition(".")[2]

    def _chips(self, tensors: Sequence[str]) -> list[str]:
        """A coloured cell for every group that lies in a box; the streams are seen on edges."""
        chips: dict[str, str] = {}
        key = self.canvas.key
        for name in tensors:
            for dim in self.coupling.layout.parameters[name]:
                for leaf in dim.leaves():
                    group = self.coupling.by_dim.get(leaf)
                    if group is None or group.name in chips or group.name not in self.alike:
                        continue
                    sizes = span(other.size for other in self.alike[group.name])
                    chips[group.name] = key.cell(group, f"{group.kind} {sizes}")
        own = [chip for name, chip in chips.items() if name not in self.streams]
        return own or list(chips.values())[:1]


def _child(module: str, block: str) -> str:
    """The part of a block that a module lies in: ``model.layers.0.mlp``."""
    indexed = indexed_module(module, block)
    rest = module.removeprefix(block + ".").split(".")
    name = f"{block}.{rest[0]}"
    if len(rest) > 1 and rest[1].isdigit() and indexed is not None:
        return indexed
    return name

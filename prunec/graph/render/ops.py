"""The picture of one group: every tensor that its units lie in, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from prunec.errors import ExportError
from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.dims import Dim
from prunec.graph.program import module_path, source_line
from prunec.graph.render import palette
from prunec.graph.render.flow import find_flow, operator_name
from prunec.graph.render.fold import Block, Item, fold, quotient
from prunec.graph.render.labels import Key, cell, table, text
from prunec.graph.render.picture import Canvas, Picture

MAX_NODES = 500


def draw_ops(
    coupling: CouplingGraph, group: str | None = None, values: Mapping[str, float] | None = None
) -> Picture:
    """Draw every call that reads or writes a tensor in which the units of one group lie.

    Of blocks that repeat only the first is drawn.

    Args:
        group: its name; by default the largest that lies in one block.
        values: a figure per group name, to colour by.

    Raises:
        PlanError: if there is no such group.
        ExportError: if the model has no groups, or the group lies in too many places.
    """
    if not coupling.groups:
        raise ExportError("the model has no group to draw", fix="prunec analyze --why says why")
    return _Ops(coupling, _largest(coupling) if group is None else coupling[group], values).draw()


def _largest(coupling: CouplingGraph) -> Group:
    inside = [group for group in coupling.groups if group.block is not None]
    return max(inside or coupling.groups, key=lambda group: group.size)


class _Ops:
    def __init__(self, coupling: CouplingGraph, group: Group, values: Mapping[str, float] | None):
        self.coupling = coupling
        self.group = group
        self.repeated = self._repeated(group)
        self.left_out: set[fx.Node] = set()  # calls of repeated blocks that carry the group
        self.nodes = self._touching()
        if len(self.nodes) > MAX_NODES:
            raise ExportError(
                f"{group.name} lies in {len(self.nodes)} calls, too many for one picture",
                fix="--level groups draws one block of it",
            )
        note = f"{len(self.nodes)} calls and tensors"
        if self.repeated:
            note += f"; blocks like those drawn are left out: {len(self.repeated)}"
        self.canvas = Canvas(Key(coupling, [group], values), group.name, note)

    def _repeated(self, group: Group) -> set[str]:
        """Blocks that another one stands for."""
        if group.block is not None:
            return set()
        folding = fold(self.coupling, find_flow(self.coupling))
        found: set[str] = set()

        def visit(items: tuple[Item, ...]) -> None:
            for item in items:
                if isinstance(item, Block):
                    first = set(item.modules[0])
                    found.update(m for modules in item.modules for m in modules if m not in first)
                    visit(item.items)

        visit(folding.items)
        return found

    def _touching(self) -> dict[fx.Node, int]:
        """Calls that read or write the group and tensors that hold it, each with its position."""
        values = self.coupling.layout.values
        carries = {
            node
            for node, results in values.items()
            if any(self.group.dim in dim.leaves() for value in results for dim in value.dims)
        }
        found: dict[fx.Node, int] = {}
        for position, node in enumerate(self.coupling.program.graph.nodes):
            if self._is_repeated(self._module(node)):
                if node in carries:
                    self.left_out.add(node)
            elif node in carries or any(n in carries for n in node.all_input_nodes):
                found[node] = position
        return {node: position for node, position in found.items() if node in values}

    def _is_repeated(self, module: str) -> bool:
        parts = module.split(".")
        return any(".".join(parts[: i + 1]) in self.repeated for i in range(len(parts)))

    def _module(self, node: fx.Node) -> str:
        name = self.coupling.program.bindings.get(node.name)
        return module_path(node) if name is None else name.rpartition(".")[0]

    def draw(self) -> Picture:
        carried = {n: p for n, p in self.nodes.items() if self._axes(n)}
        nearest = self._nearest(carried)
        inputs = {
            position: {carried[n] for m in node.all_input_nodes for n in nearest.get(m, ())}
            for node, position in self.nodes.items()
        }
        by_position = {position: node for node, position in self.nodes.items()}
        boxes = quotient(inputs, lambda position: self._module(by_position[position]))
        members: dict[int, list[fx.Node]] = {}
        for position, box in boxes.items():
            members.setdefault(box, []).append(by_position[position])
        for box, nodes in members.items():
            title = text(self._module(nodes[0]) or "(root)", bold=True)
            rows = [[cell(title, align="left", colspan=2)], *map(self._row, nodes)]
            self.canvas.box(f"s{box}", rows, hint=self._module(nodes[0]))
        edges: dict[tuple[int, int], list[fx.Node]] = {}
        for position, sources in inputs.items():
            for source in sources:
                ends = boxes[source], boxes[position]
                if ends[0] != ends[1]:
                    edges.setdefault(ends, []).append(by_position[source])
        for (a, b), found in edges.items():
            self.canvas.edge(f"s{a}", f"s{b}", list(dict.fromkeys(found)))
        return self.canvas.finish()

    def _nearest(self, carried: Mapping[fx.Node, int]) -> dict[fx.Node, set[fx.Node]]:
        """Every value -> itself where drawn, else what leads to it through what is left out."""
        nearest: dict[fx.Node, set[fx.Node]] = {}
        for node in self.coupling.program.graph.nodes:
            if node in carried:
                nearest[node] = {node}
            elif node in self.left_out:
                nearest[node] = {n for m in node.all_input_nodes for n in nearest.get(m, ())}
        return nearest

    def _axes(self, node: fx.Node) -> list[int]:
        """The axes of a value that the group lies on."""
        dims = self.coupling.layout.dims(node)
        return [axis for axis, dim in enumerate(dims) if self.group.dim in dim.leaves()]

    def _row(self, node: fx.Node) -> list[str]:
        """A call and its result, or a tensor."""
        name = self.coupling.program.bindings.get(node.name)
        words = operator_name(node) if name is None else name.rpartition(".")[2]
        cells: list[str] = []
        axes = self._axes(node)
        for axis, dim in enumerate(self.coupling.layout.dims(node)):
            cells += self._axis(dim, axis in axes)
        bar = table([cells or [cell("")]], cellspacing=1, cellpadding=2)
        hint = source_line(node) or words
        head = cell(text(words, size=10, bold=name is not None), align="left", tooltip=hint)
        return [head, cell(bar, align="right", cellpadding=0)]

    def _axis(self, dim: Dim, coloured: bool) -> list[str]:
        if coloured:
            return [c for line in self.canvas.key.axis(dim) for c in line]
        return [cell(text(f"{dim.size:,}", size=9, colour=palette.MUTED))]

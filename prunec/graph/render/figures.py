"""The figures of a coupling graph: what a unit of every group costs, and what is pinned."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import fx

from prunec.graph.cost import node_flops, parameter_count
from prunec.graph.coupling import CouplingGraph, Group, Pinned
from prunec.graph.dims import Dim
from prunec.graph.paths import block_of

T = TypeVar("T")


@dataclass(frozen=True)
class GroupFigures:
    """One group in figures.

    Attributes:
        parameters_per_unit: parameters that go with one unit (one in each row of its companions).
        flops_per_unit: FLOPs that go with it, of one pass at the traced shapes.
        blocks: how many repeated blocks it lies in; more than one means that it couples them.
    """

    group: Group
    parameters_per_unit: int
    flops_per_unit: int
    blocks: int


@dataclass(frozen=True)
class Alike:
    """Groups that differ in layer numbers only, and perhaps in size."""

    pattern: str
    figures: tuple[GroupFigures, ...]

    @property
    def first(self) -> GroupFigures:
        return self.figures[0]


@dataclass(frozen=True)
class PinnedAlike:
    """Pinned axes with one reason at one source line, whatever the layer."""

    reason: str
    where: str
    places: tuple[str, ...]
    sizes: tuple[int, ...]
    times: int


class Figures:
    """Figures of a coupling graph's groups, each computed when asked for and kept."""

    def __init__(self, coupling: CouplingGraph):
        self.coupling = coupling
        self._found: dict[str, GroupFigures] = {}
        self._contractions: dict[Dim, list[fx.Node]] | None = None

    def __getitem__(self, group: Group) -> GroupFigures:
        if group.name not in self._found:
            self._found[group.name] = GroupFigures(
                group=group,
                parameters_per_unit=self._parameters(group),
                flops_per_unit=self._flops(group),
                blocks=len({block_of(m.parameter) for m in group.members} - {None}),
            )
        return self._found[group.name]

    def all(self) -> list[GroupFigures]:
        return [self[group] for group in self.coupling.groups]

    def _parameters(self, group: Group) -> int:
        names = {m.parameter for m in group.members} & self.coupling.program.parameters
        fewer = {group.dim: group.size - 1}
        whole = parameter_count(self.coupling, names=names)
        return whole - parameter_count(self.coupling, fewer, names)

    def _flops(self, group: Group) -> int:
        if self._contractions is None:
            self._contractions = _contractions(self.coupling)
        fewer = {group.dim: group.size - 1}
        layout = self.coupling.layout
        return sum(
            node_flops(node, layout, {}) - node_flops(node, layout, fewer)
            for node in self._contractions.get(group.dim, [])
        )


def _contractions(coupling: CouplingGraph) -> dict[Dim, list[fx.Node]]:
    """The calls that cost FLOPs, by every leaf that they read or write."""
    layout = coupling.layout
    found: dict[Dim, list[fx.Node]] = {}
    for node in coupling.program.graph.nodes:
        if node.op != "call_function" or node_flops(node, layout, {}) == 0:
            continue
        values = [v for n in (node, *node.all_input_nodes) for v in layout.values.get(n, [])]
        for leaf in dict.fromkeys(x for v in values for dim in v.dims for x in dim.leaves()):
            found.setdefault(leaf, []).append(node)
    return found


def alike(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items of one key together, in the order of the first of each."""
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def pattern(path: str) -> str:
    """A path with its layer numbers left open: ``model.layers.*.mlp``."""
    return re.sub(r"(?:(?<=\.)|^)\d+(?=[./#]|$)", "*", path)


def fold_groups(figures: Sequence[GroupFigures]) -> list[Alike]:
    """Groups that differ in layer numbers only, as one row each."""
    rows = alike(figures, lambda f: (pattern(f.group.name), f.group.minimum, f.group.block is None))
    return [Alike(pattern(row[0].group.name), tuple(row)) for row in rows]


def fold_pinned(pinned: Iterable[Pinned]) -> list[PinnedAlike]:
    """Pinned axes by reason and source line; thousands of equal ones are one row."""
    folded = []
    for row in alike(pinned, lambda p: (p.reason, _line(p.where))):
        places = dict.fromkeys(f"{pattern(p.parameter)}[{p.axis}]" for p in row)
        sizes = sorted({p.size for p in row})
        folded.append(
            PinnedAlike(row[0].reason, _line(row[0].where), tuple(places), tuple(sizes), len(row))
        )
    return folded


def _line(where: str) -> str:
    """``file.py:12  code`` without the path of the module, which differs from layer to layer."""
    match = re.search(r"\(([^()]*:\d+)\)\s*(.*)", where)
    return f"{match.group(1)}  {match.group(2)}".strip() if match else pattern(where)


def short(count: float, units: str = "kMGT") -> str:
    """A count in three digits.

    Args:
        units: one letter a power of 1000.

    >>> short(1536), short(134_515_008), short(6_738_415_616, "kMBT")
    ('1,536', '135 M', '6.74 B')
    """
    if count < 10_000:
        return f"{count:,.0f}"
    power = min(4, (len(str(round(count))) - 1) // 3)
    scaled = count / 1000**power
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f} {units[power - 1]}"


def span(values: Iterable[int], brief: bool = False) -> str:
    """One figure, or the lowest and highest of several."""
    found = sorted(set(values))
    words = [short(value) if brief else f"{value:,}" for value in found[:1] + found[1:][-1:]]
    return " to ".join(dict.fromkeys(words)) or "-"

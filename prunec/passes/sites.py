"""Sites: the places in the graph where a group's units are last read.

The units of a group are removed where weights read them: an FFN channel at the second linear, a
head at the output projection, a channel at the convolutions behind it. These weights are what
compensation mends, what they multiply is what statistics are taken of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.dims import Dim, sum_of
from prunec.graph.matrix import Matrix
from prunec.graph.products import Product, find_products
from prunec.graph.propagate import Layout
from prunec.graph.rows import Rows
from prunec.graph.sums import operator_name

STREAM = "hidden"
"""The kind of the features of the residual stream: everything reads them, see `passes.channels`."""

Calls = tuple[tuple[fx.Node, Rows], ...]
"""Calls in graph order, and the rows that a weight multiplies there."""


@dataclass(frozen=True)
class Producer:
    """A weight that makes units of a site: they lie on its output axis.

    Attributes:
        parameter: the weight's name.
        axis: its output axis.
        matrix: how it is a stack of matrices.
        calls: where, and what it multiplies.
    """

    parameter: str
    axis: int
    matrix: Matrix
    calls: Calls


@dataclass(frozen=True)
class Reading:
    """A weight that reads units of a site.

    Attributes:
        parameter: the weight's name.
        matrix: how it is a stack of matrices.
        bias: name of the parameter that every call, and nothing else, adds to its product.
    """

    parameter: str
    matrix: Matrix
    bias: str | None = None


@dataclass(frozen=True)
class Input:
    """The same rows, and all weights of a site that multiply them.

    Attributes:
        calls: where, the first of these weights being called; several where layers share them.
        readings: the weights.
        parts: the number of matrices that each of them is a stack of.
    """

    calls: Calls
    readings: tuple[Reading, ...]
    parts: int


@dataclass(frozen=True)
class Site:
    """The weights that read the units of some groups.

    Attributes:
        name: the last of these weights.
        inputs: what they read; none where only the weights themselves can rank the units.
        groups: the groups whose units are read, major first.
        block: the repeated block it lies in, if any.
        producers: the weights that make the units, in graph order.
        end: the last call that reads units.
        start: from where on values are computed anew once units have gone, because what has passed
            the site's first call, a router or a recurrence cannot be cut; None where cutting is
            enough.
    """

    name: str
    inputs: tuple[Input, ...]
    groups: tuple[Group, ...]
    block: str | None
    producers: tuple[Producer, ...] = ()
    end: fx.Node | None = None
    start: fx.Node | None = None

    @property
    def readings(self) -> tuple[Reading, ...]:
        return tuple(reading for given in self.inputs for reading in given.readings)

    @property
    def parameters(self) -> list[str]:
        """The names of all parameters that hold units of the site's groups."""
        return list(dict.fromkeys(m.parameter for group in self.groups for m in group.members))

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The calls before which rows are read."""
        return tuple(node for given in self.inputs for node, _ in given.calls)

    @property
    def is_shared(self) -> bool:
        """Whether layers share a weight of it."""
        return any(len(given.calls) > 1 for given in self.inputs)

    @property
    def takes_bias(self) -> bool:
        """Whether each of its weights has a bias of its own."""
        return bool(self.inputs) and all(reading.bias for reading in self.readings)

    def columns(self, coupling: CouplingGraph) -> Dim:
        """The columns of all its weights as one axis, block after block."""
        parameters = coupling.layout.parameters
        if not self.inputs:
            return sum_of(parameters[name][axis] for name, axis in self.members)
        firsts = [given.readings[0] for given in self.inputs]
        return sum_of(first.matrix.columns(parameters[first.parameter]) for first in firsts)

    @property
    def members(self) -> list[tuple[str, int]]:
        """Every axis of a parameter that holds units of the site's groups."""
        return list(dict.fromkeys((m.parameter, m.axis) for g in self.groups for m in g.members))


@dataclass(frozen=True)
class Skipped:
    """A group that was asked for but has no site, and why."""

    group: str
    reason: str


def find_sites(
    coupling: CouplingGraph, kinds: Collection[str], *, by_weight: bool = False
) -> tuple[list[Site], list[Skipped]]:
    """The sites of all groups of these kinds, in graph order, and the groups that have none.

    Args:
        by_weight: the weights themselves rank the units, so a group needs no weight that reads it.
    """
    finder = _Finder(coupling)
    chosen = [group for group in coupling.groups if group.kind in kinds]
    reads = {group: finder.reads(group) for group in chosen}
    silent = [group for group in chosen if not reads[group]]
    sites, skipped = [], []
    if by_weight:
        joint = _sharing({group: group.members for group in chosen})
        apart = [groups for groups in joint if not set(groups).isdisjoint(silent)]
        sites = [finder.silent_site(groups) for groups in apart]
        silent = [group for groups in apart for group in groups]
    else:
        skipped = [Skipped(group.name, finder.reason(group)) for group in silent]
    heard = {group: reads[group] for group in chosen if group not in silent}
    joint = _sharing({group: [_key(read) for read in found] for group, found in heard.items()})
    sites += [finder.site(groups, [r for g in groups for r in heard[g]]) for groups in joint]
    return sorted(sites, key=finder.place), skipped


def check_found(coupling: CouplingGraph, sites: Sequence[Site], skipped: Sequence[Skipped]) -> None:
    """Raises PlanError where there are no sites, saying what stands in the way."""
    if sites:
        return
    others = dict.fromkeys(group.kind for group in coupling.groups)
    where = "; ".join(f"{item.group}: {item.reason}" for item in skipped[:3])
    if others and not skipped:
        where = f"its groups are of other kinds: {', '.join(others)} (--set units=KIND,...)"
    raise PlanError(
        "nothing can be pruned in this model",
        where=where or None,
        fix="see `prunec analyze --why`, in Python prunec.couple(...).pinned",
    )


def _key(product: Product) -> tuple[str, Matrix]:
    return product.parameter, product.matrix


def _sharing(places: Mapping[Group, Iterable[Hashable]]) -> list[list[Group]]:
    """Groups that have a place in common, together, in the order of the first of each."""
    graph: nx.Graph[Hashable] = nx.Graph()
    for group, found in places.items():
        graph.add_node(group.name)
        graph.add_edges_from((group.name, (place,)) for place in found)
    components = [set(component) for component in nx.connected_components(graph)]
    return [[group for group in places if group.name in component] for component in components]


class _Finder:
    """The products of a program by the leaves that they sum over, hold apart, or make."""

    def __init__(self, coupling: CouplingGraph):
        self._coupling = coupling
        self._order = {node: i for i, node in enumerate(coupling.program.graph.nodes)}
        self._sums: dict[Dim, list[Product]] = defaultdict(list)
        self._holds: dict[Dim, list[Product]] = defaultdict(list)
        self._makes: dict[Dim, list[Product]] = defaultdict(list)
        for product in find_products(coupling.program, coupling.layout):
            for found, axes in (
                (self._sums, product.matrix.inner),
                (self._holds, product.matrix.stack),
                (self._makes, product.matrix.outer),
            ):
                for leaf in product.leaves(coupling.layout, axes):
                    found[leaf].append(product)

    def place(self, site: Site) -> int:
        """Where in the graph a site is decided; what needs no data comes first."""
        return -1 if site.end is None else self._order[site.end]

    def reads(self, group: Group) -> list[Product]:
        """The products that read the units of a group last.

        Those that sum over them, or, as for experts, those that hold one matrix for each unit and
        feed no other such product.
        """
        if group.kind == STREAM:
            return []
        leaf = group.dim.root
        if self._sums[leaf]:
            return self._sums[leaf]
        apart = self._holds[leaf]
        layout = self._coupling.layout
        last: list[Product] = []
        fed: set[Dim] = set()
        for product in sorted(apart, key=lambda p: self._order[p.node], reverse=True):
            if fed.isdisjoint(product.leaves(layout, product.matrix.outer)):
                last.append(product)
            fed |= product.leaves(layout, product.matrix.inner)
        return last

    def reason(self, group: Group) -> str:
        """Why no site is found for a group."""
        ranked = "only its weights can rank it (importance=magnitude, random, taylor or fisher)"
        if group.kind == STREAM:
            return "a feature of the residual stream, which goes by itself (units=hidden)"
        layout, leaf = self._coupling.layout, group.dim.root
        for node in self._coupling.program.graph.nodes:
            carried = node in layout.values and leaf in _leaves_of(layout, node)
            before = [n for n in node.all_input_nodes if leaf in _leaves_of(layout, n)]
            if node in layout.data and before and not carried:
                name = operator_name(node) or str(node.target)
                return f"{name} sums over it, no stored weight does; {ranked}"
        return f"no weight reads it; {ranked}"

    def site(self, groups: Sequence[Group], reads: Sequence[Product]) -> Site:
        by_weight: dict[tuple[str, Matrix], dict[fx.Node, Product]] = {}
        for product in sorted(reads, key=lambda product: self._order[product.node]):
            by_weight.setdefault(_key(product), {})[product.node] = product
        by_rows: dict[tuple[Rows, ...], list[list[Product]]] = {}
        for calls in by_weight.values():
            rows = tuple(product.rows for product in calls.values())
            by_rows.setdefault(rows, []).append(list(calls.values()))
        inputs = tuple(self._input(weights) for weights in by_rows.values())
        nodes = sorted({read.node for read in reads}, key=self._order.__getitem__)
        end = self._order[nodes[-1]]
        made = [make for group in groups for make in self._makes[group.dim.root]]
        makes = [make for make in made if self._order[make.node] < end]
        return Site(
            name=list(by_weight)[-1][0].removesuffix(".weight"),
            inputs=inputs,
            groups=tuple(sorted(groups, key=lambda group: len(group.companions))),
            block=_block(groups),
            producers=self._producers(makes, groups),
            end=nodes[-1],
            start=self._start(groups, nodes),
        )

    def silent_site(self, groups: Sequence[Group]) -> Site:
        """A site without input: the units are ranked by the weights alone."""
        major_first = sorted(groups, key=lambda group: len(group.companions))
        return Site(groups[-1].name, (), tuple(major_first), _block(groups))

    def _input(self, weights: Sequence[Sequence[Product]]) -> Input:
        first = weights[0]
        return Input(
            calls=tuple((product.node, product.rows) for product in first),
            readings=tuple(
                Reading(calls[0].parameter, calls[0].matrix, self._own_bias(calls))
                for calls in weights
            ),
            parts=first[0].rows.parts,
        )

    def _producers(self, makes: Sequence[Product], groups: Sequence[Group]) -> tuple[Producer, ...]:
        calls: dict[tuple[str, Matrix], dict[fx.Node, Product]] = {}
        for make in makes:
            calls.setdefault(_key(make), {})[make.node] = make
        leaves = {group.dim.root for group in groups}
        parameters = self._coupling.layout.parameters
        found = []
        for (name, matrix), products in calls.items():
            dims = matrix.dims(parameters[name])
            axis = next(a for a in matrix.outer if not leaves.isdisjoint(dims[a].leaves()))
            rows = tuple((node, product.rows) for node, product in products.items())
            found.append(Producer(name, matrix.own_axis(axis), matrix, rows))
        return tuple(found)

    def _own_bias(self, calls: Sequence[Product]) -> str | None:
        """The parameter that these calls, and no others, add to their product, once an output."""
        program, (bias, *others) = self._coupling.program, dict.fromkeys(c.bias for c in calls)
        if bias is None or others or len(self._coupling.layout.dims(bias)) != 1:
            return None
        name = program.bindings.get(bias.name)
        own = set(bias.users) == {product.node for product in calls}
        return name if own and name in {*program.parameters, *program.added} else None

    def _start(self, groups: Sequence[Group], nodes: Sequence[fx.Node]) -> fx.Node | None:
        """The first value that cannot be cut once units are gone."""
        layout = self._coupling.layout
        mixed = {g.dim.root for g in groups if g.dim.has("ranked") or g.dim.has("recurrent")}
        stale = [
            node
            for node in self._order
            if mixed and node in layout.data and not mixed.isdisjoint(_leaves_of(layout, node))
        ]
        places = sorted([*stale[:1], *nodes], key=self._order.__getitem__)
        return places[0] if len(places) > 1 else None


def _leaves_of(layout: Layout, node: fx.Node) -> set[Dim]:
    return {
        leaf for value in layout.values.get(node, ()) for dim in value.dims for leaf in dim.leaves()
    }


def _block(groups: Sequence[Group]) -> str | None:
    blocks = {group.block for group in groups}
    return blocks.pop() if len(blocks) == 1 else None

"""Which slices of which weights must go together: the coupling graph and its groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import groupby

import networkx as nx
import torch

from prunec.errors import PlanError
from prunec.graph.branches import Branch, find_branches
from prunec.graph.dims import Dim
from prunec.graph.kinds import infer_kinds
from prunec.graph.paths import block_of, common_path
from prunec.graph.program import Program, source_line
from prunec.graph.propagate import Layout, propagate
from prunec.graph.retarget import retarget


@dataclass(frozen=True, order=True)
class Member:
    """One axis of one parameter that a group's units occupy."""

    parameter: str
    axis: int


@dataclass(frozen=True)
class Group:
    """A leaf Dim that can lose units, and every parameter axis that loses them with it.

    Attributes:
        name: stable across runs, shapes and processes: ``<module path>/<kind>``.
        kind: what a unit is (ffn_channel, query_head, kv_group, head, hidden, ...), for display
            and defaults only.
        dim: the leaf.
        members: the parameter axes, in the order of the model.
        companions: groups that are major to this one everywhere: which units go may differ from
            one companion unit to the next, in equal number.
        minimum: how many units must stay.
        multiple: what their number is a multiple of, for an operator that takes no other.
        normalised: a mean, norm or top-k runs over the units, or each is divided by a norm of its
            own weights, so that removing one is not the same as zeroing it.
        block: the repeated block it lies in ("model.layers.3"), None where it spans several.
    """

    name: str
    kind: str
    dim: Dim
    members: tuple[Member, ...]
    companions: tuple[str, ...]
    minimum: int
    normalised: bool
    block: str | None
    multiple: int = 1

    @property
    def size(self) -> int:
        return self.dim.size


@dataclass(frozen=True)
class Pinned:
    """A parameter axis (or part of one) that cannot be pruned, and why."""

    parameter: str
    axis: int
    size: int
    reason: str
    where: str


class CouplingGraph:
    """The groups of a program, what is pinned, and the graph of axes they are components of."""

    def __init__(self, program: Program, layout: Layout):
        self.program = program
        self.layout = layout
        self.groups = _groups(program, layout)
        self._by_name = {group.name: group for group in self.groups}
        self.by_dim = {group.dim: group for group in self.groups}

    def __getitem__(self, name: str) -> Group:
        """The group of that name.

        Raises:
            PlanError: naming the nearest groups if there is none.
        """
        if name not in self._by_name:
            raise _unknown("group", name, self._by_name)
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def retargeted(self, dtype: torch.dtype) -> CouplingGraph:
        """The same axes and groups on the program in another floating-point type."""
        program = retarget(self.program, dtype)
        twins = dict(zip(self.program.graph.nodes, program.graph.nodes, strict=True))
        layout = replace(
            self.layout,
            values={twins[node]: values for node, values in self.layout.values.items()},
            data={twins[node] for node in self.layout.data},
        )
        return CouplingGraph(program, layout)

    @cached_property
    def pinned(self) -> tuple[Pinned, ...]:
        """Every parameter axis that holds a pinned leaf, with the first reason and source line."""
        nodes = {node.name: node for node in self.program.graph.nodes}
        found: list[Pinned] = []
        for name in self._parameters():
            for axis, dim in enumerate(self.layout.parameters[name]):
                for leaf in dim.leaves():
                    note = next((n for n in leaf.notes if n.kind == "pinned"), None)
                    if note is not None and leaf.size > 1:
                        where = source_line(nodes[note.node]) if note.node in nodes else ""
                        found.append(Pinned(name, axis, leaf.size, note.reason, where))
        return tuple(found)

    def branch(self, name: str) -> Branch:
        """The branch of that name.

        Raises:
            PlanError: naming the nearest branches if there is none.
        """
        known = {branch.name: branch for branch in self.branches}
        if name not in known:
            raise _unknown("branch", name, known)
        return known[name]

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """What is added to a residual stream and can be left out, in the order of the graph."""
        return find_branches(self.program, self.layout)

    def _parameters(self) -> list[str]:
        return [name for name in self.layout.parameters if name in self.program.parameters]

    @cached_property
    def graph(self) -> nx.Graph[str]:
        """Nodes are axes of parameters and values; edges tie axes that share a leaf in one call.

        Node attributes: ``owner`` (parameter or node name), ``axis``, ``size``, ``dims`` (its
        structure as text), ``groups`` (names). Edge attribute: ``op``.
        """
        return _axis_graph(self)


def _unknown(what: str, name: str, known: Iterable[str]) -> PlanError:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return PlanError(
        f"the model has no {what} {name!r}",
        fix=f"nearest: {', '.join(near)}" if near else "prunec analyze lists what it has",
    )


def couple(program: Program, *, strict: bool = False) -> CouplingGraph:
    """Work out from the graph which slices of which weights must go together.

    Args:
        strict: raise MissingRule where an operator has no dim rule, instead of pinning.
    """
    return CouplingGraph(program, propagate(program, strict=strict))


def _groups(program: Program, layout: Layout) -> tuple[Group, ...]:
    members: dict[Dim, list[Member]] = {}
    for name, dims in layout.parameters.items():
        for axis, dim in enumerate(dims):
            for leaf in dim.leaves():
                members.setdefault(leaf, []).append(Member(name, axis))
    free = [
        leaf
        for leaf, places in members.items()
        if leaf.size > 1
        and not _is_pinned(leaf)
        and any(place.parameter in program.parameters for place in places)
    ]
    companions = {leaf: _companions(leaf, members[leaf], layout) for leaf in free}
    kinds = infer_kinds(program, layout, free, companions)
    names = _names(free, members, kinds)
    return tuple(
        Group(
            name=names[leaf],
            kind=kinds[leaf],
            dim=leaf,
            members=tuple(members[leaf]),
            companions=tuple(names[c] for c in companions[leaf] if c in names),
            minimum=leaf.minimum,
            normalised=leaf.has("normalised") or leaf.has("ranked"),
            block=_common_block(members[leaf]),
            multiple=_multiple(program, leaf, members[leaf]),
        )
        for leaf in free
    )


def _multiple(program: Program, leaf: Dim, members: Sequence[Member]) -> int:
    """Units in 16 bytes, where an operator wants its operands' rows aligned to that."""
    if not leaf.has("aligned"):
        return 1
    narrowest = min(program.state[member.parameter].element_size() for member in members)
    multiple = max(1, 16 // narrowest)
    return multiple if leaf.size % multiple == 0 else 1


def _is_pinned(leaf: Dim) -> bool:
    return leaf.has("pinned") or (leaf.has("numbered") and leaf.has("indexed"))


def _names(
    leaves: Sequence[Dim], members: Mapping[Dim, Sequence[Member]], kinds: Mapping[Dim, str]
) -> dict[Dim, str]:
    names: dict[Dim, str] = {}
    used: dict[str, int] = {}
    for leaf in leaves:
        path = common_path([member.parameter for member in members[leaf]])
        name = f"{path}/{kinds[leaf]}" if path else kinds[leaf]
        used[name] = used.get(name, 0) + 1
        names[leaf] = name if used[name] == 1 else f"{name}#{used[name]}"
    return names


def _common_block(members: Sequence[Member]) -> str | None:
    blocks = {block_of(member.parameter) for member in members}
    return blocks.pop() if len(blocks) == 1 else None


def _companions(leaf: Dim, members: Sequence[Member], layout: Layout) -> tuple[Dim, ...]:
    """Leaves major to this one wherever it occurs, and present in every tensor that carries it."""
    shared: list[Dim] | None = None
    for member in members:
        for major in _majors(layout.parameters[member.parameter][member.axis], leaf):
            shared = major if shared is None else [dim for dim in shared if dim in major]
    if not shared:
        return ()
    for values in layout.values.values():
        for value in values:
            leaves = {found for dim in value.dims for found in dim.leaves()}
            if leaf in leaves:
                shared = [dim for dim in shared if dim in leaves]
    return tuple(dim for dim in shared if not _is_pinned(dim))


def _majors(dim: Dim, leaf: Dim) -> Iterator[list[Dim]]:
    """Per occurrence of ``leaf`` below ``dim``: the leaves that are major to it there."""
    root = dim.root
    if root is leaf:
        yield []
    before: list[Dim] = []
    for part in root.parts:
        for deeper in _majors(part, leaf):
            yield [*before, *deeper]
        if root.form == "product":
            before += part.leaves()


def _axis_graph(coupling: CouplingGraph) -> nx.Graph[str]:
    layout = coupling.layout
    graph: nx.Graph[str] = nx.Graph()
    owners: dict[str, tuple[Dim, ...]] = dict(layout.parameters)
    bindings = coupling.program.bindings
    names = {node: bindings.get(node.name, node.name) for node in layout.values}
    for node, values in layout.values.items():
        owners.setdefault(names[node], values[0].dims)
    for owner, dims in owners.items():
        for axis, dim in enumerate(dims):
            groups = [
                coupling.by_dim[leaf].name for leaf in dim.leaves() if leaf in coupling.by_dim
            ]
            graph.add_node(
                f"{owner}[{axis}]",
                owner=owner,
                axis=axis,
                size=dim.size,
                dims=dim.describe(),
                groups=groups,
            )
    for node in layout.values:
        if node.op == "call_function":
            touched = [names[n] for n in (*node.all_input_nodes, node) if n in layout.values]
            _tie(graph, coupling, owners, dict.fromkeys(touched), str(node.target))
    return graph


def _tie(
    graph: nx.Graph[str],
    coupling: CouplingGraph,
    owners: Mapping[str, tuple[Dim, ...]],
    touched: Mapping[str, None],
    op: str,
) -> None:
    """Edges between the axes of one call that share a group's leaf."""
    carriers = [
        (leaf.label, id(leaf), f"{owner}[{axis}]")
        for owner in touched
        for axis, dim in enumerate(owners[owner])
        for leaf in dim.leaves()
        if leaf in coupling.by_dim
    ]
    carriers.sort()
    for _, found in groupby(carriers, key=lambda item: item[1]):
        axes = [axis for _, _, axis in found]
        for other in axes[1:]:
            if other != axes[0]:
                graph.add_edge(axes[0], other, op=op)

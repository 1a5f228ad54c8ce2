"""Sites: the places in the graph where a group's units are last read.

The units of a group are removed at the product that reads them: an FFN channel at the second
linear, a head at the output projection. Its weight is what compensation mends, its input what
statistics are taken of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from prunec.graph.cost import Counts, parameter_count
from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.dims import Dim
from prunec.graph.selection import IntArray, positions
from prunec.importance.problem import SiteProblem, UnitSet


@dataclass(frozen=True)
class Producer:
    """A weight that makes units of a site: they lie on its output axis.

    Attributes:
        parameter: the weight's name.
        axis: its output axis.
        calls: per call in graph order, the node and the operand that the weight multiplies.
    """

    parameter: str
    axis: int
    calls: tuple[tuple[fx.Node, fx.Node], ...]


@dataclass(frozen=True)
class Site:
    """A weight that reads the units of some groups, and the calls in which it does.

    Attributes:
        parameter: the weight's name.
        axis: its input axis.
        nodes: the calls, in graph order; several where layers share the weight.
        operands: per call, the value that carries the units.
        groups: the groups whose units are read, major first.
        block: the repeated block it lies in, if any.
        producers: the weights that make the units, in graph order.
        bias: name of the parameter that every call, and nothing else, adds to its product.
    """

    parameter: str
    axis: int
    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    groups: tuple[Group, ...]
    block: str | None
    producers: tuple[Producer, ...] = ()
    bias: str | None = None

    @property
    def name(self) -> str:
        return self.parameter.rpartition(".")[0] or self.parameter


@dataclass(frozen=True)
class Skipped:
    """A group that was asked for but has no site, and why."""

    group: str
    reason: str


@dataclass(frozen=True)
class _Product:
    """A product of a weight, and which axis of it a leaf lies on."""

    node: fx.Node
    operand: fx.Node
    parameter: str
    axis: int
    bias: fx.Node | None


# operator -> (input, weight, the weight's input axis, its output axis, bias)
_PRODUCTS = {
    "aten::linear": ("input", "weight", 1, 0, "bias"),
    "aten::addmm": ("mat1", "mat2", 0, 1, "self"),
    "aten::mm": ("self", "mat2", 0, 1, None),
}


def find_sites(coupling: CouplingGraph, kinds: Collection[str]) -> tuple[list[Site], list[Skipped]]:
    """The sites of all groups of these kinds, in graph order, and the groups that have none."""
    reads, makes = _products(coupling)
    places: dict[tuple[str, int], list[Group]] = {}
    skipped: list[Skipped] = []
    for group in coupling.groups:
        if group.kind not in kinds:
            continue
        found = {(read.parameter, read.axis) for read in reads.get(group.dim, [])}
        if len(found) == 1:
            places.setdefault(found.pop(), []).append(group)
        else:
            reason = f"read by {len(found)} weights" if found else "no linear layer reads it"
            skipped.append(Skipped(group.name, reason))
    order = {node: i for i, node in enumerate(coupling.program.graph.nodes)}
    sites = []
    for (parameter, axis), groups in places.items():
        at = [r for r in reads[groups[0].dim] if (r.parameter, r.axis) == (parameter, axis)]
        blocks = {group.block for group in groups}
        sites.append(
            Site(
                parameter=parameter,
                axis=axis,
                nodes=tuple(read.node for read in at),
                operands=tuple(read.operand for read in at),
                groups=tuple(sorted(groups, key=lambda group: len(group.companions))),
                block=blocks.pop() if len(blocks) == 1 else None,
                producers=_producers([make for group in groups for make in makes[group.dim]]),
                bias=_own_bias(coupling, at),
            )
        )
    return sorted(sites, key=lambda site: order[site.nodes[-1]]), skipped


def _products(
    coupling: CouplingGraph,
) -> tuple[dict[Dim, list[_Product]], dict[Dim, list[_Product]]]:
    """Per leaf, the products with a weight that sum over it, and those whose result carries it."""
    program, layout = coupling.program, coupling.layout
    reads: dict[Dim, list[_Product]] = defaultdict(list)
    makes: dict[Dim, list[_Product]] = defaultdict(list)
    for node in program.graph.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if name not in _PRODUCTS:
            continue
        operand, weight, read_axis, made_axis, bias = _PRODUCTS[name]
        call = layout.call(node)
        parameter = program.bindings.get(call.arg(weight).name)
        added = call.arg(bias) if bias else None
        if parameter in program.parameters:
            for found, axis in ((reads, read_axis), (makes, made_axis)):
                product = _Product(node, call.arg(operand), str(parameter), axis, added)
                for leaf in call.dims(weight)[axis].leaves():
                    found[leaf].append(product)
    return reads, makes


def _producers(makes: Sequence[_Product]) -> tuple[Producer, ...]:
    calls: dict[tuple[str, int], dict[fx.Node, fx.Node]] = {}
    for make in makes:
        calls.setdefault((make.parameter, make.axis), {})[make.node] = make.operand
    return tuple(
        Producer(parameter, axis, tuple(found.items()))
        for (parameter, axis), found in calls.items()
    )


def _own_bias(coupling: CouplingGraph, reads: Sequence[_Product]) -> str | None:
    """The parameter ``[out]`` that these calls, and no others, add to their product."""
    program, (bias, *others) = coupling.program, dict.fromkeys(read.bias for read in reads)
    if bias is None or others or len(coupling.layout.dims(bias)) != 1:
        return None
    name = program.bindings.get(bias.name)
    own = set(bias.users) == {read.node for read in reads}
    return name if own and name in {*program.parameters, *program.added} else None


def site_problem(
    site: Site,
    coupling: CouplingGraph,
    tensors: Mapping[str, Tensor],
    fixed: Counts | None = None,
) -> SiteProblem:
    """What a criterion is asked at this site.

    Args:
        tensors: the present member parameters.
        fixed: units that are left of leaves of no site, such as the residual stream.
    """
    names = site_parameters(site)
    by_name = {group.name: group.dim for group in site.groups}
    columns = coupling.layout.parameters[site.parameter][site.axis]

    def size(counts: Mapping[str, int]) -> int:
        kept = {**(fixed or {}), **{by_name[name]: count for name, count in counts.items()}}
        return parameter_count(coupling, kept, names)

    return SiteProblem(
        name=site.name,
        weight=tensors[site.parameter].movedim(site.axis, -1),
        unit_sets=tuple(_unit_set(group, coupling, columns) for group in site.groups),
        parameters={name: tensors[name] for name in names},
        size=size,
        reader=(site.parameter, site.axis),
        producers=tuple((made.parameter, made.axis) for made in site.producers),
    )


def site_parameters(site: Site) -> list[str]:
    """The names of all parameters that hold units of the site's groups."""
    return list(dict.fromkeys(m.parameter for group in site.groups for m in group.members))


def _unit_set(group: Group, coupling: CouplingGraph, columns: Dim) -> UnitSet:
    companions = [coupling[name] for name in group.companions]
    dims = [companion.dim for companion in companions]
    return UnitSet(
        group=group.name,
        companions=group.companions,
        columns=unit_positions(columns, group.dim, dims),
        positions={
            (member.parameter, member.axis): unit_positions(
                coupling.layout.parameters[member.parameter][member.axis], group.dim, dims
            )
            for member in group.members
        },
        minimum=group.minimum,
    )


def unit_positions(axis: Dim, leaf: Dim, companions: Sequence[Dim]) -> IntArray:
    """Int [C, U, width]: where each unit of a leaf stands on an axis, per companion index."""
    table = positions(axis)
    first = dict(reversed(table))
    rows = np.zeros(axis.size, dtype=np.int64)
    for companion in companions:
        rows = rows * companion.size + first[companion.root]
    places = [np.flatnonzero(index >= 0) for found, index in table if found is leaf.root]
    units = [index[index >= 0] for found, index in table if found is leaf.root]
    place, unit = np.concatenate(places), np.concatenate(units)
    order = np.lexsort((place, unit, rows[place]))
    count = int(np.prod([companion.size for companion in companions], initial=1))
    return place[order].reshape(count, leaf.size, -1)

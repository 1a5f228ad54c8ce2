"""Measures: what a model costs at any numbers of units, exactly, whole and site by site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import fx

from prunec.errors import PlanError
from prunec.graph.cost import Counts, flops, node_flops, parameter_count
from prunec.graph.coupling import CouplingGraph
from prunec.graph.dims import Dim, extent
from prunec.passes.sites import Site, site_parameters
from prunec.passes.targets.latency import LatencyMeasure

UnitCounts = Mapping[str, int]
"""Units kept by group name; groups that are not named are whole."""


class Measure(Protocol):
    """A cost that a target bounds; costs of different sites add up."""

    def whole(self) -> float:
        """Of the dense model."""

    def at(self, site: Site, counts: UnitCounts) -> float:
        """Of everything that carries the site's units, when its groups keep these many."""


class Parameters:
    """Number of parameters, tied ones once."""

    def __init__(self, coupling: CouplingGraph):
        self._coupling = coupling

    def whole(self) -> float:
        return parameter_count(self._coupling)

    def at(self, site: Site, counts: UnitCounts) -> float:
        return parameter_count(self._coupling, by_dim(site, counts), site_parameters(site))


class Memory:
    """Bytes of the parameters, in the dtype that each has."""

    def __init__(self, coupling: CouplingGraph):
        self._coupling = coupling

    def whole(self) -> float:
        return self._bytes(list(self._coupling.program.parameters), {})

    def at(self, site: Site, counts: UnitCounts) -> float:
        return self._bytes(site_parameters(site), by_dim(site, counts))

    def _bytes(self, names: list[str], kept: Counts) -> int:
        layout, state = self._coupling.layout, self._coupling.program.state
        return sum(
            math.prod(extent(dim, kept) for dim in layout.parameters[name])
            * state[name].element_size()
            for name in names
        )


class Flops:
    """FLOPs of one forward pass at the traced shape (see `prunec.graph.cost.flops`)."""

    def __init__(self, coupling: CouplingGraph):
        self._coupling = coupling
        self._carriers: dict[str, list[fx.Node]] = {}

    def whole(self) -> float:
        return flops(self._coupling)

    def at(self, site: Site, counts: UnitCounts) -> float:
        if site.name not in self._carriers:
            self._carriers[site.name] = carriers(self._coupling, site)
        kept, layout = by_dim(site, counts), self._coupling.layout
        return sum(node_flops(node, layout, kept) for node in self._carriers[site.name])


class KvCache:
    """Bytes that the keys and values of one token take in a cache, over all attentions.

    Heads that only repeat a key (query heads of a KV group) are not cached.
    """

    def __init__(self, coupling: CouplingGraph):
        self._coupling = coupling
        self._cached = [
            (call.dims(name), operand.meta["val"].element_size())
            for node in coupling.program.graph.nodes
            if _operator(node) == "aten::scaled_dot_product_attention"
            for call in [coupling.layout.call(node)]
            for name in ("key", "value")
            for operand in [call.arg(name)]
        ]
        if not self._cached:
            raise PlanError(
                "no attention was found whose keys and values could be cached",
                fix="use another target: params=, flops=, memory= or latency=",
            )

    def whole(self) -> float:
        return sum(self._bytes(dims, size, {}) for dims, size in self._cached)

    def at(self, site: Site, counts: UnitCounts) -> float:
        kept, own = by_dim(site, counts), {group.dim.root for group in site.groups}
        return sum(
            self._bytes(dims, size, kept)
            for dims, size in self._cached
            if own & {leaf.root for dim in dims for leaf in dim.leaves()}
        )

    def _bytes(self, dims: tuple[Dim, ...], element_size: int, kept: Counts) -> int:
        heads = math.prod(
            extent(leaf, kept) for leaf in dims[-3].leaves() if not leaf.has("shared")
        )
        return heads * extent(dims[-1], kept) * element_size


def measure_for(kind: str, coupling: CouplingGraph) -> Measure:
    """The measure of a kind of target (see `prunec.passes.targets.target.KINDS`)."""
    made: Mapping[str, Callable[[CouplingGraph], Measure]] = {
        "flops": Flops,
        "kv-cache": KvCache,
        "memory": Memory,
        "latency": LatencyMeasure,
    }
    return made.get(kind, Parameters)(coupling)


def by_dim(site: Site, counts: UnitCounts) -> dict[Dim, int]:
    """Counts by leaf instead of by group name."""
    return {group.dim: counts[group.name] for group in site.groups if group.name in counts}


def carriers(coupling: CouplingGraph, site: Site) -> list[fx.Node]:
    """The calls in which the units of a site take part."""
    leaves = {group.dim.root for group in site.groups}
    carrying = {
        node
        for node, values in coupling.layout.values.items()
        if any(leaf in leaves for value in values for dim in value.dims for leaf in dim.leaves())
    }
    return [
        node
        for node in coupling.program.graph.nodes
        if node.op == "call_function"
        and (node in carrying or any(source in carrying for source in node.all_input_nodes))
    ]


def _operator(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))

"""Measures: what a model costs at any numbers of units, exactly, whole and site by site."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from torch import fx

from prunec.errors import PlanError
from prunec.graph.attention import cached
from prunec.graph.branches import Branch
from prunec.graph.cost import Counts, flops, node_flops, parameter_count
from prunec.graph.coupling import CouplingGraph
from prunec.graph.dims import Dim, extent
from prunec.passes.sites import Site
from prunec.passes.targets.latency import LatencyMeasure

UnitCounts = Mapping[str, int]
"""Units kept by group name, of any site; groups that are not named are whole."""


class Measure(Protocol):
    """A cost that a target bounds; costs of sites that share no parameter add up."""

    def whole(self) -> float:
        """Of the dense model."""

    def at(self, site: Site, counts: UnitCounts) -> float:
        """Of everything that carries the site's units, when groups keep these many."""

    def branch(self, site: Site, branch: Branch) -> float:
        """Of a residual branch that ends in the site."""

    def added(self, site: Site) -> float:
        """Of biases that the model lacks and that are fitted where the site gives units."""


class Parameters:
    """Number of parameters, tied ones once.

    Args:
        fixed: units that are left of leaves of no site, such as the residual stream.
        names: those that count, by default all.
    """

    def __init__(
        self,
        coupling: CouplingGraph,
        fixed: Counts | None = None,
        names: Collection[str] | None = None,
    ):
        self._coupling = coupling
        self._fixed = fixed or {}
        self._names = coupling.program.parameters if names is None else frozenset(names)

    def whole(self) -> float:
        return parameter_count(self._coupling, self._fixed, self._names)

    def at(self, site: Site, counts: UnitCounts) -> float:
        kept = {**self._fixed, **by_dim(self._coupling, counts)}
        names = [name for name in site.parameters if name in self._names]
        return parameter_count(self._coupling, kept, names)

    def branch(self, site: Site, branch: Branch) -> float:
        names = [name for name in branch.parameters if name in self._names]
        return parameter_count(self._coupling, self._fixed, names)

    def added(self, site: Site) -> float:
        names = [bias for weight, bias in _added(self._coupling, site) if weight in self._names]
        return parameter_count(self._coupling, self._fixed, names)

    def counts_all(self, site: Site) -> bool:
        """Whether every parameter of a site counts."""
        return self._names.issuperset(site.parameters)


class Memory:
    """Bytes of the parameters, in the dtype that each has; `fixed` as for `Parameters`."""

    def __init__(self, coupling: CouplingGraph, fixed: Counts | None = None):
        self._coupling = coupling
        self._fixed = fixed or {}

    def whole(self) -> float:
        return self._bytes(list(self._coupling.program.parameters), {})

    def at(self, site: Site, counts: UnitCounts) -> float:
        return self._bytes(site.parameters, by_dim(self._coupling, counts))

    def branch(self, site: Site, branch: Branch) -> float:
        return self._bytes(list(branch.parameters), {})

    def added(self, site: Site) -> float:
        return self._bytes([bias for _, bias in _added(self._coupling, site)], {})

    def _bytes(self, names: list[str], kept: Counts) -> int:
        layout, state = self._coupling.layout, self._coupling.program.state
        kept = {**self._fixed, **kept}
        return sum(
            math.prod(extent(dim, kept) for dim in layout.parameters[name])
            * state[name].element_size()
            for name in names
        )


class Flops:
    """FLOPs of one forward pass at the traced shape; `fixed` as for `Parameters`."""

    def __init__(self, coupling: CouplingGraph, fixed: Counts | None = None):
        self._coupling = coupling
        self._fixed = fixed or {}
        self._carriers: dict[str, list[fx.Node]] = {}

    def whole(self) -> float:
        return flops(self._coupling, self._fixed)

    def at(self, site: Site, counts: UnitCounts) -> float:
        if site.name not in self._carriers:
            self._carriers[site.name] = carriers(self._coupling, site)
        kept = {**self._fixed, **by_dim(self._coupling, counts)}
        layout = self._coupling.layout
        return sum(node_flops(node, layout, kept) for node in self._carriers[site.name])

    def branch(self, site: Site, branch: Branch) -> float:
        layout = self._coupling.layout
        return sum(node_flops(node, layout, self._fixed) for node in branch.nodes)

    def added(self, site: Site) -> float:
        return 0.0


class KvCache:
    """Bytes that the keys and values of one token take in a cache, over all attentions
    of which a cache keeps them (`prunec.graph.attention`).

    Heads that only repeat a key (query heads of a KV group) are not cached.
    """

    def __init__(self, coupling: CouplingGraph):
        self._coupling, layout = coupling, coupling.layout
        self._cached = [
            (held.heads, held.features, held.node.meta["val"].element_size())
            for held in cached(coupling.program, layout)
        ]
        self._stored = {
            leaf.root
            for dims in layout.parameters.values()
            for dim in dims
            for leaf in dim.leaves()
        }
        if not self._cached:
            raise PlanError(
                "this model keeps no cache of keys and values",
                so="it has no attention in which tokens see none that come later",
                fix="use another target: params=, flops=, memory= or latency=",
            )

    def whole(self) -> float:
        return sum(self._bytes(*held, {}) for held in self._cached)

    def at(self, site: Site, counts: UnitCounts) -> float:
        kept, own = by_dim(self._coupling, counts), {group.dim.root for group in site.groups}
        return sum(
            self._bytes(heads, features, size, kept)
            for heads, features, size in self._cached
            if own & {leaf.root for dim in (heads, features) for leaf in dim.leaves()}
        )

    def branch(self, site: Site, branch: Branch) -> float:
        return self.at(site, {})

    def added(self, site: Site) -> float:
        return 0.0

    def _bytes(self, heads: Dim, features: Dim, element_size: int, kept: Counts) -> int:
        repeated = {
            leaf.root: 1  # a batch, or query heads that share their keys
            for leaf in heads.leaves()
            if leaf.has("shared") or leaf.root not in self._stored
        }
        return extent(heads, {**kept, **repeated}) * extent(features, kept) * element_size


def measure_for(kind: str, coupling: CouplingGraph, fixed: Counts | None = None) -> Measure:
    """The measure of a kind of target (see `prunec.passes.targets.target.KINDS`).

    Args:
        fixed: units that are left of leaves of no site.

    Raises:
        PlanError: there are some, and the measure does not count them.
    """
    if kind in ("kv-cache", "latency"):
        if fixed:
            raise PlanError(f"a {kind} target does not tell what the residual stream's width costs")
        return KvCache(coupling) if kind == "kv-cache" else LatencyMeasure(coupling)
    made: Mapping[str, Callable[[CouplingGraph, Counts | None], Measure]] = {
        "flops": Flops,
        "memory": Memory,
    }
    return made.get(kind, Parameters)(coupling, fixed)


def _added(coupling: CouplingGraph, site: Site) -> list[tuple[str, str]]:
    """A site's weights and their biases, of those biases that the model lacks."""
    if not site.takes_bias:
        return []
    readings = (reading for given in site.inputs for reading in given.readings)
    biases = {r.parameter: r.bias for r in readings if r.bias is not None}
    return [(name, bias) for name, bias in biases.items() if bias in coupling.program.added]


def by_dim(coupling: CouplingGraph, counts: UnitCounts) -> Counts:
    """Units kept by leaf."""
    return {coupling[name].dim: count for name, count in counts.items()}


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

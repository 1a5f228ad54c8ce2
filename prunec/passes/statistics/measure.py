"""Statistics of a site while the batches stream by: of its own input, and of its producers'."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, fx

from prunec.graph.interpreter import Reader, Stream
from prunec.graph.selection import Selection
from prunec.importance.statistics import Collector, collector, producer_statistics, statistic_of
from prunec.passes.compensation.regression import Moments, Regression
from prunec.passes.distributed import processes
from prunec.passes.sites import Site

_FEW_TOKENS = 3  # times fewer than columns: then eliminating columns in token space is faster

Statistics = Mapping[str, Tensor]
"""One tensor per name that a criterion or a compensation declares; of a producer or a gradient,
per parameter (see `statistic_of`)."""


class Measured(Protocol):
    """Where a site's statistics come from: a stream, or what an earlier run saved."""

    def take(self, site: Site) -> Statistics:
        """The statistics of a site; sites come in the order of the graph."""

    def pass_by(self, site: Site) -> None:
        """Go on as if they had been taken."""

    def skip(self, site: Site) -> None:
        """Those of this site are not needed."""

    def select(self, selection: Selection) -> None:
        """Units went, as this selection says."""


@dataclass(frozen=True)
class _Stop:
    """A call before which a value is shown to the collectors of one site."""

    position: int
    node: fx.Node
    operand: fx.Node
    site: str
    collectors: tuple[Collector, ...]
    moments: Moments | None = None


class Measurement:
    """The statistics of some sites, taken in one pass of a stream.

    Each site's collectors live from the first call that they watch to :meth:`take`. What makes a
    site's units may run before an earlier site is reached (attention beside an FFN), so the stops
    of all sites are kept in the order of the graph.

    Args:
        regression: the moments of input and target that are taken too, if any.
        dense: the dense program's stream, for a regression that needs it.
        tokens: whether "input_gram" may be "input_tokens" at a site of many more columns than
            tokens; every reader of these statistics must take both.
    """

    def __init__(
        self,
        stream: Stream,
        sites: Sequence[Site],
        names: Collection[str],
        *,
        regression: Regression | None = None,
        dense: Stream | None = None,
        tokens: bool = False,
    ):
        self.stream = stream
        self._tokens = tokens and processes().size == 1  # only sums add up over processes
        self._dense = dense
        self._moments = {
            site.name: Moments(regression, site, stream, dense) for site in sites if regression
        }
        self._collectors: dict[str, dict[str, Collector]] = {}
        order = {node: i for i, node in enumerate(stream.program.graph.nodes)}
        stops = [stop for site in sites for stop in self._stops(site, names, order)]
        self._pending = sorted(stops, key=lambda stop: stop.position)

    def take(self, site: Site) -> Statistics:
        """Run the stream up to the site, and hand its statistics over.

        Raises:
            VerifyError: NaN or Inf on the way, or no token.
        """
        self._run_to(site)
        collectors = self._collectors.pop(site.name)
        different = dict.fromkeys(collectors.values())  # in one order in every process
        for statistic in different:
            statistic.merge(processes().total)
        finished = {statistic: statistic.finish() for statistic in different}
        taken = {key: finished[statistic] for key, statistic in collectors.items()}
        if site.name in self._moments:
            taken |= self._moments.pop(site.name).statistics()
        return taken

    def pass_by(self, site: Site) -> None:
        """Run the stream up to the site exactly as `take` does, without its statistics."""
        self._pending = [
            replace(stop, collectors=(), moments=None) if stop.site == site.name else stop
            for stop in self._pending
        ]
        self._run_to(site)
        self._collectors.pop(site.name)
        self._moments.pop(site.name, None)

    def skip(self, site: Site) -> None:
        """Take no statistics of this site."""
        self._pending = [stop for stop in self._pending if stop.site != site.name]
        self._collectors.pop(site.name)
        self._moments.pop(site.name, None)

    def select(self, selection: Selection) -> None:
        """Units went: what streams by carries them no more."""
        self.stream.select(selection)

    def _run_to(self, site: Site) -> None:
        while any(stop.site == site.name for stop in self._pending):
            self._advance()

    def _stops(
        self, site: Site, names: Collection[str], order: Mapping[fx.Node, int]
    ) -> list[_Stop]:
        of_producers = producer_statistics(names)
        own = {
            name: collector(name, site=site.name)
            for name in sorted(self._forms(site, set(names) - set(of_producers)))
        }
        known: dict[str, Collector] = dict(own)
        moments = self._moments.get(site.name)
        watched: list[tuple[fx.Node, fx.Node, tuple[Collector, ...], Moments | None]] = [
            (node, operand, tuple(own.values()), moments)
            for node, operand in zip(site.nodes, site.operands, strict=True)
        ]
        # Producers that multiply the same value (gate and up; q, k and v) share its statistics.
        taken: dict[tuple[fx.Node, ...], dict[str, Collector]] = {}
        for producer in site.producers:
            operands = tuple(operand for _, operand in producer.calls)
            if operands not in taken:
                place = f"{producer.parameter}, which feeds {site.name}"
                taken[operands] = {
                    name: collector(base, site=place) for name, base in of_producers.items()
                }
                there = tuple(taken[operands].values())
                watched += [(node, operand, there, None) for node, operand in producer.calls]
            for name, statistic in taken[operands].items():
                known[statistic_of(name, producer.parameter)] = statistic
        self._collectors[site.name] = known
        return [
            _Stop(order[node], node, operand, site.name, collectors, pair)
            for node, operand, collectors, pair in watched
            if collectors or pair
        ]

    def _forms(self, site: Site, names: set[str]) -> set[str]:
        """The names with "input_tokens" for "input_gram" where that takes far less."""
        if not self._tokens or "input_gram" not in names:
            return names
        shapes = [operand.meta["val"].shape for operand in site.operands]
        tokens = self.stream.batches * sum(math.prod(shape[:-1]) for shape in shapes)
        if tokens * _FEW_TOKENS > shapes[0][-1]:
            return names
        return names - {"input_gram"} | {"input_tokens"}

    def _advance(self) -> None:
        """To the next call that is watched."""
        node = self._pending[0].node
        here = [stop for stop in self._pending if stop.node is node]
        self._pending = self._pending[len(here) :]
        by_operand: dict[fx.Node, list[Collector]] = {}
        for stop in here:
            by_operand.setdefault(stop.operand, []).extend(stop.collectors)
        assert len(by_operand) == 1, f"{node.name} reads units through two operands"
        ((operand, collectors),) = by_operand.items()

        paired = [stop.moments for stop in here if stop.moments is not None]
        for batch, (read, read_dense) in enumerate(self._walk(node, beside=bool(paired))):
            value = read(operand)
            tokens = self.stream.real_tokens(batch, operand, value)
            for statistic in collectors:
                statistic.update(value, tokens)
            for moments in paired:
                moments.update(batch, node, read, read_dense)

    def _walk(self, node: fx.Node, *, beside: bool) -> Iterator[tuple[Reader, Reader | None]]:
        """Batch by batch, the values of the pruned program and, beside them, the dense one's."""
        if beside and self._dense is not None:
            return zip(self.stream.walk(node), self._dense.walk(node), strict=True)
        return ((read, None) for read in self.stream.walk(node))

"""Statistics of a site while the batches stream by: of its own input, and of its producers'."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, fx

from prunec.graph.dims import Dim
from prunec.graph.interpreter import Reader, Stream
from prunec.graph.rows import Real, Rows, Tokens
from prunec.graph.selection import Selection
from prunec.importance.blocks import by_block
from prunec.importance.statistics import collector, producer_statistics, statistic_of
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
    """A call before which rows are shown to the collectors of one site."""

    position: int
    node: fx.Node
    rows: Rows
    site: str
    collectors: RowStatistics | None
    moments: Moments | None = None


class RowStatistics:
    """Statistics of some rows, for each matrix that multiplies them.

    Args:
        names: of the statistics.
        place: which rows, for messages.

    Attributes:
        selection: of the units that were left when the rows came by.
    """

    def __init__(self, names: Collection[str], rows: Rows, place: str):
        self.names = sorted(names)
        self.selection = Selection()
        self._shared_out = rows.shared_out
        self._parts = [
            {name: collector(name, site=place) for name in self.names} for _ in range(rows.parts)
        ]

    def update(self, rows: Rows, read: Reader, real: Real, selection: Selection) -> None:
        """Take in one batch at one call, from which `selection` has taken units."""
        self.selection = selection
        for chunk in rows.chunks(read, real):
            for statistic in self._parts[chunk.part].values():
                statistic.update(chunk.rows, chunk.counts)

    def finish(self) -> tuple[list[dict[str, Tensor]], list[float]]:
        """Per matrix, its statistics over its own rows, and its share of all rows.

        Raises:
            VerifyError: no row counted.
        """
        for part in self._parts:
            for statistic in part.values():
                statistic.merge(processes().total)
        counts = [next(iter(part.values())).tokens if part else 0.0 for part in self._parts]
        everything = sum(counts) if self._shared_out else max(counts)
        found = [
            {name: statistic.finish(idle=everything > 0) for name, statistic in part.items()}
            for part in self._parts
        ]
        return found, [count / everything if everything else 0.0 for count in counts]


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
        self._taken: dict[str, _Taken] = {}
        order = {node: i for i, node in enumerate(stream.program.graph.nodes)}
        stops: list[_Stop] = []
        for site in sites:
            moments: list[Moments] = []
            if regression is not None:
                moments = [Moments(regression, g, site.name, stream, dense) for g in site.inputs]
            self._taken[site.name] = taken = _Taken(site, self._forms(site, names), moments)
            watched = taken.stops(order)
            stops += watched
            if watched and site.start is not None and not site.is_shared:
                stream.hold(site.name, site.start)
        self._pending = sorted(stops, key=lambda stop: stop.position)
        for stop in self._pending:
            for either in (stream, dense):
                if either is not None:
                    either.keep_for(stop.node, stop.rows.needs)

    def take(self, site: Site) -> Statistics:
        """Run the stream up to the site, and hand its statistics over.

        Raises:
            VerifyError: NaN or Inf on the way, or no token.
        """
        self._run_to(site)
        return self._taken.pop(site.name).statistics(self.stream)

    def pass_by(self, site: Site) -> None:
        """Run the stream up to the site exactly as `take` does, without its statistics."""
        self._pending = [
            replace(stop, collectors=None, moments=None) if stop.site == site.name else stop
            for stop in self._pending
        ]
        self._run_to(site)
        self._taken.pop(site.name)

    def skip(self, site: Site) -> None:
        """Take no statistics of this site."""
        self._pending = [stop for stop in self._pending if stop.site != site.name]
        self._taken.pop(site.name)
        self.stream.release(site.name)

    def select(self, selection: Selection) -> None:
        """Units went: what streams by carries them no more."""
        self.stream.select(selection)

    def _run_to(self, site: Site) -> None:
        while any(stop.site == site.name for stop in self._pending):
            self._advance()
        self.stream.release(site.name)

    def _forms(self, site: Site, names: Collection[str]) -> set[str]:
        """The names with "input_tokens" for "input_gram" where that takes far less."""
        if not self._tokens or "input_gram" not in names or len(site.inputs) != 1:
            return set(names)
        ((_, rows), *_) = calls = site.inputs[0].calls
        if not isinstance(rows, Tokens) or rows.parts > 1:
            return set(names)
        shape = rows.operand.meta["val"].shape
        columns = math.prod(shape[axis] for axis in rows.inner)
        tokens = self.stream.batches * len(calls) * (math.prod(shape) // columns)
        if tokens * _FEW_TOKENS > columns:
            return set(names)
        return set(names) - {"input_gram"} | {"input_tokens"}

    def _advance(self) -> None:
        """To the next call that is watched."""
        node = self._pending[0].node
        here = [stop for stop in self._pending if stop.node is node]
        self._pending = self._pending[len(here) :]
        paired = any(stop.moments is not None for stop in here)
        for batch, (read, read_dense) in enumerate(self._walk(node, beside=paired)):
            real = partial(self.stream.real_tokens, batch)
            for stop in here:
                if stop.collectors is not None:
                    stop.collectors.update(stop.rows, read, real, self.stream.selection)
                if stop.moments is not None:
                    stop.moments.update(batch, node, read, read_dense)

    def _walk(self, node: fx.Node, *, beside: bool) -> Iterator[tuple[Reader, Reader | None]]:
        """Batch by batch, the values of the pruned program and, beside them, the dense one's."""
        if beside and self._dense is not None:
            return zip(self.stream.walk(node), self._dense.walk(node), strict=True)
        return ((read, None) for read in self.stream.walk(node))


class _Taken:
    """What is collected of one site: of its inputs, and of what its producers multiply."""

    def __init__(self, site: Site, names: Collection[str], moments: Sequence[Moments]):
        self._site = site
        self._moments: list[Moments | None] = list(moments) or [None] * len(site.inputs)
        self._of_producers = producer_statistics(names)
        own = set(names) - set(self._of_producers)
        self._inputs = [RowStatistics(own, given.calls[0][1], site.name) for given in site.inputs]
        # Producers that multiply the same rows (gate and up; q, k and v) share their statistics.
        self._producers: dict[tuple[Rows, ...], RowStatistics] = {}
        for producer in site.producers if self._of_producers else ():
            rows = tuple(rows for _, rows in producer.calls)
            place = f"{producer.parameter}, which feeds {site.name}"
            taken = RowStatistics(set(self._of_producers.values()), rows[0], place)
            self._producers.setdefault(rows, taken)

    def stops(self, order: Mapping[fx.Node, int]) -> list[_Stop]:
        """Where something is to be seen."""
        name = self._site.name
        found = [
            _Stop(order[node], node, rows, name, statistics, pair)
            for given, statistics, pair in zip(
                self._site.inputs, self._inputs, self._moments, strict=True
            )
            for node, rows in given.calls
            if statistics.names or pair
        ]
        seen = set[tuple[Rows, ...]]()
        for producer in self._site.producers if self._producers else ():
            key = tuple(rows for _, rows in producer.calls)
            if key not in seen:
                seen.add(key)
                found += [
                    _Stop(order[node], node, rows, name, self._producers[key])
                    for node, rows in producer.calls
                ]
        return found

    def statistics(self, stream: Stream) -> dict[str, Tensor]:
        """All of it, by key.

        Raises:
            VerifyError: no token counted.
        """
        blocks: list[dict[str, Tensor]] = []
        shares: list[float] = []
        for statistics, moments in zip(self._inputs, self._moments, strict=True):
            found, parts = statistics.finish()
            if moments is not None:
                found = [a | b for a, b in zip(found, moments.statistics(), strict=True)]
            blocks, shares = blocks + found, shares + parts
        taken = by_block(blocks, shares) if blocks else {}
        return taken | self._made(stream)

    def _made(self, stream: Stream) -> dict[str, Tensor]:
        """Statistics of producers, shaped to broadcast with the weight, its output axis first."""
        finished = {key: statistics.finish() for key, statistics in self._producers.items()}
        taken = {}
        for producer in self._site.producers if self._producers else ():
            dims = stream.layout.parameters[producer.parameter]
            shape = [stream.selection.size(dim) for dim in dims]
            key = tuple(rows for _, rows in producer.calls)
            found, shares = finished[key]
            columns = producer.matrix.columns(dims)
            left = _still_there(columns, self._producers[key].selection, stream.selection)
            for name, base in self._of_producers.items():
                each = [part[base] * share for part, share in zip(found, shares, strict=True)]
                values = torch.cat(each) if left is None else torch.cat(each)[left]
                spread = producer.matrix.spread(values, shape).movedim(producer.axis, 0)
                label = statistic_of(name, producer.parameter)
                taken[label] = spread[0] if len(spread) == 1 else spread
        return taken


def _still_there(columns: Dim, before: Selection, now: Selection) -> Tensor | None:
    """Bool, which of the columns that there were are left; None where all are."""
    mask, earlier = now.mask(columns), before.mask(columns)
    if mask is None:
        return None
    return torch.from_numpy(mask if earlier is None else mask[earlier])

"""What a criterion is asked at a site, and the weights that come of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunec.graph.cost import parameter_count
from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.dims import Dim
from prunec.graph.selection import IntArray, Selection, positions
from prunec.importance.blocks import of_block
from prunec.importance.problem import Axis, SiteProblem, UnitSet
from prunec.passes.compensation.closed_form import Compensation
from prunec.passes.sites import Input, Reading, Site


def site_problem(
    site: Site,
    coupling: CouplingGraph,
    tensors: Mapping[str, Tensor],
    selection: Selection | None = None,
) -> SiteProblem:
    """What a criterion is asked at this site.

    Args:
        tensors: the present member parameters.
        selection: the units of other groups that are gone from them.
    """
    selection = selection or Selection()
    names = site.parameters
    others = selection.counts
    by_name = {group.name: group.dim for group in site.groups}
    columns = site.columns(coupling)
    blocks = [block for given in site.inputs for block in _blocks(given, tensors)]

    def size(counts: Mapping[str, int]) -> int:
        kept = {**others, **{by_name[name]: count for name, count in counts.items()}}
        return parameter_count(coupling, kept, names)

    return SiteProblem(
        name=site.name,
        weight=_beside(blocks) if blocks else torch.zeros(0, columns.size),
        unit_sets=tuple(_unit_set(group, coupling, columns, selection) for group in site.groups),
        parameters={name: tensors[name] for name in names},
        size=size,
        readers=_readers(site, coupling),
        producers=tuple((made.parameter, made.axis) for made in site.producers),
        blocks=tuple(block.shape[1] for block in blocks) if len(blocks) > 1 else (),
    )


def _blocks(given: Input, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Per part ``[out, columns]``: what all weights that read these rows make of them."""
    stacks = [reading.matrix.split(tensors[reading.parameter]) for reading in given.readings]
    together = stacks[0] if len(stacks) == 1 else torch.cat(stacks, dim=1)
    return list(together)


def _beside(blocks: Sequence[Tensor]) -> Tensor:
    """``[out, columns]``, blocks with fewer rows filled up with zeros."""
    if len(blocks) == 1:
        return blocks[0]
    out = max(len(block) for block in blocks)
    return torch.cat(
        [torch.nn.functional.pad(block, (0, 0, 0, out - len(block))) for block in blocks], dim=1
    )


def _readers(site: Site, coupling: CouplingGraph) -> tuple[Axis, ...]:
    """The members that read the units; of a site without input, the last matrix that holds them."""
    dims = coupling.layout.parameters
    if not site.inputs:
        matrices = [axis for axis in site.members if len(dims[axis[0]]) > 1]
        return tuple(matrices[-1:])
    return tuple(
        dict.fromkeys(
            (reading.parameter, reading.matrix.own_axis(axis))
            for reading in site.readings
            for axis in (*reading.matrix.stack, *reading.matrix.inner)
        )
    )


def _unit_set(group: Group, coupling: CouplingGraph, columns: Dim, selection: Selection) -> UnitSet:
    companions = [coupling[name] for name in group.companions]
    dims = [companion.dim for companion in companions]
    return UnitSet(
        group=group.name,
        companions=group.companions,
        columns=_present(columns, group.dim, dims, selection),
        positions={
            (member.parameter, member.axis): _present(
                coupling.layout.parameters[member.parameter][member.axis],
                group.dim,
                dims,
                selection,
            )
            for member in group.members
        },
        minimum=group.minimum,
    )


def _present(axis: Dim, leaf: Dim, companions: Sequence[Dim], selection: Selection) -> IntArray:
    """Where the units stand now that others have left the axis."""
    places, mask = unit_positions(axis, leaf, companions), selection.mask(axis)
    return places if mask is None else (np.cumsum(mask) - 1)[places]


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


@dataclass(frozen=True, eq=False)
class Mender:
    """Mends the weights of sites, each matrix by itself on the statistics of its own rows.

    Attributes:
        compensation: what it does.
        selection: the units that stay.
        tensors: those before.
    """

    coupling: CouplingGraph
    compensation: Compensation
    selection: Selection
    tensors: Mapping[str, Tensor]

    def mend(self, site: Site, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a site without the columns that go, and fitted biases, by name.

        Nothing for a site without input, whose weights are only cut.
        """
        mask = self.selection.mask(site.columns(self.coupling)) if site.inputs else None
        if mask is None:
            return {}
        blocks = sum(given.parts for given in site.inputs)
        updated: dict[str, Tensor] = {}
        column, block = 0, 0
        for given in site.inputs:
            stacks = [self._matrices(reading) for reading in given.readings]
            width = stacks[0].shape[2]
            kept = torch.from_numpy(mask[column : column + given.parts * width])
            found = [of_block(statistics, block + p, blocks) for p in range(given.parts)]
            row = 0
            for reading, stack in zip(given.readings, stacks, strict=True):
                rows = slice(row, row + stack.shape[1])
                parts = [
                    _Part(matrix, keep, _of_outputs(statistics, width, rows))
                    for matrix, keep, statistics in zip(
                        stack, kept.view(given.parts, width), found, strict=True
                    )
                    if bool(keep.any())
                ]
                updated |= self._mended(reading, parts, site.name)
                row = rows.stop
            column, block = column + given.parts * width, block + given.parts
        return updated

    def _matrices(self, reading: Reading) -> Tensor:
        return reading.matrix.split(self.tensors[reading.parameter])

    def _mended(self, reading: Reading, parts: Sequence[_Part], name: str) -> dict[str, Tensor]:
        made = [
            self.compensation.compensate(
                part.weight, part.statistics, part.keep, bias=reading.bias is not None, name=name
            )
            for part in parts
        ]
        dims = reading.matrix.dims(self.coupling.layout.parameters[reading.parameter])
        sizes = [self.selection.size(dim) for dim in dims]
        stacked = torch.stack([mended.weight for mended in made])
        updated = {reading.parameter: reading.matrix.join(stacked, sizes)}
        fitted = [mended.bias for mended in made if mended.bias is not None]
        if reading.bias is not None and fitted:
            before = self.tensors[reading.bias]
            offset = torch.cat(fitted).to(before.device)
            updated[reading.bias] = (before.double() + offset).to(before.dtype)
        return updated


@dataclass(frozen=True, eq=False)
class _Part:
    """One matrix of a weight ``[out, columns]``, which columns stay, and what is known of them."""

    weight: Tensor
    keep: Tensor
    statistics: Mapping[str, Tensor]


def _of_outputs(
    statistics: Mapping[str, Tensor], columns: int, rows: slice
) -> Mapping[str, Tensor]:
    """Statistics in which the moments of a target have these outputs only.

    The targets of all weights that read the same rows are taken together, see `Regression`.
    """

    def of(moments: Tensor) -> Tensor:
        known = torch.arange(columns + 1, device=moments.device)
        mine = torch.arange(rows.start, rows.stop, device=moments.device) + columns + 1
        index = torch.cat((known, mine))
        return moments[index][:, index]

    taken = dict(statistics)
    for name in ("fit_gram", "held_gram"):
        if name in taken and len(taken[name]) > columns + 1:
            taken[name] = of(taken[name])
    return taken

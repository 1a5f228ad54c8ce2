"""Which units stay: keep masks of leaves, and what they mean for any axis, tensor or extent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunec.errors import PlanError
from prunec.graph.dims import Dim, extent

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Keep:
    """The kept units of one leaf.

    ``mask`` is bool [companion sizes..., size]. Without companions it is one row. With companions
    (axes major to the leaf wherever it occurs) each companion index has a row of its own, all
    rows of surviving companion indices with equal counts, so that tensors stay rectangular.
    """

    mask: BoolArray
    companions: tuple[Dim, ...] = ()


class Selection:
    """Keep masks by leaf; every leaf that is not mentioned stays whole."""

    def __init__(self, keeps: Mapping[Dim, Keep] | None = None):
        self._keeps = {leaf.root: keep for leaf, keep in (keeps or {}).items()}
        self._masks: dict[Dim, BoolArray | None] = {}
        self._counts = {leaf: self._leaf_count(leaf, keep) for leaf, keep in self._keeps.items()}

    def __bool__(self) -> bool:
        return bool(self._keeps)

    def with_keeps(self, keeps: Mapping[Dim, Keep]) -> Selection:
        """A new selection in which these leaves have these masks."""
        return Selection({**self._keeps, **keeps})

    def keep(self, leaf: Dim) -> Keep | None:
        return self._keeps.get(leaf.root)

    @property
    def counts(self) -> Mapping[Dim, int]:
        """Units kept by leaf (in every row), of the leaves that lose some."""
        return self._counts

    def touches(self, dim: Dim) -> bool:
        """Whether some leaf of this axis loses units."""
        return any(leaf in self._keeps for leaf in dim.leaves())

    def size(self, dim: Dim) -> int:
        """The extent of ``dim`` after selection."""
        return extent(dim, self._counts)

    def before(self, dim: Dim, bound: int) -> int:
        """How many positions stay of the first ``bound`` of an axis.

        Where the cut falls between parts this needs no mask, so that it is known even where
        which units stay differs along another axis.
        """
        root = dim.root
        if bound <= 0 or not self.touches(root):
            return max(bound, 0)
        if bound >= root.size:
            return self.size(root)
        if root.form == "sum":
            return self._before_in_sum(root, bound)
        inner = math.prod(part.size for part in root.parts[1:])
        if root.form == "product" and bound % inner == 0:
            rest = math.prod(self.size(part) for part in root.parts[1:])
            kept = self.mask(root) if self._is_joint(root) else None
            if kept is None:
                return self.before(root.parts[0], bound // inner) * rest
            return int(kept[:bound].sum())
        mask = self.mask(root)
        return bound if mask is None else int(mask[:bound].sum())

    def _before_in_sum(self, dim: Dim, bound: int) -> int:
        kept = 0
        for part in dim.parts:
            if bound < part.size:
                return kept + self.before(part, bound)
            kept, bound = kept + self.size(part), bound - part.size
        return kept

    def _is_joint(self, dim: Dim) -> bool:
        """Whether a leaf of this axis loses units row by row."""
        leaves = [leaf for leaf in dim.leaves() if leaf in self._keeps]
        return any(self._keeps[leaf].companions for leaf in leaves) and not self._spreads(dim)

    def mask(self, dim: Dim) -> BoolArray | None:
        """Bool [dim.size], True where the position stays; None where all do.

        Raises:
            PlanError: if a leaf depends on a companion that is not part of this axis.
        """
        root = dim.root
        if root not in self._masks:
            self._masks[root] = self._mask(root) if self.touches(root) else None
        return self._masks[root]

    def _mask(self, dim: Dim) -> BoolArray:
        table = positions(dim)
        indices = dict(table)
        mask = np.ones(dim.size, dtype=bool)
        for leaf, index in table:
            keep = self._keeps.get(leaf)
            if keep is None:
                continue
            missing = [c for c in keep.companions if c.root not in indices]
            if missing:
                raise PlanError(
                    f"the units kept of {leaf.label} differ from {missing[0].label} to "
                    f"{missing[0].label}, but the axis {dim.label} carries only the former"
                )
            where = (*(indices[c.root] for c in keep.companions), index)
            mask &= np.where(index >= 0, keep.mask[where], True)
        return mask

    def joint_mask(self, dims: Sequence[Dim]) -> Tensor | None:
        """Bool, of the tensor's full shape, True where an element stays; None where all do."""
        mask = self.thin_mask(dims)
        return None if mask is None else mask.expand([dim.size for dim in dims])

    def thin_mask(self, dims: Sequence[Dim]) -> Tensor | None:
        """As `joint_mask`, axes that lose nothing left at size 1, to be broadcast."""
        if not any(self.touches(dim) for dim in dims):
            return None
        if any(self._spreads(dim) for dim in dims):
            leaves = {leaf for dim in dims for leaf in dim.leaves() if leaf in self._keeps}
            needed = {c.root for leaf in leaves for c in self._keeps[leaf].companions} | leaves
            thin = [dim if needed & set(dim.leaves()) else Dim(1) for dim in dims]
            joint = torch.from_numpy(self._mask(product_of_axes(thin)))
            return joint.reshape([dim.size for dim in thin])
        joint = torch.ones([1] * len(dims), dtype=torch.bool)
        for axis, dim in enumerate(dims):
            mask = self.mask(dim)
            if mask is not None:
                joint = joint & torch.from_numpy(mask).view(-1, *[1] * (len(dims) - axis - 1))
        return joint

    def _leaf_count(self, leaf: Dim, keep: Keep) -> int:
        rows = keep.mask.reshape(-1, leaf.size)
        counts = set(rows.sum(axis=1)[self.surviving_rows(keep).reshape(-1)].tolist())
        if len(counts) != 1:
            raise PlanError(
                f"{leaf.label}: every companion index must keep as many units, not {sorted(counts)}"
            )
        return int(counts.pop())

    def surviving_rows(self, keep: Keep) -> BoolArray:
        """Bool [companion sizes...]: combinations of companion units that stay themselves.

        A companion may have companions of its own, which are then the leaf's too.
        """
        roots = [companion.root for companion in keep.companions]
        sizes = [root.size for root in roots]
        index = dict(zip(roots, np.indices(sizes), strict=True))
        alive = np.ones(sizes, dtype=bool)
        for root in roots:
            own = self._keeps.get(root)
            if own is None:
                continue
            missing = [c for c in own.companions if c.root not in index]
            if missing:
                raise PlanError(
                    f"the units kept of {root.label} differ from {missing[0].label} to "
                    f"{missing[0].label}, which is no companion of what they hold"
                )
            alive &= own.mask[(*(index[c.root] for c in own.companions), index[root])]
        return alive

    def take(self, tensor: Tensor, dims: Sequence[Dim], before: Selection | None = None) -> Tensor:
        """The part of ``tensor`` (one Dim an axis) that stays, as a new tensor.

        The tensor has the axes' original extents, or those that the selection ``before`` left.
        """
        if any(self._spreads(dim) for dim in dims):
            return self._take_jointly(tensor, dims, before)
        for axis, dim in enumerate(dims):
            mask = self.mask(dim)
            if mask is not None:
                index = _positions_within(mask, before.mask(dim) if before else None)
                if len(index) != tensor.shape[axis]:
                    tensor = tensor.index_select(axis, torch.from_numpy(index).to(tensor.device))
        return tensor

    def _spreads(self, dim: Dim) -> bool:
        """Whether a leaf of this axis has a companion that lies on another axis."""
        leaves = set(dim.leaves())
        keeps = [self._keeps[leaf] for leaf in leaves if leaf in self._keeps]
        return any(c.root not in leaves for keep in keeps for c in keep.companions)

    def _take_jointly(
        self, tensor: Tensor, dims: Sequence[Dim], before: Selection | None
    ) -> Tensor:
        """Leaf and companion on different axes: select in the joint index space, then reshape."""
        whole = product_of_axes(dims)
        index = _positions_within(self._mask(whole), before.mask(whole) if before else None)
        flat = tensor.reshape(-1)[torch.from_numpy(index).to(tensor.device)]
        return flat.reshape([self.size(d) for d in dims])

    def extents(self, dim: Dim) -> Iterator[tuple[tuple[Dim, ...], int, int]]:
        """(whose, old, new) of this axis and of every factor, run and segment that changed.

        Whose it is tells extents apart that have the same sizes: 3 of 3 groups by 3 of 3 heads.
        """
        root = dim.root
        if not self.touches(root):
            return
        yield (root,), root.size, self.size(root)
        parts = root.parts
        for part in parts:
            yield from self.extents(part)
        if root.form == "product":
            for start in range(len(parts)):
                for stop in range(start + 2, len(parts) + 1):
                    run = parts[start:stop]
                    if any(self.touches(part) for part in run):
                        yield (
                            tuple(part.root for part in run),
                            math.prod(p.size for p in run),
                            math.prod(self.size(p) for p in run),
                        )


def _positions_within(mask: BoolArray, before: BoolArray | None) -> IntArray:
    """Where the positions of ``mask`` stand among those that ``before`` left."""
    index = np.flatnonzero(mask)
    return index if before is None else np.searchsorted(np.flatnonzero(before), index)


def product_of_axes(dims: Sequence[Dim]) -> Dim:
    """All axes of a tensor as one axis (a product that keeps size-1 factors out)."""
    factors = [d.root for d in dims if d.size != 1]
    return Dim(math.prod(f.size for f in factors), form="product", parts=factors)


def positions(dim: Dim) -> list[tuple[Dim, IntArray]]:
    """Per leaf below ``dim``: int [dim.size], the index in that leaf at every position.

    -1 stands where a segment does not carry the leaf. A leaf that occurs twice in one product has
    two rows.
    """
    root = dim.root
    if root.form == "leaf":
        return [(root, np.arange(root.size))]
    tables = [positions(part) for part in root.parts]
    if root.form == "product":
        return _product_positions(root, tables)
    return _sum_positions(root, tables)


def _product_positions(
    dim: Dim, tables: list[list[tuple[Dim, IntArray]]]
) -> list[tuple[Dim, IntArray]]:
    rows: list[tuple[Dim, IntArray]] = []
    outer, inner = 1, dim.size
    for part, table in zip(dim.parts, tables, strict=True):
        inner //= part.size
        rows += [(leaf, np.tile(np.repeat(index, inner), outer)) for leaf, index in table]
        outer *= part.size
    return rows


def _sum_positions(
    dim: Dim, tables: list[list[tuple[Dim, IntArray]]]
) -> list[tuple[Dim, IntArray]]:
    rows: dict[tuple[Dim, int], IntArray] = {}
    start = 0
    for part, table in zip(dim.parts, tables, strict=True):
        seen: dict[Dim, int] = {}
        for leaf, index in table:
            occurrence = seen[leaf] = seen.get(leaf, -1) + 1
            row = rows.setdefault((leaf, occurrence), np.full(dim.size, -1))
            row[start : start + part.size] = index
        start += part.size
    return [(leaf, row) for (leaf, _), row in rows.items()]


@dataclass(frozen=True)
class Extent:
    """A size that changed, of an axis or of a part of one, and the parameters that carry it."""

    old: int
    new: int
    parameters: frozenset[str]


@dataclass(frozen=True)
class Sliced:
    """What a plan did to a model's parameters: the seam between the passes and codegen.

    Attributes:
        weights: every parameter by its name in the model, and every saved buffer that changes (the
            statistics of a batch norm), at its new size; tied names share one tensor object.
        keep: for each of them that changed, per axis, the sorted kept indices of the original axis
            (None: the whole axis).
        extents: the sizes that changed.
        added: parameters that the stock model lacks (fitted biases).
        skip: branch -> the modules that lie in it, for branches that are left out; parameters that
            only they read are not among the weights.
        stored: where the values of `weights` and `added` are read, by name, if these are on meta;
            None where they hold their values.
    """

    weights: Mapping[str, Tensor]
    keep: Mapping[str, tuple[IntArray | None, ...]]
    extents: tuple[Extent, ...]
    added: Mapping[str, Tensor] = field(default_factory=dict)
    skip: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stored: Mapping[str, Tensor] | None = None

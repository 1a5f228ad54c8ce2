"""How a weight of any rank is one matrix, or a stack of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from prunec.graph.dims import Dim, as_product, product_of


@dataclass(frozen=True)
class Matrix:
    """How a tensor is a stack of matrices ``[parts, out, columns]``.

    Attributes:
        outer: the axes of a matrix's rows.
        inner: the axes of its columns, major to minor.
        stack: the axes along which one matrix lies beside another.
        fold: axis 0 holds this many blocks, which count as an axis before all others.
    """

    outer: tuple[int, ...]
    inner: tuple[int, ...]
    stack: tuple[int, ...] = ()
    fold: int = 1

    def split(self, tensor: Tensor) -> Tensor:
        """``[parts, out, columns]``."""
        folded = tensor.reshape(self.fold, -1, *tensor.shape[1:]) if self.fold > 1 else tensor
        sizes = [
            math.prod(folded.shape[axis] for axis in axes)
            for axes in (self.stack, self.outer, self.inner)
        ]
        return folded.permute(self._order).reshape(sizes)

    def join(self, matrices: Tensor, sizes: Sequence[int]) -> Tensor:
        """The tensor of these matrices; `sizes` are those of the axes of `dims`."""
        folded = matrices.reshape([sizes[axis] for axis in self._order]).permute(self._back)
        return (folded.flatten(0, 1) if self.fold > 1 else folded).contiguous()

    def dims(self, dims: Sequence[Dim]) -> list[Dim]:
        """The Dims of the tensor's axes, the folded one taken apart."""
        if self.fold == 1:
            return list(dims)
        return [*as_product(dims[0], [self.fold, dims[0].size // self.fold]), *dims[1:]]

    def columns(self, dims: Sequence[Dim]) -> Dim:
        """The columns of all parts as one axis, part after part."""
        folded = self.dims(dims)
        return product_of(folded[axis] for axis in (*self.stack, *self.inner))

    def own_axis(self, axis: int) -> int:
        """An axis of `dims` as an axis of the tensor."""
        return max(0, axis - 1) if self.fold > 1 else axis

    def spread(self, columns: Tensor, shape: Sequence[int]) -> Tensor:
        """A number for each column of each part, to be broadcast with a tensor of `shape`."""
        sizes = [self.fold, shape[0] // self.fold, *shape[1:]] if self.fold > 1 else list(shape)
        few = [1 if axis in self.outer else size for axis, size in enumerate(sizes)]
        thin = columns.reshape([few[axis] for axis in self._order]).permute(self._back)
        if self.fold == 1:
            return thin
        return thin.expand(-1, sizes[1], *few[2:]).flatten(0, 1)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.stack, *self.outer, *self.inner)

    @property
    def _back(self) -> list[int]:
        return [self._order.index(axis) for axis in range(len(self._order))]

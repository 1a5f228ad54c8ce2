"""Rows: what a product multiplies, as one table of rows for each matrix of its weight.

A row of a linear layer is a token. A row of a convolution is the patch under its kernel. Where a
weight holds one matrix an expert, each has the rows of the tokens that were sent to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, fx

from prunec.errors import VerifyError
from prunec.graph.program import source_line

Read = Callable[[fx.Node], Tensor]
Real = Callable[[fx.Node, Tensor], Tensor | None]
"""Which tokens of a node's value are no padding, by all axes but the last; None where all are."""

_PATCH_ELEMENTS = 1 << 24
"""Patches overlap, so they are laid out for a few samples at a time."""


class Chunk(NamedTuple):
    """Some rows of one matrix.

    Attributes:
        part: which matrix of the weight.
        rows: ``[rows, columns]``.
        counts: bool ``[rows]``, which of them count; None where all do.
    """

    part: int
    rows: Tensor
    counts: Tensor | None


class Rows(Protocol):
    """Where the rows of a product come from.

    Attributes:
        operand: the value that they are made of.
        parts: the number of matrices.
        shared_out: whether a row belongs to one matrix only, as a token to its expert.
        needs: other values that are read.
    """

    @property
    def operand(self) -> fx.Node: ...
    @property
    def parts(self) -> int: ...
    @property
    def shared_out(self) -> bool: ...
    @property
    def needs(self) -> tuple[fx.Node, ...]: ...

    def chunks(self, read: Read, real: Real) -> Iterator[Chunk]:
        """The rows of one batch."""


@dataclass(frozen=True)
class Tokens:
    """The rows of a contraction: the operand's axes in another order.

    Attributes:
        stack: its axes that go along the weight's matrices.
        tokens, inner: its other axes: those that the result has too, and those summed over.
        routing: a value ``[tokens, parts]`` or so that the result is multiplied by: where it is
            zero the matrix has no say in that token.
        routing_order: its axes, those of the parts first.
    """

    operand: fx.Node
    stack: tuple[int, ...]
    tokens: tuple[int, ...]
    inner: tuple[int, ...]
    parts: int = 1
    routing: fx.Node | None = None
    routing_order: tuple[int, ...] = ()

    @property
    def shared_out(self) -> bool:
        return self.routing is not None

    @property
    def needs(self) -> tuple[fx.Node, ...]:
        return () if self.routing is None else (self.routing,)

    def chunks(self, read: Read, real: Real) -> Iterator[Chunk]:
        value = read(self.operand).permute(*self.stack, *self.tokens, *self.inner)
        sizes = value.shape[len(self.stack) : value.ndim - len(self.inner)]
        stacked = value.reshape(-1, *sizes, math.prod(value.shape[value.ndim - len(self.inner) :]))
        sent = self._sent(read, len(stacked))
        for part, rows in enumerate(stacked):
            counts = real(self.operand, rows)
            counts = None if counts is None else counts.flatten()
            if sent is not None:
                counts = sent[part] if counts is None else sent[part] & counts
            yield Chunk(part, rows.flatten(0, -2), counts)

    def _sent(self, read: Read, parts: int) -> Tensor | None:
        """Bool ``[parts, tokens]``."""
        if self.routing is None:
            return None
        return read(self.routing).permute(self.routing_order).reshape(parts, -1) != 0


@dataclass(frozen=True)
class Sorted:
    """Rows that lie sorted by the matrix that they are multiplied with.

    Attributes:
        offsets: where the rows of each matrix end, ``[parts]``.
        origin: the token that each row is, None where that is not known.
        tokens: how many tokens there are.
    """

    operand: fx.Node
    offsets: fx.Node
    parts: int
    origin: fx.Node | None = None
    tokens: int = 0
    shared_out: bool = True

    @property
    def needs(self) -> tuple[fx.Node, ...]:
        return (self.offsets,) if self.origin is None else (self.offsets, self.origin)

    def chunks(self, read: Read, real: Real) -> Iterator[Chunk]:
        value, first = read(self.operand), 0
        counts = _of_tokens(self, value, read, real)
        for part, end in enumerate(read(self.offsets).tolist()):
            yield Chunk(part, value[first:end], None if counts is None else counts[first:end])
            first = end


@dataclass(frozen=True)
class Chosen:
    """Rows each of which is multiplied with a matrix of its own, taken from the weight.

    Attributes:
        inner: the operand's axis that is summed over.
        choice: which matrix, by row.
        axes: the operand's axis for each of the choice's; None where it has none, all matrices that
            a row chooses being multiplied with the same.
        origin, tokens: as in `Sorted`.
    """

    operand: fx.Node
    inner: int
    choice: fx.Node
    axes: tuple[int | None, ...]
    parts: int
    origin: fx.Node | None = None
    tokens: int = 0
    shared_out: bool = True

    @property
    def needs(self) -> tuple[fx.Node, ...]:
        return (self.choice,) if self.origin is None else (self.choice, self.origin)

    def chunks(self, read: Read, real: Real) -> Iterator[Chunk]:
        value, choice = read(self.operand), read(self.choice)
        known = [axis for axis in self.axes if axis is not None]
        width = value.shape[self.inner]
        rows = value.movedim((*known, self.inner), tuple(range(len(known) + 1))).reshape(-1, width)
        counts = _of_tokens(self, rows, read, real)
        sizes = [
            1 if axis is None else size for axis, size in zip(self.axes, choice.shape, strict=True)
        ]
        rows = rows.reshape(*sizes, width).expand(*choice.shape, width)
        if counts is not None:
            counts = counts.reshape(sizes).expand(choice.shape)
        for part in range(self.parts):
            mine = choice == part
            yield Chunk(part, rows[mine], None if counts is None else counts[mine])


def _of_tokens(given: Sorted | Chosen, rows: Tensor, read: Read, real: Real) -> Tensor | None:
    """Bool ``[rows]``: those of tokens that are no padding."""
    if given.origin is None:
        return real(given.operand, rows)
    counts = real(given.operand, rows.new_empty(given.tokens, 0))
    return None if counts is None else counts[read(given.origin).flatten()]


@dataclass(frozen=True)
class Patches:
    """The patches under the kernel of a convolution, one a position of its result.

    Attributes:
        kernel, stride, padding, dilation: a number per spatial axis; the padding a pair.
        parts: groups of the convolution, of which each has its own channels.
        transposed: the kernel is laid over the stretched input, turned around.
    """

    operand: fx.Node
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    parts: int = 1
    transposed: bool = False
    shared_out: bool = False
    needs: tuple[fx.Node, ...] = ()

    def chunks(self, read: Read, real: Real) -> Iterator[Chunk]:
        value = read(self.operand)
        if value.ndim == len(self.kernel) + 1:
            value = value[None]
        few = max(1, _PATCH_ELEMENTS // (value[0].numel() * math.prod(self.kernel)))
        known = real(self.operand, value.movedim(1, -1))
        for first in range(0, len(value), few):
            patches = self._patches(value[first : first + few])
            mask = None
            if known is not None:
                if known.shape[1:] != patches.shape[1:-2]:
                    raise VerifyError(
                        "a convolution changes the number of positions, some of them padding",
                        where=source_line(self.operand),
                        fix="give samples of one length, without padding",
                    )
                mask = known[first : first + few].flatten()
            for part in range(self.parts):
                yield Chunk(part, patches[..., part, :].flatten(0, -2), mask)

    def _patches(self, value: Tensor) -> Tensor:
        """``[samples, positions..., parts, columns]``."""
        rank = len(self.kernel)
        stride = self.stride
        if self.transposed:
            value, stride = _stretched(value, self.stride), (1,) * rank
        value = F.pad(value, [side for pair in reversed(self.padding) for side in pair])
        for axis, (size, step, gap) in enumerate(
            zip(self.kernel, stride, self.dilation, strict=True)
        ):
            value = value.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
            if self.transposed:
                value = value.flip(-1)
        samples, channels, *positions = value.shape[: 2 + rank]
        value = value.movedim(1, 1 + rank)
        columns = (channels // self.parts) * math.prod(self.kernel)
        return value.reshape(samples, *positions, self.parts, columns)


def _stretched(value: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Zeros between the positions, as a transposed convolution has them."""
    sizes = [(size - 1) * step + 1 for size, step in zip(value.shape[2:], stride, strict=True)]
    wide = value.new_zeros(*value.shape[:2], *sizes)
    places = tuple(slice(None, None, step) for step in stride)
    wide[(slice(None), slice(None), *places)] = value
    return wide


def spatial(given: Any, rank: int) -> tuple[int, ...]:
    """An argument of a convolution, a number for each spatial axis."""
    numbers = list(given) if isinstance(given, (list, tuple)) else [given]
    return tuple(int(n) for n in (numbers * rank if len(numbers) == 1 else numbers))


def patches(
    operand: fx.Node, arguments: dict[str, Any], kernel: tuple[int, ...], *, transposed: bool
) -> Patches:
    """The patches of a call of a convolution, from its arguments by name."""
    rank = len(kernel)
    stride, dilation = (spatial(arguments[name], rank) for name in ("stride", "dilation"))
    sides = _sides(arguments["padding"], kernel, dilation)
    if transposed:
        more = spatial(arguments["output_padding"], rank)
        reach = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        sides = tuple(
            (full - low, full - high + extra)
            for full, (low, high), extra in zip(reach, sides, more, strict=True)
        )
    groups = int(arguments["groups"])
    return Patches(operand, kernel, stride, sides, dilation, groups, transposed)


def _sides(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((side, side) for side in spatial(padding, len(kernel)))

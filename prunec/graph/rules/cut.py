"""Operators that cut an axis: splits, slices, single positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prunec.errors import DimError
from prunec.graph.dims import Dim, as_sum
from prunec.graph.rules.layout import read_as
from prunec.graph.rules.registry import RULES, Call, Resized, Result, Value
from prunec.graph.selection import Selection


@RULES.register("aten::unbind", usage="move")
def unbind(call: Call) -> Result:
    axis, dims = call.axis(), call.dims("self")
    _cut(call, dims[axis], [1] * dims[axis].size)
    return [Value(dims[:axis] + dims[axis + 1 :], call.domain("self")) for _ in call.shapes]


_SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")


@RULES.register(*(f"aten::{name}" for name in _SPLITS), usage="move")
def split(call: Call) -> Result:
    axis, dims = call.axis(), call.dims("self")
    segments = _cut(call, dims[axis], [shape[axis] for shape in call.shapes])
    domain = call.domain("self")
    return [Value((*dims[:axis], s, *dims[axis + 1 :]), domain) for s in segments]


@RULES.resizes(*(f"aten::{name}" for name in _SPLITS))
def resize_split(call: Call, selection: Selection) -> Resized:
    """Pieces may come out unequal, so every split becomes a split with sizes."""
    axis = call.axis()
    if not selection.touches(call.dims("self")[axis]):
        return Resized()
    sizes = [selection.size(value.dims[axis]) for value in call.results]
    arguments = {"self": call.arg("self"), "split_sizes": sizes, "dim": axis}
    return Resized(arguments, target=torch.ops.aten.split_with_sizes.default)


def _cut(call: Call, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Segments of an axis; where it has none such, it is pinned and the pieces are new axes."""
    if 0 in sizes:
        kept = iter(_cut(call, dim, [size for size in sizes if size]) if any(sizes) else [])
        return [next(kept) if size else Dim(0) for size in sizes]
    try:
        return as_sum(dim, sizes)
    except DimError as error:
        call.pin(dim, str(error))
        fresh = [call.fresh(size) for size in sizes]
        for piece in fresh:
            call.pin(piece, str(error))
        return fresh


@RULES.register("aten::slice", "aten::narrow", usage="move")
def slice_(call: Call) -> Result:
    axis, dims = call.axis(), list(call.dims("self"))
    size, new, step = dims[axis].size, call.shape[axis], call.arg("step") or 1
    if new == size:
        return tuple(dims)
    if step != 1:
        dims[axis] = _stride(call, dims[axis], new, step)
        return tuple(dims)
    start = call.arg("start") or 0
    if not isinstance(start, int):
        raise DimError("a slice with a start that is not known")
    start = min(start + size if start < 0 else start, size)
    sizes = [start, new, size - start - new]
    dims[axis] = _cut(call, dims[axis], sizes)[1]
    return tuple(dims)


def _stride(call: Call, dim: Dim, size: int, step: int) -> Dim:
    """Every step-th position: the major factor of a product whose minor factor is the phase."""
    if dim.size != size * step:
        raise DimError(f"every {step}th of {dim.size} positions")
    major, phase = read_as(call, dim, [size, step])
    call.pin(phase, "a strided slice picks one phase")
    return major


@RULES.resizes("aten::slice")
def resize_slice(call: Call, selection: Selection) -> Resized:
    """Bounds become the number of kept positions before them; a strided start is a phase."""
    dim = call.dims("self")[call.axis()]
    if not selection.touches(dim) or (call.arg("step") or 1) != 1:
        return Resized()
    bounds = {}
    for name in ("start", "end"):
        bound = call.arg(name)
        if isinstance(bound, int) and bound != 0:
            bounds[name] = selection.before(dim, bound + dim.size if bound < 0 else bound)
    return Resized(bounds)


@RULES.resizes("aten::narrow")
def resize_narrow(call: Call, selection: Selection) -> Resized:
    axis = call.axis()
    dim = call.dims("self")[axis]
    if not selection.touches(dim):
        return Resized()
    start = selection.before(dim, int(call.arg("start")))
    return Resized({"start": start, "length": selection.size(call.result.dims[axis])})


@RULES.register("aten::select", usage="move")
def select(call: Call) -> Result:
    axis, dims = call.axis(), call.dims("self")
    dim = dims[axis]
    if dim.form == "sum":
        _cut(call, dim, [1] * dim.size)
    else:
        call.pin(dim, "one position is picked")
    return dims[:axis] + dims[axis + 1 :]


@RULES.resizes("aten::select")
def resize_select(call: Call, selection: Selection) -> Resized:
    dim = call.dims("self")[call.axis()]
    index = call.arg("index")
    if not selection.touches(dim) or not isinstance(index, int):
        return Resized()
    return Resized({"index": selection.before(dim, index % dim.size)})

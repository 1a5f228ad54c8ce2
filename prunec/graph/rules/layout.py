"""Operators that rearrange axes: views, permutations, expansion, concatenation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunec.errors import DimError
from prunec.graph.dims import Dim, as_product, product_of, sum_of
from prunec.graph.rules.registry import RULES, Call, Dims, Resized, Result, Value
from prunec.graph.selection import Selection

_VIEWS = ("view", "reshape", "_unsafe_view", "_reshape_alias")
_SHAPED_LIKE = ("flatten", "unflatten", "view_as", "reshape_as")


@RULES.register(*(f"aten::{name}" for name in _VIEWS + _SHAPED_LIKE), usage="move")
def view(call: Call) -> Result:
    dims = call.dims("self")
    if "dtype" in call.arguments and [dim.size for dim in dims] == call.shape:
        return dims
    return regroup(call, dims, call.shape)


def regroup(call: Call, source: Dims, sizes: Sequence[int]) -> Dims:
    """Read the axes of ``source`` as axes of these sizes.

    Both shapes are cut into the smallest runs of equal product; each run becomes one product that
    is read anew. Axes of size 1 carry nothing and fall out.
    """
    if 0 in sizes:
        return tuple(call.fresh(size) for size in sizes)
    pending = [dim for dim in source if dim.size != 1]
    result: list[Dim] = []
    wanted = list(sizes)
    while wanted:
        run, have = [wanted.pop(0)], 1
        if run[0] == 1:
            result.append(Dim(1))
            continue
        taken: list[Dim] = []
        while have != math.prod(run):
            if have < math.prod(run) and pending:
                taken.append(pending.pop(0))
                have *= taken[-1].size
            elif wanted:
                run.append(wanted.pop(0))
            else:
                raise DimError(f"axes of {[dim.size for dim in source]} read as {list(sizes)}")
        result += read_as(call, product_of(taken), run)
    return tuple(result)


def read_as(call: Call, whole: Dim, sizes: Sequence[int]) -> list[Dim]:
    try:
        return as_product(whole, sizes)
    except DimError as error:
        call.pin(whole, str(error))
        fresh = [call.fresh(size) for size in sizes]
        for dim in fresh:
            call.pin(dim, str(error))
        return fresh


@RULES.resizes("aten::view", strides=True)
@RULES.resizes("aten::reshape", "aten::_unsafe_view")
def resize_view(call: Call, selection: Selection) -> Resized:
    """As a reshape: strides that allowed a view may not survive, even where no axis changes.

    An attention kernel, for one, lays its result out by the width of its operands.
    """
    if "dtype" in call.arguments:
        return Resized()
    arguments = {"self": call.arg("self"), "shape": _new_sizes(call, selection)}
    return Resized(arguments, target=torch.ops.aten.reshape.default)


@RULES.resizes("aten::unflatten")
def resize_unflatten(call: Call, selection: Selection) -> Resized:
    axis, count = call.axis("dim"), len(call.arg("sizes"))
    dims = call.result.dims[axis : axis + count]
    sizes = [
        selection.size(dim) if selection.touches(dim) and size != -1 else size
        for dim, size in zip(dims, call.arg("sizes"), strict=True)
    ]
    return Resized({"sizes": sizes})


def _size_argument(call: Call) -> str:
    return "size" if "size" in call.arguments else "shape"


def _new_sizes(call: Call, selection: Selection) -> list[Any]:
    """Literal sizes after slicing; -1 and symbolic sizes stay."""
    given = call.arg(_size_argument(call))
    offset = len(call.result.dims) - len(given)
    return [
        selection.size(dim) if selection.touches(dim) and size != -1 else size
        for size, dim in zip(given, call.result.dims[offset:], strict=True)
    ]


@RULES.register("aten::permute", usage="move")
def permute(call: Call) -> Result:
    dims = call.dims("self")
    return tuple(dims[axis] for axis in call.arg("dims"))


@RULES.register("aten::transpose", "aten::swapaxes", "aten::swapdims", usage="move")
def transpose(call: Call) -> Result:
    dims = list(call.dims("self"))
    names = [a.name for a in call.target._schema.arguments[1:3]]
    i, j = (call.axis(name) for name in names)
    dims[i], dims[j] = dims[j], dims[i]
    return tuple(dims)


@RULES.register("aten::t", "aten::numpy_T", "aten::mT", "aten::adjoint", usage="move")
def reverse(call: Call) -> Result:
    dims = call.dims("self")
    return (*dims[:-2], *reversed(dims[-2:]))


@RULES.register("aten::movedim", "aten::moveaxis", usage="move")
def movedim(call: Call) -> Result:
    dims = call.dims("self")
    source = [axis % len(dims) for axis in _as_list(call.arg("source"))]
    target = [axis % len(dims) for axis in _as_list(call.arg("destination"))]
    rest = iter(axis for axis in range(len(dims)) if axis not in source)
    placed = dict(zip(target, source, strict=True))
    return tuple(dims[placed[i] if i in placed else next(rest)] for i in range(len(dims)))


def _as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


@RULES.register("aten::unsqueeze", usage="move")
def unsqueeze(call: Call) -> Result:
    dims = list(call.dims("self"))
    dims.insert(int(call.arg("dim")) % (len(dims) + 1), Dim(1))
    return tuple(dims)


@RULES.register("aten::squeeze", usage="move")
def squeeze(call: Call) -> Result:
    dims = call.dims("self")
    given = call.arg("dim")
    axes = set(range(len(dims))) if given is None else {a % len(dims) for a in _as_list(given)}
    return tuple(dim for i, dim in enumerate(dims) if i not in axes or dim.size != 1)


@RULES.register("aten::expand", "aten::broadcast_to", "aten::expand_as", usage="move")
def expand(call: Call) -> Result:
    """New axes where a size of 1 is widened: the tensor is shared along them."""
    dims = call.dims("self")
    result = call.broadcast([dims], call.shape)
    for back, dim in enumerate(reversed(result), start=1):
        if (len(dims) < back or dims[-back].size == 1) and call.is_data("self"):
            call.note(dim, "shared")
    return result


@RULES.resizes("aten::expand", "aten::broadcast_to")
def resize_expand(call: Call, selection: Selection) -> Resized:
    return Resized({_size_argument(call): _new_sizes(call, selection)})


@RULES.register("aten::broadcast_tensors", usage="move")
def broadcast_tensors(call: Call) -> Result:
    """Sizes follow the operands': nothing to resize."""
    dims = call.broadcast([call.dims(node) for node in call.arg("tensors")], call.shape)
    return [Value(dims, call.domain(node)) for node in call.arg("tensors")]


@RULES.register("aten::repeat", "aten::tile", usage="move")
def repeat(call: Call) -> Result:
    dims = call.dims("self")
    lead = len(call.shape) - len(dims)
    result = [call.fresh(size) for size in call.shape[:lead]]
    for dim, size in zip(dims, call.shape[lead:], strict=True):
        result.append(product_of([call.fresh(size // dim.size), dim]) if dim.size else dim)
    if call.is_data("self"):
        for dim in result[:lead]:
            call.note(dim, "shared")
    return tuple(result)


@RULES.resizes("aten::repeat", "aten::tile")
def resize_repeat(call: Call, selection: Selection) -> Resized:
    source = call.dims("self")
    results = call.result.dims
    lead = len(results) - len(source)
    name = "repeats" if "repeats" in call.arguments else "dims"
    given = [1] * (len(results) - len(call.arg(name))) + list(call.arg(name))
    times = [
        selection.size(dim) if selection.touches(dim) else size
        for dim, size in zip(results[:lead], given, strict=False)
    ]
    for dim, new, size in zip(source, results[lead:], given[lead:], strict=True):
        changed = selection.touches(new)
        times.append(selection.size(new) // max(1, selection.size(dim)) if changed else size)
    return Resized({name: times})


@RULES.register("aten::repeat_interleave", usage="move")
def repeat_interleave(call: Call) -> Result:
    repeats, dim = call.arg("repeats"), call.arg("dim")
    if not isinstance(repeats, int) or dim is None:
        raise DimError("repeat_interleave with a tensor of repeats or without an axis")
    axis, dims = call.axis("dim"), list(call.dims("self"))
    shared = call.fresh(repeats)
    if call.is_data("self"):
        call.note(shared, "shared")
    dims[axis] = product_of([dims[axis], shared])
    return tuple(dims)


@RULES.resizes("aten::repeat_interleave")
def resize_repeat_interleave(call: Call, selection: Selection) -> Resized:
    axis = call.axis("dim")
    new, old = selection.size(call.result.dims[axis]), selection.size(call.dims("self")[axis])
    size = {"output_size": new} if isinstance(call.arg("output_size"), int) else {}
    return Resized({"repeats": new // max(1, old), **size})


@RULES.register("aten::cat", "aten::concat", "aten::concatenate", usage="move")
def cat(call: Call) -> Result:
    tensors = [call.dims(node) for node in call.arg("tensors")]
    full = [dims for dims in tensors if len(dims) == len(call.shape)]
    axis = int(call.arg("dim")) % len(call.shape)
    result: list[Dim] = []
    for i, size in enumerate(call.shape):
        column = [dims[i] for dims in full]
        result.append(
            sum_of(column) if i == axis else call.broadcast([[d] for d in column], [size])[0]
        )
    return tuple(result)


@RULES.register("aten::stack", usage="move")
def stack(call: Call) -> Result:
    tensors = [call.dims(node) for node in call.arg("tensors")]
    axis = int(call.arg("dim")) % len(call.shape)
    rest = call.shape[:axis] + call.shape[axis + 1 :]
    dims = list(call.broadcast(tensors, rest))
    dims.insert(axis, sum_of([Dim(1) for _ in tensors]))
    return tuple(dims)


@RULES.register("aten::flip", "aten::roll", usage="move")
def reorder(call: Call) -> Result:
    dims = call.dims("self")
    for axis in _as_list(call.arg("dims")) or range(len(dims)):
        call.pin(dims[axis], "its order changes")
    return dims


@RULES.register("aten::diagonal", usage="move")
def diagonal(call: Call) -> Result:
    dims = list(call.dims("self"))
    i, j = call.axis("dim1"), call.axis("dim2")
    call.unify(dims[i], dims[j]) if dims[i].size == dims[j].size else call.pin(dims[i], "diagonal")
    kept = [dim for axis, dim in enumerate(dims) if axis not in (i, j)]
    return (*kept, dims[i] if dims[i].size == call.shape[-1] else call.fresh(call.shape[-1]))


@RULES.register("aten::unfold", "aten::as_strided", "aten::view_as_real", "aten::view_as_complex")
def reinterpret(call: Call) -> Result:
    """Complex pairs are a pinned axis of 2; windows and raw strides pin what they cut."""
    dims = call.dims("self")
    if call.name == "aten::view_as_real":
        pair = call.fresh(2)
        call.pin(pair, "real and imaginary part")
        return (*dims, pair)
    if call.name == "aten::view_as_complex":
        call.pin(dims[-1], "real and imaginary part")
        return dims[:-1]
    cut = range(len(dims)) if call.name == "aten::as_strided" else [int(call.arg("dimension"))]
    for axis in cut:
        call.pin(dims[axis], "cut into windows")
    return _same_or_pinned(call, dims)


@RULES.resizes("aten::view_as_complex", strides=True)
def resize_view_as_complex(call: Call, selection: Selection) -> Resized:
    """Pairs cut out of a narrower tensor may no longer start at even strides."""
    return Resized({"self": call.arg("self")}, target=pairs_as_complex)


def pairs_as_complex(self: Tensor) -> Tensor:
    """view_as_complex of a tensor of any strides."""
    return torch.view_as_complex(self.contiguous())


def _same_or_pinned(call: Call, dims: Dims) -> Dims:
    result: list[Dim] = []
    for axis, size in enumerate(call.shape):
        if call.name != "aten::as_strided" and axis < len(dims) and dims[axis].size == size:
            result.append(dims[axis])
        else:
            result.append(call.fresh(size))
            call.pin(result[-1], "a window")
    return tuple(result)

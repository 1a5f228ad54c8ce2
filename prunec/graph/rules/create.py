"""Operators that make a tensor from sizes: new axes, and integers that count positions."""

from __future__ import annotations

from prunec.graph.rules.registry import RULES, Call, Domain, Resized, Result, Value
from prunec.graph.selection import Selection


@RULES.register("aten::arange", usage="index")
def arange(call: Call) -> Result:
    dim = call.fresh(call.shape[0])
    start, step = call.arg("start") or 0, call.arg("step") or 1
    counter = start == 0 and step == 1
    if not counter:
        call.note(dim, "tabled")
    return Value((dim,), Domain(dim, ordinal=True) if counter else None)


@RULES.resizes("aten::arange")
def resize_arange(call: Call, selection: Selection) -> Resized:
    """A counter that is an index is counted anew; one that is a number keeps its numbers."""
    dim = call.result.dims[0]
    if call.result.domain is None or dim.has("numbered") or call.target._overloadname == "start":
        return Resized(select=True)
    return Resized({"end": selection.size(dim)})


@RULES.register("aten::linspace", "aten::eye", "aten::hann_window", "aten::logspace")
def table(call: Call) -> Result:
    """Numbers that depend on the position."""
    dims = tuple(call.fresh(size) for size in call.shape)
    for dim in dims:
        call.note(dim, "tabled")
    return dims


@RULES.resizes("aten::linspace", "aten::eye", "aten::hann_window", "aten::logspace")
def resize_table(call: Call, selection: Selection) -> Resized:
    return Resized(select=True)


_FILLED = ("full", "zeros", "ones", "empty", "rand", "randn", "scalar_tensor")
_FILLED_LIKE = ("new_zeros", "new_ones", "new_full", "new_empty")


@RULES.register(*(f"aten::{name}" for name in _FILLED + _FILLED_LIKE), usage="index")
def filled(call: Call) -> Result:
    return tuple(call.fresh(size) for size in call.shape)


@RULES.resizes(*(f"aten::{name}" for name in _FILLED + _FILLED_LIKE if name != "scalar_tensor"))
def resize_filled(call: Call, selection: Selection) -> Resized:
    sizes = [
        selection.size(dim) if selection.touches(dim) else size
        for dim, size in zip(call.result.dims, call.arg("size"), strict=True)
    ]
    return Resized({"size": sizes})


@RULES.register(
    *(f"aten::{name}_like" for name in ("zeros", "ones", "full", "empty", "rand", "randn")),
    "aten::fill",
    "aten::zero",
    "aten::uniform",
    "aten::normal",
    usage="index",
)
def filled_like(call: Call) -> Result:
    return call.dims("self")


@RULES.register("aten::tril", "aten::triu")
def triangle(call: Call) -> Result:
    for dim in call.dims("self")[-2:]:
        call.pin(dim, "order matters to a triangle")
    return call.dims("self")


@RULES.register(
    "aten::tril_indices", "aten::triu_indices", "aten::meshgrid", "aten::cartesian_prod"
)
def coordinates(call: Call) -> Result:
    values: list[Value] = []
    for shape in call.shapes:
        dims = tuple(call.fresh(size) for size in shape)
        for dim in dims:
            call.pin(dim, "coordinates")
        values.append(Value(dims))
    for node in call.operands:
        for dim in call.dims(node):
            call.pin(dim, "coordinates")
    return values

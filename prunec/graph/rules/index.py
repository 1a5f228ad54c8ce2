"""Operators that address positions by integers: lookups, top-k, gather and scatter.

An integer tensor remembers the axis that it indexes (its Domain). A lookup by indices of the same
axis ties the two; a lookup by anything else (token ids) pins the axis that is looked up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from prunec.graph.dims import Dim
from prunec.graph.rules.registry import RULES, Call, Domain, Resized, Result, Value
from prunec.graph.selection import Selection


@RULES.register("aten::embedding", usage="index")
def embedding(call: Call) -> Result:
    weight = call.dims("weight")
    call.index_into("indices", weight[0])
    return (*call.dims("indices"), weight[1])


@RULES.register("aten::topk", usage="index")
def topk(call: Call) -> Result:
    axis, dims = call.axis(), list(call.dims("self"))
    source, count = dims[axis], call.shape[axis]
    source.require(count)
    call.note(source, "ranked")
    dims[axis] = call.fresh(count)
    call.pin(dims[axis], "the k of a top-k")
    return [Value(tuple(dims)), Value(tuple(dims), Domain(source))]


@RULES.register("aten::sort", "aten::argsort", usage="index")
def sort(call: Call) -> Result:
    dims = call.dims("self")
    over = dims[call.axis()]
    call.note(over, "ranked")
    call.pin(over, "its order changes")  # the result's positions are ranks, not units
    order = Value(dims, Domain(over))
    return order if call.name == "aten::argsort" else [Value(dims, call.domain("self")), order]


@RULES.register("aten::histc", "aten::bincount", usage="index")
def count_indices(call: Call) -> Result:
    """How often each index occurs: one bin a position of the indexed axis."""
    domain, size = call.domain("self"), call.shape[0]
    if domain is not None and domain.dim.size == size:
        domain.dim.note("indexed", call.name, call.node.name)
        return (domain.dim,)
    call.use_as_number(domain)
    return (_addressed(call, size),)


def _addressed(call: Call, size: int) -> Dim:
    """An axis whose positions are values of integers that nothing is known of."""
    dim = call.fresh(size)
    call.pin(dim, "addressed by position")
    return dim


@RULES.resizes("aten::histc")
def resize_histc(call: Call, selection: Selection) -> Resized:
    dim = call.result.dims[0]
    if not selection.touches(dim):
        return Resized()
    bins = selection.size(dim)
    return Resized({"bins": bins, "max": bins - 1})


@RULES.resizes("aten::bincount")
def resize_bincount(call: Call, selection: Selection) -> Resized:
    return Resized({"minlength": selection.size(call.result.dims[0])})


@RULES.register("aten::one_hot", usage="index")
def one_hot(call: Call) -> Result:
    domain, size = call.domain("self"), call.shape[-1]
    if domain is not None and domain.dim.size == size:
        domain.dim.note("indexed", call.name, call.node.name)
        return (*call.dims("self"), domain.dim)
    call.use_as_number(domain)
    return (*call.dims("self"), _addressed(call, size))


@RULES.resizes("aten::one_hot")
def resize_one_hot(call: Call, selection: Selection) -> Resized:
    return Resized({"num_classes": selection.size(call.result.dims[-1])})


@RULES.register("aten::searchsorted", "aten::bucketize", usage="index")
def bucketize(call: Call) -> Result:
    for node in call.operands:
        call.use_as_number(call.domain(node))
    boundaries = call.dims("sorted_sequence") or call.dims("boundaries")
    if boundaries:
        call.pin(boundaries[-1], "sorted boundaries")
    return call.dims("self")


@RULES.register("aten::index", "aten::_unsafe_index", usage="index")
def index(call: Call) -> Result:
    """x[:, i, j]: indexed axes are replaced by the indices' own, broadcast together."""
    dims = call.dims("self")
    chosen = {axis: node for axis, node in enumerate(call.arg("indices")) if node is not None}
    if any(_is_mask(node) for node in chosen.values()):
        return _masked_index(call, dims, chosen)
    for axis, node in chosen.items():
        call.index_into(node, dims[axis])
    rest = [dim for axis, dim in enumerate(dims) if axis not in chosen]
    count = len(call.shape) - len(rest)
    axes = sorted(chosen)
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    start = axes[0] if adjacent else 0
    middle = call.broadcast(
        [call.dims(node) for node in chosen.values()], call.shape[start : start + count]
    )
    domain = call.domain("self")
    return Value((*rest[:start], *middle, *rest[start:]), domain)


def _is_mask(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.meta["val"].dtype in (torch.bool, torch.uint8)


def _masked_index(call: Call, dims: tuple[Dim, ...], chosen: dict[int, fx.Node]) -> Result:
    """x[mask]: which positions come out depends on the data."""
    axis, node = next(iter(chosen.items()))
    width = len(call.dims(node))
    for dim in dims[axis : axis + width]:
        call.pin(dim, "chosen by a mask")
    rest = (*dims[:axis], *dims[axis + width :])
    fresh = call.fresh(call.shape[axis])
    call.pin(fresh, "chosen by a mask")
    return (*rest[:axis], fresh, *rest[axis:])


@RULES.register("aten::index_put", "aten::_unsafe_index_put", usage="index")
def index_put(call: Call) -> Result:
    dims = call.dims("self")
    chosen = {axis: node for axis, node in enumerate(call.arg("indices")) if node is not None}
    for axis, node in chosen.items():
        if _is_mask(node):
            for ours, theirs in zip(dims[axis:], call.dims(node), strict=False):
                call.unify(ours, theirs)
        else:
            call.index_into(node, dims[axis])
    rest = [dim for axis, dim in enumerate(dims) if axis not in chosen]
    values = call.dims("values")
    for ours, theirs in zip(reversed(rest), reversed(values), strict=False):
        if ours.size == theirs.size:
            call.unify(ours, theirs)
    return dims


@RULES.register("aten::masked_scatter")
def masked_scatter(call: Call) -> Result:
    """Marked positions take the source's rows in turn: the axes behind the last one it marks."""
    dims = call.broadcast([call.dims("self"), call.dims("mask")], call.shape)
    source, marks = call.dims("source"), call.dims(_narrow(call.arg("mask")))
    whole = 0  # trailing axes that the mask does not tell apart
    while whole < len(source) and (len(marks) <= whole or marks[-1 - whole].size == 1):
        call.unify(dims[-1 - whole], source[-1 - whole])
        whole += 1
    for dim in (*dims[: len(dims) - whole], *source[: len(source) - whole]):
        call.pin(dim, "chosen by a mask")
    return dims


def _narrow(mask: fx.Node) -> fx.Node:
    """The mask before it was expanded."""
    while getattr(getattr(mask.target, "_schema", None), "name", None) in _WIDENED:
        mask = mask.all_input_nodes[0]
    return mask


_WIDENED = tuple(
    f"aten::{name}" for name in ("expand", "expand_as", "broadcast_to", "to", "_to_copy", "clone")
)


@RULES.register("aten::index_select", usage="index")
def index_select(call: Call) -> Result:
    axis, dims = call.axis(), call.dims("self")
    call.index_into("index", dims[axis])
    new = call.dims("index")[0] if call.dims("index") else Dim(1)
    return Value((*dims[:axis], new, *dims[axis + 1 :]), call.domain("self"))


@RULES.register("aten::gather", "aten::take_along_dim", usage="index")
def gather(call: Call) -> Result:
    """Along ``dim`` the index chooses; along every other axis index and source walk together."""
    axis, dims = call.axis(), call.dims("self")
    name = "index" if "index" in call.arguments else "indices"
    call.index_into(name, dims[axis])
    result: list[Dim] = []
    for i, (ours, theirs) in enumerate(zip(dims, call.dims(name), strict=True)):
        same = i != axis and ours.size == theirs.size
        if not same and i != axis and ours.size != 1 and theirs.size != 1:
            call.pin(ours, "gathered in part")
        result.append(call.unify(ours, theirs) if same else theirs)
    return Value(tuple(result), call.domain("self"))


@RULES.register(
    "aten::scatter",
    "aten::scatter_add",
    "aten::scatter_reduce",
    "aten::scatter_value",
    usage="index",
)
def scatter(call: Call) -> Result:
    axis, dims = call.axis(), call.dims("self")
    call.index_into("index", dims[axis])
    operands = [call.dims("index"), call.dims("src")]
    for other in operands:
        for i, (ours, theirs) in enumerate(zip(dims, other, strict=False)):
            if i != axis and ours.size == theirs.size:
                call.unify(ours, theirs)
    return dims


@RULES.register("aten::index_add", "aten::index_copy", "aten::index_fill", usage="index")
def index_add(call: Call) -> Result:
    axis, dims = call.axis(), call.dims("self")
    call.index_into("index", dims[axis])
    source = call.dims("source")
    for i, (ours, theirs) in enumerate(zip(dims, source, strict=False)):
        if i != axis:
            call.unify(ours, theirs)
        elif call.dims("index"):
            call.unify(theirs, call.dims("index")[0])
    return dims


@RULES.register("aten::nonzero", "aten::unique", "aten::_unique2", "aten::masked_select")
def data_dependent(call: Call) -> Result:
    for node in call.operands:
        for dim in call.dims(node):
            call.pin(dim, "the result's size depends on the data")
    values: list[Value] = []
    for shape in call.shapes:
        dims = tuple(call.fresh(size) for size in shape)
        for dim in dims:
            call.pin(dim, "its size depends on the data")
        values.append(Value(dims))
    return values


@RULES.register("aten::numel", "aten::item", "aten::_local_scalar_dense", "aten::sym_size")
def scalar(call: Call) -> Result:
    return [Value(tuple(call.fresh(size) for size in shape)) for shape in call.shapes]

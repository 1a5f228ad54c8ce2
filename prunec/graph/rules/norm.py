"""Norms, softmax, reductions and scans: what a result is normalised over or summed out of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from prunec.graph.dims import Dim, as_product, as_sum
from prunec.graph.rules.registry import RULES, Call, Domain, Resized, Result, Value
from prunec.graph.selection import Selection

_LAYER_NORMS = ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")


@RULES.register(*(f"aten::{name}" for name in _LAYER_NORMS))
def layer_norm(call: Call) -> Result:
    dims = call.dims(call.first)
    inner = dims[-len(call.arg("normalized_shape")) :]
    for dim in inner:
        call.note(dim, "normalised")
    for name in ("weight", "bias"):
        for ours, theirs in zip(inner, call.dims(name), strict=False):
            call.unify(ours, theirs)
    return _with_statistics(call, dims)


@RULES.resizes(*(f"aten::{name}" for name in _LAYER_NORMS))
def resize_layer_norm(call: Call, selection: Selection) -> Resized:
    count = len(call.arg("normalized_shape"))
    return Resized({"normalized_shape": [selection.size(dim) for dim in call.result.dims[-count:]]})


_BATCH_NORMS = (
    "batch_norm",
    "native_batch_norm",
    "cudnn_batch_norm",
    "instance_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
)


@RULES.register(*(f"aten::{name}" for name in _BATCH_NORMS))
def batch_norm(call: Call) -> Result:
    """Each channel has statistics of its own: exact to prune. The data's run over all the rest."""
    dims = call.dims("input")
    if call.arg("training") or call.arg("use_input_stats"):
        over_batch = "instance" not in call.name
        for dim in (*dims[: int(over_batch)], *dims[2:]):
            call.note(dim, "normalised")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.dims(name):
            call.unify(dims[1], call.dims(name)[0])
    return _with_statistics(call, dims)


@RULES.register("aten::group_norm")
def group_norm(call: Call) -> Result:
    dims = call.dims("input")
    for name in ("weight", "bias"):
        if call.dims(name):
            call.unify(dims[1], call.dims(name)[0])
    groups = int(call.arg("num_groups"))
    _, inner = _grouped(dims[1], groups)
    call.note(inner, "normalised")
    return dims


@RULES.resizes("aten::group_norm")
def resize_group_norm(call: Call, selection: Selection) -> Resized:
    outer, _ = _grouped(call.dims("input")[1], int(call.arg("num_groups")))
    return Resized({"num_groups": selection.size(outer)})


def _grouped(dim: Dim, groups: int) -> list[Dim]:
    return as_product(dim, [groups, dim.size // groups])


def _with_statistics(call: Call, dims: tuple[Dim, ...]) -> list[Value]:
    """The normalised tensor, then whatever statistics the operator also returns."""
    rest = []
    for shape in call.shapes[1:]:
        known = {dim.size: dim for dim in dims}
        rest.append(Value(tuple(known.get(size) or call.fresh(size) for size in shape)))
    return [Value(dims), *rest]


@RULES.register("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax")
def softmax(call: Call) -> Result:
    dims = call.dims("self")
    call.note(dims[call.axis()], "normalised")
    return dims


@RULES.register(
    "aten::cumsum", "aten::cumprod", "aten::logcumsumexp", "aten::cummax", "aten::cummin"
)
def scan(call: Call) -> Result:
    """Removed units add nothing. Counts by expert are scanned too: there the order is free."""
    dims = call.dims("self")
    over = dims[call.axis()]
    call.note(over, "normalised")
    if not over.has("indexed"):
        call.note(over, "scanned")
    return [Value(dims) for _ in call.shapes]


@RULES.register("aten::diff")
def difference(call: Call) -> Result:
    dims = list(call.dims("self"))
    axis = call.axis()
    call.pin(dims[axis], "differences of neighbours")
    dims[axis] = call.fresh(call.shape[axis])
    call.pin(dims[axis], "differences of neighbours")
    return tuple(dims)


@RULES.register("aten::glu")
def glu(call: Call) -> Result:
    dims = list(call.dims("self"))
    axis = call.axis()
    half = dims[axis].size // 2
    first, second = as_sum(dims[axis], [half, half])
    dims[axis] = call.unify(first, second)
    return tuple(dims)


@RULES.register("aten::_weight_norm", "aten::_weight_norm_interface")
def weight_norm(call: Call) -> Result:
    """The result is g * v / |v|: the norm runs over every axis but ``dim``, and zeros have none."""
    v, g = call.dims("v"), call.dims("g")
    axis = int(call.arg("dim")) % len(v)
    if g:
        call.unify(v[axis], g[axis if len(g) == len(v) else 0])
    for dim in v:
        call.note(dim, "normalised")
    return _with_statistics(call, v)


_REDUCTIONS = (
    *("sum", "mean", "prod", "amax", "amin", "max", "min", "any", "all", "nansum"),
    *("var", "std", "norm", "linalg_vector_norm", "logsumexp", "argmax", "argmin", "median"),
    *("var_mean", "std_mean", "count_nonzero", "frobenius_norm", "aminmax", "square_sum"),
)


@RULES.register(*(f"aten::{name}" for name in _REDUCTIONS))
def reduce(call: Call) -> Result:
    """Reduced axes vanish, or stay as 1. Sums may lose zeros; a mean or a norm knows the count."""
    if call.name in ("aten::max", "aten::min") and "other" in call.arguments:
        return call.broadcast([call.dims(node) for node in call.operands], call.shape)
    dims = call.dims(call.first)
    axes = _axes(call.arg("dim"), len(dims))
    short = call.name.removeprefix("aten::")
    for axis in axes:
        if short not in ("sum", "nansum", "any", "count_nonzero"):
            call.note(dims[axis], "normalised")
    if short.startswith(("var", "std")):
        _keep_enough_for_a_spread(call, [dims[axis] for axis in axes])
    keep = bool(call.arg("keepdim"))
    result = tuple(
        Dim(1) if i in axes else dim for i, dim in enumerate(dims) if keep or i not in axes
    )
    if short.startswith("arg") and len(axes) == 1:
        return Value(result, Domain(dims[axes.pop()]))
    values = [Value(result)]
    for _ in call.shapes[1:]:
        over = dims[next(iter(axes))] if len(axes) == 1 else None
        indices = over is not None and short in ("max", "min", "median")
        values.append(Value(result, Domain(over) if indices and over is not None else None))
    return values


@RULES.register("aten::cosine_similarity", "aten::pairwise_distance")
def compare(call: Call) -> Result:
    """A sum over one axis of two operands: what is zero in both adds nothing to it."""
    operands = [call.dims("x1"), call.dims("x2")]
    rank = max(map(len, operands))
    sizes = [
        max(dims[-back].size for dims in operands if len(dims) >= back)
        for back in range(rank, 0, -1)
    ]
    dims = call.broadcast(operands, sizes)
    axis = int(call.arg("dim") if "dim" in call.arguments else -1) % rank
    between = (Dim(1),) if call.arg("keepdim") else ()
    return (*dims[:axis], *between, *dims[axis + 1 :])


def _keep_enough_for_a_spread(call: Call, over: Sequence[Dim]) -> None:
    """The unbiased spread of one number is 0 / 0: more than ``correction`` positions must stay."""
    given = call.arg("correction")
    correction = int(call.arg("unbiased") is not False) if given is None else math.ceil(given)
    leaves = [leaf for dim in over for leaf in dim.leaves()]
    if correction > 0 and leaves and all(dim.form != "sum" for dim in over):
        max(leaves, key=lambda leaf: leaf.size).require(correction + 1)


def _axes(given: Any, rank: int) -> set[int]:
    if given is None or given == []:
        return set(range(rank))
    axes = given if isinstance(given, (list, tuple)) else [given]
    return {int(axis) % max(1, rank) for axis in axes if not isinstance(axis, fx.Node)}

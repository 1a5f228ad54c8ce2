"""Exact parameters and FLOPs of a program at any unit counts, from its Dims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import fx

from prunec.graph.coupling import CouplingGraph
from prunec.graph.dims import Dim, extent
from prunec.graph.propagate import Layout

Counts = Mapping[Dim, int]


def parameter_count(
    coupling: CouplingGraph, counts: Counts | None = None, names: Iterable[str] | None = None
) -> int:
    """Parameters (tied ones once) when these leaves keep these many units.

    Args:
        counts: units kept by leaf; others whole.
        names: count these parameters only (canonical names).
    """
    layout, kept = coupling.layout, counts or {}
    chosen = coupling.program.parameters if names is None else names
    return sum(math.prod(extent(dim, kept) for dim in layout.parameters[name]) for name in chosen)


def flops(coupling: CouplingGraph, counts: Counts | None = None) -> int:
    """FLOPs of one forward pass at the traced shapes: 2 per multiply-add of every contraction.

    Norms, activations and softmax are left out, as is the convention of the field.
    """
    layout, kept = coupling.layout, counts or {}
    return sum(node_flops(node, layout, kept) for node in coupling.program.graph.nodes)


def node_flops(node: fx.Node, layout: Layout, counts: Counts) -> int:
    """FLOPs of one call; 0 for anything but a contraction."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if name not in _CONTRACTED:
        return 0
    call = layout.call(node)
    result = math.prod(extent(dim, counts) for dim in call.result.dims)
    if name == "aten::scaled_dot_product_attention":
        query, key = call.dims("query"), call.dims("key")
        rows = math.prod(extent(dim, counts) for dim in call.result.dims[:-1])
        keys = extent(key[-2], counts)
        widths = extent(query[-1], counts) + extent(call.result.dims[-1], counts)
        return 2 * rows * keys * widths
    operand, axes = _CONTRACTED[name]
    dims = call.dims(operand)
    inner = math.prod(
        extent(dim, counts) for dim in (dims[axis] for axis in axes if axis < len(dims))
    )
    return 2 * result * inner


# operator -> the operand and those of its axes that every result element sums over
_CONTRACTED: dict[str, tuple[str, tuple[int, ...]]] = {
    "aten::linear": ("weight", (1,)),
    "aten::mm": ("self", (-1,)),
    "aten::bmm": ("self", (-1,)),
    "aten::matmul": ("self", (-1,)),
    "aten::addmm": ("mat1", (-1,)),
    "aten::baddbmm": ("batch1", (-1,)),
    "aten::conv1d": ("weight", (1, 2)),
    "aten::conv2d": ("weight", (1, 2, 3)),
    "aten::conv3d": ("weight", (1, 2, 3, 4)),
    "aten::conv_transpose1d": ("weight", (0, 2)),
    "aten::conv_transpose2d": ("weight", (0, 2, 3)),
    "aten::_grouped_mm": ("self", (-1,)),
    "transformers::grouped_mm_fallback": ("input", (-1,)),
    "aten::scaled_dot_product_attention": ("query", (-1,)),
}

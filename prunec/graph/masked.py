"""The reference that slicing is held to: the full-size program, its reductions told what is gone.

A removed unit can reach the output only through a reduction over its axis: a contraction, a sum, a
mean, a norm, a softmax, a top-k. So the program runs with its own graph, sizes and weights, and
every reduction leaves the removed positions out: zeros for sums, the kept count for means and
norms, minus infinity for softmax, only the kept candidates for a top-k. Unlike zeroed weights this
is right for every group, those that a norm or a router runs over included.

Nothing here looks at how a call is resized or a weight is cut: that is what it checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from prunec.errors import VerifyError
from prunec.graph.program import Program, source_line
from prunec.graph.propagate import Layout
from prunec.graph.rules.registry import bind_arguments
from prunec.graph.selection import Selection


def run_masked(
    program: Program,
    layout: Layout,
    selection: Selection,
    inputs: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The program's first output when the units that ``selection`` removes take no part.

    Args:
        state: full-size tensors that stand in for the program's own.

    Raises:
        VerifyError: where units are reduced over by an operator that has no reference here.
    """
    arguments = program.arguments(state, inputs)
    with torch.no_grad():
        outputs = _Masked(program, layout, selection).run(*arguments)
    first: Tensor = outputs[0]
    return first


class _Masked(fx.Interpreter):
    """Runs a graph, reductions over touched axes excepted."""

    def __init__(self, program: Program, layout: Layout, selection: Selection):
        super().__init__(program.graph_module)
        self._layout = layout
        self._selection = selection
        self._masks: dict[fx.Node, Tensor | None] = {}

    def mask(self, node: fx.Node) -> Tensor | None:
        """Bool, broadcast to the value: True where an element takes part. None: everywhere."""
        if node not in self._masks:
            values = self._layout.values.get(node)
            self._masks[node] = self._selection.thin_mask(values[0].dims) if values else None
        return self._masks[node]

    def run_node(self, n: fx.Node) -> Any:
        target = n.target
        if n.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            return super().run_node(n)
        if all(self.mask(source) is None for source in n.all_input_nodes):
            return super().run_node(n)
        reduction = _Reduction(self, n)
        name = target._schema.name.removeprefix("aten::").removesuffix("_")
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(reduction)
        # An operator of the user's own: what is gone counts as zero, as in any product.
        fill = _FILLS.get(name, 0.0 if "::" in name else None)
        return super().run_node(n) if fill is None else reduction.filled(fill)


@dataclass(frozen=True)
class _Reduction:
    """One call in which some operand carries removed units."""

    interpreter: _Masked
    node: fx.Node

    @property
    def arguments(self) -> dict[str, Any]:
        """By schema name, nodes replaced by their values."""
        return dict(fx.map_arg(bind_arguments(self.node), lambda n: self.interpreter.env[n]))

    def operand(self, name: str) -> tuple[Tensor, Tensor]:
        """A tensor operand and its mask."""
        node = bind_arguments(self.node)[name]
        value = self.interpreter.env[node]
        mask = self.interpreter.mask(node)
        mask = value.new_ones((), dtype=torch.bool) if mask is None else mask
        return value, mask.expand_as(value)

    def filled(self, fill: float, but: Any = None) -> Any:
        """The call as it is, ``fill`` for every removed element of its operands ``but`` one."""

        def value_of(node: fx.Node) -> Any:
            value, mask = self.interpreter.env[node], self.interpreter.mask(node)
            if mask is None or node is but or not isinstance(value, Tensor):
                return value
            return torch.where(mask, value, _neutral(value, fill))

        args = fx.map_arg(self.node.args, value_of)
        kwargs = fx.map_arg(self.node.kwargs, value_of)
        return self.node.target(*args, **kwargs)  # type: ignore[operator]

    @property
    def axes(self) -> list[int]:
        rank = len(self.interpreter._layout.dims(self.node.all_input_nodes[0]))
        given = self.arguments.get("dim")
        if given is None or given == []:
            return list(range(rank))
        given = given if isinstance(given, (list, tuple)) else [given]
        return [int(axis) % max(1, rank) for axis in given]

    def unknown(self) -> VerifyError:
        return VerifyError(
            f"no reference for {self.node.target} over units that are removed",
            where=source_line(self.node),
        )


def _neutral(value: Tensor, fill: float) -> Tensor:
    if value.dtype == torch.bool:
        return torch.tensor(bool(fill == 1))
    if not value.is_floating_point() and not value.is_complex():
        info = torch.iinfo(value.dtype)
        fill = min(max(fill, info.min), info.max)
    return torch.tensor(fill, dtype=value.dtype, device=value.device)


def _mean(call: _Reduction) -> Tensor:
    value, mask = call.operand("self")
    keep = bool(call.arguments.get("keepdim"))
    dtype = call.arguments.get("dtype")
    value = value if dtype is None else value.to(dtype)
    mean, _ = _moments(value, mask, call.axes, 0)
    return mean if keep else mean.squeeze(call.axes)


def _moments(
    value: Tensor, mask: Tensor, axes: list[int], correction: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the elements that take part, reduced axes kept as 1."""
    count = mask.sum(axes, keepdim=True).to(value.dtype)
    zero = value.new_zeros(())
    mean = torch.where(mask, value, zero).sum(axes, keepdim=True) / count.clamp(min=1)
    centred = torch.where(mask, value - mean, zero)
    variance = centred.square().sum(axes, keepdim=True) / (count - correction).clamp(min=1)
    return mean, variance


def _spread(call: _Reduction) -> Any:
    """var, std, var_mean, std_mean."""
    value, mask = call.operand("self")
    given = call.arguments
    correction = given["correction"] if "correction" in given else int(given.get("unbiased", True))
    mean, variance = _moments(value, mask, call.axes, 1 if correction is None else correction)
    name = call.node.target._schema.name  # type: ignore[union-attr]
    spread = variance.sqrt() if "std" in name else variance
    if not given.get("keepdim"):
        mean, spread = mean.squeeze(call.axes), spread.squeeze(call.axes)
    return (spread, mean) if name.endswith("_mean") else spread


def _layer_norm(call: _Reduction) -> Any:
    name = call.node.target._schema.name  # type: ignore[union-attr]
    value, mask = call.operand("input")
    axes = list(range(value.ndim - len(call.arguments["normalized_shape"]), value.ndim))
    eps = call.arguments.get("eps")
    eps = torch.finfo(value.dtype).eps if eps is None else eps
    mean, variance = _moments(value, mask, axes, 0)
    if "rms" in name:
        square, _ = _moments(value.square(), mask, axes, 0)
        mean, variance = torch.zeros_like(mean), square
    result = (value - mean) * (variance + eps).rsqrt()
    result = _affine(result, call.arguments.get("weight"), call.arguments.get("bias"))
    results = (result, mean, (variance + eps).rsqrt())
    if name.endswith("native_layer_norm"):
        return results
    return (result, results[2]) if name.endswith("_fused_rms_norm") else result


def _affine(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _group_norm(call: _Reduction) -> Tensor:
    value, mask = call.operand("input")
    batch, channels = value.shape[:2]
    groups = int(call.arguments["num_groups"])
    blocks = (batch, groups, channels // groups, *value.shape[2:])
    axes = list(range(2, len(blocks)))
    mean, variance = _moments(value.reshape(blocks), mask.reshape(blocks), axes, 0)
    result = (value.reshape(blocks) - mean) * (variance + call.arguments["eps"]).rsqrt()
    column = [1, channels, *[1] * (value.ndim - 2)]
    weight, bias = call.arguments.get("weight"), call.arguments.get("bias")
    return _affine(
        result.reshape(value.shape),
        None if weight is None else weight.view(column),
        None if bias is None else bias.view(column),
    )


def _batch_norm(call: _Reduction) -> Any:
    """With the data's own statistics: over every axis but the channels (and one of the batch)."""
    name = call.node.target._schema.name  # type: ignore[union-attr]
    given = call.arguments
    if not (given.get("training") or given.get("use_input_stats")):
        return call.filled(0.0)
    value, mask = call.operand("input")
    if not name.endswith(("::batch_norm", "::instance_norm")):
        raise call.unknown()
    axes = [axis for axis in range(value.ndim) if axis > 1 or (axis == 0 and "batch" in name)]
    mean, variance = _moments(value, mask, axes, 0)
    column = [1, value.shape[1], *[1] * (value.ndim - 2)]
    weight, bias = given.get("weight"), given.get("bias")
    return _affine(
        (value - mean) * (variance + given["eps"]).rsqrt(),
        None if weight is None else weight.view(column),
        None if bias is None else bias.view(column),
    )


def _topk(call: _Reduction) -> Any:
    """Only kept candidates compete, so that ties fall as they do among fewer."""
    value, mask = call.operand("self")
    given = call.arguments
    axis = int(given["dim"]) % value.ndim
    line = mask.movedim(axis, -1).reshape(-1, value.shape[axis])
    alive = line[line.any(-1)]
    if not bool((alive == alive[:1]).all()):
        raise call.unknown()
    kept = torch.nonzero(alive[0]).flatten()
    best, index = torch.topk(
        value.index_select(axis, kept), int(given["k"]), axis, given["largest"], given["sorted"]
    )
    return best, kept[index]


def _extreme(call: _Reduction) -> Any:
    """max, min, argmax, argmin: removed elements lose."""
    name = call.node.target._schema.name  # type: ignore[union-attr]
    return call.filled(-math.inf if "max" in name else math.inf)


def _grouped_product(call: _Reduction) -> Any:
    """Removed groups have no rows, so their offsets stay where the rows before them end."""
    return call.filled(0.0, but=bind_arguments(call.node).get("offs"))


def _attention(call: _Reduction) -> Any:
    """Removed features count as zero; removed keys are masked out."""
    given = call.arguments
    query, key, value = (
        torch.where(mask, tensor, tensor.new_zeros(()))
        for tensor, mask in (call.operand(name) for name in ("query", "key", "value"))
    )
    scale = given["scale"] if given.get("scale") is not None else query.shape[-1] ** -0.5
    selection, layout = call.interpreter._selection, call.interpreter._layout
    keys = selection.mask(layout.dims(bind_arguments(call.node)["key"])[-2])
    bias, causal = given.get("attn_mask"), bool(given.get("is_causal"))
    if keys is not None:
        if causal:
            raise call.unknown()
        allowed = torch.from_numpy(keys)
        if bias is None or bias.dtype == torch.bool:
            bias = allowed if bias is None else bias & allowed
            bias = bias.expand(query.shape[-2], key.shape[-2]) if bias.ndim < 2 else bias
        else:
            bias = bias.masked_fill(~allowed, -math.inf)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        is_causal=causal,
        scale=scale,
        enable_gqa=bool(given.get("enable_gqa")),
    )


def _unknown(call: _Reduction) -> Any:
    """An order statistic: fine beside the units, without a reference over them."""
    node = call.node.all_input_nodes[0]
    touched = [call.interpreter._selection.touches(d) for d in call.interpreter._layout.dims(node)]
    if any(touched[axis] for axis in call.axes):
        raise call.unknown()
    return call.filled(0.0)


# What stands for a removed element in an operand of these.
_FILLS: dict[str, float] = {
    **dict.fromkeys(
        (
            *("linear", "bilinear", "mm", "bmm", "matmul", "addmm", "baddbmm", "addbmm", "mv"),
            *("dot", "einsum", "conv1d", "conv2d", "conv3d", "convolution"),
            *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "cosine_similarity"),
            *("pairwise_distance", "cdist"),
            *("sum", "nansum", "any", "count_nonzero", "cumsum", "linalg_vector_norm", "norm"),
            *("frobenius_norm", "_weight_norm", "_weight_norm_interface", "square_sum"),
            *("lstm", "gru", "rnn_tanh", "rnn_relu"),
            *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        ),
        0.0,
    ),
    **dict.fromkeys(("prod", "cumprod", "all"), 1.0),
    **dict.fromkeys(
        (
            *("softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp"),
            *("amax", "cummax", "logcumsumexp"),
        ),
        -math.inf,
    ),
    **dict.fromkeys(("amin", "cummin"), math.inf),
}

_HANDLERS: dict[str, Callable[[_Reduction], Any]] = {
    "mean": _mean,
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _spread),
    **dict.fromkeys(
        ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), _layer_norm
    ),
    "group_norm": _group_norm,
    **dict.fromkeys(
        ("batch_norm", "native_batch_norm", "cudnn_batch_norm", "instance_norm"), _batch_norm
    ),
    **dict.fromkeys(("_grouped_mm", "transformers::grouped_mm_fallback"), _grouped_product),
    "topk": _topk,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("max", "min", "argmax", "argmin"), _extreme),
    **dict.fromkeys(("median", "sort", "argsort", "aminmax"), _unknown),
}

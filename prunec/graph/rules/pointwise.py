"""Operators that act on each element: operands are broadcast, axes stay what they are."""

from __future__ import annotations

from torch import fx

from prunec.graph.rules.registry import RULES, Call, Result, Value


@RULES.register(
    "pointwise",
    "aten::dropout",
    "aten::alpha_dropout",
    "aten::feature_dropout",
    "aten::native_dropout",
    "aten::bernoulli",
    "aten::gelu",
    "aten::silu",
    "aten::relu6",
    "aten::hardtanh",
    "aten::hardswish",
    "aten::hardsigmoid",
    "aten::log_sigmoid",
    "aten::softplus",
    "aten::rrelu",
    "aten::floor_divide",
    "aten::multiply",
    "aten::divide",
    "aten::subtract",
    "aten::true_divide",
    "aten::__and__",
    "aten::__or__",
    "aten::__xor__",
    "aten::bitwise_and",
    "aten::nan_to_num",
    "aten::polar",
    "aten::complex",
    "aten::_conj",
    "aten::real",
    "aten::imag",
    "aten::isin",
    "aten::_prelu_kernel",
)
def pointwise(call: Call) -> Result:
    dims = call.broadcast([call.dims(node) for node in call.operands], call.shape)
    return [Value(dims) for _ in call.shapes]


@RULES.register("aten::prelu")
def prelu(call: Call) -> Result:
    """One slope for all channels, or one for each."""
    dims, slopes = call.dims("self"), call.dims("weight")
    if slopes and slopes[0].size > 1:
        call.unify(dims[min(1, len(dims) - 1)], slopes[0])
    return dims


@RULES.register(
    "aten::clone",
    "aten::contiguous",
    "aten::detach",
    "aten::alias",
    "aten::lift_fresh_copy",
    "aten::to",
    "aten::_to_copy",
    "aten::float",
    "aten::long",
    "aten::int",
    "aten::type_as",
    "aten::clamp",
    "aten::clamp_min",
    "aten::clamp_max",
    "aten::masked_fill",
    "aten::where",
    "aten::resolve_conj",
    "aten::resolve_neg",
    "aten::view_dtype",
    usage="move",
)
def moves(call: Call) -> Result:
    """Values pass through unchanged (masked fills and clamps included)."""
    operands = call.operands[:1] if call.name == "aten::type_as" else call.operands
    return call.broadcast([call.dims(node) for node in operands], call.shape)


@RULES.register("aten::copy", usage="move")
def copy(call: Call) -> Result:
    dims = call.broadcast([call.dims("self"), call.dims("src")], call.shape)
    return Value(dims, call.domain("src"))


_COMPARISONS = tuple(
    f"aten::{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "less", "greater", "not_equal")
)


@RULES.register(*_COMPARISONS, usage="index")
def compare(call: Call) -> Result:
    """Indices may be compared with indices of the same axis, or with a bound beyond it."""
    sides = [call.arg(a.name) for a in call.target._schema.arguments[:2]]
    nodes = [side for side in sides if isinstance(side, fx.Node)]
    domains = [domain for node in nodes if (domain := call.domain(node)) is not None]
    if len(domains) == 2 and domains[0].dim.size == domains[1].dim.size:
        if not all(domain.ordinal for domain in domains):
            call.unify(domains[0].dim, domains[1].dim)
    else:
        bounds = [side for side in sides if isinstance(side, (int, float))]
        for domain in domains:
            if not bounds or bounds[0] < domain.dim.size:
                call.use_as_number(domain)
    return call.broadcast([call.dims(node) for node in call.operands], call.shape)

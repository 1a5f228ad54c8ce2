"""One call of a graph as the Python that a person would write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

_END = 2**63 - 1
_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "floor_divide": "//",
    "remainder": "%", "pow": "**", "le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==",
    "ne": "!=", "__and__": "&", "__or__": "|", "bitwise_and": "&", "bitwise_or": "|",
    "floordiv": "//", "mod": "%", "truediv": "/",
}  # fmt: skip
_PREFIX = {"neg": "-", "bitwise_not": "~"}
# positional arguments as in the ATen schema
_METHODS = frozenset({
    "abs", "all", "amax", "amin", "any", "argmax", "argmin", "bmm", "chunk", "clamp", "clone",
    "contiguous", "cos", "cumsum", "exp", "expand", "flatten", "float", "gather", "index_select",
    "log", "masked_fill", "max", "mean", "min", "permute", "pow", "prod", "repeat", "reshape",
    "rsqrt", "select", "sigmoid", "sin", "softmax", "split", "sqrt", "square", "squeeze", "sum",
    "tanh", "topk", "transpose", "tril", "triu", "type_as", "unbind", "unflatten", "unsqueeze",
    "view",
})  # fmt: skip
_TORCH = frozenset({
    "cat", "einsum", "logical_and", "logical_or", "maximum", "minimum", "outer", "stack", "where",
})  # fmt: skip
_FUNCTIONAL = frozenset({
    "avg_pool2d", "elu", "gelu", "glu", "hardswish", "leaky_relu", "linear", "logsigmoid",
    "max_pool2d", "mish", "pad", "relu", "scaled_dot_product_attention", "silu", "softplus",
})  # fmt: skip
_CREATE = frozenset(["arange", "full", "ones", "zeros", "empty", "scalar_tensor"])


@dataclass(frozen=True)
class Code:
    """An expression; `compound` needs parentheses inside another."""

    text: str
    compound: bool = False

    @property
    def inner(self) -> str:
        return f"({self.text})" if self.compound else self.text


@dataclass(frozen=True)
class Renderer:
    """Renders calls.

    Attributes:
        value: the code of an operand.
        number: the code of an integer literal; the second argument says what it is.
        device: code of the device on which new tensors are made.
    """

    value: Callable[[fx.Node], Code]
    number: Callable[[int, str], str]
    device: str

    def call(self, node: fx.Node) -> Code:
        """The expression of a call_function node."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._python(node)
        name = node.target._schema.name.partition("::")[2]
        args, kwargs = list(node.args), {k: v for k, v in node.kwargs.items() if v is not None}
        special = getattr(self, f"_op_{name}", None)
        if special is not None:
            found: Code | None = special(node, args, kwargs)
            if found is not None:
                return found
        if name in _INFIX and len(args) == 2 and not kwargs:
            left, right = (self._code(arg).inner for arg in args)
            return Code(f"{left} {_INFIX[name]} {right}", compound=True)
        if name in _PREFIX and len(args) == 1:
            return Code(f"{_PREFIX[name]}{self._code(args[0]).inner}", compound=True)
        overload = node.target.__name__
        if (
            name in _METHODS
            and args
            and isinstance(args[0], fx.Node)
            and overload.partition(".")[0] == name
        ):
            return Code(
                f"{self.value(args[0]).inner}.{name}({self._arguments(args[1:], kwargs, name)})"
            )
        if name in _TORCH and hasattr(torch, name):
            return Code(f"torch.{name}({self._arguments(args, kwargs, name)})")
        if name in _FUNCTIONAL and hasattr(functional, name):
            return Code(f"F.{name}({self._arguments(args, kwargs, name)})")
        if name in _CREATE:
            return self._create(name, args, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "layout")}
        return Code(f"torch.ops.aten.{overload}({self._arguments(args, kwargs, name)})")

    def _python(self, node: fx.Node) -> Code:
        """getitem, and arithmetic on sizes."""
        name = getattr(node.target, "__name__", "")
        args = [self._code(arg) for arg in node.args]
        if name == "getitem":
            return Code(f"{args[0].inner}[{args[1].text}]")
        if name in _INFIX and len(args) == 2:
            return Code(f"{args[0].inner} {_INFIX[name]} {args[1].inner}", compound=True)
        if name == "neg":
            return Code(f"-{args[0].inner}", compound=True)
        home = getattr(node.target, "__module__", "")
        if (
            name in ("sym_max", "sym_min", "sym_not", "sym_ite", "sym_float", "sym_int")
            and home == "torch"
        ):
            return Code(f"torch.{name}({', '.join(a.text for a in args)})")
        if name in ("trunc", "ceil", "floor"):
            return Code(f"math.{name}({args[0].text})")
        raise LookupError(f"{node.target}")

    # operators whose Python differs from the schema

    def _op_sym_size(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Code:
        return Code(f"{self.value(args[0]).inner}.shape[{args[1]}]")

    def _op_rsub(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Code | None:
        if len(args) != 2 or kwargs:
            return None
        return Code(f"{self._code(args[1]).inner} - {self._code(args[0]).inner}", compound=True)

    def _op_to(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Code:
        dtype = node.meta["val"].dtype
        return Code(f"{self.value(args[0]).inner}.to({dtype})")

    _op__to_copy = _op_to

    def _op_embedding(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Code:
        return Code(f"F.embedding({self._code(args[1]).text}, {self._code(args[0]).text})")

    def _op_layer_norm(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Code:
        return Code(f"F.layer_norm({self._arguments(args[:5], {}, 'layer_norm')})")

    def _op_conv2d(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Code:
        return Code(f"F.conv2d({self._arguments(args, kwargs, 'conv2d')})")

    def _op_slice(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Code:
        given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
        axis, start, stop, step = given
        begin = "" if start in (0, None) else self._code(start).text
        end = "" if stop in (None, _END) else self._code(stop).text
        part = f"{begin}:{end}" + (f":{step}" if step != 1 else "")
        rank = node.meta["val"].ndim
        axis = axis if axis >= 0 else axis + rank
        last = axis == rank - 1 and rank > 1
        where = f"..., {part}" if last else ", ".join([*[":"] * axis, part])
        return Code(f"{self.value(args[0]).inner}[{where}]")

    def _op_index(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Code:
        parts = [":" if index is None else self._code(index).text for index in args[1]]
        return Code(f"{self.value(args[0]).inner}[{', '.join(parts)}]")

    def _op_new_ones(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Code:
        dtype = {"dtype": kwargs["dtype"]} if "dtype" in kwargs else {}
        source = self.value(args[0]).inner
        return Code(f"{source}.new_ones({self._arguments(args[1:2], dtype, 'size')})")

    def _create(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Code:
        kept = {k: v for k, v in kwargs.items() if k == "dtype"}
        inside = self._arguments(args, kept, "size")
        if name == "scalar_tensor":
            name = "tensor"
        return Code(f"torch.{name}({inside}, device={self.device})")

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any], hint: str) -> str:
        named = [f"{name}={self._code(value, hint).text}" for name, value in kwargs.items()]
        return ", ".join([*(self._code(arg, hint).text for arg in args), *named])

    def _code(self, value: Any, hint: str = "size") -> Code:
        if isinstance(value, fx.Node):
            return self.value(value)
        if isinstance(value, list | tuple):
            items = ", ".join(self._code(item, hint).text for item in value)
            return Code(f"[{items}]")
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return Code(repr(value))
        if isinstance(value, int):
            return Code(self.number(value, hint))
        if isinstance(value, float):
            finite = math.isfinite(value)
            return Code(repr(value) if finite else f'float("{value}")', compound=value < 0)
        if isinstance(value, torch.device):
            return Code(self.device)
        return Code(str(value))  # a dtype, layout or memory format

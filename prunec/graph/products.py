"""Products: the calls in which a stored weight multiplies data and sums over some of its axes.

Whatever the operator (linear, a matrix product, einsum, a convolution, one matrix an expert), a
product is the same thing: a weight that is a stack of matrices, and rows that they multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from prunec.graph.dims import Dim
from prunec.graph.matrix import Matrix
from prunec.graph.program import Program
from prunec.graph.propagate import Layout
from prunec.graph.routing import origin_of, routing_of
from prunec.graph.rows import Chosen, Rows, Sorted, Tokens, patches
from prunec.graph.rules.registry import Call


@dataclass(frozen=True)
class Product:
    """One call of a weight.

    Attributes:
        node: the call.
        parameter: the weight's name.
        matrix: how the weight is a stack of matrices.
        rows: what they multiply.
        bias: what the call itself adds to the result, if anything.
    """

    node: fx.Node
    parameter: str
    matrix: Matrix
    rows: Rows
    bias: fx.Node | None = None

    def leaves(self, layout: Layout, axes: Sequence[int]) -> set[Dim]:
        """The leaves on some axes of the matrix."""
        dims = self.matrix.dims(layout.parameters[self.parameter])
        return {leaf for axis in axes for leaf in dims[axis].leaves()}


def find_products(program: Program, layout: Layout) -> Iterator[Product]:
    """Every call that multiplies data with a stored weight and sums over something."""
    for node in program.graph.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        find = _FINDERS.get(name)
        if find is None or node not in layout.data:
            continue
        product = find(_Site(program, layout, layout.call(node)))
        if product is not None:
            yield product


@dataclass(frozen=True)
class _Stored:
    """A value that is a parameter with its axes in another order.

    Attributes:
        axes: the parameter's axis for each of the value's, None for one of size 1 that was added.
        choice: what the first axis was indexed by, and has been replaced by, if by anything.
    """

    parameter: str
    axes: tuple[int | None, ...]
    choice: fx.Node | None = None


@dataclass(frozen=True)
class _Site:
    """A call, and what is known of its operands."""

    program: Program
    layout: Layout
    call: Call

    def stored(self, node: object) -> _Stored | None:
        """The parameter that a value is, through transpositions and the like."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "placeholder":
            name = self.program.bindings.get(node.name)
            rank = len(self.layout.dims(node)) if node in self.layout.values else 0
            return _Stored(name, tuple(range(rank))) if name in self.program.parameters else None
        name = getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::")
        if name not in _MOVES or node not in self.layout.values:
            return None
        before = self.stored(node.all_input_nodes[0])
        return None if before is None else _MOVES[name](self.layout.call(node), before)

    def is_data(self, node: object) -> bool:
        return isinstance(node, fx.Node) and node in self.layout.data


def _same(call: Call, before: _Stored) -> _Stored:
    return before


def _permuted(call: Call, before: _Stored) -> _Stored:
    rank = len(before.axes)
    if "dims" in call.arguments:
        order = [int(axis) % rank for axis in call.arg("dims")]
    else:
        order = list(range(rank))
        last = (call.arg("dim0"), call.arg("dim1")) if "dim0" in call.arguments else (-2, -1)
        if rank > 1:
            a, b = (int(axis) % rank for axis in last)
            order[a], order[b] = b, a
    return _Stored(before.parameter, tuple(before.axes[axis] for axis in order), before.choice)


def _unsqueezed(call: Call, before: _Stored) -> _Stored:
    axes = list(before.axes)
    axes.insert(int(call.arg("dim")) % (len(axes) + 1), None)
    return _Stored(before.parameter, tuple(axes), before.choice)


def _chosen(call: Call, before: _Stored) -> _Stored | None:
    """``weight[choice]``: a matrix a row."""
    indices = list(call.arg("indices"))
    if len(indices) != 1 or before.choice is not None or not call.is_data(indices[0]):
        return None
    return _Stored(before.parameter, before.axes, indices[0])


_MOVES: dict[str, Callable[[Call, _Stored], _Stored | None]] = {
    **dict.fromkeys(("to", "_to_copy", "contiguous", "clone", "detach", "alias"), _same),
    **dict.fromkeys(("permute", "transpose", "t", "numpy_T", "mT"), _permuted),
    "unsqueeze": _unsqueezed,
    "index": _chosen,
}


def _contraction(
    site: _Site, letters: Sequence[Sequence[str]], nodes: Sequence[fx.Node], result: Sequence[str]
) -> Product | None:
    """Of two operands, one a weight, their axes named by letters; None if it is nothing of ours."""
    stored = [None if site.is_data(node) else site.stored(node) for node in nodes]
    if stored[0] is None and stored[1] is None:
        stored = [found if found and found.choice else None for found in map(site.stored, nodes)]
    if (stored[0] is None) == (stored[1] is None):
        return None
    left = stored[0] is not None
    weight, names = (stored[0], letters[0]) if left else (stored[1], letters[1])
    operand, others = (nodes[1], letters[1]) if left else (nodes[0], letters[0])
    assert weight is not None
    if weight.choice is not None:
        return _chosen_product(site, weight, names, operand, others, result)
    sizes = [dim.size for dim in site.layout.dims(operand)]
    wide = {name for name, size in zip(others, sizes, strict=True) if size > 1}
    held = [dim.size for dim in site.layout.parameters[weight.parameter]]
    axes = {name: axis for name, axis in zip(names, weight.axes, strict=True) if axis is not None}
    if len(axes) != len(held):
        return None
    inner = [name for name in axes if name not in result]
    stack = [name for name in axes if name in result and name in wide and held[axes[name]] > 1]
    outer = [name for name in axes if name not in (*inner, *stack)]
    if not inner or not set(inner) <= set(others):
        return None
    of_outer, of_inner, of_stack = (
        tuple(axes[name] for name in named) for named in (outer, inner, stack)
    )
    matrix = Matrix(of_outer, of_inner, of_stack)
    place = {name: axis for axis, name in enumerate(others)}
    spent = {*inner, *stack}
    dims = matrix.dims(site.layout.parameters[weight.parameter])
    parts = math.prod(dims[axis].size for axis in matrix.stack)
    rows = Tokens(
        operand,
        tuple(place[name] for name in stack),
        tuple(axis for name, axis in place.items() if name not in spent),
        tuple(place[name] for name in inner),
        parts,
    )
    if len(stack) == 1:
        experts = dims[matrix.stack[0]]
        made = {leaf for axis in matrix.outer for leaf in dims[axis].leaves()}
        rows = routing_of(site.layout, site.call.node, rows, experts, made)
    return Product(site.call.node, weight.parameter, matrix, rows)


def _chosen_product(
    site: _Site,
    weight: _Stored,
    names: Sequence[str],
    operand: fx.Node,
    others: Sequence[str],
    result: Sequence[str],
) -> Product | None:
    """Rows each of which has a matrix of its own, such as [rows, 1, i] x weight[choice]."""
    assert weight.choice is not None
    rank = len(site.layout.dims(weight.choice))
    chosen, held = names[:rank], dict(zip(names[rank:], weight.axes[1:], strict=True))
    inner = [name for name in held if name not in result]
    if weight.axes[0] is None or len(inner) != 1 or inner[0] not in others or len(held) != 2:
        return None
    (outer,) = [axis for name, axis in held.items() if name != inner[0]]
    column, place = held[inner[0]], {name: axis for axis, name in enumerate(others)}
    sizes = site.layout.dims(operand)
    more = [axis for name, axis in place.items() if name not in (*chosen, *inner)]
    if outer is None or column is None or any(sizes[axis].size > 1 for axis in more):
        return None
    rows = Chosen(
        operand,
        place[inner[0]],
        weight.choice,
        tuple(place.get(name) for name in chosen),
        site.layout.parameters[weight.parameter][weight.axes[0]].size,
        *origin_of(site.layout, operand),
    )
    matrix = Matrix((outer,), (column,), (weight.axes[0],))
    return Product(site.call.node, weight.parameter, matrix, rows)


def _linear(site: _Site) -> Product | None:
    call = site.call
    tokens = [f"t{axis}" for axis in range(len(call.dims("input")) - 1)]
    letters = ([*tokens, "i"], ["o", "i"])
    found = _contraction(site, letters, (call.arg("input"), call.arg("weight")), [*tokens, "o"])
    return _with_bias(found, call.arg("bias"))


def _matmul(first: int, bias: str | None = None) -> Callable[[_Site], Product | None]:
    def find(site: _Site) -> Product | None:
        call = site.call
        schema = call.target._schema.arguments
        nodes = [call.arg(schema[first + side].name) for side in (0, 1)]
        ranks = [len(call.dims(node)) for node in nodes]
        left = [f"b{axis}" for axis in range(ranks[0] - 2, 0, -1)]
        right = [f"b{axis}" for axis in range(ranks[1] - 2, 0, -1)]
        rows, free = (["m"] if ranks[0] > 1 else []), (["n"] if ranks[1] > 1 else [])
        batch = left if len(left) >= len(right) else right
        letters = ([*left, *rows, "i"], [*right, "i", *free])
        found = _contraction(site, letters, nodes, [*batch, *rows, *free])
        return _with_bias(found, call.arg(bias) if bias else None)

    return find


def _with_bias(product: Product | None, bias: fx.Node | None) -> Product | None:
    if product is None or bias is None:
        return product
    return Product(product.node, product.parameter, product.matrix, product.rows, bias)


def _einsum(site: _Site) -> Product | None:
    equation = str(site.call.arg("equation")).replace(" ", "")
    nodes = list(site.call.arg("tensors"))
    if "->" not in equation or len(nodes) != 2:
        return None
    terms, result = equation.split("->")
    ranks = [len(site.layout.dims(node)) for node in nodes]
    letters = [_spelled(term, rank) for term, rank in zip(terms.split(","), ranks, strict=True)]
    if any(len(set(names)) != len(names) for names in letters):
        return None
    return _contraction(
        site, letters, nodes, _spelled(result, len(site.layout.dims(site.call.node)))
    )


def _spelled(term: str, rank: int) -> list[str]:
    """A name an axis; those that dots stand for are numbered from the right."""
    before, dots, after = term.partition("...")
    count = rank - len(before) - len(after) if dots else 0
    return [*before, *(f".{axis}" for axis in range(count, 0, -1)), *after]


def _convolution(site: _Site) -> Product | None:
    call = site.call
    weight = site.stored(call.arg("weight"))
    if weight is None or not site.is_data(call.arg("input")) or weight.choice is not None:
        return None
    dims = site.layout.parameters[weight.parameter]
    if weight.axes != tuple(range(len(dims))):
        return None
    transposed = "transpose" in call.name or bool(call.arg("transposed"))
    groups = int(call.arg("groups"))
    more = int(groups > 1)
    kernel = tuple(range(2 + more, len(dims) + more))
    outer, inner = (1 + more, more) if transposed else (more, 1 + more)
    matrix = Matrix((outer,), (inner, *kernel), (0,) if more else (), groups)
    sizes = tuple(dim.size for dim in dims[2:])
    arguments = {"output_padding": 0, **call.arguments}
    rows = patches(call.arg("input"), arguments, sizes, transposed=transposed)
    return Product(call.node, weight.parameter, matrix, rows, call.arg("bias"))


def _grouped(site: _Site) -> Product | None:
    """Sorted rows, a matrix for each run of them: [rows, i] x [parts, i, o] with offsets."""
    call = site.call
    names = [argument.name for argument in call.target._schema.arguments[:2]]
    weight, operand = site.stored(call.arg(names[1])), call.arg(names[0])
    offsets = call.arg("offs")
    axes = () if weight is None else tuple(axis for axis in weight.axes if axis is not None)
    if weight is None or len(axes) != 3 or not isinstance(offsets, fx.Node):
        return None
    stack, inner, outer = axes
    parts = site.layout.parameters[weight.parameter][stack].size
    rows = Sorted(operand, offsets, parts, *origin_of(site.layout, operand))
    return Product(call.node, weight.parameter, Matrix((outer,), (inner,), (stack,)), rows)


_FINDERS: dict[str, Callable[[_Site], Product | None]] = {
    "aten::linear": _linear,
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::matmul", "aten::mv"), _matmul(0)),
    "aten::addmm": _matmul(1, "self"),
    "aten::baddbmm": _matmul(1),
    "aten::einsum": _einsum,
    **dict.fromkeys(
        (
            *("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution"),
            *("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d"),
        ),
        _convolution,
    ),
    **dict.fromkeys(("aten::_grouped_mm", "transformers::grouped_mm_fallback"), _grouped),
}

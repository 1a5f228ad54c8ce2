"""Where queries meet keys and values, fused or written out: what a cache holds of a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from prunec.graph.dims import Dim
from prunec.graph.program import Program
from prunec.graph.propagate import Layout
from prunec.graph.sums import is_product, operator_name

_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
_RIGHT = {"matmul": 1, "bmm": 1, "baddbmm": 2}  # where a product takes its right operand


@dataclass(frozen=True)
class Cached:
    """The keys, or the values, of one attention.

    Attributes:
        node: the value that holds them.
        heads: its axis of heads; batches and heads where these are one axis.
        features: its axis of the features of a head.
    """

    node: fx.Node
    heads: Dim
    features: Dim


def cached(program: Program, layout: Layout) -> Iterator[Cached]:
    """Keys and values of every attention, in the order of the graph.

    Written out, an attention is a softmax over a product of two values, ``q k^T``, whose result
    meets a third in the next product.
    """
    for node in program.graph.nodes:
        name = operator_name(node)
        if name == "scaled_dot_product_attention":
            call = layout.call(node)
            yield from (_of(call.arg(which), layout, -1) for which in ("key", "value"))
        elif name in _SOFTMAX:
            keys = _met_in(_next_products(node, layout, forward=False))
            values = _met_in(_next_products(node, layout, forward=True))
            if keys is not None and values is not None:
                yield _of(keys, layout, -2)
                yield _of(values, layout, -1)


def _of(node: fx.Node, layout: Layout, axis: int) -> Cached:
    dims = layout.dims(node)
    return Cached(node, dims[-3], dims[axis])


def _next_products(node: fx.Node, layout: Layout, *, forward: bool) -> Iterator[fx.Node]:
    """The nearest products that a value enters, or that it is computed from, by data alone."""
    todo, seen = [node], {node}
    while todo:
        here = todo.pop(0)
        onward: Iterable[fx.Node] = here.users if forward else here.all_input_nodes
        for other in onward:
            if other in seen or other not in layout.data:
                continue
            seen.add(other)
            if not is_product(other):
                todo.append(other)
            elif all(source in layout.data for source in other.all_input_nodes[-2:]):
                yield other


def _met_in(products: Iterator[fx.Node]) -> fx.Node | None:
    """The right operand of the first product of batched matrices."""
    for node in products:
        at = _RIGHT.get(operator_name(node))
        right = node.args[at] if at is not None and at < len(node.args) else None
        if isinstance(right, fx.Node) and node.meta["val"].ndim > 2:
            return right
    return None

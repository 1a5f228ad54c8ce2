"""Who gets which token: what a graph tells of the way from a router to its experts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import replace

from torch import fx

from prunec.graph.dims import Dim
from prunec.graph.propagate import Layout
from prunec.graph.rows import Tokens
from prunec.graph.sums import operator_name


def routing_of(
    layout: Layout, product: fx.Node, rows: Tokens, experts: Dim, made: Collection[Dim]
) -> Tokens:
    """The rows of a product over all experts, told which of them each expert is asked for.

    Where every expert sees every token, the result is multiplied by the router's weights later on:
    zero for the tokens that went elsewhere. Nothing is changed where no such factor is found, or
    where it is computed after the product.

    Args:
        experts: the Dim of the matrices of the weight.
        made: the leaves of what one matrix makes, which the factor does not carry.
    """
    order = {node: i for i, node in enumerate(product.graph.nodes)}
    tokens = math.prod(layout.dims(rows.operand)[axis].size for axis in rows.tokens)
    for node in _carriers(layout, product, experts.root):
        if operator_name(node) != "mul":
            continue
        for operand in node.all_input_nodes:
            for factor in _moved(layout, operand):
                order_of = _axes_of(layout, factor, experts.root, made, tokens)
                if order_of is not None and order[factor] < order[product]:
                    return replace(rows, routing=factor, routing_order=order_of)
    return rows


def _axes_of(
    layout: Layout, factor: fx.Node, leaf: Dim, made: Collection[Dim], tokens: int
) -> tuple[int, ...] | None:
    """The axes of a factor, that of the experts first; None if it is not one for each token."""
    dims = layout.dims(factor)
    places = [axis for axis, dim in enumerate(dims) if dim.root is leaf]
    rest = [axis for axis in range(len(dims)) if axis not in places]
    if len(places) != 1 or any(found in made for dim in dims for found in dim.leaves()):
        return None
    if math.prod(dims[axis].size for axis in rest) != tokens:
        return None
    return (*places, *rest)


def _moved(layout: Layout, value: fx.Node) -> Iterator[fx.Node]:
    """A value, and what it is another view of."""
    while value in layout.data and value in layout.values:
        yield value
        if operator_name(value) not in _VIEWS:
            return
        value = value.all_input_nodes[0]


_VIEWS = (
    *("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "contiguous", "clone"),
    *("transpose", "permute", "t", "numpy_T", "mT", "to", "_to_copy", "alias", "detach"),
)


def _carriers(layout: Layout, start: fx.Node, leaf: Dim) -> Iterator[fx.Node]:
    """What is computed from a value and still carries a leaf, nearest first."""
    waiting, seen = deque([start]), {start}
    while waiting:
        node = waiting.popleft()
        for user in node.users:
            if user in seen or user not in layout.values or user.op != "call_function":
                continue
            seen.add(user)
            if any(leaf in set(dim.leaves()) for dim in layout.dims(user)):
                yield user
                waiting.append(user)


def origin_of(layout: Layout, operand: fx.Node) -> tuple[fx.Node | None, int]:
    """Which token each row of a value is, and how many tokens there are.

    Rows are taken from the tokens by one lookup; None and 0 where none is found.
    """
    rows = layout.dims(operand)[0].size
    waiting, seen = deque([operand]), {operand}
    while waiting:
        node = waiting.popleft()
        if node.op != "call_function" or node not in layout.data or node not in layout.values:
            continue
        dims = layout.dims(node)
        if not dims or dims[0].size != rows:
            continue
        if operator_name(node) in ("index", "index_select"):
            source = node.all_input_nodes[0]
            indices = [given for given in node.all_input_nodes[1:] if given in layout.data]
            if source in layout.data and len(indices) == 1 and len(layout.dims(source)) == 2:
                return indices[0], layout.dims(source)[0].size
        for before in node.all_input_nodes:
            if before not in seen:
                seen.add(before)
                waiting.append(before)
    return None, 0

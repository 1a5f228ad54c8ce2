"""Where queries meet keys and values, fused or written out: what a cache holds of a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from prunec.graph.dims import Dim
from prunec.graph.program import Program
from prunec.graph.propagate import Layout
from prunec.graph.rules.registry import bind_arguments
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


@dataclass(frozen=True)
class _Attention:
    """One attention: the call that weighs, and what meets in it.

    Attributes:
        scores: the scores; of a fused attention its mask, where it has one.
        along: the axis of the keys that is of their features.
    """

    node: fx.Node
    scores: fx.Node | None
    query: fx.Node
    keys: fx.Node
    values: fx.Node
    along: int


def cached(program: Program, layout: Layout) -> Iterator[Cached]:
    """Keys and values that a cache holds of each token, in the order of the graph.

    Kept can be what no later token changes: an attention in which none sees those behind it, and
    one whose queries come from such an attention but whose keys do not (a decoder's, of what the
    encoder read). An encoder's own has neither: nothing of it is kept.
    """
    made: set[fx.Node] = set()  # what depends on an attention that looks back alone
    found = {attention.node: attention for attention in _attentions(program, layout)}
    for node in program.graph.nodes:
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)
        one = found.get(node)
        if one is None:
            continue
        looks_back = _looks_back(program, one)
        if looks_back or (one.query in made and one.keys not in made):
            yield _of(one.keys, layout, one.along)
            yield _of(one.values, layout, -1)
        if looks_back:
            made.add(node)


def _attentions(program: Program, layout: Layout) -> Iterator[_Attention]:
    """Every attention.

    Written out, it is a softmax over a product of two values, ``q k^T``, whose result meets a
    third in the next product.
    """
    for node in program.graph.nodes:
        name = operator_name(node)
        if name == "scaled_dot_product_attention":
            given = bind_arguments(node)
            query, key, value = (given[which] for which in ("query", "key", "value"))
            yield _Attention(node, given["attn_mask"], query, key, value, -1)
        elif name in _SOFTMAX:
            scored = _met_in(_next_products(node, layout, forward=False))
            weighed = _met_in(_next_products(node, layout, forward=True))
            if scored is not None and weighed is not None:
                scores, query, keys, values = node.all_input_nodes[0], *scored, weighed[1]
                yield _Attention(node, scores, query, keys, values, -2)


def _looks_back(program: Program, one: _Attention) -> bool:
    """Whether no token gets anything of a later one, at the traced lengths.

    Seen in the weights where all products are zero: what is left is the mask. A column in front
    of the keys, or behind them, may be of no token.
    """
    if one.scores is None:
        return bool(bind_arguments(one.node).get("is_causal"))
    scores = _without_products(program, one.scores)
    masked = scores.dtype == torch.bool
    seen = scores if masked else scores.float().softmax(-1).nan_to_num() != 0
    rows, columns = seen.shape[-2:]
    if rows > columns or (rows == 1 and columns > 1):
        return False
    return not seen[..., :rows].triu(1).any() or not seen[..., columns - rows :].triu(1).any()


def _without_products(program: Program, wanted: fx.Node) -> Tensor:
    """A value for the example inputs where every product and every parameter is zero."""
    place = next((t.device for t in program.state.values() if not t.is_meta), torch.device("cpu"))
    live: dict[fx.Node, Any] = {}
    todo = [wanted]
    while todo:
        node = todo[-1]
        name = program.bindings.get(node.name)
        if is_product(node) or name in program.parameters:
            like = node.meta["val"]
            live[node] = torch.zeros((), dtype=like.dtype, device=place).expand(like.shape)
        elif name is not None:
            live[node] = program.state[name].to(place)
        elif node.name in program.inputs:
            live[node] = program.example[program.inputs[node.name]].to(place)
        elif waiting := [source for source in node.all_input_nodes if source not in live]:
            todo += waiting
            continue
        else:
            args = fx.map_arg(node.args, live.__getitem__)
            kwargs = fx.map_arg(node.kwargs, live.__getitem__)
            with torch.no_grad():
                live[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        todo.pop()
    result: Tensor = live[wanted]
    return result


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


def _met_in(products: Iterator[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The operands of the first product of batched matrices."""
    for node in products:
        at = _RIGHT.get(operator_name(node))
        right = node.args[at] if at is not None and at < len(node.args) else None
        if at is not None and isinstance(right, fx.Node) and node.meta["val"].ndim > 2:
            left = node.args[at - 1]
            assert isinstance(left, fx.Node)
            return left, right
    return None

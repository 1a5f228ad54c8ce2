"""Sub-graphs that export sets apart, put back in line: one flat graph of operators."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

_GRADIENT = "has_gradient"


def inline(graph_module: fx.GraphModule) -> None:
    """Replace each call of a region that only changes a mode by the nodes of that region.

    Export sets apart what runs under another gradient mode, or with autocast switched off. A
    program runs without autocast; `has_gradient` tells the nodes of the other mode apart, for
    those who differentiate.
    """
    graph = graph_module.graph
    for call in list(graph.nodes):
        if not _changes_only_a_mode(call):
            continue
        at, attribute = next(
            (place, argument)
            for place, argument in enumerate(call.args)
            if isinstance(argument, fx.Node) and argument.op == "get_attr"
        )
        region = getattr(graph_module, str(attribute.target))
        inline(region)
        if isinstance(call.args[0], bool):
            _mark(region.graph, call.args[0])
        places = region.graph.find_nodes(op="placeholder")
        inputs: dict[fx.Node, Any] = dict(zip(places, call.args[at + 1 :], strict=True))
        with graph.inserting_before(call):
            results = graph.graph_copy(region.graph, inputs)
        _take_results(call, results)
        graph.erase_node(call)
        if not attribute.users:
            graph.erase_node(attribute)


def has_gradient(node: fx.Node) -> bool:
    """Whether the model itself lets gradients through this call, where it is to have any."""
    return bool(node.meta.get(_GRADIENT, True))


def _mark(region: fx.Graph, gradient: bool) -> None:
    for node in region.nodes:  # those of a region within it are marked already
        node.meta.setdefault(_GRADIENT, gradient)


def _changes_only_a_mode(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    switched_off = name == "wrap_with_autocast" and node.args[2] is False
    return name == "wrap_with_set_grad_enabled" or switched_off


def _take_results(call: fx.Node, results: Any) -> None:
    for user in list(call.users):
        assert user.target is operator.getitem, f"{user} takes all results of {call}"
        user.replace_all_uses_with(results[user.args[1]])
        user.graph.erase_node(user)

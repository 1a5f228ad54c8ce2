"""One call after slicing: the literal sizes in its arguments follow the axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from prunec.graph.propagate import Layout
from prunec.graph.rules import RULES
from prunec.graph.selection import Selection


@dataclass(frozen=True)
class ResizedCall:
    """A node's call under a selection; ``select`` takes the kept positions from its result."""

    node: fx.Node
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    select: bool = False

    @property
    def changed(self) -> bool:
        node = self.node
        same = self.target is node.target and self.args == node.args and self.kwargs == node.kwargs
        return self.select or not same


def resized_call(node: fx.Node, layout: Layout, selection: Selection) -> ResizedCall:
    """The call that computes what is left of ``node`` once its operands are sliced."""
    target: Any = node.target
    plain = ResizedCall(node, target, node.args, node.kwargs)
    if not isinstance(target, torch._ops.OpOverload) or not selection:
        return plain
    rule = RULES.find(target)
    if rule is None or rule.resize is None:
        return plain
    if not rule.strides and not _touched(node, layout, selection):
        return plain
    resized = rule.resize(layout.call(node), selection)
    if resized.target is not None:
        return ResizedCall(node, resized.target, (), resized.arguments, resized.select)
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, argument in enumerate(target._schema.arguments):
        if argument.name in resized.arguments:
            if position < len(args):
                args[position] = resized.arguments[argument.name]
            else:
                kwargs[argument.name] = resized.arguments[argument.name]
    return ResizedCall(node, target, tuple(args), kwargs, resized.select)


def _touched(node: fx.Node, layout: Layout, selection: Selection) -> bool:
    nodes = [n for n in (node, *node.all_input_nodes) if n in layout.values]
    return any(
        selection.touches(dim) for n in nodes for value in layout.values[n] for dim in value.dims
    )

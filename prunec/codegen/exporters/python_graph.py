"""A traced program made ready to be read: what computes nothing goes, values get their names."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.unflatten import UnflattenedModule, unflatten

_END = 2**63 - 1  # "to the end", as torch writes it
_ASSIGNMENT = re.compile(r"^([A-Za-z_][\w, ]*?)\s*(?::[^=]+)?=(?!=)\s*")
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


def readable(program: ExportedProgram) -> tuple[UnflattenedModule, dict[str, str]]:
    """The program as a tree of the model's modules, and names of values by node.

    Returns:
        Modules with a graph of their own each, parameters in place; and for those nodes whose value
        the model's source assigns to a variable, that variable. Node names are the same in all
        graphs of the tree.
    """
    module = copy.deepcopy(program.graph_module)
    _simplify(module.graph)
    module.recompile()
    cleaned = program._update(module, program.graph_signature)
    return unflatten(cleaned), _variables(module.graph)


def _simplify(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and str(getattr(node.target, "__name__", "")).startswith(_CHECKS):
            graph.erase_node(node)
    for node in list(graph.nodes):
        source = _same(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    _rename_sizes(graph)
    graph.eliminate_dead_code()


def _same(node: fx.Node) -> fx.Node | None:
    """The operand that this call returns unchanged."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name, first = node.target._schema.name.removeprefix("aten::"), node.args[:1]
    if not first or not isinstance(first[0], fx.Node):
        return None
    before, after = first[0].meta.get("val"), node.meta.get("val")
    rest = (*node.args[1:], *node.kwargs.values())
    same = isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
    if same and (
        (name == "to" and _device(before) == _device(after))
        or (
            name == "slice"
            and _get(rest, 1, 0) in (0, None)
            and _get(rest, 2, _END) == _END
            and _get(rest, 3, 1) == 1
        )
        or (name == "add" and rest == (0,))
        or (name == "mul" and rest in ((1,), (1.0,)))
        or (name == "dropout" and rest[-1] is False)
        or name in ("lift_fresh_copy", "alias", "detach_")
    ):
        return first[0]
    return None


def _device(value: Any) -> torch.device | None:
    return value.device if isinstance(value, Tensor) else None


def _get(values: tuple[Any, ...], index: int, default: Any) -> Any:
    return values[index] if len(values) > index else default


def _rename_sizes(graph: fx.Graph) -> None:
    """The sizes of the inputs are called by what they are."""
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.target is not torch.ops.aten.sym_size.int or not isinstance(source, fx.Node):
            continue
        if source.op == "placeholder":
            length = "target" if source.name.startswith("decoder") else "sequence"
            node._rename({0: "batch", 1: length}.get(node.args[1], f"size_{node.args[1]}"))


def _variables(graph: fx.Graph) -> dict[str, str]:
    """Node -> the variable that its source line assigns, for the last calls of every line."""
    names = {n.name: n.name for n in graph.nodes if n.name in ("batch", "sequence", "target")}
    lines: dict[tuple[object, str, str], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node.name] = node.name
        elif (line := _line(node)) and node.name not in names:
            lines.setdefault((_module(node), _place(node), line), []).append(node)
    for (*_, line), nodes in lines.items():
        found = _ASSIGNMENT.match(line)
        if found is not None:
            last = [n for n in nodes if not any(user in nodes for user in n.users)]
            targets = [name.strip() for name in found[1].split(",") if name.strip()]
            targets = [name for name in targets if name.isidentifier()]
            if len(targets) >= len(last):
                names |= {n.name: t for n, t in zip(last, targets, strict=False)}
    return names


def _line(node: fx.Node) -> str:
    lines = str(node.meta.get("stack_trace", "")).strip().splitlines()
    return lines[-1].strip() if lines and not lines[-1].strip().startswith("File ") else ""


def _place(node: fx.Node) -> str:
    """File and line number."""
    return str(node.meta.get("stack_trace", "")).strip().rpartition("\n")[0]


def _module(node: fx.Node) -> object:
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    return next(reversed(list(stack)), None)


def same_line(first: fx.Node, second: fx.Node) -> bool:
    """Whether one line of the model's source made both."""
    known = _line(first) != ""
    return known and first.meta["stack_trace"] == second.meta.get("stack_trace")

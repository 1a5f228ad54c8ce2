"""The statements of one graph, as its module's forward."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from prunec.codegen.exporters.python_graph import same_line
from prunec.codegen.exporters.python_render import Code, Renderer

MARK = re.compile("⟦(\\d+)⟧")  # an integer of a template
_SHORT = 66  # characters of an expression that may stand inside another


@dataclass
class Slot:
    """An integer of a module's code: its value there, and a name in case it differs elsewhere."""

    value: int
    hint: str


@dataclass
class Template:
    """The code of one module, integers as marks."""

    path: str
    kind: str
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    inputs: tuple[str, ...] = ()
    slots: list[Slot] = field(default_factory=list)

    def number(self, value: int, hint: str) -> str:
        self.slots.append(Slot(value, hint))
        return f"⟦{len(self.slots) - 1}⟧"

    @property
    def key(self) -> object:
        return self.kind, tuple(self.init), tuple(self.forward), self.inputs


class Forward:
    """The statements of one graph."""

    def __init__(
        self, template: Template, module: Any, variables: Mapping[str, str], inputs: Sequence[str]
    ) -> None:
        graph = module.graph
        self._template, self._inputs = template, inputs
        self._variables = {**variables, **_results(module, variables)}
        self._nodes = [node for node in graph.nodes if node.op != "get_attr"]
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._code: dict[fx.Node, Code] = {}
        self._holder: dict[str, fx.Node] = {}  # variable -> whose value it has
        self._pending: list[tuple[fx.Node, Code]] = []  # inlined, and not yet written
        self._mutates = any(_in_place(node) for node in self._nodes)
        for node in graph.nodes:
            if node.op == "get_attr":
                self._code[node] = Code(f"self.{node.target}")

    def write(self) -> None:
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        for node, name in zip(inputs, self._inputs, strict=True):
            self._name(node, name)
        self._template.inputs = tuple(self._code[node].text for node in inputs)
        tensors = [n for n in inputs if isinstance(n.meta.get("val"), Tensor)]
        device = f"{self._code[tensors[0]].text}.device" if tensors else '"cpu"'
        self._renderer = Renderer(lambda node: self._code[node], self._template.number, device)
        index = len(inputs)
        while index < len(self._nodes):
            index += self._loop(index) or self._statement(self._nodes[index])

    def _statement(self, node: fx.Node) -> int:
        if node.op == "output":
            self._return(node)
            return 1
        code = self._expression(node)
        if self._is_inlined(node, code):
            self._code[node] = code
            self._pending.append((next(iter(node.users)), code))
            return 1
        if not node.users:
            self._template.forward.append(code.text)
            return 1
        items = [user for user in node.users if _is_item(user)]
        if len(items) == len(node.users) > 0 and not self._mutates:
            names = {_item_index(item): item for item in items}
            texts = [
                self._name(names[i], self._variable(names[i])) if i in names else "_"
                for i in range(max(names) + 1)
            ]
            more = ", *_" if self._count(node) > len(texts) else ""
            self._template.forward.append(
                f"{', '.join(texts)}{more or ',' * (len(texts) == 1)} = {code.text}"
            )
            return 1
        self._template.forward.append(f"{self._name(node, self._variable(node))} = {code.text}")
        return 1

    def _count(self, node: fx.Node) -> int:
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            return len(value)
        return 1 + max(_item_index(user) for user in node.users)

    def _expression(self, node: fx.Node) -> Code:
        if node in self._code:  # an item that has its name already
            return self._code[node]
        if node.op == "call_module":
            path = re.sub(r"\.(\d+)", r"[\1]", f"self.{node.target}")
            given = ", ".join(self._code[arg].text for arg in node.args if isinstance(arg, fx.Node))
            return Code(f"{path}({given})")
        return self._renderer.call(node)

    def _is_inlined(self, node: fx.Node, code: Code) -> bool:
        if node in self._code:
            return True
        if self._mutates or len(node.users) != 1:
            return False
        user = next(iter(node.users))
        if user.op == "output":
            return True
        short = len(MARK.sub("00", code.text)) < _SHORT
        if all(n.op == "call_module" and "." in str(n.target) for n in (node, user)):
            return False
        return short and (same_line(node, user) or node.op == "call_module")

    def _return(self, node: fx.Node) -> None:
        results = node.args[0]
        values = list(results) if isinstance(results, list | tuple) else [results]
        texts = [self._code[v].text for v in values if isinstance(v, fx.Node)]
        self._template.forward.append(f"return {', '.join(texts)}")

    def _variable(self, node: fx.Node) -> str:
        if node.name in self._variables:
            return self._variables[node.name]
        if node.op == "call_module":
            leaf = [part for part in str(node.target).split(".") if not part.isdigit()]
            return f"{leaf[-1]}_out" if leaf else "x"
        name = re.sub(r"(_default)?(_\d+)?$", "", node.name).strip("_") or "x"
        return f"{name}_" if keyword.iskeyword(name) else name

    def _name(self, node: fx.Node, wanted: str) -> str:
        """`wanted`, or with a number where its present value is still needed."""
        name, number = wanted, 2
        while (holder := self._holder.get(name)) is not None and self._alive(name, holder, node):
            name, number = f"{wanted}_{number}", number + 1
        self._holder[name] = node
        self._code[node] = Code(name)
        return name

    def _alive(self, name: str, holder: fx.Node, now: fx.Node) -> bool:
        """Whether a variable is read after `now`, by itself or within an inlined expression."""
        if now.op == "placeholder":
            return True
        word = re.compile(rf"\b{name}\b")
        readers = [*holder.users, *(user for user, code in self._pending if word.search(code.text))]
        return any(self._order[user] > self._order[now] for user in readers)

    def _loop(self, start: int) -> int:
        """A run of the children of one list, each fed the result of the one before, as a loop."""
        run: list[fx.Node] = []
        for node in self._nodes[start:]:
            if node.op != "call_module" or not re.fullmatch(r".+\.\d+", str(node.target)):
                break
            if run and not _continues(run[-1], node):
                break
            run.append(node)
        home = str(run[0].target).rpartition(".")[0] if run else ""
        if len(run) < 2 or [str(n.target) for n in run] != [f"{home}.{i}" for i in range(len(run))]:
            return 0
        place = next(i for i, arg in enumerate(run[1].args) if arg is run[0])
        given = [self._code[arg].text for arg in run[0].args if isinstance(arg, fx.Node)]
        name = self._variables.get(run[-1].name, self._variables.get(run[0].name, "x"))
        first, name = given[place], self._name(run[-1], name)
        if first != name:
            self._template.forward.append(f"{name} = {first}")
        given[place] = name
        item = home.rpartition(".")[2].removesuffix("s") or "item"
        whole = len(run) == self._length(home)
        part = "" if whole else f"[:{len(run)}]"
        self._template.forward.append(f"for {item} in self.{home}{part}:")
        self._template.forward.append(f"    {name} = {item}({', '.join(given)})")
        return len(run)

    def _length(self, home: str) -> int:
        targets = {str(n.target) for n in self._nodes if n.op == "call_module"}
        return sum(target.rpartition(".")[0] == home for target in targets)


def _continues(before: fx.Node, node: fx.Node) -> bool:
    """Whether the only use of `before` is as one argument of `node`, all others being the same."""
    if list(before.users) != [node] or len(before.args) != len(node.args):
        return False
    return [a is b for a, b in zip(before.args, node.args, strict=True)].count(False) == 1


def _results(module: Any, variables: Mapping[str, str]) -> dict[str, str]:
    """What a module's own code calls the results of its children: as they call them."""
    found = {}
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        outer = next(n for n in module.get_submodule(node.target).graph.nodes if n.op == "output")
        results = outer.args[0]
        if isinstance(results, fx.Node):
            if results.name in variables:
                found[node.name] = variables[results.name]
            continue
        for item in filter(_is_item, node.users):
            result = results[item.args[1]]
            if isinstance(result, fx.Node) and result.name in variables:
                found[item.name] = variables[result.name]
    return found


def _item_index(item: fx.Node) -> int:
    index = item.args[1]
    assert isinstance(index, int)
    return index


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int)


def _in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)

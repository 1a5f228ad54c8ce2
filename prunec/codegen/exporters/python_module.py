"""The classes of a module tree: modules whose code differs in sizes only share one."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunec.codegen.exporters.python_forward import MARK, Forward, Template

_LINE = 100


@dataclass(frozen=True)
class Class:
    """A class of the written module.

    Attributes:
        name: unique in the file.
        text: its source.
        parameters: the sizes that its constructor takes.
    """

    name: str
    text: str
    parameters: tuple[str, ...]


class Writer:
    """Turns a tree of graph modules into classes, children first.

    Args:
        root: as `python_graph.readable` makes it.
        original: the model itself; its torch.nn leaves are written as such.
        variables: node -> variable.
        fields: config field -> its value in every layer, for the names of sizes.
    """

    def __init__(
        self,
        root: Any,
        original: nn.Module,
        variables: Mapping[str, str],
        fields: Mapping[str, Sequence[int]],
    ) -> None:
        self._root, self._original = root, original
        self._variables, self._fields = variables, fields
        self.classes: list[Class] = []
        self._made: dict[str, tuple[Class, tuple[int, ...]]] = {}  # path -> class and arguments
        self._names: Counter[str] = Counter()
        self._fixed: dict[object, Class] = {}  # code and sizes -> a class without parameters

    def write(self) -> Class:
        """All classes, in `classes`; returns the root's."""
        paths = [path for path, module in self._root.named_modules() if _has_code(module)]
        self._inputs = _input_names(
            [self._root.get_submodule(path) for path in paths], self._variables
        )
        depth = {path: path.count(".") + bool(path) for path in paths}
        for level in sorted(set(depth.values()), reverse=True):
            self._write_level([path for path in paths if depth[path] == level])
        return self._made[""][0]

    def _write_level(self, paths: Sequence[str]) -> None:
        alike: dict[object, list[Template]] = {}
        for path in paths:
            if self._leaf(path) is None:
                template = self._template(path)
                alike.setdefault(template.key, []).append(template)
        for key, templates in alike.items():
            sizes = {tuple(slot.value for slot in t.slots) for t in templates}
            fixed = key, next(iter(sizes)) if len(sizes) == 1 else None
            if fixed not in self._fixed:
                made, arguments = self._class(templates)
                self.classes.append(made)
                if not made.parameters:
                    self._fixed[fixed] = made
            else:  # written for a deeper level already
                made, arguments = self._fixed[fixed], [()] * len(templates)
            for template, values in zip(templates, arguments, strict=True):
                self._made[template.path] = made, values

    # one module

    def _template(self, path: str) -> Template:
        module = self._root.get_submodule(path) if path else self._root
        template = Template(path, _kind(module))
        for name, tensor in _own_tensors(module):
            template.init.append(_declaration(template, name, tensor))
        for name, child in module.named_children():
            template.init += self._child(template, f"{path}.{name}" if path else name, name, child)
        Forward(template, module, self._variables, self._inputs[_role(module)]).write()
        return template

    def _child(self, template: Template, path: str, name: str, child: nn.Module) -> Iterator[str]:
        leaf = self._leaf(path)
        if leaf is not None:
            yield f"self.{name} = {_constructed(template, name, *leaf)}"
        elif _has_code(child):
            yield f"self.{name} = {self._instance(template, path)}"
        elif next(child.children(), None) is None:
            return  # never called
        elif all(key.isdigit() for key in dict(child.named_children())):
            made = [
                self._item(template, f"{path}.{key}", key, c) for key, c in child.named_children()
            ]
            yield f"self.{name} = nn.ModuleList(["
            yield from (f"    {item}," for item in made)
            yield "])"
        else:
            yield f"self.{name} = nn.Module()"
            for key, inner in child.named_children():
                yield from self._child(template, f"{path}.{key}", f"{name}.{key}", inner)

    def _item(self, template: Template, path: str, key: str, child: nn.Module) -> str:
        leaf = self._leaf(path)
        if leaf is not None:
            return _constructed(template, key, *leaf)
        return self._instance(template, path)

    def _instance(self, template: Template, path: str) -> str:
        made, arguments = self._made[path]
        named = [
            f"{name}={template.number(value, name)}"
            for name, value in zip(made.parameters, arguments, strict=True)
        ]
        return f"{made.name}({', '.join(named)})"

    def _leaf(self, path: str) -> tuple[str, list[tuple[str, Any]]] | None:
        """A childless module of torch.nn: its class and arguments, if they are known."""
        traced = self._root.get_submodule(path)
        try:
            module = self._original.get_submodule(path)
        except AttributeError:
            return None
        if not _has_code(traced):
            return None
        home = type(module).__module__.startswith("torch.nn.modules.")
        if not home or next(module.children(), None) is not None:
            return None
        if len(_placeholders(traced)) != 1:
            return None
        return _construction(module)

    # modules that share a class

    def _class(self, templates: Sequence[Template]) -> tuple[Class, list[tuple[int, ...]]]:
        first = templates[0]
        columns = [tuple(t.slots[i].value for t in templates) for i in range(len(first.slots))]
        names: dict[tuple[int, ...], str] = {}
        for column, slot in zip(columns, first.slots, strict=True):
            if len(set(column)) > 1 and column not in names:
                names[column] = self._size_name(templates, column, slot.hint, names.values())
        name = self._unique(first.kind)
        stored = {
            names[columns[int(mark)]]
            for line in first.forward
            for mark in MARK.findall(line)
            if columns[int(mark)] in names
        }
        text = _class_text(name, first, columns, names, stored, self._where(templates))
        arguments = [tuple(column[i] for column in names) for i in range(len(templates))]
        return Class(name, text, tuple(names.values())), arguments

    def _size_name(
        self, templates: Sequence[Template], column: tuple[int, ...], hint: str, taken: Any
    ) -> str:
        layers = [_layer(t.path) for t in templates]
        name = hint
        for field_name, values in self._fields.items():
            inside = all(i is not None and i < len(values) for i in layers)
            if inside and column == tuple(values[i] for i in layers if i is not None):
                name = field_name
        known, number = set(taken), 2
        base = name
        while name in known:
            name, number = f"{base}_{number}", number + 1
        return name

    def _unique(self, kind: str) -> str:
        self._names[kind] += 1
        count = self._names[kind]
        return kind if count == 1 else f"{kind}{count}"

    def _where(self, templates: Sequence[Template]) -> str:
        first = templates[0].path
        if len(templates) == 1:
            return first or "the whole model"
        return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", first) + f" ({len(templates)} of them)"


def _has_code(module: nn.Module) -> bool:
    graph = getattr(module, "graph", None)
    return graph is not None and any(node.op == "output" for node in graph.nodes)


def _placeholders(module: Any) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _role(module: nn.Module) -> tuple[str, int]:
    """Modules of one role call their inputs by the same names."""
    return _kind(module), len(_placeholders(module))


def _input_names(
    modules: Sequence[nn.Module], variables: Mapping[str, str]
) -> dict[tuple[str, int], list[str]]:
    """Role -> the names of its inputs: the variables that most callers hand over."""
    votes: dict[tuple[str, int], list[Counter[str]]] = {}
    for module in modules:
        nodes = _placeholders(module)
        counts = votes.setdefault(_role(module), [Counter() for _ in nodes])
        for node, count in zip(nodes, counts, strict=True):
            if node.name in variables:
                count[variables[node.name]] += 1
    return {
        role: [count.most_common(1)[0][0] if count else "x" for count in counts]
        for role, counts in votes.items()
    }


def _kind(module: nn.Module) -> str:
    named = getattr(module, "type_name", None)
    name = str(named() if callable(named) else type(module).__name__).rpartition(".")[2]
    return {"UnflattenedModule": "Model", "Wrapper": "Model"}.get(name, name.removeprefix("Prunec"))


def _layer(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the module's own code reads, by attribute."""
    graph: fx.Graph = module.graph  # type: ignore[assignment]
    for name in dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr"):
        if "." not in name:
            tensor = getattr(module, name)
            assert isinstance(tensor, Tensor)
            yield name, tensor


def _declaration(template: Template, name: str, tensor: Tensor) -> str:
    sizes = ", ".join(template.number(size, f"{name}_size") for size in tensor.shape)
    empty = f"torch.empty({sizes or '()'})"
    if isinstance(tensor, nn.Parameter):
        return f"self.{name} = nn.Parameter({empty})"
    return f'self.register_buffer("{name}", {empty})'


def _construction(module: nn.Module) -> tuple[str, list[tuple[str, Any]]] | None:
    """Class and arguments of a torch.nn module, read from its own repr; None if that lacks some."""
    kind = type(module).__name__
    try:
        call = ast.parse(repr(module), mode="eval").body
        assert isinstance(call, ast.Call)
        arguments = [("", ast.literal_eval(arg)) for arg in call.args]
        arguments += [(str(k.arg), ast.literal_eval(k.value)) for k in call.keywords]
        cls = getattr(nn, kind)
        with torch.device("meta"):
            made = cls(*[v for n, v in arguments if not n], **{n: v for n, v in arguments if n})
    except (AssertionError, AttributeError, SyntaxError, TypeError, ValueError):
        return None
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (made, module)]
    return (kind, arguments) if shapes[0] == shapes[1] else None


def _constructed(template: Template, name: str, kind: str, arguments: list[tuple[str, Any]]) -> str:
    parts = []
    for key, value in arguments:
        if type(value) is int:
            hints = {"in_features": f"{name}_in", "out_features": f"{name}_out"}
            value = template.number(value, hints.get(key, key) or f"{name}_size")
        positional = not key or key in ("in_features", "out_features")
        parts.append(str(value) if positional else f"{key}={value}")
    return f"nn.{kind}({', '.join(parts)})"


def _class_text(
    name: str,
    template: Template,
    columns: Sequence[tuple[int, ...]],
    names: Mapping[tuple[int, ...], str],
    stored: set[str],
    where: str,
) -> str:
    def filled(line: str, prefix: str) -> str:
        def number(mark: re.Match[str]) -> str:
            column = columns[int(mark[1])]
            return f"{prefix}{names[column]}" if column in names else str(column[0])

        return MARK.sub(number, line)

    parameters = "".join(f", {parameter}: int" for parameter in names.values())
    inputs = "".join(f", {given}" for given in template.inputs)
    lines = [f"class {name}(nn.Module):", f'    """{where}"""', ""]
    if template.init or names:
        lines += wrapped(f"    def __init__(self{parameters}):")
        lines.append("        super().__init__()")
        lines += [f"        self.{n} = {n}" for n in names.values() if n in stored]
        for line in template.init:
            lines += wrapped(f"        {filled(line, '')}")
        lines.append("")
    lines.append(f"    def forward(self{inputs}):")
    for line in template.forward:
        lines += wrapped(f"        {filled(line, 'self.')}")
    return "\n".join(lines)


def wrapped(line: str) -> list[str]:
    """A statement, the arguments of its last call on lines of their own if it is too long."""
    whole = line
    line = whole.rstrip(":,")
    tail = whole[len(line) :]
    if len(whole) <= _LINE or not line.endswith(")"):
        return [whole]
    depth, start, commas = 0, len(line), []
    for index in range(len(line) - 1, -1, -1):
        depth += {")": 1, "]": 1, "(": -1, "[": -1}.get(line[index], 0)
        if depth == 1 and line[index] == ",":
            commas.append(index)
        if depth == 0:
            start = index
            break
    indent = " " * (len(line) - len(line.lstrip()))
    inside = line[start + 1 : -1]
    if len(indent) + 4 + len(inside) <= _LINE:
        return [line[: start + 1], f"{indent}    {inside}", f"{indent}){tail}"]
    cuts = [start, *reversed(commas), len(line) - 1]
    parts = [line[a + 1 : b].strip() for a, b in pairwise(cuts)]
    return [line[: start + 1], *(f"{indent}    {part}," for part in parts), f"{indent}){tail}"]

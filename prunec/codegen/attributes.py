"""Which Python numbers of a module may have to change with its tensors, and to what.

A module's forward reads integers that its constructor worked out: a head count, a split size.
Nobody tables them here. A candidate is an integer of a module on the path of a sliced parameter
(or a field of that module's config) that equals an old extent below it; its options are the new
values of those extents. Modules of one class in one role decide together, so a model of thirty
layers poses the same few questions as one of two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunec.codegen.twin import tensors_of
from prunec.graph.paths import enclosing
from prunec.graph.selection import Sliced

Number = int | tuple[int, ...]
Values = tuple[Number, ...]  # one a module of the role
CONFIG = "config."


@dataclass(frozen=True)
class Candidate:
    """An attribute of all modules in one role, and what it may become.

    Attributes:
        role: class and path of the modules, layer numbers replaced by ``*``.
        name: attribute, or ``config.field`` as those modules read it.
        modules: their paths.
        old: its value in each of them.
        options: every reading of the extents, the likelier first; the last leaves all as it is.
        carriers: for each option, the parameters (below the module) whose extent it reads.
        implied: what the sizes alone imply, where every reading of them agrees; else None.
    """

    role: str
    name: str
    modules: tuple[str, ...]
    old: Values
    options: tuple[Values, ...]
    carriers: tuple[frozenset[str], ...]
    implied: Values | None

    def describe(self, values: Values) -> str:
        changes = sorted({f"{a} -> {b}" for a, b in zip(self.old, values, strict=True)})
        return f"{self.role}.{self.name}: {', '.join(changes)}"


@dataclass(frozen=True)
class Sizes:
    """What one module sees: extents that changed, by who carries them, and axes of its own."""

    extents: tuple[tuple[frozenset[str], int, int], ...]  # relative parameter names, old, new
    axes: Mapping[tuple[str, int], tuple[int, int]]  # (relative parameter name, axis): old, new


def role_of(path: str, module: nn.Module) -> str:
    """Class and numberless path; a childless module's role is its class, wherever it stands."""
    kind = type(module).__name__
    if next(module.children(), None) is None:
        return kind
    return f"{re.sub(r'(?<![^.])[0-9]+(?![^.])', '*', path)} ({kind})" if path else kind


def candidates(model: nn.Module, sliced: Sliced) -> list[Candidate]:
    """Every attribute that may depend on a changed size, in the order of the modules."""
    roles: dict[str, list[str]] = {}
    touched = {path for name in sliced.keep for path in ("", *enclosing(name)[:-1])}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        roles.setdefault(role_of(path, module), []).append(path)
    found: list[Candidate] = []
    for role, paths in roles.items():
        if not touched.isdisjoint(paths):
            sizes = [sizes_seen(model, sliced, path) for path in paths]
            values = [numbers(modules[path]) for path in paths]
            for name in values[0]:
                if all(name in v for v in values):
                    old = tuple(v[name] for v in values)
                    made = candidate(role, name, tuple(paths), old, sizes)
                    if made is not None and not are_places(paths, old):
                        found.append(made)
    return found


def are_places(paths: Sequence[str], values: Values) -> bool:
    """Whether each module's number is its place in a list: an index of layers, and no size."""
    pairs = zip(paths, values, strict=True)
    return len(set(values)) > 1 and all(str(value) in path.split(".") for path, value in pairs)


def numbers(module: nn.Module) -> dict[str, Number]:
    """The integers that a module's forward could read from itself or from its own config."""
    found = {name: value for name, value in vars(module).items() if _is_number(value)}
    config = vars(module).get("config")
    if config is not None and not hasattr(module, "base_model_prefix"):
        fields = vars(getattr(config, "_config", config))
        for name in fields:
            if not name.startswith("_") and _is_number(value := config_field(config, name)):
                found[CONFIG + name] = value
    return found


def config_field(config: Any, name: str) -> Any:
    """A field as its owner reads it; None if there is none, or if each layer has its own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers, of a config whose layers differ by themselves
        return None


def _is_number(value: Any) -> bool:
    if type(value) is tuple:
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int and value > 0


def sizes_seen(model: nn.Module, sliced: Sliced, path: str) -> Sizes:
    """The sizes that a number of the module at `path` could stand for."""
    prefix = f"{path}." if path else ""
    extents = []
    for extent in sliced.extents:
        names = frozenset(n[len(prefix) :] for n in extent.parameters if n.startswith(prefix))
        if names and not _within_one_child(names):
            extents.append((names, extent.old, extent.new))
    axes = {}
    for name, tensor in tensors_of(model).items():
        own = name[len(prefix) :]
        if name.startswith(prefix) and name in sliced.weights and not _within_one_child({own}):
            pairs = zip(tensor.shape, sliced.weights[name].shape, strict=True)
            axes.update({(own, axis): pair for axis, pair in enumerate(pairs)})
    return Sizes(tuple(extents), axes)


def _within_one_child(names: Iterable[str]) -> bool:
    """Whether all names lie in one numbered child: no number of the parent is about just that."""
    parts = [name.split(".")[:-1] for name in names]
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            return False
        if column[0].isdigit():
            return True
    return False


def candidate(
    role: str, name: str, modules: tuple[str, ...], old: Values, sizes: list[Sizes]
) -> Candidate | None:
    """The readings of one number of these modules; None where no extent gives it another value."""
    by_extent, by_axis = _by_extent(old, sizes), _by_axis(old, sizes)
    found = by_extent | {r: names for r, names in by_axis.items() if r not in by_extent}
    changed = {r: names for r, names in found.items() if r != old}
    if not changed:
        return None
    options = (*changed, old)
    readings = set(by_axis or by_extent)  # an axis that fits every module is the better evidence
    implied = readings.pop() if len(readings) == 1 else None
    carriers = (*changed.values(), frozenset[str]())
    return Candidate(role, name, modules, old, options, carriers, implied)


def _by_extent(old: Values, sizes: list[Sizes]) -> dict[Values, frozenset[str]]:
    """Readings as "the extent that these parameters carry", exactly or at least these."""
    carriers = dict.fromkeys(
        names
        for value, size in zip(old, sizes, strict=True)
        for names, before, _ in size.extents
        if _occurs(before, value)
    )
    readings: dict[Values, frozenset[str]] = {}
    for names in sorted(carriers, key=lambda n: (len(n), sorted(n))):
        for loose in (False, True):
            rows = [_read(v, s, names, loose) for v, s in zip(old, sizes, strict=True)]
            for ordinal in range(max(len(row) for row in rows)):
                reading = tuple(row[min(ordinal, len(row) - 1)] for row in rows)
                readings.setdefault(reading, names)
    return readings


def _read(value: Number, size: Sizes, names: frozenset[str], loose: bool) -> list[Number]:
    exact = [(b, a) for carried, b, a in size.extents if carried == names and _occurs(b, value)]
    if loose and not exact:
        exact = [(b, a) for carried, b, a in size.extents if carried > names and _occurs(b, value)]
    return list(dict.fromkeys(_replaced(value, *pair) for pair in exact)) or [value]


def _by_axis(old: Values, sizes: list[Sizes]) -> dict[Values, frozenset[str]]:
    """Readings as "the length of that parameter's axis", changed or not, true of every module."""
    shared = set.intersection(*(set(size.axes) for size in sizes))
    readings: dict[Values, frozenset[str]] = {}
    for name, axis in sorted(shared):
        pairs = [size.axes[name, axis] for size in sizes]
        if all(_occurs(before, v) for v, (before, _) in zip(old, pairs, strict=True)):
            reading = tuple(_replaced(v, *p) for v, p in zip(old, pairs, strict=True))
            readings.setdefault(reading, frozenset({name}))
    return readings


def _occurs(before: int, value: Number) -> bool:
    return before in value if isinstance(value, tuple) else before == value


def _replaced(value: Number, before: int, after: int) -> Number:
    if isinstance(value, tuple):
        return tuple(after if item == before else item for item in value)
    return after

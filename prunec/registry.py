"""Plug-ins by name: a lookup in the installed entry points, the built-ins included.

A package adds a plug-in by declaring it; prunec's own pyproject.toml is the example::

    [project.entry-points."prunec.importance"]
    mine = "my_package:Mine"
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from prunec.errors import PluginError

GROUPS = (
    "importance",
    "op_rules",
    "forwards",
    "allocation",
    "compensation",
    "passes",
    "exporters",
)


def names(group: str) -> list[str]:
    """Sorted names of the plug-ins that are installed in a group, such as ``importance``.

    >>> names("allocation")
    ['global', 'layer-range', 'log-increase', 'search', 'similarity-softmax', 'uniform']
    """
    return sorted(_declared(group))


def plugin(group: str, name: str) -> Any:
    """Import the plug-in `name` of a group and return the object that its entry point names.

    Raises:
        PluginError: no such name (the nearest is named), the import failed, or two packages
            declare the same name.
    """
    declared = _declared(group)
    if name not in declared:
        raise PluginError(f"no {group} named {name!r}", fix=nearest(name, sorted(declared)))
    entry, *others = declared[name]
    if others:
        raise PluginError(
            f"two {group} plug-ins are named {name!r}",
            where=" and ".join(f"{_package(e)} ({e.value})" for e in declared[name][:2]),
            fix="uninstall one of them",
        )
    try:
        return entry.load()
    except Exception as error:
        raise PluginError(
            f"the {group} plug-in {name!r} does not load: {error}",
            where=f"{_package(entry)}: {entry.value}",
            fix="reinstall or repair that package",
        ) from error


@cache
def _declared(group: str) -> dict[str, list[EntryPoint]]:
    """By name what is declared: more than one, where packages contradict each other."""
    if group not in GROUPS:
        raise PluginError(f"no plug-in group named {group!r}", fix=nearest(group, list(GROUPS)))
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=f"prunec.{group}"):
        held = found.setdefault(entry.name, [])
        # The same package can be on the path twice (a checkout and its install): same value.
        if all(entry.value != other.value for other in held):
            held.append(entry)
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown package"


def nearest(name: str, known: Sequence[str]) -> str:
    """What a message says of a name that is none of those known: the nearest, and all."""
    if near := get_close_matches(name, known, n=1):
        return f"did you mean {near[0]!r}? There are: {', '.join(known)}"
    return f"there are: {', '.join(known)}" if known else "none is installed"

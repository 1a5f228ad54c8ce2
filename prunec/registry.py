"""Plug-ins by name: a lookup in the installed entry points, the built-ins included.

A package adds a plug-in by declaring it; prunec's own pyproject.toml is the example::

    [project.entry-points."prunec.importance"]
    mine = "my_package:Mine"
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, wraps
from importlib.metadata import EntryPoint, entry_points
from types import FunctionType
from typing import Any

from prunec.errors import PluginError, PrunecError

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


def guarded(made: type, called: str, interface: type, returns: Mapping[str, type]) -> type:
    """A plug-in's class whose methods say whose they are where they fail.

    Args:
        called: what a message names it by.
        interface: the Protocol that it implements.
        returns: by method what comes back.

    Raises:
        PluginError: it lacks an attribute, or a method cannot be called as the interface's.
    """
    public = [
        n
        for n in {**inspect.get_annotations(interface), **vars(interface)}
        if not n.startswith("_")
    ]
    methods = {name: vars(interface).get(name) for name in public}
    told: dict[str, Any] = {}
    for name, model in methods.items():
        own = getattr(made, name, None)
        if isinstance(model, FunctionType):
            if not callable(own) or not _takes(own, model):
                raise PluginError(
                    f"{called} has no method {name} that can be called as it has to be",
                    where=f"{made.__module__}.{made.__qualname__}",
                    fix=f"def {name}({', '.join(_written(model))})",
                )
            told[name] = _telling(own, called, returns.get(name, object))
        elif not hasattr(made, name) and name not in getattr(made, "__dataclass_fields__", {}):
            raise PluginError(
                f"{called} has no attribute {name!r}",
                where=f"{made.__module__}.{made.__qualname__}",
                fix=f"it needs: {', '.join(public)}",
            )
    named = {name: getattr(made, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(made.__name__, (made,), {**named, **told})


def _written(model: FunctionType) -> list[str]:
    """A method's parameters as a definition has them, without their types."""
    given = [p.replace(annotation=p.empty) for p in inspect.signature(model).parameters.values()]
    named = [str(p) for p in given if p.kind is p.KEYWORD_ONLY]
    return [str(p) for p in given if p.kind is not p.KEYWORD_ONLY] + (
        ["*", *named] if named else []
    )


def _takes(own: Callable[..., Any], model: FunctionType) -> bool:
    """Whether a method can be called as another is: by position, and by name what has to be."""
    given = inspect.signature(model).parameters.values()
    named = {p.name: None for p in given if p.kind is p.KEYWORD_ONLY}
    try:
        inspect.signature(own).bind(*[None] * (len(given) - len(named)), **named)
    except TypeError:
        return False
    return True


def _telling(own: Callable[..., Any], called: str, returned: type) -> Callable[..., Any]:
    """A method that raises nothing but errors of prunec and of the machine."""

    @wraps(own)
    def method(*args: Any, **kwargs: Any) -> Any:
        try:
            result = own(*args, **kwargs)
        except (PrunecError, OSError, MemoryError):
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f for f in frames if f.filename == inspect.getsourcefile(own)] or frames
            raise PluginError(
                f"{called} fails: {type(error).__name__}: {error}",
                where=f"{lines[-1].filename}:{lines[-1].lineno}  {lines[-1].line}",
                fix="repair that package",
            ) from error
        if not isinstance(result, returned):
            raise PluginError(
                f"{called}: {own.__name__} returns a {type(result).__name__}",
                fix=f"return a {returned.__name__}",
            )
        return result

    return method


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

"""Classes of plug-ins held to the Protocol of their group."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from inspect import Parameter, Signature
from types import FunctionType
from typing import Any

from prunec.errors import PluginError, PrunecError


@dataclass(frozen=True)
class Contract:
    """What a plug-in of a group has to be.

    Attributes:
        interface: the Protocol that it implements.
        returns: by method what comes back, where that is looked at.
    """

    interface: type
    returns: Mapping[str, type] = field(default_factory=dict)

    def hold(self, made: type, called: str) -> type:
        """The class, its methods such that a message says whose they are where they fail.

        Args:
            called: what a message names it by.

        Raises:
            PluginError: it lacks an attribute, or a method cannot be called as the interface's.
        """
        declared = {**inspect.get_annotations(self.interface), **vars(self.interface)}
        public = [name for name in declared if not name.startswith("_")]
        place = f"{made.__module__}.{made.__qualname__}"
        telling: dict[str, Any] = {}
        for name in public:
            model, own = declared[name], getattr(made, name, None)
            if isinstance(model, FunctionType):
                if not callable(own) or not _takes(own, model):
                    raise PluginError(
                        f"{called} has no method {name} that can be called as it has to be",
                        where=place,
                        fix=f"def {name}{_untyped(model)}",
                    )
                telling[name] = _telling(own, called, self.returns.get(name, object))
            elif not hasattr(made, name) and name not in getattr(made, "__dataclass_fields__", {}):
                raise PluginError(
                    f"{called} has no attribute {name!r}",
                    where=place,
                    fix=f"it needs: {', '.join(public)}",
                )
        named = {name: getattr(made, name) for name in ("__module__", "__qualname__", "__doc__")}
        return type(made.__name__, (made,), {**named, **telling})


def _untyped(model: FunctionType) -> Signature:
    """A method's parameters as a definition has them, without their types."""
    given = inspect.signature(model).parameters.values()
    return Signature([p.replace(annotation=Parameter.empty) for p in given])


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

"""prunec: a structured-pruning compiler for PyTorch models.

Importing it loads neither torch nor transformers; each name below loads on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunec import errors

if TYPE_CHECKING:
    from prunec.api import Result, apply_plan, check, couple, export, load, prune, register, trace
    from prunec.graph.coupling import CouplingGraph
    from prunec.graph.program import Program
    from prunec.passes.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "CouplingGraph",
    "Plan",
    "Program",
    "Result",
    "apply_plan",
    "check",
    "couple",
    "errors",
    "export",
    "load",
    "prune",
    "register",
    "trace",
]

_HOMES = {"CouplingGraph": "graph.coupling", "Plan": "passes.plan", "Program": "graph.program"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'prunec' has no attribute {name!r}")
    value = getattr(import_module(f"prunec.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

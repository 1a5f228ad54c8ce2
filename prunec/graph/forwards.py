"""Forwards that are traced in place of a class's own, where torch.export cannot follow that one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

from prunec.registry import names, plugin


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """For the time of a trace, modules of a class that a plug-in names run the plug-in's forward.

    An entry point in the group ``prunec.forwards`` bears the name of the class and is a function
    with the signature of its forward, ``self`` included: the same outputs, without control flow or
    sizes that depend on the data. Within it ``type(self).forward`` is the class's own.

    Example::

        [project.entry-points."prunec.forwards"]
        MyExperts = "my_package:my_experts"
    """
    declared = set(names("forwards"))
    before: list[tuple[nn.Module, dict[str, object]]] = []
    for module in model.modules() if declared else ():
        known = (cls.__name__ for cls in type(module).__mro__ if cls.__name__ in declared)
        if (name := next(known, None)) is not None:
            before.append((module, {k: v for k, v in vars(module).items() if k == "forward"}))
            vars(module)["forward"] = MethodType(plugin("forwards", name), module)
    try:
        yield
    finally:
        for module, own in before:
            del vars(module)["forward"]
            vars(module).update(own)

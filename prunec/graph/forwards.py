"""Forwards that are traced in place of a class's own, where torch.export cannot follow that one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

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
    swapped: list[tuple[dict[str, Any], Any]] = []
    try:
        for module in model.modules() if declared else ():
            known = (cls.__name__ for cls in type(module).__mro__ if cls.__name__ in declared)
            if (name := next(known, None)) is not None:
                own, forward = vars(module), MethodType(plugin("forwards", name), module)
                swapped.append((own, own.get("forward")))
                own["forward"] = forward
        yield
    finally:
        for own, before in swapped:
            del own["forward"]
            if before is not None:
                own["forward"] = before

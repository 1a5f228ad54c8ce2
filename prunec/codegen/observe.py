"""Which numbers a forward really reads: attribute access observed, not source code parsed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prunec.codegen.attributes import CONFIG, numbers
from prunec.codegen.modeling_prunec import LayerConfig

Reads = set[tuple[str, str]]  # (module path, attribute or "config.field")


class _WatchedConfig(LayerConfig):
    def __init__(self, config: Any, path: str, reads: Reads) -> None:
        super().__init__(config, {})
        self.__dict__["_note"] = (path, reads)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            path, reads = self.__dict__["_note"]
            reads.add((path, CONFIG + getattr(self._config, "attribute_map", {}).get(name, name)))
        return super().__getattr__(name)


@contextmanager
def attribute_reads(model: nn.Module) -> Iterator[Reads]:
    """The numbers of `model`'s modules, and of their configs, that are read inside the context."""
    reads: Reads = set()
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    watched = {path: frozenset(numbers(module)) for path, module in model.named_modules()}
    modules: list[Any] = list(model.modules())
    before = [(module, type(module), vars(module).get("config")) for module in modules]

    def watch(cls: type[nn.Module]) -> type[nn.Module]:
        def read(self: nn.Module, name: str) -> Any:
            path = paths.get(id(self))  # a slice of a module list is a new module
            if path is not None and name in watched[path]:
                reads.add((path, name))
            return cls.__getattribute__(self, name)

        space = {"__getattribute__": read, "__module__": cls.__module__}
        return type(cls.__name__, (cls,), space)

    try:
        for module, cls, config in before:
            if config is not None and not hasattr(module, "base_model_prefix"):
                module.config = _WatchedConfig(config, paths[id(module)], reads)
            if cls not in classes:
                classes[cls] = watch(cls)
            module.__class__ = classes[cls]
        yield reads
    finally:
        for module, cls, config in before:
            module.__class__ = cls
            if config is not None:
                module.config = config

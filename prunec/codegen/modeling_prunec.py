"""A pruned model: the stock transformers class, with the sizes that `config.prunec` lists.

Written by prunec beside the weights, so that `from_pretrained` needs nothing but transformers and
torch. The layers differ in size, which the stock config cannot say; `config.prunec` says it:

    shapes  parameter name -> its shape, where the stock class would build another one
    added   parameter name -> shape of one that the stock class lacks, such as a fitted bias
    attrs   module path -> {attribute: value}; under "config": config fields as that module reads
            them
    skip    module path -> what stands for a module that was left out
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn


class LayerConfig:
    """The model's own config with a few fields replaced, as one layer reads it.

    A live view and no copy: a later `model.set_attn_implementation(...)` is seen through it.
    """

    def __init__(self, config: Any, fields: dict[str, Any]) -> None:
        names = getattr(config, "attribute_map", {})
        self.__dict__["_config"] = config
        self.__dict__["_fields"] = {names.get(name, name): value for name, value in fields.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_fields"):
            raise AttributeError(name)
        field = getattr(self._config, "attribute_map", {}).get(name, name)
        return self._fields[field] if field in self._fields else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerConfig, (self._config, self._fields)


def set_attributes(module: Any, values: dict[str, Any]) -> None:
    """Give a module the numbers that its forward reads."""
    for name, value in values.items():
        if name == "config":
            module.config = LayerConfig(module.config, value)
        else:
            setattr(module, name, tuple(value) if isinstance(value, list) else value)


def listed(table: dict[str, Any], kind: str, prefix: str) -> Iterator[tuple[str, Any]]:
    """One kind of the table's rows, for the part of the model that `prefix` names."""
    for name, value in table.get(kind, {}).items():
        if name.startswith(prefix):
            yield name[len(prefix) :], value


def resize(model: Any, table: dict[str, Any], prefix: str = "") -> None:
    """Give a freshly built stock model the sizes of `table`. Names there start with `prefix`.

    Their numbers, which `from_config` keeps, are the first of those that the stock class drew: at
    sizes that its config does not say it may fail to.
    """
    for name, shape in [*listed(table, "shapes", prefix), *listed(table, "added", prefix)]:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        own = getattr(module, leaf, None)
        # an added parameter takes after the module's others
        like = next(module.parameters(recurse=False)) if own is None else own
        tensor = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if own is not None:
            first = own.detach()[tuple(map(slice, shape))]
            tensor[tuple(map(slice, first.shape))] = first
        if leaf in module._buffers:
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=like.requires_grad))
    for path, values in listed(table, "attrs", prefix):
        set_attributes(model.get_submodule(path), values)


class Pruned(nn.Module):
    """Comes before the stock class among the bases."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        table = getattr(config, "prunec", None)
        if not table:
            return
        oldest = table["transformers"]
        if int(transformers.__version__.partition(".")[0]) < oldest:
            raise ImportError(f"this model needs transformers {oldest} or newer")
        base = self.base_model_prefix
        names = (*table["shapes"], *table["added"], *table["skip"])
        bare = not hasattr(self, base) and any(name.startswith(f"{base}.") for name in names)
        self._resize(table, f"{base}." if bare else "")
        self.tie_weights()

    def _resize(self, table: dict[str, Any], prefix: str) -> None:
        resize(self, table, prefix)

    def initialize_weights(self: Any) -> None:
        """As a stock class: of a class that is not its own, transformers leaves out each module
        without tensors, and some of those fill their children's buffers. What has been loaded is
        left alone: a stock class may begin with vectors of its config's sizes.
        """
        for module in self.modules():
            held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if held and all(getattr(tensor, "_is_hf_initialized", False) for tensor in held):
                module._is_hf_initialized = True
        self.is_custom_code = lambda: False
        super().initialize_weights()  # type: ignore[misc]
        del self.is_custom_code

    @classmethod
    def _stock(cls) -> Any:
        return next(c for c in cls.__mro__ if c.__module__.startswith("transformers."))

    # transformers decides these two from the source text of the class's file, which is not this one
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls._stock()._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls._stock()._can_set_experts_implementation())

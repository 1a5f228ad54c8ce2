"""A pruned model: the stock transformers class, with the sizes that `config.prunec` lists.

Written by prunec beside the weights, so that `from_pretrained` needs nothing but transformers and
torch. The layers differ in size, which the stock config cannot say; `config.prunec` says it:

    shapes  parameter name -> its shape, where the stock class would build another one
    added   parameter name -> shape of one that the stock class lacks, such as a fitted bias
    attrs   module path -> {attribute: value}; under "config": config fields as that module reads
            them
    skip    module path -> what a module that was left out returns: "zeros" in the shape of its
            first tensor, "zeros:64" with a last axis of 64, null for none; a list for a tuple
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


class Skipped(nn.Module):
    """Stands where a module was left out: adds nothing to the residual stream, has no weights."""

    returns: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = first_tensor(args, kwargs)
        self._count(kwargs.get("past_key_values"), value)
        if isinstance(self.returns, list):
            return tuple(_zeros(value, item) for item in self.returns)
        return _zeros(value, self.returns)

    def _count(self, cache: Any, value: torch.Tensor) -> None:
        """Tell a cache how many tokens passed: models ask its first layer for the position."""
        index = getattr(self, "layer_idx", None)
        if cache is None or index is None:
            return
        known = index < len(cache.layers) and cache.layers[index].is_initialized
        keys = cache.layers[index].keys if known else None
        heads, size = (1, 1) if keys is None else (keys.shape[1], keys.shape[-1])
        empty = value.new_zeros(value.shape[0], heads, value.shape[1], size)
        cache.update(empty, empty, index)


def first_tensor(args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The first floating-point tensor that a module is given: the stream, by custom."""
    given = (*args, *kwargs.values())
    return next(t for t in given if isinstance(t, torch.Tensor) and t.is_floating_point())


def _zeros(like: torch.Tensor, kind: Any) -> Any:
    if kind is None:
        return None
    size = kind.partition(":")[2]
    return like.new_zeros(*like.shape[:-1], int(size)) if size else torch.zeros_like(like)


def skip(module: nn.Module, returns: Any) -> None:
    """Empty a module; the attributes that others may read of it stay."""
    for store in (module._parameters, module._buffers, module._modules):
        store.clear()
    module.__class__ = Skipped
    module.returns = returns


def set_attributes(module: Any, values: dict[str, Any]) -> None:
    """Give a module the numbers that its forward reads."""
    for name, value in values.items():
        if name == "config":
            module.config = LayerConfig(module.config, value)
        else:
            setattr(module, name, tuple(value) if isinstance(value, list) else value)


def resize(model: Any, table: dict[str, Any], prefix: str = "") -> None:
    """Give a freshly built stock model the sizes of `table`. Names there start with `prefix`."""

    def listed(kind: str) -> Iterator[tuple[str, Any]]:
        for name, value in table.get(kind, {}).items():
            if name.startswith(prefix):
                yield name[len(prefix) :], value

    for path, returns in listed("skip"):
        skip(model.get_submodule(path), returns)
    fresh = {}
    for name, shape in [*listed("shapes"), *listed("added")]:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        like = getattr(module, leaf, None)
        if like is None:  # an added parameter takes after the module's others
            like = next(module.parameters(recurse=False))
        tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
        if leaf in module._buffers:
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=like.requires_grad))
        fresh[path] = module
    for path, values in listed("attrs"):
        set_attributes(model.get_submodule(path), values)
    for module in fresh.values():  # `from_config` keeps these numbers, `from_pretrained` does not
        if all(not p.is_meta for p in module.parameters(recurse=False)):
            model._init_weights(module)


class Pruned(nn.Module):
    """Comes before the stock class among the bases."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        table = getattr(config, "prunec", None)
        if not table:
            return
        oldest = table["transformers"]
        if int(transformers.__version__.partition(".")[0]) < oldest:
            raise ImportError(f"this model needs transformers {oldest} or newer")
        self._resize(table)

    def _resize(self: Any, table: dict[str, Any]) -> None:
        prefix = self.base_model_prefix
        names = (*table["shapes"], *table["added"], *table["skip"])
        named = any(name.startswith(prefix + ".") for name in names)
        resize(self, table, f"{prefix}." if named and not hasattr(self, prefix) else "")
        self.tie_weights()

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

"""Modules that were left out of a pruned model: the second part of its modeling_prunec.py.

Only the directories of models that skip something carry it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prunec.codegen.modeling_prunec import Pruned, listed


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


class SkippingPruned(Pruned):
    """A pruned model some of whose modules are gone: `skip` of the table lists them.

    By the module's path: "zeros" where it returned a tensor in the shape of its first one,
    "zeros:64" with a last axis of 64, null for none; a list for a tuple.
    """

    def _resize(self: Any, table: dict[str, Any], prefix: str) -> None:
        for path, returns in listed(table, "skip", prefix):
            skip(self.get_submodule(path), returns)
        super()._resize(table, prefix)

"""Buffers that no file holds, such as rotary frequencies: a class makes them whenever it opens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunec.codegen.perturb import build
from prunec.codegen.shrink import is_transformers
from prunec.codegen.twin import assemble, tensors_of
from prunec.events import Progress


def as_loaded(model: nn.Module, progress: Progress) -> nn.Module:
    """The model as its files would give it, where a cast has rounded buffers that they lack.

    ``model.to(torch.bfloat16)`` rounds them, ``from_pretrained(..., dtype=torch.bfloat16)`` does
    not. A copy around the same weights has the class's own; any other model is returned itself.
    """
    half = {
        name: buffer
        for name, buffer in _unsaved(model).items()
        if buffer.is_floating_point() and buffer.itemsize == 2
    }
    if not half or not is_transformers(model):
        return model
    made = {name: buffer for name, buffer in remade(model).items() if name in half}
    exact = {name: b for name, b in made.items() if torch.equal(b.to(half[name]), half[name])}
    if not exact:
        return model
    first, *others = exact
    more = f" and {len(others)} more" if others else ""
    progress.message(
        f"model.to(dtype) has rounded {first}{more}: pruned with what the class makes, as after"
        " from_pretrained(..., dtype=...)."
    )
    return assemble(model, tensors_of(model) | exact)


def remade(model: Any) -> dict[str, Tensor]:
    """The buffers in no file that the model's class makes otherwise than the model has them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)  # as from_pretrained does meanwhile
    try:
        made = build(type(model), model.config)
    finally:
        torch.set_default_dtype(before)
    if made is None:
        return {}
    own = _unsaved(model)
    return {
        name: buffer.to(own[name].device)
        for name, buffer in made.named_buffers()
        if name in own and not _same(own[name], buffer)
    }


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _same(own: Tensor, other: Tensor) -> bool:
    return own.dtype == other.dtype and torch.equal(own.cpu(), other)

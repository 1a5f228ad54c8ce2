"""Digests of models: equal weights give equal digests, however they were stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

# What transformers records about a config's origin, rather than about the model.
_ORIGIN = frozenset({"_name_or_path", "transformers_version"})


def state_digest(model: nn.Module, stored: Mapping[str, Tensor] | None = None) -> str:
    """sha256 (hex) over a model's class, config, and every name, dtype, shape and value in it.

    It reads every weight once: 0.4 s a GB where the processor has sha instructions. Weights on
    meta count by shape alone, unless `stored` has their values.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    if (config := getattr(model, "config", None)) is not None and hasattr(config, "to_dict"):
        values = {key: value for key, value in config.to_dict().items() if key not in _ORIGIN}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta and stored is not None:
            tensor = stored[name]
        if not tensor.is_meta:
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_digest(*tokens: Tensor) -> str:
    """sha256 (hex) over token ids, in order, shapes included; integers of any width count alike."""
    digest = hashlib.sha256()
    for ids in tokens:
        digest.update(f"{tuple(ids.shape)}".encode())
        digest.update(_bytes(ids if ids.is_floating_point() else ids.to(torch.int64)))
    return digest.hexdigest()


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """sha256 (hex) over tensors in order, dtypes and shapes included."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")

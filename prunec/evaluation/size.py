"""Sizes: parameters and files."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; a tensor that several modules share counts once."""
    return sum(parameter.numel() for parameter in _distinct(model))


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in _distinct(model))


def file_size(directory: Path) -> int:
    """Bytes of all files in a directory and below it."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _distinct(model: nn.Module) -> list[nn.Parameter]:
    found: dict[object, nn.Parameter] = {}
    for parameter in model.parameters():
        # Two Parameter objects may wrap one tensor; on meta there is no address to tell by.
        address = 0 if parameter.is_meta else parameter.data_ptr()
        found[(address, parameter.shape) if address else id(parameter)] = parameter
    return list(found.values())

"""The weights of a checkpoint by the names of the model that opens it, read one at a time.

Names in a checkpoint are not names of parameters: transformers renames, stacks experts that lie one
by one, transposes. A Store carries out its conversions for just the parameter that is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class _Conversion:
    """What transformers does to some tensors of the files to get parameters.

    Attributes:
        name: of the first parameter that comes out.
        transform: transformers' own rule; a copy of it is used up each time.
        sources: (pattern of the rule, name in the files).
    """

    name: str
    transform: Any
    sources: tuple[tuple[str, str], ...]

    def carry_out(self, model: Any, read: Read) -> dict[str, Tensor]:
        transform = copy.deepcopy(self.transform)
        for pattern, source in self.sources:
            transform.add_tensor(self.name, source, pattern, partial(read, source))
        made = transform.convert(self.name, model=model, config=model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}


class Store(Mapping[str, Tensor]):
    """A model's parameters and persistent buffers, each read when asked for and kept nowhere.

    Tied parameters have every name that the model gives them. Tensors come in the dtype of the
    model's own (meta) tensors, exactly as `from_pretrained` would give them.

    Args:
        model: the transformers model, on meta.
        files: its safetensors files.
    """

    def __init__(self, model: Any, files: Sequence[Path]) -> None:
        self._model = model
        self._state: dict[str, Tensor] = model.state_dict()
        self._files = {name: path for path in files for name in tensor_shapes(path)}
        metas = {n: t for path in files for n, t in tensor_shapes(path).items()}
        self._homes = {
            name: conversion
            for conversion in _conversions(model, self._state, metas)
            for name in conversion.carry_out(model, metas.__getitem__)
        }
        self._names = _known_names(model, self._homes)

    def __getitem__(self, name: str) -> Tensor:
        home = self._names[name]
        conversion = self._homes[home]
        dtype = self._state[conversion.name].dtype
        return conversion.carry_out(self._model, partial(self._read, dtype=dtype))[home]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        # The file is mapped for this one read: pages of a file that stays open count as ours.
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.to(dtype, copy=True)


def tensor_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on meta: names, shapes and dtypes, nothing read."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part = file.get_slice(name)
            dtype = part[:0].dtype if part.get_shape() else file.get_tensor(name).dtype
            found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return found


def _conversions(
    model: Any, state: dict[str, Tensor], sources: Mapping[str, Tensor]
) -> list[_Conversion]:
    """Transformers' grouping of the files' tensors (convert_and_load_state_dict_in_model)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for source in sorted(sources, key=dot_natural_key):
        rename = partial(rename_source_key, source)
        prefix = model.base_model_prefix
        name, pattern = rename(renamings, converters, prefix, state)
        if name not in state and source in state:
            name, pattern = rename([], [], prefix, state)
        if name in state:
            rule = WeightRenaming(source, name) if pattern is None else by_pattern[pattern]
            groups.setdefault(name, (rule, []))[1].append((pattern or source, source))
    return [_Conversion(name, rule, tuple(group)) for name, (rule, group) in groups.items()]


def _known_names(model: Any, homes: Mapping[str, object]) -> dict[str, str]:
    """Every name of a tensor that the files hold -> the name that they hold it by."""
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    found = {id(named[name]): name for name in homes if name in named}
    return {name: found[id(tensor)] for name, tensor in named.items() if id(tensor) in found}

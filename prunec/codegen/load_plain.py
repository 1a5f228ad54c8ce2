"""A dense module takes on the sizes and weights of a directory that `save_plain` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from prunec.codegen.modeling_prunec import set_attributes
from prunec.errors import ModelError
from prunec.models.checkpoint import NO_JSON

RECORD, PROGRAM, WEIGHTS = "prunec.json", "model.pt2", "model.safetensors"


def is_plain(directory: Path) -> bool:
    """Whether `save_plain` wrote this directory."""
    return (directory / PROGRAM).is_file() and (directory / RECORD).is_file()


def open_program(directory: Path, device: str = "cpu") -> tuple[nn.Module, dict[str, Tensor]]:
    """The program of a directory, called with inputs by name, and those that it was traced with.

    Raises:
        ModelError: the directory is damaged.
    """
    try:
        program = torch.export.load(directory / PROGRAM)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{PROGRAM} does not open: {error}", where=str(directory)) from error
    program = move_to_device_pass(program, device)
    _, example = program.example_inputs
    return program.module().requires_grad_(False), dict(example)


def load_into(module: nn.Module, directory: Path) -> nn.Module:
    """Give a dense module of the class the sizes and weights of a directory; it is changed.

    Raises:
        ModelError: the directory is damaged, holds a graph, or another class's module.
    """
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
        tables, tied = record["tables"], record["tied"]
    except (OSError, KeyError, TypeError, SafetensorError, *NO_JSON) as error:
        raise ModelError(
            f"no directory of a plain module: {type(error).__name__}: {error}", where=str(directory)
        ) from error
    if not tables:
        raise ModelError(
            "the directory holds a graph: its class cannot take the smaller tensors",
            where=str(directory),
            fix=f'torch.export.load("{directory / PROGRAM}").module()',
        )
    _check_class(module, tensors.keys() | tied.keys(), tables, record["class"], directory)
    held = {name: _replaced(module, name, tensor) for name, tensor in tensors.items()}
    for name, first in tied.items():
        _put(module, name, held[first])
    for path, values in tables["attrs"].items():
        set_attributes(module.get_submodule(path), values)
    return module.eval()


def _check_class(
    module: nn.Module, names: Set[str], tables: Mapping[str, Any], cls: str, directory: Path
) -> None:
    """Raises ModelError where the module is not the dense one."""
    own = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = sorted(own.keys() ^ (names - set(tables["added"])))
    wrong += [name for name, (old, _) in tables["shapes"].items() if own.get(name) != old]
    if type(module).__qualname__ != cls or wrong:
        raise ModelError(
            f"this {type(module).__name__} is not the dense {cls} that was pruned"
            + (f": {', '.join(wrong[:3])} differ" if wrong else ""),
            where=str(directory),
            fix=f"give a {cls} with the sizes that it had before pruning",
        )


def _replaced(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the place of the module's own, on its device; what is now there."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    like = old if isinstance(old, Tensor) else next(module.parameters())
    tensor = tensor.to(like.device)
    if leaf not in owner._buffers:
        tensor = nn.Parameter(tensor, requires_grad=like.requires_grad)
    _put(module, name, tensor)
    return tensor


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, tensor)

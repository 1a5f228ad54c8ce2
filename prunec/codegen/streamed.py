"""Modules whose weights stay where they are stored, each read for the time of one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prunec.codegen.twin import scatter, tensors_of
from prunec.graph.selection import Sliced


@contextmanager
def at_hand(module: nn.Module, stored: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
    """Let a module on meta run and be saved; its weights are read when a block needs them.

    accelerate's hooks do it: they put a block's tensors in before its forward and take them out
    after it. A module that holds its own weights (`stored` None) is left alone.

    Args:
        stored: every parameter by its name in the module.
    """
    if stored is None:
        yield module
        return
    from accelerate.hooks import (  # type: ignore[import-untyped]
        attach_align_device_hook,
        remove_hook_from_submodules,
    )

    ties = _ties(module)
    blocks = list(getattr(module, "_no_split_modules", None) or ())
    attach_align_device_hook(
        module,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=stored,
        preload_module_classes=blocks,  # a block may read the weights of its parts itself
    )
    _tie(module, ties)
    vars(module)["hf_device_map"] = {"": "disk"}  # by which save_pretrained sees what to do
    try:
        yield module
    finally:
        remove_hook_from_submodules(module)
        del vars(module)["hf_device_map"]
        _tie(module, ties)


def _ties(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(module: nn.Module, ties: list[list[str]]) -> None:
    """Make one object of each again: the hooks put a new one in every place."""
    for first, *others in ties:
        parameter = module.get_parameter(first)
        for name in others:
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._parameters[leaf] = parameter


def is_streamed(module: nn.Module) -> bool:
    """Whether the module's weights are `at_hand` from elsewhere."""
    return "hf_device_map" in vars(module)


class Padded(Mapping[str, Tensor]):
    """The zero-padded twin's weights, each made when it is asked for."""

    def __init__(self, model: nn.Module, sliced: Sliced, stored: Mapping[str, Tensor]) -> None:
        self._sizes = {name: tensor.shape for name, tensor in tensors_of(model).items()}
        self._keep, self._stored = sliced.keep, stored

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        keep = self._keep.get(name)
        return tensor if keep is None else scatter(tensor, keep, self._sizes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

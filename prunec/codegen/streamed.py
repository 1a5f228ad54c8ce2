"""Modules whose weights stay where they are stored, each read for the time of one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prunec.codegen.twin import assemble, scatter, tensors_of
from prunec.graph.memory import release_freed, trim_heap
from prunec.graph.retarget import as_float
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
    attach_align_device_hook(
        module,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=stored,
        preload_module_classes=_blocks(module),  # a block may read the weights of its parts itself
    )
    _tie(module, ties)
    vars(module)["hf_device_map"] = {"": "disk"}  # by which save_pretrained sees what to do
    blocks = [part for part in module.modules() if type(part).__name__ in _blocks(module)]
    trims = [block.register_forward_hook(lambda *_: trim_heap()) for block in blocks]
    release_freed()
    try:
        yield module
    finally:
        for hook in trims:
            hook.remove()
        remove_hook_from_submodules(module)
        del vars(module)["hf_device_map"]
        _tie(module, ties)


@contextmanager
def in_single(
    module: nn.Module,
    stored: Mapping[str, Tensor] | None,
    added: Mapping[str, Tensor] | None = None,
) -> Iterator[nn.Module]:
    """Let a module with 16-bit weights compute in fp32, on the CPU; others run as they are.

    Rounding to 8 bits adds up, over tens of layers, to as much as a wrong slice does: 3.6 % of the
    largest logit were seen on 32 layers of bf16. A copy is widened block by block, or as a whole
    where the class does not say what its blocks are.

    Args:
        stored: as in :func:`at_hand`; it may hold buffers too.
        added: those of its parameters that `module` lacks.
    """
    if not is_half(module):
        with at_hand(module, stored):
            yield module
        return
    own, by_block = tensors_of(module), bool(_blocks(module))
    wide = _Widened(own if stored is None else stored)

    def tensor(name: str, old: Tensor) -> Tensor:
        if by_block and isinstance(old, nn.Parameter):
            return torch.empty(old.shape, device="meta")
        return wide[name] if name in wide else as_float(old.cpu(), torch.float32)

    tensors = {name: tensor(name, old) for name, old in own.items()}
    computing = assemble(module, tensors, {name: wide[name] for name in added or {}})
    with at_hand(computing, wide if by_block else None):
        yield computing


def is_half(module: nn.Module) -> bool:
    """Whether all of the module's parameters are numbers of 16 bits."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    return bool(dtypes) and all(d.is_floating_point and d.itemsize == 2 for d in dtypes)


def _blocks(module: nn.Module) -> list[str]:
    """The classes whose weights transformers keeps in one place."""
    return list(getattr(module, "_no_split_modules", None) or ())


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

    def __init__(self, model: nn.Module, sliced: Sliced) -> None:
        self._old, self._keep = tensors_of(model), sliced.keep
        in_memory = {**sliced.weights, **sliced.added}
        self._given = in_memory if sliced.stored is None else sliced.stored
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._left_out = parameters.keys() - self._given.keys()

    def __getitem__(self, name: str) -> Tensor:
        if name in self._left_out:
            return torch.zeros_like(self._old[name], device="cpu")
        tensor, keep = self._given[name], self._keep.get(name)
        return tensor if keep is None else scatter(tensor.detach(), keep, self._old[name].shape)

    def __iter__(self) -> Iterator[str]:
        yield from (*self._given, *self._left_out)

    def __len__(self) -> int:
        return len(self._given) + len(self._left_out)


class _Widened(Mapping[str, Tensor]):
    """These tensors in fp32, on the CPU, each converted when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return as_float(self._tensors[name].detach().cpu(), torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

"""Copies of a model with other tensors in it: the shrunk one and its zero-padded twin.

Slicing equals masking: the stock module with the new weights scattered back into zeros at the kept
positions computes what the shrunk module must compute, at any shape and with any cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from prunec.codegen.modeling_prunec import Pruned
from prunec.errors import ExportError
from prunec.graph.selection import Sliced


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name it has; tied names map to one object."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


def assemble(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    added: Mapping[str, Tensor] | None = None,
    keep_layers: Mapping[str, Sequence[int]] | None = None,
) -> nn.Module:
    """A copy of `model`'s structure around `tensors`; nothing else of any size is copied.

    Args:
        model: the dense model, which may be on meta; not mutated.
        tensors: new parameters and buffers by name, of any shape; unnamed ones are copied. A buffer
            of another shape is saved with the copy, as its class would make one of the old shape.
        added: parameters that `model` lacks.
        keep_layers: for module lists, by path, the children that the copy has; the others go.
    """
    memo: dict[int, object] = {}
    resized = set()
    for name, old in tensors_of(model).items():
        if name in tensors and id(old) not in memo:
            memo[id(old)] = new = _like(old, tensors[name])
            if new.shape != old.shape:
                resized.add(id(new))
    for path, kept in (keep_layers or {}).items():
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        memo[id(layers)] = nn.ModuleList(copy.deepcopy(layers[index], memo) for index in kept)
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        module._non_persistent_buffers_set -= {
            leaf for leaf, buffer in module._buffers.items() if id(buffer) in resized
        }
    for name, tensor in (added or {}).items():
        _add(made, name, tensor)
    return made


def _like(old: Tensor, tensor: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
    return tensor.detach()


def _add(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf not in module._parameters or module._parameters[leaf] is not None:
        raise ExportError(
            f"{type(module).__name__} has no empty place for a parameter {leaf!r}",
            where=name,
            so="the stock forward would ignore it",
        )
    module.register_parameter(leaf, nn.Parameter(tensor.detach(), requires_grad=False))


def scatter(tensor: Tensor, keep: Sequence[object], shape: Sequence[int]) -> Tensor:
    """`tensor` at the kept positions of zeros of `shape`. `keep`: indices or None for each axis."""
    for axis, (kept, size) in enumerate(zip(keep, shape, strict=True)):
        if kept is not None:
            index = torch.as_tensor(kept, device=tensor.device)
            full = tensor.new_zeros([*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]])
            tensor = full.index_copy_(axis, index, tensor)
    return tensor


def padded(model: nn.Module, sliced: Sliced, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` at the sizes of `model`: whole tensors as they are, sliced ones among zeros."""
    old = tensors_of(model)
    full: dict[int, Tensor] = {}  # tied names share one tensor here too
    for name, tensor in weights.items():
        if name in sliced.keep and id(tensor) not in full:
            full[id(tensor)] = scatter(tensor, sliced.keep[name], old[name].shape)
    kept = {name: full.get(id(tensor), tensor) for name, tensor in weights.items()}
    return {**kept, **{name: zeros.clone() for name, zeros in _absent(model, weights).items()}}


def _absent(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros, one number in memory, for each parameter of a branch that was left out."""
    zero = next(iter(weights.values())).new_zeros(())
    named = model.named_parameters(remove_duplicate=False)
    missing = {name: old for name, old in named if name not in weights}
    made = {id(old): zero.expand(old.shape) for old in missing.values()}
    return {name: made[id(old)] for name, old in missing.items()}


class LazyTwin:
    """Pads each module's weights for the time of its own forward: costs one layer's memory."""

    def __init__(self, model: nn.Module, sliced: Sliced) -> None:
        old = tensors_of(model)
        tensors = {**sliced.weights, **_absent(model, sliced.weights)}
        self.module = assemble(model, tensors, sliced.added)
        owners: dict[str, list[tuple[str, Callable[[], Tensor]]]] = {}
        for name, keep in sliced.keep.items():
            path, _, leaf = name.rpartition(".")
            small, shape = sliced.weights[name], old[name].shape
            pad = _padding(small, keep, shape)
            owners.setdefault(path, []).append((leaf, pad))
        for path, pads in owners.items():
            module = self.module.get_submodule(path)
            module.register_forward_pre_hook(_filler(pads))
            module.register_forward_hook(_emptier([leaf for leaf, _ in pads]))


def _padding(small: Tensor, keep: Sequence[object], shape: Sequence[int]) -> Callable[[], Tensor]:
    return lambda: scatter(small.detach(), keep, shape)


def _filler(pads: list[tuple[str, Callable[[], Tensor]]]) -> Callable[[nn.Module, object], None]:
    def fill(module: nn.Module, _: object) -> None:
        for leaf, pad in pads:
            getattr(module, leaf).data = pad()

    return fill


def _emptier(leaves: list[str]) -> Callable[[nn.Module, object, object], None]:
    def empty(module: nn.Module, *_: object) -> None:
        for leaf in leaves:
            tensor = getattr(module, leaf)
            tensor.data = tensor.new_empty(0)

    return empty


def redraw(model: nn.Module, sliced: Sliced, seed: int = 0) -> Sliced:
    """The same selection on random fp32 weights of unit gain, where an error cannot hide.

    A default initialisation (std 0.02) leaves attention almost uniform: a wrong head count then
    changes the logits by less than rounding does.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    old = tensors_of(model)

    def draw(name: str, like: Tensor) -> Tensor:
        if id(like) not in drawn:
            noise = torch.randn(like.shape, generator=generator)
            noise = noise if like.is_meta else noise.to(like.device)
            drawn[id(like)] = _gain(noise, old.get(name), id(old.get(name)) in embeddings)
        return drawn[id(like)]

    given = sorted(sliced.weights.items())  # one order: the same numbers in every process
    weights = {name: draw(name, w) for name, w in given if isinstance(old.get(name), nn.Parameter)}
    added = {name: draw(name, w) for name, w in sorted(sliced.added.items())}
    buffers = {
        name: sliced.weights.get(name, tensor).float()  # statistics of norms, beside fp32 weights
        for name, tensor in old.items()
        if tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)
    }
    return Sliced({**sliced.weights, **buffers, **weights}, sliced.keep, sliced.extents, added)


def _gain(noise: Tensor, old: Tensor | None, embedding: bool) -> Tensor:
    if embedding:
        return noise
    if noise.ndim < 2:  # scales stay near what they are (one, or zero), biases become visible
        centre = 0.0 if old is None or old.is_meta or not old.numel() else float(old.float().mean())
        return centre + 0.3 * noise
    fans = noise.shape[-2] * noise.shape[-1] if noise.ndim == 2 else noise[0].numel() ** 2
    return noise / math.sqrt(math.sqrt(fans))


def stock_class(model: nn.Module) -> type[nn.Module]:
    """The transformers class that `model` is, or that its generated class extends."""
    return next(c for c in type(model).__mro__ if issubclass(c, nn.Module) and not _ours(c))


def _ours(cls: type) -> bool:
    return issubclass(cls, Pruned)

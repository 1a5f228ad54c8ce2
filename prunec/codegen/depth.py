"""The dense module without what was left out of it: shorter, or with modules that add nothing.

Both are dense modules of the same class, which the fit then takes for the original. Whichever
passes the comparison with the masked original is delivered; nothing here is believed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunec.codegen.battery import FORWARD_ERRORS, checks, outputs
from prunec.codegen.modeling_prunec import Pruned
from prunec.codegen.modeling_skipped import first_tensor, skip
from prunec.codegen.perturb import build, meta_model
from prunec.codegen.reduce import Layers
from prunec.codegen.twin import LazyTwin, assemble, padded, tensors_of
from prunec.errors import ExportError
from prunec.graph.selection import Extent, Sliced

Returns = str | list[str | None] | None  # as modeling_prunec's table says it


def without_branches(
    model: nn.Module, sliced: Sliced, example: Mapping[str, Tensor]
) -> Iterator[tuple[nn.Module, Sliced, Mapping[str, str]]]:
    """Dense modules to slice in place of ``model``, the better first, each with its slicing.

    The third item maps the names of its parameters to those of the model.

    Where whole layers are gone: the class with fewer layers. Else, and for what else is left out:
    modules that return zeros. Just the model itself where no branch was dropped.

    Raises:
        ExportError: a branch is no set of modules, or returns what zeros cannot stand for.
    """
    same = {name: name for name in sliced.weights}
    if not sliced.skip:
        yield model, sliced, same
        return
    returned = _observe(model, sliced, example)
    shorter = _fewer_layers(model, sliced)
    if shorter is not None:
        base, layers = shorter
        rest = {new: r for path, r in returned.items() if (new := layers.rename(path)) is not None}
        origin = {new: old for old in same if (new := layers.rename(old)) is not None}
        yield _skipping(base, rest), _renamed(sliced, layers), origin
    yield _skipping(model, returned), sliced, same


def _skipping(model: nn.Module, returned: Mapping[str, Returns]) -> nn.Module:
    if not returned:
        return model
    made = assemble(model, tensors_of(model))
    for path, returns in returned.items():
        skip(made.get_submodule(path), returns)
    return made


def _renamed(sliced: Sliced, layers: Layers) -> Sliced:
    only = layers.only
    extents = tuple(
        Extent(e.old, e.new, frozenset(n for p in e.parameters if (n := layers.rename(p))))
        for e in sliced.extents
    )
    return Sliced(only(sliced.weights), only(sliced.keep), extents, only(sliced.added))


def _observe(model: nn.Module, sliced: Sliced, example: Mapping[str, Tensor]) -> dict[str, Returns]:
    """What every module that is left out returns, seen while the masked model runs."""
    for branch, paths in sliced.skip.items():
        if not paths:
            raise ExportError(
                "a branch is no module of its own, or one that runs several times",
                where=branch,
                so="the class cannot leave it out",
                fix="keep it",
            )
    try:
        return _returned(LazyTwin(model, sliced).module.eval(), sliced, example)
    except FORWARD_ERRORS:  # a module that reads a child's weight itself finds it empty
        twin = assemble(model, padded(model, sliced, sliced.weights), sliced.added).eval()
        return _returned(twin, sliced, example)


def _returned(twin: nn.Module, sliced: Sliced, example: Mapping[str, Tensor]) -> dict[str, Returns]:
    found: dict[str, Returns] = {}

    def watch(path: str) -> Any:
        def see(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            like = first_tensor(args, kwargs)
            if isinstance(output, tuple):
                found[path] = [_kind(item, like) for item in output]
            else:
                found[path] = _kind(output, like)

        return twin.get_submodule(path).register_forward_hook(see, with_kwargs=True)

    handles = [watch(path) for inside in sliced.skip.values() for path in inside]
    outputs(twin, checks(twin, example)[0])
    for handle in handles:
        handle.remove()
    return found


def _kind(value: Any, like: Tensor) -> str | None:
    """Zeros as this value: like the input, or with another last axis."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if value.shape == like.shape:
        return "zeros"
    if value.shape[:-1] == like.shape[:-1]:
        return f"zeros:{value.shape[-1]}"
    return None


def _fewer_layers(model: Any, sliced: Sliced) -> tuple[nn.Module, Layers] | None:
    """The class with fewer layers around the tensors of those that stay; None where it has none.

    Which config fields count or list the layers is found by building the class with other values.
    """
    if getattr(model, "config", None) is None or isinstance(model, Pruned):
        return None
    config, kept = copy.deepcopy(model.config), dict[str, tuple[int, ...]]()
    for path, left in _lists_with_empty_layers(model, sliced):
        count = len(_list_at(model, path))
        fields = list(_counting_fields(model, path, count))
        for owner, name in fields:
            setattr(_owner(config, owner), name, len(left))
        for owner, name, listed in _listing_fields(model.config, count) if fields else ():
            setattr(_owner(config, owner), name, [listed[i] for i in left])
        kept |= {path: left} if fields else {}
    tensors = Layers(kept).only(tensors_of(model))
    built = build(type(model), config) if kept else None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if built is None or {n: t.shape for n, t in tensors_of(built).items()} != shapes:
        return None
    if hasattr(model, "generation_config"):
        built.generation_config = copy.deepcopy(model.generation_config)
    return assemble(built, tensors).eval(), Layers(kept)


def _lists_with_empty_layers(
    model: nn.Module, sliced: Sliced
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Module lists in which some children have no weights left, and those that have."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(map(_has_parameters, module)):
            left = tuple(i for i in range(len(module)) if _has_weights(f"{path}.{i}.", sliced))
            if 0 < len(left) < len(module):
                yield path, left


def _has_weights(prefix: str, sliced: Sliced) -> bool:
    return any(name.startswith(prefix) for name in sliced.weights)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _configs(config: Any) -> dict[str, Any]:
    """A config and those inside it, by attribute; the outer one under the empty name."""
    inner = {name: value for name, value in vars(config).items() if hasattr(value, "to_dict")}
    return {"": config, **inner}


def _owner(config: Any, name: str) -> Any:
    return getattr(config, name) if name else config


def _counting_fields(model: Any, path: str, count: int) -> Iterator[tuple[str, str]]:
    """Config fields on which the length of this module list depends: (owner, name)."""
    for owner, config in _configs(model.config).items():
        for name, value in vars(config).items():
            if type(value) is int and value == count and not name.startswith("_"):
                other = copy.deepcopy(model.config)
                setattr(_owner(other, owner), name, count - 1)
                for inner, field, listed in _listing_fields(model.config, count):
                    setattr(_owner(other, inner), field, list(listed[:-1]))
                built = meta_model(type(model), other, {}, validate=False)
                if built is not None and len(_list_at(built, path)) == count - 1:
                    yield owner, name


def _list_at(model: nn.Module, path: str) -> Sequence[Any]:
    module = model.get_submodule(path)
    assert isinstance(module, nn.ModuleList)
    return list(module)


def _listing_fields(config: Any, count: int) -> Iterator[tuple[str, str, Sequence[Any]]]:
    """Config fields with an entry for each layer: (owner, name, entries)."""
    for owner, inner in _configs(config).items():
        for name, value in vars(inner).items():
            if isinstance(value, (list, tuple)) and len(value) == count and name[:1] != "_":
                yield owner, name, value

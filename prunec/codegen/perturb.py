"""What changes with what, seen by building the stock class from a config with one other number."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from prunec.codegen.attributes import CONFIG, Candidate, Values, config_field, numbers
from prunec.codegen.battery import FORWARD_ERRORS
from prunec.codegen.twin import stock_class


def numbers_of(config: Any) -> dict[str, int]:
    """The integer fields of a config."""
    return {n: v for n, v in vars(config).items() if type(v) is int and not n.startswith("_")}


def meta_model(
    cls: type[nn.Module], config: Any, fields: dict[str, Any], *, validate: bool = True
) -> nn.Module | None:
    """`cls` built on meta from `config` with some fields changed; None where it refuses them."""
    try:
        changed = copy.deepcopy(config)
        for name, value in fields.items():
            setattr(changed, name, value)
        if validate and hasattr(changed, "validate"):
            changed.validate()
        with torch.device("meta"):
            return cls(changed)
    except (*FORWARD_ERRORS, StrictDataclassError):
        return None


def build(cls: type[nn.Module], config: Any) -> Any:
    """`cls` of a config, parameters on meta and buffers real; None where it refuses."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    try:
        with init_empty_weights(include_buffers=False):
            made: Any = cls(config)
    except (*FORWARD_ERRORS, StrictDataclassError):
        return None
    if hasattr(made, "tie_weights"):
        made.tie_weights()  # each tied name got a parameter of its own
    return made


def explicit_head_dim(config: Any) -> Iterator[dict[str, int]]:
    """No field more; then the head_dim that the class otherwise works out from the head count."""
    yield {}
    heads = config_field(config, "num_attention_heads")
    hidden = config_field(config, "hidden_size")
    if heads and hidden and not config_field(config, "head_dim"):
        yield {"head_dim": hidden // heads}


def _perturbations(
    model: nn.Module, fields: dict[str, int], base: dict[str, int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """The stock class with one field doubled, or halved, or one more, where it allows that.

    `base`: fields that are stated beside it.
    """
    cls = stock_class(model)
    for name, value in fields.items():
        for other in (value * 2, value // 2, value + 1):
            built = meta_model(cls, model.config, {**(base or {}), name: other}) if other else None
            if built is not None:
                yield name, built
                break


def free_knobs(model: nn.Module, candidates: Iterable[Candidate]) -> set[Candidate]:
    """The candidates that only look like sizes: a sliding window of 4096 beside 4096 features.

    A number is a knob if a config field sets it and, in its module, nothing else changes with that
    field: no parameter shape and no other number.
    """
    suspects = list(candidates)
    values = {v for c in suspects for v in c.old}
    config = getattr(model, "config", None)
    stock = meta_model(stock_class(model), config, {}) if suspects and config else None
    if stock is None:
        return set()
    fields = {name: value for name, value in numbers_of(config).items() if value in values}
    before, found = dict(stock.named_modules()), set()
    for name, other in _perturbations(model, fields):
        after = dict(other.named_modules())  # with fewer layers, perhaps
        for candidate in suspects:
            pairs = [(before[p], after[p]) for p in candidate.modules if p in before and p in after]
            if any(_is_knob(candidate.name, name, *pair) for pair in pairs):
                found.add(candidate)
    return found


def _is_knob(name: str, field: str, stock: nn.Module, other: nn.Module) -> bool:
    before, after = _state(stock), _state(other)
    differing = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    return differing == {name} or (name == CONFIG + field and not differing)


def _state(module: nn.Module) -> dict[str, Any]:
    """Own numbers and the shapes below; config fields left out."""
    own = {n: v for n, v in numbers(module).items() if not n.startswith(CONFIG)}
    floats = {n: v for n, v in vars(module).items() if type(v) is float}
    shapes = {f".{n}": tuple(p.shape) for n, p in module.named_parameters()}
    return {**own, **floats, **shapes}


def grown_together(model: nn.Module, candidate: Candidate) -> set[Values]:
    """The readings of a candidate that the class itself bears out.

    Somewhere a config field multiplies the number and, by the same factor, just the parameters
    whose extent the reading takes it for.
    """
    config, path = getattr(model, "config", None), candidate.modules[0]
    stock = meta_model(stock_class(model), config, {}) if config else None
    if stock is None:
        return set()
    before = stock.get_submodule(path)
    found = set()
    others = [
        other
        for base in explicit_head_dim(config)  # else more heads are smaller ones, and nothing grows
        for _, other in _perturbations(model, numbers_of(config), base)
    ]
    for other in others:
        after = dict(other.named_modules()).get(path, before)
        old, new = numbers(before).get(candidate.name), numbers(after).get(candidate.name)
        if isinstance(old, int) and isinstance(new, int) and old != new:
            grown = _grown(before, after, old, new)
            pairs = zip(candidate.options, candidate.carriers, strict=True)
            found |= {values for values, carriers in pairs if carriers == grown}
    return found


def _grown(before: nn.Module, after: nn.Module, old: int, new: int) -> frozenset[str] | None:
    """The parameters that changed, if all of them did by the factor new / old."""
    sizes = dict(after.named_parameters())
    changed = {n: p for n, p in before.named_parameters() if sizes[n].shape != p.shape}
    in_step = all(sizes[n].numel() * old == p.numel() * new for n, p in changed.items())
    return frozenset(changed) if in_step else None

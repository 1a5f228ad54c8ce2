"""What of the new sizes the stock config can say: for all layers at once, or layer by layer.

Config fields are found as module numbers are: a field may stand for an extent that it equals, and a
set of fields is right if the stock class, built from them on meta, has exactly the new shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunec.codegen.attributes import Candidate, Values, candidate, config_field, sizes_seen
from prunec.codegen.battery import FORWARD_ERRORS, checks, outputs, resized
from prunec.codegen.modeling_skipped import Skipped
from prunec.codegen.perturb import build, explicit_head_dim, meta_model, numbers_of
from prunec.codegen.search import Choice, search
from prunec.codegen.streamed import at_hand
from prunec.codegen.twin import assemble, stock_class, tensors_of
from prunec.errors import ExportError
from prunec.graph.selection import Sliced

LIMIT = 64  # settings tried; each builds the class on meta
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ConfigFields:
    """Config fields that say the new sizes.

    Attributes:
        uniform: fields to change for the stock class to be the shrunk module; None if it cannot.
        reason: why it cannot.
        layers: layer -> fields that differ from the global ones there.
        base: fields to state globally for `layers` to hold, such as an explicit head_dim.
        whole: whether `layers` says every size of every layer.
        was: the values that those fields had.
    """

    uniform: dict[str, Any] | None = None
    reason: str = "the model has no config"
    layers: dict[int, dict[str, int]] = field(default_factory=dict)
    base: dict[str, int] = field(default_factory=dict)
    whole: bool = False
    was: dict[str, int] = field(default_factory=dict)


def config_fields(
    model: nn.Module, small: nn.Module, sliced: Sliced, example: Mapping[str, Tensor]
) -> ConfigFields:
    """Fields for the stock class, if it can be `small` exactly, and fields by layer."""
    if getattr(model, "config", None) is None:
        return ConfigFields()
    path = _layer_list(model)
    layers, base, whole = ({}, {}, False) if not path else _layer_fields(model, small, sliced, path)
    uniform: dict[str, Any] | None = None
    if sliced.added:
        reason = f"{len(sliced.added)} parameters are not in the stock class"
    elif gone := [path for path, m in small.named_modules() if isinstance(m, Skipped)]:
        reason = f"modules inside a layer are left out ({', '.join(gone)})"
    elif (name := _uneven(model, small)) is not None:
        reason = f"the layers differ in size ({name})"
    else:
        guess = {**base, **layers.get(0, {})}
        uniform, reason = _uniform_fields(model, small, sliced, example, guess)
    if path:
        layers = _with_cache_geometry(small, path, layers, base, example)
    was = {name: config_field(model.config, name) for row in layers.values() for name in row}
    return ConfigFields(uniform, reason, layers, base, whole, was)


def _layer_list(model: Any) -> str | None:
    """The module list of the decoder layers: as long as the config says, the only such one."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [p for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    fitting = [p for p in lists if len(model.get_submodule(p)) == count]
    return fitting[0] if len(fitting) == 1 else None


def shapes_of(model: nn.Module, prefix: str = "") -> Shapes:
    """Shapes of the parameters whose names start with `prefix`, by the rest of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {n[len(prefix) :]: tuple(p.shape) for n, p in named if n.startswith(prefix)}


def _uneven(model: nn.Module, small: nn.Module) -> str | None:
    """A parameter that is alike in all layers of the model and no longer in those of `small`."""
    after, seen = shapes_of(small), dict[object, tuple[int, ...]]()
    for name, before in shapes_of(model).items():
        pattern = re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name)
        if seen.setdefault((pattern, before), after[name]) != after[name]:
            return pattern
    return None


def _layer_fields(
    model: Any, small: nn.Module, sliced: Sliced, path: str
) -> tuple[dict[int, dict[str, int]], dict[str, int], bool]:
    """Fields by layer such that the class built from layer i's has layer i's shapes.

    Where no set of fields gives all shapes (False), those that alone give what they change.
    """
    found = _with_effect(model, _field_candidates(model, sliced, path))
    layers = _Layers(model, small, path)
    for base in explicit_head_dim(model.config):
        try:
            accepted = search(found, partial(layers.differ, base=base), LIMIT)
        except ExportError:
            continue
        return _by_layer(_fewest(accepted.choice, accepted.equivalents)), base, True
    alone = {c: v for c in found for v in c.options[:-1] if layers.explains({c: v})}
    return _by_layer(alone), {}, False


def _field_candidates(model: Any, sliced: Sliced, path: str) -> list[Candidate]:
    count = len(model.get_submodule(path))
    places = tuple(f"{path}.{i}" for i in range(count))
    sizes = [sizes_seen(model, sliced, place) for place in places]
    found, own = [], overrides(model.config)
    for name, value in numbers_of(model.config).items():
        old: Values = tuple(own.get(i, {}).get(name, value) for i in range(count))
        made = candidate("layer", name, places, old, sizes)
        found += [made] if made is not None else []
    return found


def _with_effect(model: Any, found: list[Candidate]) -> list[Candidate]:
    """Without the fields that no shape depends on: token ids and the like."""
    cls, config = stock_class(model), model.config
    stock = meta_model(cls, config, {}, validate=False)
    before = shapes_of(stock) if stock is not None else {}

    def matters(field: Candidate) -> bool:
        value = next(v for v, o in zip(field.options[0], field.old, strict=True) if v != o)
        built = meta_model(cls, config, {field.name: value}, validate=False)
        return built is None or shapes_of(built) != before

    return [field for field in found if matters(field)]


class _Layers:
    """Compares the layers of the stock class, built from given fields, with the shrunk ones."""

    def __init__(self, model: Any, small: nn.Module, path: str) -> None:
        self._model = model
        self._places = [f"{path}.{i}" for i in range(len(model.get_submodule(path)))]
        self._wanted = [shapes_of(small, place + ".") for place in self._places]
        self._own = overrides(model.config)  # of a model that is pruned once more
        self._built: dict[object, nn.Module | None] = {}

    def _layer(self, at: int, fields: dict[str, Any]) -> Shapes:
        """Shapes of one layer of the class built from these fields; empty if it refuses them."""
        fields = {**self._own.get(at, {}), **fields}
        key = tuple(sorted(fields.items()))
        if key not in self._built:
            cls, config = stock_class(self._model), self._model.config
            self._built[key] = meta_model(cls, config, fields, validate=False)
        built = self._built[key]
        shapes = {} if built is None else shapes_of(built, self._places[at] + ".")
        return {n: shape for n, shape in shapes.items() if n in self._wanted[at]}  # but left out

    def differ(self, choice: Choice, base: dict[str, int]) -> str | None:
        for at, wanted in enumerate(self._wanted):
            if self._layer(at, {**base, **_changes(choice, at)}) != wanted:
                return f"layer {at} has other shapes"
        return None

    def explains(self, choice: Choice) -> bool:
        """Whether these fields change some shapes, and only to what they must be."""
        effect = False
        for at, wanted in enumerate(self._wanted):
            stock, built = self._layer(at, {}), self._layer(at, _changes(choice, at))
            changed = {n: s for n, s in built.items() if s != stock.get(n)}
            if not built or any(shape != wanted.get(n) for n, shape in changed.items()):
                return False
            effect |= bool(changed)
        return effect


def _changes(choice: Choice, at: int) -> dict[str, Any]:
    return {c.name: v[at] for c, v in choice.items() if v[at] != c.old[at]}


def overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Fields that differ in single layers already."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(index): dict(row) for index, row in config.to_dict()["per_layer_config"].items()}


def _fewest(choice: Choice, equivalents: Mapping[Candidate, tuple[Values, ...]]) -> Choice:
    """Fields that no shape depends on stay as they are."""
    return {c: c.old if c.old in equivalents[c] else values for c, values in choice.items()}


def _by_layer(choice: Choice) -> dict[int, dict[str, int]]:
    """Only fields that vary from layer to layer or from the model's own."""
    varying = {c: v for c, v in choice.items() if v != c.old}
    count = len(next(iter(varying)).old) if varying else 0
    return {at: {c.name: cast(int, v[at]) for c, v in varying.items()} for at in range(count)}


def _uniform_fields(
    model: Any,
    small: nn.Module,
    sliced: Sliced,
    example: Mapping[str, Tensor],
    guess: Mapping[str, Any],
) -> tuple[dict[str, Any] | None, str]:
    """Fields from which the stock class builds `small`, or None and why there are none."""
    config = model.config
    fields = _matching_fields(model, small, sliced, guess)
    if fields is None:
        return None, "no fields of its config give these sizes"
    if meta_model(stock_class(model), config, fields) is None:
        said = ", ".join(f"{name}={value}" for name, value in fields.items())
        return None, f"its config refuses {said}"
    if not _same_numbers(model, small, fields, example, sliced.stored):
        return None, "with these sizes it computes something else"
    return fields, ""


def _matching_fields(
    model: Any, small: nn.Module, sliced: Sliced, guess: Mapping[str, Any]
) -> dict[str, Any] | None:
    config, cls, wanted = model.config, stock_class(model), shapes_of(small)
    numbers, news = numbers_of(config), dict[int, tuple[int, ...]]()
    for extent in sliced.extents:
        news[extent.old] = tuple(dict.fromkeys((*news.get(extent.old, ()), extent.new)))
    found = [_global(name, old, news[old]) for name, old in numbers.items() if old in news]
    trials = 0

    def judge(choice: Choice, more: dict[str, Any]) -> str | None:
        nonlocal trials
        trials += 1
        built = meta_model(cls, config, {**more, **_changes(choice, 0)}, validate=False)
        return None if built is not None and shapes_of(built) == wanted else "other shapes"

    if guess and judge({}, dict(guess)) is None:
        return dict(guess)
    found = _with_effect(model, found)
    for more in _additions(
        config, {n for old in news.keys() - numbers.values() for n in news[old]}
    ):
        if trials >= LIMIT:
            break
        try:
            accepted = search(found, partial(judge, more=more), LIMIT - trials)
        except ExportError:
            continue
        return {**more, **_changes(_fewest(accepted.choice, accepted.equivalents), 0)}
    return None


def _additions(config: Any, spare: set[int]) -> Iterator[dict[str, Any]]:
    """Fields to state beside the changed ones: none, head_dim, an empty one for a spare size."""
    yield from explicit_head_dim(config)
    for name, value in vars(config).items():
        if value is None and not name.startswith("_"):
            yield from ({name: size} for size in sorted(spare))


def _global(name: str, old: int, news: tuple[int, ...]) -> Candidate:
    options: tuple[Values, ...] = (*((new,) for new in news), (old,))
    return Candidate("model", name, ("",), (old,), options, (frozenset(),) * len(options), None)


def _same_numbers(
    model: Any,
    small: nn.Module,
    fields: dict[str, Any],
    example: Mapping[str, Tensor],
    stored: Mapping[str, Tensor] | None,
) -> bool:
    """Whether the stock class, built from those fields around the same tensors, equals `small`."""
    built = meta_model(stock_class(model), model.config, fields)
    assert built is not None
    built = build(stock_class(model), built.config)
    assert built is not None
    stock = assemble(built, tensors_of(small)).eval()
    check = checks(small, example, ((2, 9),))[0]
    try:
        with at_hand(stock, stored):
            pairs = zip(outputs(small, check), outputs(stock, check), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)
    except FORWARD_ERRORS:
        return False


def _with_cache_geometry(
    small: Any,
    path: str,
    layers: dict[int, dict[str, int]],
    base: dict[str, int],
    example: Mapping[str, Tensor],
) -> dict[int, dict[str, int]]:
    """The fields that transformers sizes a static cache by, where they are not true yet.

    It reads KV heads and head size of every layer from the config; what they are is seen in the
    dynamic cache that the module itself fills.
    """
    config = small.config
    if getattr(config, "is_encoder_decoder", False) or "input_ids" not in example:
        return layers
    shapes = _cached_shapes(small, example)
    counting = {getattr(m, "layer_idx", None) for m in small.modules() if isinstance(m, Skipped)}
    if len(shapes) != len(small.get_submodule(path)):
        return layers
    grouped = config_field(config, "num_key_value_heads") is not None
    name = "num_key_value_heads" if grouped else "num_attention_heads"
    head_dim = config_field(config, "head_dim")
    found, own = {index: dict(row) for index, row in layers.items()}, overrides(config)
    for index, (heads, size) in enumerate(shapes):
        if index in counting:
            continue
        row = {**own.get(index, {}), **found.get(index, {})}
        said = row.get(name, config_field(config, name))
        if said != heads:
            found.setdefault(index, {})[name] = heads
            if not head_dim:
                base["head_dim"] = size
    return found


@torch.no_grad()
def _cached_shapes(small: Any, example: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """(KV heads, head size) of every layer's cache; empty where there is no such cache."""
    if not (hasattr(small, "can_generate") and small.can_generate()):
        return []
    try:
        past = small(**resized(small, example, 1, 2), use_cache=True).past_key_values
        return [(layer.keys.shape[1], layer.keys.shape[-1]) for layer in past.layers]
    except FORWARD_ERRORS:
        return []

"""The class of a model whose layers differ: in memory, and as the file in its directory."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from prunec.codegen import modeling_prunec, modeling_skipped
from prunec.codegen.attributes import config_field
from prunec.codegen.fields import ConfigFields, overrides, shapes_of
from prunec.codegen.modeling_skipped import Skipped, SkippingPruned
from prunec.codegen.perturb import meta_model
from prunec.codegen.twin import stock_class, tensors_of
from prunec.errors import ExportError

FORMAT = 1
MODULE = "modeling_prunec"
Attributes = Mapping[str, Mapping[str, Any]]


@functools.cache
def pruned_class(stock: type[Any]) -> Any:
    """The stock class with the sizes of `config.prunec`, as modeling_prunec.py defines it."""

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        # a class that is not transformers' own is read back without renaming of its keys
        kwargs.setdefault("save_original_format", False)
        stock.save_pretrained(self, save_directory, *args, **kwargs)
        path = Path(save_directory) / f"{MODULE}.py"
        path.write_text(source(stock, self.config), encoding="utf-8")

    body = {"__module__": __name__, "save_pretrained": save_pretrained}
    return type(f"Prunec{stock.__name__}", (SkippingPruned, stock), body)


def adopt(model: Any, attributes: Attributes, fields: ConfigFields) -> None:
    """Make the shrunk module what its directory will open as; changes its class and its config.

    Sizes that the stock config can say go there and the class stays stock; else the class becomes
    the generated one and its config carries the `prunec` table. Either way `save_pretrained`,
    a Trainer's checkpoints and static caches work on it.
    """
    stock: Any = stock_class(model)
    config = model.config
    if fields.uniform is not None:
        for name, value in fields.uniform.items():
            setattr(config, name, value)
        for name in ("prunec", "auto_map"):
            vars(config).pop(name, None)
        model.__class__ = stock
        _save_as(_built(model), model)
        return
    config.prunec = table(model, attributes)
    config.auto_map = auto_map(model)
    model.__class__ = pruned_class(stock)
    config.architectures = [type(model).__name__]
    _say_layers(config, fields)


def _save_as(stock: nn.Module, model: nn.Module) -> None:
    """Leave out of the file the buffers that the stock class makes by itself."""
    for path, module in stock.named_modules():
        own = model.get_submodule(path)
        own._non_persistent_buffers_set |= module._non_persistent_buffers_set & own._buffers.keys()


def auto_map(model: Any) -> dict[str, str]:
    """Auto class -> the class of our file that it opens, for a config with its `prunec` table."""
    known = dict.fromkeys(auto_classes(model), stock_class(model))
    known["AutoModel"] = _bare_class(model.config)
    return {
        auto: f"{MODULE}.Prunec{cls.__name__}" for auto, cls in known.items() if cls is not None
    }


def _say_layers(config: Any, fields: ConfigFields) -> None:
    """Transformers' own per-layer key: read by its static caches, by vLLM, by exporters."""
    earlier, rows = overrides(config), {}
    for index in sorted(earlier.keys() | fields.layers.keys()):
        said = {**earlier.get(index, {}), **fields.layers.get(index, {})}
        row = {name: value for name, value in said.items() if config_field(config, name) != value}
        if row:
            rows[str(index)] = row
    key = {"per_layer_config": rows, "allow_global_per_layer_attribute_access": True}
    if rows and _accepts(type(config), {**config.to_dict(), **fields.base, **key}):
        for name, value in {**fields.base, **key}.items():
            setattr(config, name, value)


def _accepts(cls: Any, values: dict[str, Any]) -> bool:
    try:
        cls.from_dict(copy.deepcopy(values))
    except (AttributeError, ValueError, TypeError, StrictDataclassError):
        return False
    return True


def table(model: Any, attributes: Attributes) -> dict[str, Any]:
    """What the generated class does to the stock one: shapes, parameters, numbers, what is gone."""
    stock = _built(model)
    before = {n: list(t.shape) for n, t in tensors_of(stock).items()}
    saved = model.state_dict().keys() | shapes_of(model).keys()
    now = {n: list(t.shape) for n, t in tensors_of(model).items() if n in saved}
    earlier = getattr(model.config, "prunec", None) or {}  # of a model that is pruned once more
    return {
        "format": FORMAT,
        "transformers": _oldest_transformers(stock),
        "shapes": {n: s for n, s in now.items() if n in before and s != before[n]},
        "added": {n: s for n, s in now.items() if n not in before},
        "attrs": _merged(earlier.get("attrs", {}), attributes),
        "skip": {p: m.returns for p, m in model.named_modules() if isinstance(m, Skipped)},
    }


def _merged(earlier: Attributes, later: Attributes) -> dict[str, dict[str, Any]]:
    merged = {path: dict(values) for path, values in earlier.items()}
    for path, values in later.items():
        own = merged.setdefault(path, {})
        fields = {**own.get("config", {}), **values.get("config", {})}
        own |= {**values, **({"config": fields} if fields else {})}
    return merged


def _built(model: Any) -> Any:
    cls = stock_class(model)
    built = meta_model(cls, model.config, {}, validate=False)
    if built is None:
        raise ExportError(f"{cls.__name__} cannot be built from its own config")
    return built


def _oldest_transformers(stock: Any) -> int:
    """The oldest major release whose class has these parameter names and reads this config."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    rope = getattr(stock.config, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in rope.values())
    return 5 if nested or get_model_conversion_mapping(stock, add_legacy=False) else 4


def auto_classes(model: Any) -> list[str]:
    """The transformers Auto classes that know the model's class; the one for its task first.

    A class whose config they do not map (the text part of a larger model) they know by its name:
    such a directory opens by its `auto_map` alone.
    """
    if not hasattr(model, "config"):
        return []
    found = [name for name, mapping in _auto_mappings() if _maps(mapping, model)]
    return _task_first(found) if found else auto_classes_named(stock_class(model).__name__)


def auto_classes_named(name: str) -> list[str]:
    """The transformers Auto classes that know a class of this name; the one for its task first."""
    return _task_first([auto for auto, mapping in _auto_mappings() if name in _names(mapping)])


def _task_first(autos: Sequence[str]) -> list[str]:
    return sorted(autos, key=lambda name: (name == "AutoModelForPreTraining", name == "AutoModel"))


def opens_as_stock(model: Any) -> bool:
    """Whether an Auto class makes the model's class of its config, without an `auto_map`."""
    return any(_maps(mapping, model) for _, mapping in _auto_mappings())


def _auto_mappings() -> Iterator[tuple[str, Any]]:
    from transformers.models.auto import modeling_auto

    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if inspect.isclass(auto) and mapping is not None:
            yield name, mapping


def _maps(mapping: Any, model: Any) -> bool:
    known = mapping.get(type(model.config), ())
    return stock_class(model) in (known if isinstance(known, tuple) else (known,))


def _names(mapping: Any) -> set[str]:
    listed = (n if isinstance(n, tuple) else (n,) for n in mapping._model_mapping.values())
    return {name for names in listed for name in names}


def _bare_class(config: Any) -> Any:
    """The class of the bare model, without a head for a task; None if there is none.

    Nor if it lacks a part that `config.prunec` names: some are given their decoder by the head.
    """
    from transformers import AutoModel

    known = AutoModel._model_mapping.get(type(config), None)
    bare = known[0] if isinstance(known, tuple) else known
    built = None if bare is None else meta_model(bare, config, {}, validate=False)
    if bare is None or built is None:
        return None
    shapes, added, attrs, skip = (
        config.prunec.get(kind, {}) for kind in ("shapes", "added", "attrs", "skip")
    )
    owners = (name.rpartition(".")[0] for name in (*shapes, *added))
    prefix = f"{bare.base_model_prefix}."
    named = {path for path in (*owners, *attrs, *skip) if path.startswith(prefix)}
    parts = {f"{prefix}{path}" for path, _ in built.named_modules()}
    return bare if named <= parts else None


def source(stock: Any, config: Any) -> str:
    """modeling_prunec.py: the text of our own module, then the classes that `auto_map` names."""
    named = {entry.rpartition(".Prunec")[2] for entry in config.auto_map.values()}
    names = sorted({stock.__name__, *named})
    text, imports = inspect.getsource(modeling_prunec), "from torch import nn\n"
    assert imports in text
    text = text.replace(imports, f"{imports}from transformers import {', '.join(names)}\n", 1)
    base = "Pruned"
    if config.prunec["skip"]:
        _, head, body = inspect.getsource(modeling_skipped).partition("\n\n\nclass Skipped")
        text, base = f"{text.rstrip()}{head}{body}", "SkippingPruned"
    bodies = (
        f'class Prunec{name}({base}, {name}):\n    """{name}, with the sizes of config.prunec."""\n'
        for name in names
    )
    return text + "".join(f"\n\n{body}" for body in bodies)

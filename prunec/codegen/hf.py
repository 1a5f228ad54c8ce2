"""The default output: one directory that `from_pretrained` opens in a process without prunec."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

import prunec
from prunec.codegen import modeling_prunec
from prunec.codegen.card import model_card
from prunec.codegen.directory import staged
from prunec.codegen.fields import shapes_of
from prunec.codegen.gate import accept
from prunec.codegen.perturb import meta_model
from prunec.codegen.shrink import Shrunk
from prunec.codegen.twin import stock_class, tensors_of
from prunec.errors import ExportError, VerifyError
from prunec.events import Progress, silent

log = logging.getLogger(__name__)
FORMAT = 1
MODULE = "modeling_prunec"


def save(
    shrunk: Shrunk,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    progress: Progress = silent,
) -> None:
    """Write the directory, prove in a fresh process that it is the model, then give it its name.

    Uniform sizes that the stock class accepts: the stock config and no code. Otherwise the stock
    config with a `prunec` table and a generated modeling_prunec.py.

    Args:
        tokenizer: saved beside the model, if given.
        metadata: "recipe" (YAML text or a mapping), "plan", "provenance", "metrics"; each may lack.
        overwrite: replace an existing model directory, once the new one is proven.

    Raises:
        ExportError: this model or this place cannot take it.
        VerifyError: the directory is not the model; nothing is delivered.
    """
    target, metadata = Path(directory), dict(metadata or {})
    auto = _auto_classes(shrunk.model)
    forms = ["stock"] if shrunk.config.uniform is not None else []
    with staged(target, overwrite=overwrite) as folder:
        for form in [*forms, "generated"]:
            with progress.task("write the directory"):
                _write(shrunk, folder, form, auto, tokenizer, max_shard_size)
            try:
                with progress.task("open it in a fresh process without prunec"):
                    found = accept(shrunk.model, folder, auto[0], shrunk.example)
                break
            except VerifyError as error:
                if form == "generated":
                    raise
                log.warning("the stock class does not reproduce the model: %s", error.where)
        _write_metadata(replace(shrunk, checks=(*shrunk.checks, *found)), folder, metadata, auto)


def _auto_classes(model: Any) -> list[str]:
    """The transformers Auto classes that know the model's class; the one for its task first.

    Raises:
        ExportError: the model is none of transformers' own.
    """
    from transformers.models.auto import modeling_auto

    cls, found = stock_class(model), []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if inspect.isclass(auto) and mapping is not None:
            known = mapping.get(type(model.config), ()) if hasattr(model, "config") else ()
            if cls in (known if isinstance(known, tuple) else (known,)):
                found.append(name)
    if not found:
        raise ExportError(
            f"{cls.__name__} is not a transformers class that an Auto class opens",
            where=f"{cls.__module__}.{cls.__qualname__}",
            fix="export to another format, or use the result in memory",
        )
    return sorted(found, key=lambda name: (name == "AutoModelForPreTraining", name == "AutoModel"))


def _write(
    shrunk: Shrunk, folder: Path, form: str, auto: list[str], tokenizer: Any, max_shard_size: str
) -> None:
    model: Any = shrunk.model
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ExportError("the model has no weights", fix="give weights, or only save the plan")
    for old in folder.iterdir():
        old.unlink()
    # transformers renames no checkpoint keys for a class that is not its own: names as in memory
    model.save_pretrained(
        folder, max_shard_size=max_shard_size, save_original_format=form == "stock"
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = _portable(config)
    if form == "stock":
        config |= shrunk.config.uniform or {}
        config["architectures"] = [stock_class(model).__name__]
    else:
        config |= _generated_config(shrunk, config, auto)
        (folder / f"{MODULE}.py").write_text(_source(model), encoding="utf-8")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 4 reads it too, without a trace of where the model came from."""
    for key in ("_name_or_path", "prunec", "auto_map", "per_layer_config", "_attn_implementation"):
        config.pop(key, None)
    config = {k: v for k, v in config.items() if not (v is None and k == "layer_types")}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        # 4.x ignores rope_parameters and would silently take 10000
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    return config


def _generated_config(shrunk: Shrunk, config: dict[str, Any], auto: list[str]) -> dict[str, Any]:
    model: Any = shrunk.model
    head, bare = _class_names(model)
    classes = dict.fromkeys(auto, f"{MODULE}.{head}")
    if bare is not None:
        classes |= {"AutoModel": f"{MODULE}.{bare}"}
    extra: dict[str, Any] = {
        "architectures": [head],
        "auto_map": classes,
        "prunec": table(shrunk),
        **shrunk.config.base,
    }
    layers = _varying(shrunk.config.layers, config)
    if layers:
        # transformers' own key; read by its static cache, by vLLM, by exporters
        extra["per_layer_config"] = {str(index): fields for index, fields in layers.items()}
        extra["allow_global_per_layer_attribute_access"] = True
        if not _loads(type(model.config), {**config, **extra}):
            del extra["per_layer_config"], extra["allow_global_per_layer_attribute_access"]
    return extra


def _varying(layers: Mapping[int, Mapping[str, int]], config: Mapping[str, Any]) -> dict[int, Any]:
    rows = {
        index: {name: value for name, value in fields.items() if config.get(name) != value}
        for index, fields in layers.items()
    }
    return {index: row for index, row in rows.items() if row}


def _loads(cls: Any, config: dict[str, Any]) -> bool:
    try:
        cls.from_dict(copy.deepcopy(config))
    except (ValueError, TypeError, StrictDataclassError):
        return False
    return True


def table(shrunk: Shrunk) -> dict[str, Any]:
    """What the generated class does to the stock one: shapes, added parameters, numbers."""
    model: Any = shrunk.model
    stock = meta_model(stock_class(model), model.config, {}, validate=False)
    if stock is None:
        raise ExportError(f"{stock_class(model).__name__} cannot be built from its own config")
    before = {n: list(t.shape) for n, t in tensors_of(stock).items()}
    now = {n: list(t.shape) for n, t in tensors_of(model).items()}
    saved = model.state_dict().keys() | set(shapes_of(model))
    return {
        "format": FORMAT,
        "transformers": _oldest_transformers(model),
        "shapes": {n: s for n, s in now.items() if n in before and s != before[n] and n in saved},
        "added": {n: s for n, s in now.items() if n not in before and n in saved},
        "attrs": shrunk.attributes,
        "skip": {},
    }


def _oldest_transformers(model: Any) -> int:
    """The oldest major release whose class has these parameter names and reads this config."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    rope = getattr(model.config, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in rope.values())
    renamed = get_model_conversion_mapping(_as_stock(model), add_legacy=False)
    return 5 if nested or renamed else 4


def _as_stock(model: Any) -> Any:
    built = meta_model(stock_class(model), model.config, {}, validate=False)
    assert built is not None
    return built


def _class_names(model: Any) -> tuple[str, str | None]:
    """Names of the generated classes: for the model, and for the bare model inside it."""
    head, bare = stock_class(model), _bare_class(model)
    return f"Prunec{head.__name__}", None if bare in (None, head) else f"Prunec{bare.__name__}"


def _bare_class(model: Any) -> Any:
    from transformers import AutoModel

    known = AutoModel._model_mapping.get(type(model.config), None)
    return known[0] if isinstance(known, tuple) else known


def _source(model: Any) -> str:
    """modeling_prunec.py: the text of our own module, then the classes of this model."""
    head, bare = stock_class(model), _bare_class(model)
    names = sorted({cls.__name__ for cls in (head, bare) if cls is not None})
    text = inspect.getsource(modeling_prunec)
    imports = "from torch import nn\n"
    assert imports in text
    text = text.replace(imports, f"{imports}from transformers import {', '.join(names)}\n", 1)
    classes = (
        f'class Prunec{name}(Pruned, {name}):\n    """{name}, with the sizes of config.prunec."""\n'
        for name in names
    )
    return text + "".join(f"\n\n{cls}" for cls in classes)


def _write_metadata(
    shrunk: Shrunk, folder: Path, metadata: Mapping[str, Any], auto: list[str]
) -> None:
    import transformers

    recipe, plan = metadata.get("recipe"), metadata.get("plan")
    if recipe is not None:
        text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    if plan is not None:
        _dump(folder / "plan.json", plan)
    record = {
        "format": FORMAT,
        "prunec": prunec.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recipe": recipe,
        "provenance": metadata.get("provenance", {}),
        "metrics": metadata.get("metrics", {}),
        "checks": list(shrunk.checks),
        "trials": shrunk.trials,
    }
    _dump(folder / "prunec.json", record)
    card = model_card(shrunk, metadata, auto[0], custom=(folder / f"{MODULE}.py").exists())
    (folder / "README.md").write_text(card, encoding="utf-8")


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

"""The default output: one directory that `from_pretrained` opens in a process without prunec."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

import prunec
from prunec.codegen.card import model_card
from prunec.codegen.directory import check_shard_size, staged
from prunec.codegen.gate import accept
from prunec.codegen.generated import FORMAT, adopt, auto_classes
from prunec.codegen.shrink import Shrunk
from prunec.codegen.streamed import at_hand, is_streamed
from prunec.codegen.twin import stock_class
from prunec.errors import ExportError, VerifyError
from prunec.events import Progress, silent
from prunec.models.digest import file_digest
from prunec.models.quiet import quiet

log = logging.getLogger(__name__)


def save(
    shrunk: Shrunk,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    max_shard_size: str = "1GB",
    progress: Progress = silent,
) -> None:
    """Write the directory, prove in a fresh process that it is the model, then give it its name.

    Uniform sizes that the stock class accepts: the stock config and no code. Otherwise the stock
    config with a `prunec` table and a generated modeling_prunec.py.

    Args:
        tokenizer: saved beside the model, if given.
        metadata: goes into prunec.json; "plan" and "recipe" get files of their own, "base_model",
            "report", "recovery" and "metrics" are read by the model card. Each may lack.
        finish: called with the folder before it gets its name, for further files.
        overwrite: replace an existing model directory, once the new one is proven.
        max_shard_size: of one weight file, such as "500MB".

    Raises:
        ExportError: this model or this place cannot take it.
        VerifyError: the directory is not the model; nothing is delivered.
    """
    check_shard_size(max_shard_size)
    with at_hand(shrunk.model, shrunk.stored):
        auto = check_model(shrunk.model)
    with staged(Path(directory), overwrite=overwrite) as folder:
        with progress.task("write the directory"), quiet():
            _write(shrunk, folder, max_shard_size)
        try:
            with progress.task("open it in a fresh process without prunec"), quiet():
                found = _accept(shrunk, folder, auto)
        except VerifyError as error:
            if shrunk.config.uniform is None:
                raise
            shrunk = _without_stock(shrunk, f"its own class gives other numbers: {error.where}")
            with quiet():
                _write(shrunk, folder, max_shard_size)
                found = _accept(shrunk, folder, auto)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, folder)
        if finish is not None:
            finish(folder)
        _write_metadata(replace(shrunk, checks=(*shrunk.checks, *found)), folder, metadata or {})


def _write(shrunk: Shrunk, folder: Path, max_shard_size: str) -> None:
    with at_hand(shrunk.model, shrunk.stored):
        write_model(shrunk.model, folder, max_shard_size)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except (ValueError, TypeError, AttributeError) as error:
        raise ExportError(
            f"the tokenizer cannot be saved: {error}",
            where=type(tokenizer).__name__,
            so="nothing was written",
            fix="save the result without it",
        ) from error


def _accept(shrunk: Shrunk, folder: Path, auto: str) -> list[str]:
    with at_hand(shrunk.model, shrunk.stored):
        return accept(shrunk.model, folder, auto, shrunk.example)


def check_model(model: Any) -> str:
    """Name of the Auto class for the model's task, which has weights."""
    auto = auto_class(model)
    if not is_streamed(model) and any(tensor.is_meta for tensor in model.parameters()):
        raise ExportError("the model has no weights", fix="give weights, or save the plan only")
    return auto


def auto_class(model: Any) -> str:
    """Name of the Auto class for the model's task.

    Raises:
        ExportError: there is none, so that no directory of the model could be opened.
    """
    found, cls = auto_classes(model), stock_class(model)
    if not found:
        raise ExportError(
            f"{cls.__name__} is not a transformers class that an Auto class opens",
            where=f"{cls.__module__}.{cls.__qualname__}",
            fix="prune model.merge_and_unload(), the model with its adapter merged"
            if hasattr(model, "merge_and_unload")
            else "use the result in memory: prunec.prune(model, ...).model",
        )
    return found[0]


def _without_stock(shrunk: Shrunk, reason: str) -> Shrunk:
    log.warning("not a stock directory: %s", reason)
    shrunk = replace(shrunk, config=replace(shrunk.config, uniform=None, reason=reason))
    adopt(shrunk.model, shrunk.attributes, shrunk.config)
    return shrunk


def write_model(model: Any, folder: Path, max_shard_size: str) -> None:
    """Weights, config and, where the class is a generated one, its file; replaces what is there."""
    for old in folder.iterdir():
        old.unlink()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ExportError(f"transformers does not save this model: {error}") from error
    path = folder / "config.json"
    config = _portable(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 4 reads it too, without a trace of where the model lay."""
    config = {k: v for k, v in config.items() if k != "_name_or_path"}
    if config.get("layer_types", ()) is None:
        del config["layer_types"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        # 4.x ignores rope_parameters and would silently take its default
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
        if "partial_rotary_factor" in rope:
            config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    return config


def _write_metadata(shrunk: Shrunk, folder: Path, metadata: Mapping[str, Any]) -> None:
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
        **{name: value for name, value in metadata.items() if name != "plan"},
        "code": shrunk.config.reason or None,
        "checks": list(shrunk.checks),
        "trials": shrunk.trials,
    }
    auto = auto_classes(shrunk.model)[0]
    (folder / "README.md").write_text(model_card(shrunk, metadata, auto), encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    record["sha256"] = {str(path.relative_to(folder)): file_digest(path) for path in files}
    _dump(folder / "prunec.json", record)


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

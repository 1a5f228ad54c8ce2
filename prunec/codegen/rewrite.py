"""The directory of a model that was read from one: the same sizes, other weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prunec.codegen.fields import ConfigFields
from prunec.codegen.hf import save
from prunec.codegen.modeling_prunec import Pruned
from prunec.codegen.shrink import Shrunk
from prunec.events import Progress, silent
from prunec.models.checkpoint import read_json
from prunec.models.example import example_inputs

# of the process that writes, not of the pruning
_OWN = ("format", "prunec", "torch", "transformers", "code", "checks", "trials")


def read_record(directory: Path) -> dict[str, Any]:
    """What prunec.json and plan.json of a directory say; empty for one that prunec did not write.

    Raises:
        ModelError: a file that is no JSON object.
    """
    record: dict[str, Any] = {}
    for name, path in (("", directory / "prunec.json"), ("plan", directory / "plan.json")):
        if path.is_file():
            read = read_json(path)
            record |= {name: read} if name else read
    return record


def rewrite(
    model: Any,
    source: Path,
    directory: Path,
    *,
    changes: Mapping[str, Any],
    tokenizer: Any = None,
    finish: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Write `model`, which was opened from `source`, with its records and the proof of a new one.

    Args:
        changes: entries of prunec.json that are new, such as "recovery".
        finish: called with the folder before it gets its name, for further files.

    Raises:
        ExportError, VerifyError: as `save`.
    """
    record = read_record(source)
    dtype = json.loads((source / "config.json").read_text(encoding="utf-8")).get("dtype")
    if isinstance(dtype, str):
        model = model.to(getattr(torch, dtype))
    custom = isinstance(model, Pruned)
    shrunk = Shrunk(
        model,
        attributes={},
        config=ConfigFields(
            uniform=None if custom else {}, reason=record.get("code") or "its layers differ"
        ),
        trials=record.get("trials", 0),
        checks=tuple(record.get("checks", ())),
        example=example_inputs(model),
    )
    metadata = {name: value for name, value in record.items() if name not in _OWN}
    save(
        shrunk,
        directory,
        tokenizer=tokenizer,
        metadata={**metadata, **changes},
        finish=finish,
        overwrite=overwrite,
        progress=progress,
    )

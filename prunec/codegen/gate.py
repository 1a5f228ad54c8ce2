"""The acceptance gate: a process without prunec opens the directory and gets the same numbers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunec.codegen import acceptance
from prunec.codegen.battery import (
    FORWARD_ERRORS,
    Check,
    checks,
    own_shape,
    tolerance,
    whole_outputs,
)
from prunec.codegen.remade import remade
from prunec.codegen.streamed import is_streamed
from prunec.codegen.twin import assemble, tensors_of
from prunec.errors import VerifyError
from prunec.staging import temporary

log = logging.getLogger(__name__)

SHAPES = ((1, 1), (2, 9))


def accept(model: Any, directory: Path, auto: str, example: Mapping[str, Tensor]) -> list[str]:
    """Open `directory` in a fresh process where prunec cannot be imported, and compare.

    Zero missing and unexpected keys; logits equal to the bit at the same thread count; generation
    with the cache equal to generation without.

    Args:
        model: the module in memory.
        auto: name of the transformers Auto class that users will open it with.
        example: inputs by keyword.

    Returns:
        What was compared.

    Raises:
        VerifyError: naming every difference.
    """
    with temporary() as folder:
        compared = prepare(model, directory, auto, example, folder)
        (problems,) = reopen([folder])
    if not problems:
        return compared
    otherwise = list(remade(model))
    raise VerifyError(
        "the written directory is not the model in memory",
        where="; ".join(problems),
        so="nothing was delivered"
        + "".join(
            f"; its class makes another {name}, which no file holds" for name in otherwise[:1]
        ),
        fix="prune a model that was loaded in its dtype, from_pretrained(..., dtype=...):"
        " model.to(dtype) rounds such a buffer"
        if otherwise
        else None,
    )


def prepare(
    model: Any, directory: Path, auto: str, example: Mapping[str, Tensor], folder: Path
) -> list[str]:
    """Write into `folder` what a fresh process is to find in `directory`; what it will compare."""
    streamed = is_streamed(model)
    if not streamed and model.device.type != "cpu":  # where the other side runs
        model = assemble(model, {name: tensor.cpu() for name, tensor in tensors_of(model).items()})
    acceptance.align(model)  # as the other side does: values stay, addresses change
    plain = [c for c in checks(model, example, SHAPES) if c.attention == _attention(model)]
    whole = [c for c in plain if not c.decode]
    whole = whole[-1:] if streamed else whole  # each reads all weights on both sides
    with _frozen(model):
        outcomes = _outcomes(model, whole)
        outcomes = outcomes or _outcomes(model, checks(model, example, (own_shape(example),))[:1])
    if not outcomes:
        raise VerifyError(
            "the model gives no finite numbers to compare",
            where=type(model).__name__,
            so="nothing was delivered",
        )
    battery = [check for check, _ in outcomes]
    generates = any(c.decode for c in plain) and not streamed
    auto_map = json.loads((directory / "config.json").read_text("utf-8")).get("auto_map", {})
    job: dict[str, Any] = {
        "directory": str(directory),
        "auto": auto,
        "custom": bool(auto_map),
        "bare": auto != "AutoModel" and "AutoModel" in auto_map,
        "attention": _implementations(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "tolerance": tolerance(model),
        "cases": [check.name for check in battery],
        "streamed": streamed,
        "pad_token_id": _pad_token(model),
    }
    job["generates"] = generates and _generates(model, battery[-1].inputs, job)
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    save_file(_tensors(outcomes), folder / "tensors.safetensors")
    generation = ["generate, cached"] if job["generates"] else []
    return [f"{check.name} (fresh process)" for check in battery] + generation


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """As the other side has them: no parameter wants a gradient."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _generates(model: Any, inputs: dict[str, Tensor], job: dict[str, Any]) -> bool:
    """Whether the class itself generates alike with its cache and without it: many do not.

    That the shrunk module's cache does what the dense one's does was proven before.
    """
    problems: list[str] = []
    try:
        acceptance.generate(model, inputs, job, problems)
    except FORWARD_ERRORS as error:
        problems.append(str(error))
    if problems:
        log.info("generation is not compared: %s", problems[0])
    return not problems


def _attention(model: Any) -> str | None:
    name = model.config._attn_implementation
    return name if name in (None, "eager", "sdpa") else "eager"


def _implementations(model: Any) -> str | dict[str, str] | None:
    """As `from_pretrained` takes it: by part, where the parts of a model do not agree."""
    name, config = _attention(model), model.config
    parts = {part: getattr(config, part, None) for part in getattr(config, "sub_configs", {})}
    own = {k: v._attn_implementation for k, v in parts.items() if v is not None}
    if name is None or all(other in (name, None) for other in own.values()):
        return name
    return {"": name, **{part: other for part, other in own.items() if other is not None}}


def _pad_token(model: Any) -> int:
    settings = getattr(model, "generation_config", None)
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(settings, name, None)
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0


def _outcomes(model: Any, battery: Sequence[Check]) -> list[tuple[Check, Tensor]]:
    """Each check with its logits; those left out that the class cannot run, or overflows at."""
    found = []
    for check in battery:
        try:
            logits = whole_outputs(model, check)[0].cpu()
        except FORWARD_ERRORS as error:
            log.info("%r is not compared: %s", check.name, error)
            continue
        if bool(logits.isfinite().all()):
            found.append((check, logits.clone(memory_format=torch.contiguous_format)))
    return found


def _tensors(outcomes: Sequence[tuple[Check, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for check, logits in outcomes:
        found[f"{check.name}.out"] = logits
        found |= {f"{check.name}.in.{n}": t.clone() for n, t in check.inputs.items()}
    return found


def reopen(folders: Sequence[Path]) -> list[list[str]]:
    """Do the prepared jobs in one process without prunec; for each, the problems found."""
    with temporary() as modules:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(modules),  # nothing of ours stays in the user's cache
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "MALLOC_MMAP_THRESHOLD_": "1000000",  # glibc gives freed weights back at once
        }
        command = [sys.executable, "-P", str(Path(acceptance.__file__)), *map(str, folders)]
        done = subprocess.run(
            command, cwd=modules, env=environment, capture_output=True, text=True, check=False
        )
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return [_findings(folder / "findings.json", last) for folder in folders]


def _findings(file: Path, last: str) -> list[str]:
    if not file.exists():
        return [f"it does not open: {last}"]
    return [str(problem) for problem in json.loads(file.read_text(encoding="utf-8"))]

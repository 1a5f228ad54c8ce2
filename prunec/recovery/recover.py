"""Recovery: train what pruning left, keep the best, and never call worse better."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunec.errors import CheckpointError, ModelError, PlanError
from prunec.events import Progress, silent
from prunec.models.context import context_length, fitting
from prunec.models.digest import state_digest
from prunec.models.example import example_inputs
from prunec.models.generation import generates
from prunec.models.quiet import quiet
from prunec.passes.checkpoint import run_of
from prunec.recovery.adapters import attach, detach, merge
from prunec.recovery.data import Samples, read_samples, split_held_out
from prunec.recovery.packing import Row, keeps_apart, pack, single
from prunec.recovery.settings import Recovery
from prunec.recovery.teacher import Teacher
from prunec.recovery.training import Point, Training, planned_steps, trainer

CPU_MINUTES = 30.0
GPU_EPOCHS = 2.0


@dataclass(frozen=True)
class RecoveryReport:
    """What was trained and what came of it.

    Attributes:
        settings: as they ran.
        run: what tells this run from all others.
        data, digest: the source and the sha256 of the tokens trained on.
        samples, rows, tokens: of the whole source; `held_out` rows were not trained on.
        packed: whether rows hold several samples.
        parameters: that were trained.
        before, after: held-out loss in nats a token, of what was given and of what is returned.
        improved: whether training lowered it; where not, the weights are those that were given.
        steps, seconds: of training, measurements included.
        training, held_out_losses: the curves.
    """

    settings: Recovery
    run: str | None
    data: str
    digest: str
    samples: int
    rows: int
    tokens: int
    held_out: int
    packed: bool
    parameters: int
    before: float
    after: float
    improved: bool
    steps: int
    seconds: float
    training: tuple[Point, ...]
    held_out_losses: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as prunec.json holds it."""
        return {
            **vars(self),
            "settings": self.settings.to_dict(),
            "training": [vars(point) for point in self.training],
            "held_out_losses": [vars(point) for point in self.held_out_losses],
        }


@dataclass(frozen=True, eq=False)
class Recovered:
    """The model, mended; the adapter's folder, where one was trained; the report.

    `is_main` is False in the other processes of a distributed run, which must not write.
    """

    model: nn.Module
    report: RecoveryReport
    adapter: Path | None
    is_main: bool


def recover(
    model: nn.Module,
    tokenizer: Any,
    data: str,
    settings: Recovery,
    *,
    work: Path,
    base: str = "",
    teacher: nn.Module | None = None,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Recovered:
    """Train a pruned model on a text; see `Recovery` for what, and `read_samples` for `data`.

    Args:
        model: a causal language model of transformers; changed in place.
        work: folder for checkpoints and the adapter; the caller's to remove.
        base: directory of `model`, which the adapter names as its base.
        teacher: the dense model, for distillation and for ``self``.
        resume: go on from the last checkpoint in `work`.
        options: TrainingArguments by name.

    Raises:
        ModelError: the model is no causal language model.
        PlanError: settings that do not fit the model.
        CalibrationError: the data is unusable.
        CheckpointError: the checkpoints in `work` are of another run.
    """
    settings = _complete(model, settings, teacher, progress)
    samples = read_samples(
        data, tokenizer, settings.row_tokens, dense=teacher, seed=settings.seed, progress=progress
    )
    rows, packed = _rows(model, samples, settings, progress)
    train, held_out = split_held_out(rows, settings.held_out)
    checkpoint = _prepare(work, _identity(model, settings, samples), resume=resume)
    probe = example_inputs(model)
    original = _copy(model) if settings.train == "full" else {}
    torch.manual_seed(settings.seed)
    with progress.task("find what to train"), quiet():
        trained = attach(model, settings, probe)
    parameters = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    total = _total(settings, len(train))
    following = settings.objective == "distill"
    assert not following or teacher is not None
    guide = _teacher(teacher, settings) if following else None
    with progress.task("training", total) as task, quiet():
        run = trainer(
            trained, train, held_out, settings, work,
            packed=packed, teacher=guide, task=task, total=total, options=options or {},
        )  # fmt: skip
        before = float(run.evaluate()["eval_loss"])
        _restore(run, checkpoint)
        run.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    best = run.state.best_metric
    improved = best is not None and math.isfinite(best) and best < before
    if not improved:
        progress.message(
            "Training did not lower the held-out loss: the weights are those that were given."
        )
    adapter = None
    if settings.train != "full" and improved and run.is_world_process_zero():
        adapter = _keep_adapter(trained, work, base)
    report = RecoveryReport(
        settings=settings,
        run=run_of(work),
        data=data,
        digest=samples.digest,
        samples=len(samples.samples),
        rows=len(rows),
        tokens=samples.tokens,
        held_out=len(held_out),
        packed=packed,
        parameters=parameters,
        before=before,
        after=float(best) if improved and best is not None else before,
        improved=improved,
        steps=run.state.global_step,
        seconds=run.watch.seconds,
        training=tuple(run.watch.training),
        held_out_losses=(Point(0, 0.0, before), *run.watch.held_out),
    )
    mended = _finish(run, trained, probe, original, improved=improved)
    return Recovered(mended, report, adapter, run.is_world_process_zero())


def _complete(
    model: Any, settings: Recovery, teacher: nn.Module | None, progress: Progress
) -> Recovery:
    if not generates(model):
        raise ModelError(
            f"{type(model).__name__} does not predict next tokens",
            fix="recovery trains causal language models",
        )
    if settings.objective == "distill" and teacher is None:
        raise PlanError("distillation needs the dense model", fix="--teacher MODEL")
    if teacher is not None and settings.objective == "distill":
        sizes = [_vocabulary(model), _vocabulary(teacher)]
        if sizes[0] != sizes[1]:
            raise PlanError(
                f"the teacher knows {sizes[1]} tokens and the model {sizes[0]}",
                fix="take the model that this one was made from",
            )
    limit = context_length(model)
    if settings.seq_len is None:
        settings = replace(settings, seq_len=fitting(settings.row_tokens, limit, progress))
    elif limit and settings.seq_len > limit:
        raise PlanError(
            f"the model reads at most {limit} tokens, rows of {settings.seq_len} were asked for",
            fix=f"--set seq_len={limit}",
        )
    if settings.steps is None and settings.epochs is None and settings.minutes is None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        if on_cpu:
            return replace(settings, minutes=CPU_MINUTES)
        return replace(settings, epochs=GPU_EPOCHS)
    return settings


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _rows(
    model: nn.Module, samples: Samples, settings: Recovery, progress: Progress
) -> tuple[list[Row], bool]:
    """Rows, and whether any holds more than one sample."""
    listed = samples.samples
    short = sum(len(sample.ids) < settings.row_tokens for sample in listed)
    if settings.packing and short > 1:
        if keeps_apart(model):
            return pack(listed, settings.row_tokens), True
        progress.message("This model mixes samples that share a row: one sample a row, padded.")
    return single(listed), False


def _identity(model: nn.Module, settings: Recovery, samples: Samples) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from."""
    return {
        "settings": settings.to_dict(),
        "model": state_digest(model),
        "data": samples.digest,
    }


def _prepare(work: Path, identity: Mapping[str, Any], *, resume: bool) -> Path | None:
    """The folder for this run, and the checkpoint to go on from, if asked for."""
    path = work / "run.json"
    if not resume:
        if int(os.environ.get("RANK", "0")) > 0:  # of torchrun: the first process does it for all
            return None
        work.mkdir(parents=True, exist_ok=True)
        for earlier in work.glob("*/"):
            shutil.rmtree(earlier)
        path.write_text(json.dumps(identity), encoding="utf-8")
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "there is no interrupted run to go on with", where=str(work), fix="leave out --resume"
        ) from error
    for part, value in identity.items():
        if known.get(part) != json.loads(json.dumps(value)):
            raise CheckpointError(
                f"the interrupted run had other {part}",
                where=str(work),
                fix="repeat its command with --resume, or leave out --resume",
            )
    found = sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    return found[-1] if found else None


def _restore(run: Training, checkpoint: Path | None) -> None:
    """What Trainer does not restore by itself: our clock and curves, the patience."""
    if checkpoint is None:
        return
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    kept = state["stateful_callbacks"]
    run.watch.restore(kept["Watch"]["attributes"])
    for callback in run.callback_handler.callbacks:
        name = type(callback).__name__
        if name == "EarlyStoppingCallback":
            for attribute, value in kept[name]["attributes"].items():
                setattr(callback, attribute, value)


def _total(settings: Recovery, rows: int) -> int:
    """Parts of the progress bar: steps, or hundredths of the minutes."""
    steps = None if settings.minutes is not None else planned_steps(settings, rows)
    return steps or 100


def _teacher(model: nn.Module | None, settings: Recovery) -> Teacher:
    return Teacher(model, temperature=settings.temperature, top_k=settings.top_k)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def _keep_adapter(trained: Any, work: Path, base: str) -> Path:
    for config in trained.peft_config.values():
        config.base_model_name_or_path = base
    folder = work / "adapter"
    trained.save_pretrained(folder)
    return folder


def _finish(
    run: Training,
    trained: Any,
    probe: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    *,
    improved: bool,
) -> nn.Module:
    """The plain model with the best weights, or with those that were given."""
    model: Any = run.accelerator.unwrap_model(trained)
    if vars(model).pop("_original_forward", None) is not None:
        del model.forward  # accelerate's, on the object: it computes in mixed precision
    if run.settings.train == "full":
        if not improved:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(original[name])
        finished: nn.Module = model.requires_grad_(False).eval()
        return finished
    plain: nn.Module = merge(model, probe) if improved else detach(model)
    return plain

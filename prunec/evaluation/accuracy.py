"""Accuracy of models that do not write text: masked tokens, and classes from a user's loader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from prunec.calibration.drawing import longest_sequence
from prunec.calibration.forms import IGNORED, MASKED_PART, masked
from prunec.calibration.given import (
    LABELS,
    Batch,
    call_loader,
    forward_inputs,
    guarded,
    read_batches,
)
from prunec.errors import CalibrationError
from prunec.evaluation.logits import negative_log_likelihoods
from prunec.evaluation.perplexity import token_ids, windows_of
from prunec.events import Progress, silent
from prunec.models.context import fitting

_WINDOW = 128


@dataclass(frozen=True)
class Accuracy:
    """`value` is the part, 0 to 1, of `samples` predictions that were right; `stderr` its standard
    error, sqrt(p (1 - p) / (n - 1)) as lm-eval has it (None for one sample). `nll` is the mean
    negative log-likelihood of the right answers, in nats. `data` names where they came from.
    """

    value: float
    stderr: float | None
    nll: float
    samples: int
    data: str


def masked_accuracy(
    model: nn.Module,
    tokenizer: Any,
    text: str | PathLike[str],
    *,
    window: int | None = None,
    max_windows: int | None = None,
    ratio: float = MASKED_PART,
    seed: int = 0,
    progress: Progress = silent,
) -> Accuracy:
    """How often a masked language model finds the tokens that were masked out.

    Non-overlapping windows, of 128 tokens by default or what the model reads at most; in each the
    same part of the ordinary tokens, `ratio`, is replaced by the mask token, drawn from `seed` and
    so the same for every model with this tokenizer.

    Raises:
        CalibrationError: the text is unusable, or the tokenizer has no mask token.
    """
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise CalibrationError("the tokenizer has no mask token: this is no masked language model")
    ids, data = token_ids(tokenizer, text, progress)
    if window is None:
        window = fitting(_WINDOW, longest_sequence(model, tokenizer), progress)
    windows = windows_of(len(ids), window, None, data)[:max_windows]
    if not windows or not 0 < ratio < 1:
        raise CalibrationError(
            f"nothing was to be masked: max_windows={max_windows}, ratio={ratio:g}"
        )
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterable[Mapping[str, Tensor]]:
        for part in windows:
            found = masked(ids[part.begin : part.end], tokenizer, generator, ratio)
            yield {name: value[None] for name, value in found.items()}

    return accuracy(model, batches(), data=data, total=len(windows), progress=progress)


def loaded_accuracy(model: nn.Module, loader: str, *, progress: Progress = silent) -> Accuracy:
    """Classification accuracy on the batches that ``package.module:loader`` returns.

    Raises:
        ModelError: the loader cannot be imported, or raises.
        CalibrationError: it gives something else than batches.
    """
    batches = call_loader(loader)
    total = len(batches) if isinstance(batches, Sized) else None
    return accuracy(model, guarded(batches, loader), data=loader, total=total, progress=progress)


def accuracy(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    data: str = "batches",
    total: int | None = None,
    progress: Progress = silent,
) -> Accuracy:
    """The part of labels that are the model's first choice.

    A batch is (inputs, labels), or a dict with `labels`, as `read_batches` takes it; labels are
    int64 of the shape of the logits without their last axis, the classes, and -100 where they do
    not count.

    Raises:
        CalibrationError: a batch of another form or that forward does not take, labels of another
            shape or of no class, or no labels at all.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right, count, loss = 0, 0, 0.0
    with progress.task(f"accuracy on {data}", total) as task, torch.inference_mode():
        for batch in batches:
            inputs, labels = _split(batch, model, data)
            labels = labels.to(device)
            logits = _run(model, inputs, device)
            if logits.shape[:-1] != labels.shape:
                raise CalibrationError(
                    f"labels {list(labels.shape)} do not go with logits {list(logits.shape)}",
                    where=data,
                    fix="labels have the shape of the logits without the last axis, the classes",
                )
            counted = labels != IGNORED
            scores, wanted = logits[counted].float(), labels[counted]
            _check_classes(wanted, scores.shape[-1], data)
            right += int((scores.argmax(-1) == wanted).sum())
            count += len(wanted)
            loss += float(negative_log_likelihoods(scores, wanted).sum())
            task.advance()
    if not count:
        raise CalibrationError("there are no labels to compare with", where=data)
    value = right / count
    stderr = math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None
    return Accuracy(value, stderr, loss / count, count, data)


def _split(batch: Any, model: nn.Module, data: str) -> tuple[Batch, Tensor]:
    """What the model reads of a batch, and its labels."""
    (given,) = read_batches([batch], model, data)
    if LABELS not in given:
        raise CalibrationError(
            f"a batch has {', '.join(given)} without labels",
            where=data,
            fix="give (inputs, labels), or a dict with a key labels",
        )
    return forward_inputs(model, given, loss=False), given[LABELS]


def _run(model: Any, inputs: Batch, device: torch.device) -> Tensor:
    placed = {name: value.to(device) for name, value in inputs.items()}
    try:
        output = model(**placed)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise CalibrationError(
            f"{type(model).__name__} does not take a batch: {error}",
            so=f"its inputs are {shapes}",
            fix="give inputs of the form that the model was made for",
        ) from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise CalibrationError(f"{type(model).__name__} gives no logits: it has no accuracy")
    return logits


def _check_classes(labels: Tensor, classes: int, data: str) -> None:
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= classes)).any()):
        raise CalibrationError(
            f"a label is no class: they are numbers from 0 to {classes - 1}",
            where=data,
            fix=f"labels int64, {IGNORED} where one does not count",
        )

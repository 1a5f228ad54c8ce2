"""Perplexity of a causal language model: on a text in windows, or on batches of one's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunec.calibration.text import read_text, tokenise
from prunec.errors import CalibrationError
from prunec.evaluation.logits import Inputs, logit_chunks, token_losses, with_positions
from prunec.events import Progress, silent
from prunec.models.context import context_length, fitting
from prunec.models.digest import token_digest
from prunec.models.generation import generates

WINDOW = 1024


@dataclass(frozen=True)
class Perplexity:
    """`value` is exp(`nll`); `nll` the mean negative log-likelihood, in nats a token.

    `tokens` were scored in `windows` windows of `window` tokens, `stride` apart. `data` names the
    text; `digest` is the sha256 of all its tokens. `stderr` is the standard error of `value`, from
    the spread of the windows' means (tokens within one are not independent); None for one window.
    """

    value: float
    nll: float
    tokens: int
    window: int
    stride: int
    windows: int
    data: str
    digest: str
    stderr: float | None = None


@dataclass(frozen=True)
class Window:
    """Tokens begin to end of the text, of which those from `scored` on count."""

    begin: int
    end: int
    scored: int


def perplexity(
    model: nn.Module,
    tokenizer_or_ids: Any,
    text: str | PathLike[str] | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Perplexity:
    """Perplexity on a text: exp of the mean negative log-likelihood of its tokens, in windows.

    `window` is 1024 tokens by default, or what the model reads at most.
    Without `stride`: non-overlapping windows of so many tokens, each loses its first, and what
    does not fill the last window is left out; the mean is over all tokens scored. This is the
    protocol of LLM-Pruner (window 128) and of SparseGPT (2048). With `stride` < `window`: windows
    begin `stride` tokens apart, each scores the tokens that the one before it did not reach, and
    the last may be shorter. Only values of one window, stride and text compare.

    The text is a string, the path of a UTF-8 file (a PathLike), or absent where token ids, int64
    [tokens], are given in place of a tokenizer. It is tokenised whole, with the special tokens
    that the tokenizer adds.

    Logits are held for 256 positions at a time where the model's head can be found and its
    output is the logits; the loss is in fp32, its sum in fp64.

    Raises:
        CalibrationError: the text is unusable or shorter than one window, the model does not
            predict next tokens, reads fewer tokens than a window, or its vocabulary is smaller
            than the tokenizer's.
    """
    ids, data = token_ids(tokenizer_or_ids, text, progress)
    if window is None:
        window = fitting(WINDOW, context_length(model), progress)
    windows = windows_of(len(ids), window, stride, data)[:max_windows]
    check_model(model, ids, window)
    if not windows or batch_size < 1:
        raise CalibrationError(
            f"no windows were asked for: max_windows={max_windows}, batch_size={batch_size}"
        )
    with progress.task(f"perplexity on {data}", len(windows)) as task:
        losses, counts = [], []
        for inputs, scored in window_batches(ids, windows, batch_size):
            found = _losses(model, [(inputs, scored)])
            losses.append(found)
            counts.append(scored.sum(dim=1).double())
            task.advance(len(found))
    nll, error = mean_and_error(torch.cat(losses), torch.cat(counts))
    value = _exp(nll)
    return Perplexity(
        value=value,
        nll=nll,
        tokens=int(torch.cat(counts).sum()),
        window=window,
        stride=stride or window,
        windows=len(windows),
        data=data,
        digest=token_digest(ids),
        stderr=None if error is None else value * error,
    )


def batch_nll(model: nn.Module, batches: Sequence[Inputs]) -> tuple[float, int]:
    """Mean negative log-likelihood over batches, in nats a token, and the number of tokens.

    A batch is `input_ids`, int64 [batch, n]; `attention_mask`, 0 at padding on either side; and
    `labels`, -100 where a token does not count. A token counts if it and the one before it are
    not padding. Other inputs, such as `position_ids`, go to the model as they are.
    """
    pairs = [_scored(batch) for batch in batches]
    losses = _losses(model, pairs)
    count = sum(int(scored.sum()) for _, scored in pairs)
    if not count:
        raise CalibrationError("no token of these batches counts: all are padding or masked")
    return float(losses.sum()) / count, count


def _scored(batch: Inputs) -> tuple[dict[str, Tensor], Tensor]:
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    scored = torch.zeros_like(mask)
    scored[:, 1:] = mask[:, 1:] & mask[:, :-1]
    if "labels" in batch:
        scored &= batch["labels"] != -100
    return {name: value for name, value in batch.items() if name != "labels"}, scored


def _losses(model: nn.Module, pairs: Sequence[tuple[Inputs, Tensor]]) -> Tensor:
    """Summed loss of each row of each batch."""
    found = []
    with torch.inference_mode(), logit_chunks(model) as chunks:
        for inputs, scored in pairs:
            placed = with_positions(model, inputs)
            ids = placed["input_ids"]
            found.append(token_losses(chunks(placed), ids, scored.to(ids.device)))
    return torch.cat(found)


def mean_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Mean of all tokens and its standard error, from the sums and counts of clusters of them.

    The ratio estimator: residuals of the clusters around the common mean (Cochran, Sampling
    Techniques, 3rd ed., eq. 6.13, without the finite population's correction).
    """
    total, number = float(counts.sum()), len(sums)
    mean = float(sums.sum()) / total
    if number < 2:
        return mean, None
    residuals = sums - mean * counts
    variance = float((residuals**2).sum()) * number / (number - 1) / total**2
    return mean, math.sqrt(variance) if math.isfinite(variance) else math.nan


def window_batches(
    ids: Tensor, windows: Sequence[Window], batch_size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Inputs and the tokens to score, bool [batch, n]; a shorter window is padded on the right."""
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        length = max(w.end - w.begin for w in part)
        rows = torch.zeros(len(part), length, dtype=torch.int64)
        mask, scored = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        for row, w in enumerate(part):
            rows[row, : w.end - w.begin] = ids[w.begin : w.end]
            mask[row, : w.end - w.begin] = 1
            scored[row, w.scored - w.begin : w.end - w.begin] = True
        inputs = {"input_ids": rows}
        yield inputs if bool(mask.all()) else inputs | {"attention_mask": mask}, scored


def token_ids(
    tokenizer_or_ids: Any, text: str | PathLike[str] | None, progress: Progress = silent
) -> tuple[Tensor, str]:
    """Token ids int64 [tokens] of a text, a file or themselves, and what they are called."""
    if isinstance(tokenizer_or_ids, Tensor):
        return tokenizer_or_ids.reshape(-1).cpu(), "tokens" if text is None else str(text)
    if tokenizer_or_ids is None:
        raise CalibrationError("the model has no tokenizer, so it cannot be measured on text")
    if text is None:
        raise CalibrationError("perplexity needs a text, or token ids")
    name = "text" if isinstance(text, str) else Path(text).name
    content = text if isinstance(text, str) else read_text(Path(text))
    with progress.task(f"tokenising {name}"):
        return tokenise(content, tokenizer_or_ids, special_tokens=True), name


def windows_of(tokens: int, window: int, stride: int | None, data: str) -> list[Window]:
    """The windows of a text of so many tokens.

    Raises:
        CalibrationError: window and stride do not fit together, or the text is too short.
    """
    if window < 2 or (stride is not None and not 1 <= stride <= window):
        raise CalibrationError(
            f"window {window} and stride {stride} do not fit together",
            fix="take a window of 2 or more, and a stride from 1 to the window",
        )
    if tokens < window:
        raise CalibrationError(
            f"{data} has {tokens} tokens, fewer than one window of {window}",
            fix="take a longer text, or a smaller window: --window",
        )
    if stride is None or stride == window:
        starts = range(0, tokens - window + 1, window)
        return [Window(start, start + window, start + 1) for start in starts]
    found = [Window(0, window, 1)]
    while (reached := found[-1].end) < tokens:
        begin = found[-1].begin + stride
        found.append(Window(begin, min(begin + window, tokens), reached))
    return found


def check_model(model: Any, ids: Tensor, window: int) -> None:
    """Raises CalibrationError if the model cannot predict these tokens in windows of that size."""
    if hasattr(model, "config") and not generates(model):
        raise CalibrationError(
            f"{type(model).__name__} does not predict next tokens: it has no perplexity"
        )
    find = getattr(model, "get_input_embeddings", None)
    size = getattr(find(), "num_embeddings", None) if find is not None else None
    if size is not None and len(ids) and int(ids.max()) >= size:
        raise CalibrationError(
            f"the tokenizer gives id {int(ids.max())}, but the model knows {size} tokens",
            fix="use the model's own tokenizer",
        )
    limit = context_length(model)
    if limit and window > limit:
        raise CalibrationError(
            f"the model reads at most {limit} tokens, and windows of {window} were asked for",
            fix=f"a smaller window: --window {limit}",
        )


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf if nll == nll else math.nan

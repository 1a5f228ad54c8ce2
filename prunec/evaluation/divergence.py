"""How far a model's predictions are from those of the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunec.errors import CalibrationError
from prunec.evaluation.logits import logit_chunks, with_positions
from prunec.evaluation.perplexity import (
    WINDOW,
    check_model,
    mean_and_error,
    token_ids,
    window_batches,
    windows_of,
)
from prunec.events import Progress, silent
from prunec.importance.predictions import kl_terms
from prunec.models.context import context_length


@dataclass(frozen=True)
class Divergence:
    """Means over tokens, each with its standard error from the windows' spread (None for one).

    `kl` is KL(dense || model) of the next-token distributions, in nats; `agreement` the part of
    positions, 0 to 1, where both rank the same token first.
    """

    kl: float
    kl_stderr: float | None
    agreement: float
    agreement_stderr: float | None
    tokens: int
    window: int
    windows: int
    data: str


def divergence(
    model: nn.Module,
    dense: nn.Module,
    tokenizer_or_ids: Any,
    text: str | PathLike[str] | None = None,
    *,
    window: int | None = None,
    max_windows: int | None = None,
    progress: Progress = silent,
) -> Divergence:
    """KL divergence from the dense model and top-1 agreement, on non-overlapping windows.

    A window has 1024 tokens by default, or what both models read; every position of it counts. The
    sums are in fp64 over fp32 log-probabilities; logits of either model are held for a few
    positions at a time.

    Raises:
        CalibrationError: the text is unusable, or the vocabularies differ.
    """
    ids, data = token_ids(tokenizer_or_ids, text, progress)
    if window is None:
        window = min(WINDOW, *(context_length(reader) or WINDOW for reader in (model, dense)))
    windows = windows_of(len(ids), window, None, data)[:max_windows]
    if not windows:
        raise CalibrationError(f"no windows were asked for: max_windows={max_windows}")
    check_model(model, ids, window)
    check_model(dense, ids, window)
    kls, hits, counts = [], [], []
    with (
        progress.task(f"divergence on {data}", len(windows)) as task,
        torch.inference_mode(),
        logit_chunks(model) as ours,
        logit_chunks(dense) as theirs,
    ):
        for inputs, _ in window_batches(ids, windows, 1):
            pairs = zip(
                ours(with_positions(model, inputs)),
                theirs(with_positions(dense, inputs)),
                strict=True,
            )
            kl, hit = _compare(pairs)
            kls.append(kl)
            hits.append(hit)
            counts.append(window)
            task.advance()
    number = torch.tensor(counts, dtype=torch.float64)
    kl_mean, kl_error = mean_and_error(torch.tensor(kls, dtype=torch.float64), number)
    hit_mean, hit_error = mean_and_error(torch.tensor(hits, dtype=torch.float64), number)
    return Divergence(
        kl=kl_mean,
        kl_stderr=kl_error,
        agreement=hit_mean,
        agreement_stderr=hit_error,
        tokens=int(number.sum()),
        window=window,
        windows=len(windows),
        data=data,
    )


def _compare(pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Summed KL and number of agreements over chunks [1, positions, vocabulary]."""
    kl, hits = 0.0, 0.0
    for found, wanted in pairs:
        if found.shape != wanted.shape:
            raise CalibrationError(
                f"the models know {found.shape[-1]} and {wanted.shape[-1]} tokens",
                fix="compare with the model that this one was made from",
            )
        log_q = F.log_softmax(found.float(), dim=-1)
        log_p = F.log_softmax(wanted.to(found.device).float(), dim=-1)
        kl += float(kl_terms(log_p, log_q).sum(dtype=torch.float64))
        hits += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
    return kl, hits

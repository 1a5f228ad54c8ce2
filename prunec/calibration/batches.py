"""Calibration: the token batches that statistics are taken on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunec.calibration.sampling import sample_tokens
from prunec.calibration.sources import SELF, TextSource, parse_source, share_samples
from prunec.calibration.text import draw_windows, read_text, tokenise
from prunec.errors import CalibrationError
from prunec.events import Progress, silent
from prunec.models.context import context_length
from prunec.models.digest import token_digest

# The default batch: enough tokens to keep a few cores busy, few enough for their activations.
_BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token batches, all of one shape: {"input_ids": int64 [batch, seq_len]}, unpadded.

    `tokens` counts them all; `digest` is the sha256 of the tokens, in order; `sources` says how
    many samples came from where.
    """

    batches: tuple[dict[str, Tensor], ...]
    tokens: int
    digest: str
    sources: tuple[str, ...]


def calibrate_text(
    sources: Sequence[str],
    tokenizer: Any | None,
    *,
    samples: int = 128,
    seq_len: int = 1024,
    seed: int = 0,
    batch_size: int | None = None,
    model: nn.Module | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Draw `samples` sequences of `seq_len` tokens from text files and from the model itself.

    A source is ``PATH`` or ``self`` (text that `model` samples; kept on disk), each with an
    optional ``=WEIGHT``: the samples are shared by weight. Windows of a file are drawn at random
    without overlap, or with it where the file is too short; special tokens are not added. What
    one source gives depends on its content, `seed` and its number of samples, not on the others.
    `batch_size` must divide `samples`; by default it is the largest that does and makes batches
    of at most 2048 tokens.

    Raises:
        CalibrationError: a text is absent, empty, binary or shorter than one sequence; `self`
            without a model that generates; numbers that do not fit together.
    """
    parsed = _merged([parse_source(source) for source in sources])
    size = _batch_size(samples, seq_len, batch_size)
    _check_length(seq_len, model)
    counts = share_samples(parsed, samples)
    drawn: list[Tensor] = []
    for source, count in zip(parsed, counts, strict=True):
        if source.name == SELF:
            if model is None:
                raise CalibrationError("calibration on `self` needs the model that samples")
            drawn.append(sample_tokens(model, tokenizer, count, seq_len, seed, progress))
        else:
            tokens = _tokens_of(Path(source.name).expanduser(), tokenizer, seq_len, progress)
            drawn.append(draw_windows(tokens, count, seq_len, seed))
    ids = torch.cat(drawn)
    return Calibration(
        batches=tuple({"input_ids": batch} for batch in torch.split(ids, size)),
        tokens=ids.numel(),
        digest=token_digest(ids),
        sources=tuple(
            f"{source.name}: {count} x {seq_len}"
            for source, count in zip(parsed, counts, strict=True)
        ),
    )


def _tokens_of(path: Path, tokenizer: Any | None, seq_len: int, progress: Progress) -> Tensor:
    text = read_text(path)
    if tokenizer is None:
        raise CalibrationError(
            "the model has no tokenizer, so text cannot be its calibration",
            fix="name a MODEL with a tokenizer, or calibrate through the Python API",
        )
    with progress.task(f"tokenising {path.name}"):
        tokens = tokenise(text, tokenizer)
    if len(tokens) < seq_len:
        raise CalibrationError(
            f"{path.name} has {len(tokens)} tokens, fewer than one sequence of {seq_len}",
            where=str(path),
            fix="take a longer text, or shorter sequences: --seq-len",
        )
    return tokens


def _merged(sources: list[TextSource]) -> list[TextSource]:
    """Each name once, with the sum of its weights: else its windows would be drawn twice."""
    if not sources:
        raise CalibrationError("no calibration source", fix="name a text file, or self")
    weights: dict[str, float] = {}
    for source in sources:
        weights[source.name] = weights.get(source.name, 0.0) + source.weight
    return [TextSource(name, weight) for name, weight in weights.items()]


def _batch_size(samples: int, seq_len: int, wanted: int | None) -> int:
    if samples < 1 or seq_len < 2:
        raise CalibrationError(
            f"{samples} samples of {seq_len} tokens: at least 1 of 2 tokens are needed"
        )
    divisors = [size for size in range(1, samples + 1) if samples % size == 0]
    if wanted is None:
        return max((s for s in divisors if s * seq_len <= _BATCH_TOKENS), default=1)
    if wanted not in divisors:
        near = min(divisors, key=lambda size: (abs(size - wanted), size))
        raise CalibrationError(
            f"a batch size of {wanted} does not divide {samples} samples, and all batches must be"
            " alike",
            fix=f"take {near}",
        )
    return wanted


def _check_length(seq_len: int, model: nn.Module | None) -> None:
    limit = context_length(model)
    if limit and seq_len > limit:
        raise CalibrationError(
            f"the model reads at most {limit} tokens, and sequences of {seq_len} were asked for",
            fix=f"--seq-len {limit}",
        )

"""Training samples: texts, instructions, data sets of the Hub, and the dense model's own words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunec.calibration.rows import Entry, Sample, encode, read_entries, source_rows
from prunec.calibration.sampling import sample_tokens
from prunec.calibration.sources import parse_source
from prunec.calibration.text import read_text, tokenise
from prunec.errors import CalibrationError
from prunec.events import Progress, silent
from prunec.models.digest import token_digest

SELF_TOKENS = 200_000


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in order, what they came from, and the sha256 of all their tokens."""

    samples: tuple[Sample, ...]
    source: str
    digest: str

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)


def read_samples(
    source: str,
    tokenizer: Any,
    seq_len: int,
    *,
    dense: nn.Module | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Samples:
    """The samples of a source, none longer than `seq_len` tokens.

    Sources are those of `prunec.calibration.calibrate` that hold text: a file, which is cut into
    windows of `seq_len`; rows, of a file or a data set; ``self``, text that the dense model
    samples. Of an exchange (a prompt and its answer) only the answer is learnt, and an end mark
    follows it. What does not fit is cut off at the end.

    Raises:
        CalibrationError: the source is unusable, or the model has no tokenizer.
        PluginError: the package for data sets is absent.
    """
    if tokenizer is None:
        raise CalibrationError("the model has no tokenizer, so it cannot be trained on text")
    found = parse_source(source)
    if found.kind == "self":
        if dense is None:
            raise CalibrationError("`self` needs the dense model", fix="--teacher MODEL")
        count = -(-SELF_TOKENS // seq_len)
        rows = sample_tokens(dense, tokenizer, count, seq_len, seed, progress)
        samples = [Sample(row) for row in rows]
    elif found.kind in ("rows", "hub"):
        entries = read_entries(source_rows(found, progress), found, tokenizer)
        with progress.task(f"tokenising {source}"):
            samples = _from_entries(entries, tokenizer, seq_len)
    elif found.kind == "text":
        text = read_text(found.path)
        with progress.task(f"tokenising {found.path.name}"):
            samples = _windows(tokenise(text, tokenizer), seq_len)
    else:
        raise CalibrationError(
            f"training reads text, and {source} is none", fix="name a text file, or rows"
        )
    kept = tuple(sample for sample in samples if len(sample.ids) > max(1, sample.prompt))
    cut = sum(0 < len(sample.ids) <= sample.prompt for sample in samples)
    if not kept:
        raise CalibrationError(
            f"{source} holds nothing to train on",
            where=source,
            so=f"its prompts leave no room for an answer in {seq_len} tokens" if cut else None,
            fix="longer rows: --set seq_len=N" if cut else None,
        )
    if cut:
        progress.message(
            f"Left out, as their prompts leave no room for an answer in {seq_len} tokens: "
            f"{cut:,} of {len(samples):,} samples."
        )
    return Samples(kept, source, token_digest(*(sample.ids for sample in kept)))


def _windows(tokens: Tensor, seq_len: int) -> list[Sample]:
    return [Sample(window) for window in torch.split(tokens, seq_len)]


def _from_entries(entries: Iterable[Entry], tokenizer: Any, seq_len: int) -> list[Sample]:
    found: list[Sample] = []
    for entry in entries:
        sample = encode(entry, tokenizer)
        if entry.prompt is None:
            found += _windows(sample.ids, seq_len)
        else:
            found.append(Sample(sample.ids[:seq_len], sample.prompt))
    return found


def split_held_out(rows: Sequence[Any], part: float) -> tuple[list[Any], list[Any]]:
    """Rows to train on and rows held out: the last ones, at least 4 and at most 64.

    The last ones and not random ones: neighbours in a text share sentences.

    Raises:
        CalibrationError: there are too few rows.
    """
    count = min(64, max(4, round(part * len(rows))))
    if len(rows) < 2 * count:
        raise CalibrationError(
            f"the data comes to {len(rows)} rows, too few to hold {count} out",
            fix="more data, or shorter rows: --set seq_len=N",
        )
    return list(rows[:-count]), list(rows[-count:])

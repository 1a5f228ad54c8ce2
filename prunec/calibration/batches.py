"""Calibration: the batches that statistics are taken on, and the record of where they are from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunec.calibration.drawing import Drawing, load, longest_sequence
from prunec.calibration.forms import Fields
from prunec.calibration.given import read_batches, rows_of, samples_in
from prunec.calibration.padding import batched, token_count
from prunec.calibration.sources import DataSource, merged, parse_source, share_samples
from prunec.errors import CalibrationError
from prunec.events import Progress, silent
from prunec.models.context import fitting
from prunec.models.digest import token_digest

_TOKENS = 1024
# The default batch: enough tokens to keep a few cores busy, few enough for their activations.
_BATCH_TOKENS = 2048
_BATCH_SAMPLES = 16


@dataclass(frozen=True)
class SourceRecord:
    """What one source gave.

    Attributes:
        name: as the user wrote it.
        kind: text, rows, hub, self, images, loader or given.
        weight: as asked for, relative to the other sources'.
        samples, tokens: that were drawn; padding does not count, and images have no tokens.
        digest: sha256 of them.
    """

    name: str
    kind: str
    weight: float
    samples: int
    tokens: int
    digest: str


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches of inputs by name, all of one shape, the sample axis first.

    Text is "input_ids", int64 [batch, tokens]. Where samples are shorter, "attention_mask" is 0 at
    the padding. "labels" are what the loss compares with; only criteria that need gradients read
    them. `tokens` counts what is no padding; `digest` is the sha256 of all inputs, in order;
    `sources` has an entry a source.
    """

    batches: tuple[dict[str, Tensor], ...]
    tokens: int
    digest: str
    sources: tuple[SourceRecord, ...]

    @property
    def samples(self) -> int:
        return sum(source.samples for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as prunec.json holds it: without the inputs themselves."""
        return {
            "batches": len(self.batches),
            "samples": self.samples,
            "tokens": self.tokens,
            "digest": self.digest,
            "sources": [vars(source) for source in self.sources],
        }


def calibrate(
    sources: str | Sequence[str],
    tokenizer: Any | None = None,
    *,
    model: nn.Module | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Draw `samples` samples from texts, rows, data sets, images, loaders and the model itself.

    A source is a text file; a ``.jsonl`` or ``.json`` file of rows; ``hub:NAME[:SUBSET[:SPLIT]]``,
    a data set of the Hub or in a directory; ``self``, text that `model` samples (kept on disk); a
    directory of images; or ``package.module:loader``, a function that returns batches. Each takes
    an optional ``=WEIGHT``: the samples are shared by weight. What one source gives depends on its
    content, `seed` and its number of samples, not on the others. See docs/calibration.md.

    Args:
        model: says what its samples are: windows of a text for a causal model (as where it is
            absent), masked texts, pairs, images.
        seq_len: tokens a sample, at most; a causal model's have exactly so many. By default 1024,
            or what the model reads at most.
        batch_size: must divide the number of samples; by default the largest that does and makes
            batches of at most 2048 tokens, or of 16 samples that are no tokens.

    Raises:
        CalibrationError: a source is absent, empty, damaged, or not what the model reads; `self`
            without a model that generates; numbers that do not fit together.
        ModelError: a loader cannot be imported, or raises.
        PluginError: a package for data sets or images is absent.
    """
    length = seq_len
    if length is None:
        length = fitting(_TOKENS, longest_sequence(model, tokenizer), progress)
    if samples < 1 or length < 2:
        raise CalibrationError(
            f"{samples} samples of {length} tokens: at least 1 of 2 tokens are needed"
        )
    named = [sources] if isinstance(sources, str) else sources
    parsed = merged([parse_source(source) for source in named])
    if len(parsed) == 1 and parsed[0].kind == "loader" and batch_size is None:
        return _as_given(load(parsed[0], model, samples), parsed[0], _pad(tokenizer, model))
    drawing = Drawing(model, tokenizer, length, seed, progress)
    drawn: list[Fields] = []
    records = []
    for source, count in zip(parsed, share_samples(parsed, samples), strict=True):
        found = drawing.samples(source, count)
        if len(found) < count:
            progress.message(f"{source.name} has {len(found)} samples, all of which are taken")
        single = [{name: value[None] for name, value in sample.items()} for sample in found]
        records.append(_record(source, single, len(found)))
        drawn += found
    return _calibration(_labelled(drawn), records, batch_size, _pad(tokenizer, model))


def collect(given: Calibration | Iterable[Any], model: nn.Module) -> Calibration:
    """Any iterable of batches as a Calibration; batches of one shape stay as they are.

    Raises:
        CalibrationError: there are none, or they are no inputs by name.
    """
    if isinstance(given, Calibration):
        return given
    if isinstance(given, str | Mapping | Tensor) or not isinstance(given, Iterable):
        raise CalibrationError(
            f"the calibration is a {type(given).__name__}, not batches",
            fix="give an iterable of dicts by input name, or prunec.calibration.calibrate([...])",
        )
    batches = read_batches(given, model, "the calibration")
    return _as_given(batches, DataSource("batches", "given", ""), _pad(None, model))


def _as_given(batches: list[Fields], source: DataSource, pad: int) -> Calibration:
    """The user's batches; where they are not alike, their samples in batches that are."""
    shapes = [{name: value.shape for name, value in batch.items()} for batch in batches]
    if any(shape != shapes[0] for shape in shapes):
        largest = max(samples_in(batch, source.name) for batch in batches)
        rows = [row for batch in batches for row in rows_of(batch, source.name)]
        batches = batched(rows, _divisor(len(rows), largest), pad)
    record = _record(source, batches, sum(samples_in(batch, source.name) for batch in batches))
    return Calibration(tuple(batches), record.tokens, record.digest, (record,))


def _calibration(
    samples: Sequence[Fields], records: Sequence[SourceRecord], batch_size: int | None, pad: int
) -> Calibration:
    longest = max(sample["input_ids"].numel() if "input_ids" in sample else 0 for sample in samples)
    most = max(1, _BATCH_TOKENS // longest) if longest else _BATCH_SAMPLES
    size = _divisor(len(samples), most)
    if batch_size is not None:
        size = _divisor(len(samples), batch_size)
        if size != batch_size:
            raise CalibrationError(
                f"a batch size of {batch_size} does not divide {len(samples)} samples, and all"
                " batches must be alike",
                fix=f"take {size}",
            )
    batches = tuple(batched(samples, size, pad))
    return Calibration(
        batches, sum(record.tokens for record in records), _digest(batches), tuple(records)
    )


def _divisor(count: int, most: int) -> int:
    """The largest divisor of `count` that is at most `most`; 1 at least."""
    return max((size for size in range(1, min(count, most) + 1) if count % size == 0), default=1)


def _labelled(samples: list[Fields]) -> list[Fields]:
    """Where only some samples have labels, the others' are their tokens: all of them are learnt."""
    if not any("labels" in sample for sample in samples):
        return samples
    return [
        {**sample, "labels": sample["input_ids"]} if sample.keys() == {"input_ids"} else sample
        for sample in samples
    ]


def _record(source: DataSource, batches: Sequence[Fields], count: int) -> SourceRecord:
    """What a source gave: batches of `count` samples in all."""
    tokens, digest = token_count(batches), _digest(batches)
    return SourceRecord(source.name, source.kind, source.weight, count, tokens, digest)


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """sha256 of all inputs in the order of their names, however they lie in batches."""
    names = sorted({name for batch in batches for name in batch})
    return token_digest(
        *(value for name in names for value in _joined([b[name] for b in batches if name in b]))
    )


def _joined(values: Sequence[Tensor]) -> list[Tensor]:
    alike = len({value.shape[1:] for value in values}) == 1 and values[0].ndim > 0
    return [torch.cat(list(values))] if alike else list(values)


def _pad(tokenizer: Any | None, model: nn.Module | None) -> int:
    """The token id in padding; any does, as masks leave it out."""
    for holder in (tokenizer, getattr(model, "config", None)):
        if (value := getattr(holder, "pad_token_id", None)) is not None:
            return int(value)
    return 0

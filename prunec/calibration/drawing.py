"""The samples of one source, for one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunec.calibration.forms import Fields, Form, entry_samples, form_of, text_samples
from prunec.calibration.given import call_loader, guarded, read_batches, rows_of
from prunec.calibration.images import image_samples
from prunec.calibration.rows import read_entries, source_rows
from prunec.calibration.sampling import sample_tokens
from prunec.calibration.sources import DataSource
from prunec.calibration.text import read_text, seeded, tokenise
from prunec.errors import CalibrationError
from prunec.events import Progress
from prunec.models.context import context_length
from prunec.models.generation import generates

# Of a data set, samples are drawn from so many rows: a part of what may be hundreds of gigabytes.
_HUB_ROWS = 10_000


@dataclass(frozen=True, eq=False)
class Drawing:
    """What samples are drawn for."""

    model: nn.Module | None
    tokenizer: Any | None
    seq_len: int
    seed: int
    progress: Progress

    def samples(self, source: DataSource, count: int) -> list[Fields]:
        """The samples of one source.

        Raises:
            CalibrationError: it gives none.
        """
        try:
            found = self._samples(source, count)
        except CalibrationError as error:
            error.where = error.where or source.name
            raise
        if not found:
            raise CalibrationError(f"{source.name} gives no samples", where=source.name)
        return found

    def _samples(self, source: DataSource, count: int) -> list[Fields]:
        if source.kind == "loader":
            batches = load(source, self.model, count)
            return [row for batch in batches for row in rows_of(batch, source.name)]
        if source.kind == "images":
            return image_samples(source.path, self.model, count, self.seed, self.progress)
        if source.kind == "self":
            if self.model is None:
                raise CalibrationError("calibration on `self` needs the model that samples")
            self._check_length()
            ids = sample_tokens(
                self.model, self.tokenizer, count, self.seq_len, self.seed, self.progress
            )
            return [{"input_ids": row} for row in ids]
        form = self._form()
        if source.kind == "text":
            return text_samples(form, self._tokens(source, form), count, self.seed)
        rows = source_rows(source, self.progress, most=_HUB_ROWS)
        generator = seeded(self.seed, f"{len(rows)} rows")
        order = torch.randperm(len(rows), generator=generator).tolist()
        with self.progress.task(f"tokenising {source.name}"):
            entries = read_entries(rows, source, self.tokenizer, order)
            return entry_samples(form, entries, count, self.seed)

    def _form(self) -> Form:
        if self.tokenizer is None:
            raise CalibrationError(
                "the model has no tokenizer, so text cannot be its calibration",
                fix="name a MODEL with a tokenizer, or a loader of batches: package.module:loader",
            )
        self._check_length()
        return form_of(self.model, self.tokenizer, self.seq_len)

    def _tokens(self, source: DataSource, form: Form) -> Tensor:
        text = read_text(source.path)
        with self.progress.task(f"tokenising {source.path.name}"):
            tokens = tokenise(text, self.tokenizer)
        if len(tokens) < form.room:
            raise CalibrationError(
                f"{source.path.name} has {len(tokens)} tokens, fewer than one sequence of"
                f" {form.room}",
                where=source.place,
                fix="take a longer text, or shorter sequences: --seq-len",
            )
        return tokens

    def _check_length(self) -> None:
        limit = longest_sequence(self.model, self.tokenizer)
        if limit is not None and self.seq_len > limit:
            raise CalibrationError(
                f"the model reads at most {limit} tokens, and sequences of {self.seq_len} were"
                " asked for",
                fix=f"--seq-len {limit}",
            )


def load(source: DataSource, model: nn.Module | None, most: int) -> list[Fields]:
    """The batches of a loader, at most `most` samples of them."""
    batches = guarded(call_loader(source.place), source.name)
    return read_batches(batches, model, source.name, most)


def longest_sequence(model: nn.Module | None, tokenizer: Any | None) -> int | None:
    """Tokens that the positions of a model reach; None for no limit.

    Of an encoder its tokenizer knows better: RoBERTa's positions begin behind the padding's.
    """
    stated = context_length(model)
    if stated is None or generates(model):
        return stated
    return min(stated, getattr(tokenizer, "model_max_length", stated))

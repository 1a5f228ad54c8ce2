"""What a sample of text is to a model: what it reads, and what its loss compares with.

A causal model reads windows of a text. An encoder reads a text between its marks; one that was
trained to find masked tokens has some masked. An encoder-decoder reads a source, and its decoder
a target that begins with the start mark.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunec.calibration.rows import Entry, encode, end_mark
from prunec.calibration.text import draw_positions, draw_windows, seeded, tokenise
from prunec.errors import CalibrationError
from prunec.models.digest import token_digest
from prunec.models.generation import generates

Fields = dict[str, Tensor]
"""The inputs of one sample by name: tokens int64 [n], a class int64 []."""

Objective = Literal["causal", "masked", "seq2seq", "classes", "none"]
IGNORED = -100
MASKED_PART = 0.15


@dataclass(frozen=True, eq=False)
class Form:
    """How a model's samples are made of text.

    Attributes:
        objective: what its loss is of; "none" for an encoder without a head.
        before, after: the marks around a text that the tokenizer adds, int64 [n]; none for a
            causal model, whose windows lie inside a text.
        start: what a decoder begins with.
        classes: class number by name, where the loss is of classes.
        length: of a sample in tokens, at most.
    """

    tokenizer: Any
    objective: Objective
    before: Tensor
    after: Tensor
    length: int
    start: int | None = None
    classes: Mapping[str, int] | None = None

    @property
    def room(self) -> int:
        """Tokens of a text between the marks."""
        return self.length - len(self.before) - len(self.after)


def form_of(model: nn.Module | None, tokenizer: Any, length: int) -> Form:
    """The form that a model's class and config tell; causal where there is no model.

    Raises:
        CalibrationError: an encoder-decoder without a start mark, or no room for a text.
    """
    objective = _objective(model, tokenizer)
    if objective == "causal":
        none = torch.tensor([], dtype=torch.int64)
        return Form(tokenizer, objective, none, none, length)
    before, after = _marks(tokenizer)
    config: Any = getattr(model, "config", None)
    form = Form(
        tokenizer,
        objective,
        before,
        after,
        length,
        start=_start(config) if objective == "seq2seq" else None,
        classes=class_names(config) if objective == "classes" else None,
    )
    if form.room < 2:
        raise CalibrationError(
            f"{length} tokens have no room for a text between the marks",
            fix="take longer sequences: --seq-len",
        )
    return form


def _objective(model: Any, tokenizer: Any) -> Objective:
    if model is None or generates(model):
        return "causal"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    learns = "labels" in inspect.signature(model.forward).parameters
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if learns and head is not None and tokenizer.mask_token_id is not None:
        return "masked"
    return "classes" if learns and head is None else "none"


def _marks(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """What the tokenizer puts before and after a text."""
    whole, text = tokenise("a", tokenizer, special_tokens=True), tokenise("a", tokenizer)
    size = len(text)
    places = range(len(whole) - size + 1)
    first = next((i for i in places if torch.equal(whole[i : i + size], text)), 0)
    return whole[:first], whole[first + size :]


def _start(config: Any) -> int:
    for name in ("decoder_start_token_id", "bos_token_id"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    raise CalibrationError(
        "the model's config names no mark with which its decoder starts",
        fix="set config.decoder_start_token_id, or calibrate through a loader",
    )


def text_samples(form: Form, tokens: Tensor, count: int, seed: int) -> list[Fields]:
    """Samples of a running text: windows that are drawn as `draw_windows` does.

    For an encoder-decoder the first half of a window is the source, the second half the target
    (the prefix objective of Raffel et al., T5, arXiv 1910.10683, section 3.2.1).
    """
    windows = draw_windows(tokens, count, form.room, seed)
    if form.objective == "causal":
        return [{"input_ids": window} for window in windows]
    if form.objective == "seq2seq":
        half = form.room // 2
        return [_pair(form, _marked(form, w[:half]), _marked(form, w[half:])) for w in windows]
    return _encoded(form, [(_marked(form, window), None) for window in windows], seed)


def entry_samples(form: Form, entries: Iterable[Entry], count: int, seed: int) -> list[Fields]:
    """Samples of what rows say, the first `count`; fewer where there are fewer.

    For a causal model the rows are joined to one text, each ended by the end mark, from which
    windows are drawn; for others each row is a sample, cut off at the end where it is too long.

    Raises:
        CalibrationError: labels that are no classes of the model, rows without a source.
    """
    if form.objective == "causal":
        return _joined(form, entries, count, seed)
    if form.objective == "seq2seq":
        return list(islice(_pairs(form, entries), count))
    return _encoded(form, list(islice(_texts(form, entries), count)), seed)


def _joined(form: Form, entries: Iterable[Entry], count: int, seed: int) -> list[Fields]:
    end = end_mark(form.tokenizer)
    ids: list[Tensor] = []
    learnt: list[Tensor] = []
    size = 0
    for entry in entries:
        sample = encode(entry, form.tokenizer)
        open_ended = entry.prompt is None and not entry.formatted
        ids.append(torch.cat([sample.ids, end]) if open_ended else sample.ids)
        learnt.append(torch.arange(len(ids[-1])) >= sample.prompt)
        size += len(ids[-1])
        if size >= count * form.length:
            break
    if size < form.length:
        raise CalibrationError(
            f"the rows have {size} tokens, fewer than one sequence of {form.length}",
            fix="take more rows, or shorter sequences: --seq-len",
        )
    whole, counts = torch.cat(ids), torch.cat(learnt)
    places = draw_positions(whole, count, form.length, seed)
    if bool(counts.all()):
        return [{"input_ids": whole[place]} for place in places]
    labels = whole.masked_fill(~counts, IGNORED)
    return [{"input_ids": whole[place], "labels": labels[place]} for place in places]


def _pairs(form: Form, entries: Iterable[Entry]) -> Iterator[Fields]:
    for entry in entries:
        if entry.prompt is None:
            ids = tokenise(entry.text, form.tokenizer)[: form.room]
            half = len(ids) // 2
            if half:
                yield _pair(form, _marked(form, ids[:half]), _marked(form, ids[half:]))
            continue
        asked = tokenise(entry.prompt, form.tokenizer)
        said = form.tokenizer(text_target=entry.text, verbose=False)["input_ids"]
        if len(asked) and said:
            yield _pair(form, _marked(form, asked), torch.tensor(said[: form.length]))


def _pair(form: Form, source: Tensor, target: Tensor) -> Fields:
    start = torch.tensor([form.start], dtype=torch.int64)
    return {
        "input_ids": source,
        "decoder_input_ids": torch.cat([start, target[:-1]]),
        "labels": target,
    }


def _texts(form: Form, entries: Iterable[Entry]) -> Iterator[tuple[Tensor, int | None]]:
    """Each row as one text between the marks, and its class."""
    for entry in entries:
        text = entry.text if entry.prompt is None else f"{entry.prompt} {entry.text}"
        if len(ids := tokenise(text, form.tokenizer)):
            yield _marked(form, ids), _class(form, entry)


def _class(form: Form, entry: Entry) -> int | None:
    if form.classes is None or entry.label is None:
        return None
    return class_number(form.classes, entry.label)


def class_names(config: Any) -> dict[str, int]:
    """Class number by name, as a model's config has them."""
    names = getattr(config, "id2label", None) or {}
    return {str(name): int(number) for number, name in names.items()}


def class_number(classes: Mapping[str, int], label: int | str) -> int:
    """The number of a class that is given by number or by name.

    Raises:
        CalibrationError: the model has no such class.
    """
    number = classes.get(label) if isinstance(label, str) else label
    if number is None or not 0 <= number < len(classes):
        raise CalibrationError(
            f"the model has no class {label!r}",
            fix=f"it has {len(classes)}: {', '.join(list(classes)[:8])}",
        )
    return int(number)


def _marked(form: Form, ids: Tensor) -> Tensor:
    return torch.cat([form.before, ids[: form.room], form.after])


def _encoded(form: Form, texts: list[tuple[Tensor, int | None]], seed: int) -> list[Fields]:
    """Texts as an encoder reads them; with masks where it was trained on them."""
    if form.objective == "masked":
        generator = seeded(seed, token_digest(*(ids for ids, _ in texts)))
        return [masked(ids, form.tokenizer, generator) for ids, _ in texts]
    if texts and all(label is not None for _, label in texts):
        return [{"input_ids": ids, "labels": torch.tensor(label)} for ids, label in texts]
    return [{"input_ids": ids} for ids, _ in texts]


def masked(
    ids: Tensor, tokenizer: Any, generator: torch.Generator, part: float = MASKED_PART
) -> Fields:
    """A part of a text's ordinary tokens replaced by the mask token, and `labels` of these."""
    ordinary = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    places = ordinary.nonzero().flatten()
    count = max(1, round(part * len(places)))
    chosen = places[torch.randperm(len(places), generator=generator)[:count]]
    labels = torch.full_like(ids, IGNORED)
    labels[chosen] = ids[chosen]
    return {"input_ids": ids.index_fill(0, chosen, tokenizer.mask_token_id), "labels": labels}

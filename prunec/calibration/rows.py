"""Rows of JSON files and of data sets, and what a row says: a text, an exchange or a chat.

Calibration and recovery read the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunec.calibration.hub import hub_rows
from prunec.calibration.sources import DataSource
from prunec.calibration.text import read_text, tokenise
from prunec.errors import CalibrationError
from prunec.events import Progress, silent
from prunec.models.checkpoint import NO_JSON

Row = Mapping[str, Any]

# Taori et al., Stanford Alpaca, 2023: the two prompts that it and LLM-Pruner train with.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_PAIRS = (("prompt", "completion"), ("source", "target"))
_CHATS = ("messages", "conversations")
_TURN = ("role", "from", "content", "value")
# ShareGPT's words for who speaks, as chat templates say it.
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Entry:
    """What one row says.

    Attributes:
        text: all of it; where there is a prompt, the answer to it.
        prompt: what the answer is to, None for a plain text.
        formatted: a chat, in which the template has written the special tokens already.
        label: the class of the text, a number or a name, where the row has one.
    """

    text: str
    prompt: str | None = None
    formatted: bool = False
    label: int | str | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """Token ids int64 [n], of which the first `prompt` are read but not learnt."""

    ids: Tensor
    prompt: int = 0


def source_rows(
    source: DataSource, progress: Progress = silent, *, most: int | None = None
) -> Sequence[Row]:
    """The rows of a JSON file, or of a data set: ``hub:NAME[:SUBSET[:SPLIT]]``, train by default.

    Args:
        most: of a data set, only the first so many.

    Raises:
        CalibrationError, PluginError: they cannot be read.
    """
    if source.kind == "rows":
        return _read_rows(source.path)
    name, _, rest = source.place.partition(":")
    subset, _, split = rest.partition(":")
    if not name:
        raise CalibrationError("a data set without a name", fix="hub:owner/name")
    return hub_rows(name, subset or None, split or None, progress, most=most)


def _read_rows(path: Path) -> list[Row]:
    text = read_text(path)
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except NO_JSON as error:
            raise CalibrationError(f"{path.name} is not JSON: {error}", where=str(path)) from error
    else:
        rows = [
            _parsed(line, f"{path.name}, line {number}")
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CalibrationError(
            f"{path.name} is not a list of rows",
            where=str(path),
            fix='one {"instruction": ..., "input": ..., "output": ...} or {"text": ...} a row',
        )
    return rows


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except NO_JSON as error:
        raise CalibrationError(f"{where} is not JSON: {error}", where=where) from error


def read_entries(
    rows: Sequence[Row], source: DataSource, tokenizer: Any, order: Iterable[int] | None = None
) -> Iterator[Entry]:
    """What each row says, row by row as it is asked for.

    Raises:
        CalibrationError: a row of another form, or a chat without a template for it.
    """
    for index in range(len(rows)) if order is None else order:
        yield _entry(rows[index], source.fields, tokenizer, f"{source.name}, row {index + 1}")


def _entry(row: Row, fields: Sequence[str], tokenizer: Any, where: str) -> Entry:
    label = row.get("label")
    label = label if isinstance(label, int | str) else None
    if fields:
        values = [_value(row, field, where) for field in fields]
        if len(values) == 1 and isinstance(values[0], list):
            return _chat(values[0], tokenizer, where)
        for field, value in zip(fields, values, strict=True):
            if not isinstance(value, str):
                raise CalibrationError(
                    f"the field {field} is a {type(value).__name__}, not a text", where=where
                )
        prompt, text = values if len(values) == 2 else (None, values[0])
        return Entry(text, prompt, label=label)
    for name in _CHATS:
        if isinstance(row.get(name), list):
            return _chat(row[name], tokenizer, where)
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        form = _WITH_INPUT if row.get("input") else _WITHOUT_INPUT
        prompt = form.format(instruction=row["instruction"], input=row.get("input") or "")
        return Entry(row["output"], prompt)
    for asked, said in _PAIRS:
        if isinstance(row.get(asked), str) and isinstance(row.get(said), str):
            return Entry(row[said], row[asked])
    if isinstance(row.get("text"), str):
        return Entry(row["text"], label=label)
    held = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
    raise CalibrationError(
        f"a row has {held or 'no fields'}",
        where=where,
        fix="give text; messages; prompt and completion; source and target; or instruction,"
        " input and output; or name the field: FILE#field",
    )


def _value(row: Row, field: str, where: str) -> Any:
    """A field of a row; ``translation.en`` is a field of a field, where no field is called so."""
    value: Any = row
    for part in [field] if field in row else field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise CalibrationError(
                f"a row has no field {field!r}: it has {', '.join(map(str, row)) or 'none'}",
                where=where,
            )
        value = value[part]
    return value


def _chat(turns: Sequence[Any], tokenizer: Any, where: str) -> Entry:
    """A conversation as the model's own template writes it."""
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "the tokenizer has no chat template, so it cannot read a conversation",
            where=where,
            fix="set tokenizer.chat_template, or give the conversation as text",
        )
    messages = [_message(turn, where) for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is code, which may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"the chat template does not take this conversation: {reason}", where=where
        ) from error
    return Entry(str(text), formatted=True)


def _message(turn: Any, where: str) -> dict[str, Any]:
    """A turn as templates know it, with what else it holds (the calls of tools); columns that a
    data set fills up with None are left out.
    """
    if isinstance(turn, Mapping):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        rest = {k: v for k, v in turn.items() if k not in _TURN and v is not None}
        said = _said(content)
        if isinstance(role, str) and (said is not None or "tool_calls" in rest):
            spoken = {} if said is None else {"content": said}
            return {"role": _SPEAKERS.get(role, role), **spoken, **rest}
    raise CalibrationError(
        "a turn of a conversation has no speaker or no text",
        where=where,
        fix='{"role": "user", "content": "..."}, or {"from": "human", "value": "..."}',
    )


def _said(content: Any) -> str | None:
    """The text of a turn, also where it comes in parts; None where it is something else."""
    parts = content if isinstance(content, list) else [content]
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        for part in parts
    ]
    said = [text for text in texts if isinstance(text, str)]
    return "".join(said) if said and len(said) == len(texts) else None


def encode(entry: Entry, tokenizer: Any) -> Sample:
    """The tokens of an entry: an exchange ends with the end mark, and only its answer is learnt.

    Prompt and answer are tokenised apart, so that no token is of both.
    """
    if entry.prompt is None:
        return Sample(tokenise(entry.text, tokenizer))
    asked = tokenise(entry.prompt, tokenizer, special_tokens=True)
    end = end_mark(tokenizer)
    if len(asked) and len(end) and int(asked[-1]) == int(end):
        asked = asked[:-1]  # some tokenizers end everything that they are given
    return Sample(torch.cat([asked, tokenise(entry.text, tokenizer), end]), len(asked))


def end_mark(tokenizer: Any) -> Tensor:
    """The mark that ends a text, int64 [1]; [0] where the tokenizer has none."""
    end = tokenizer.eos_token_id
    return torch.tensor([] if end is None else [end], dtype=torch.int64)

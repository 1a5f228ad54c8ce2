"""Training samples: texts, instructions, data sets of the Hub, and the dense model's own words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunec.calibration.hub import hub_rows
from prunec.calibration.sampling import sample_tokens
from prunec.calibration.text import read_text, tokenise
from prunec.errors import CalibrationError
from prunec.events import Progress, silent
from prunec.models.digest import token_digest

SELF = "self"
SELF_TOKENS = 200_000

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


@dataclass(frozen=True, eq=False)
class Sample:
    """Token ids int64 [n], of which the first `prompt` are read but not learnt."""

    ids: Tensor
    prompt: int = 0


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

    A source is a text file, which is cut into windows of `seq_len`; a .jsonl or .json file of
    rows; ``self``, text that the dense model samples; or a data set of the Hub, ``owner/name`` or
    ``owner/name:subset``. A row has `text`; `prompt` and `completion`; or, as Alpaca has them,
    `instruction`, `input` and `output`. Of the latter two only the answer is learnt, and an end
    mark follows it. What does not fit is cut off at the end.

    Raises:
        CalibrationError: the source is unusable, or the model has no tokenizer.
    """
    if tokenizer is None:
        raise CalibrationError("the model has no tokenizer, so it cannot be trained on text")
    samples: Iterable[Sample]
    path = Path(source).expanduser()
    if source == SELF:
        if dense is None:
            raise CalibrationError("`self` needs the dense model", fix="--teacher MODEL")
        count = -(-SELF_TOKENS // seq_len)
        rows = sample_tokens(dense, tokenizer, count, seq_len, seed, progress)
        samples = [Sample(row) for row in rows]
    elif path.suffix in (".jsonl", ".json") and path.exists():
        samples = _from_rows(_read_rows(path), tokenizer, seq_len, source)
    elif path.exists() or not _is_hub_name(source):
        text = read_text(path)
        with progress.task(f"tokenising {path.name}"):
            samples = _windows(tokenise(text, tokenizer), seq_len)
    else:
        name, _, subset = source.partition(":")
        rows = hub_rows(name, subset or None, "train", progress)
        samples = _from_rows(rows, tokenizer, seq_len, source)
    kept = tuple(sample for sample in samples if len(sample.ids) > max(1, sample.prompt))
    if not kept:
        raise CalibrationError(f"{source} holds nothing to train on", where=source)
    return Samples(kept, source, token_digest(*(sample.ids for sample in kept)))


def _is_hub_name(source: str) -> bool:
    name = source.partition(":")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).suffix


def _windows(tokens: Tensor, seq_len: int) -> list[Sample]:
    return [Sample(window) for window in torch.split(tokens, seq_len)]


def _read_rows(path: Path) -> list[Mapping[str, Any]]:
    text = read_text(path)
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise CalibrationError(f"{path.name} is not JSON: {error}", where=str(path)) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CalibrationError(
            f"{path.name} is not a list of rows",
            where=str(path),
            fix='one {"instruction": ..., "input": ..., "output": ...} or {"text": ...} a row',
        )
    return rows


def _from_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, seq_len: int, source: str
) -> list[Sample]:
    found: list[Sample] = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row.get("text"), str):
            found += _windows(tokenise(row["text"], tokenizer), seq_len)
            continue
        prompt, answer = _prompt_and_answer(row, f"{source}, row {number}")
        found.append(_instruction(prompt, answer, tokenizer, seq_len))
    return found


def _prompt_and_answer(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        form = _WITH_INPUT if row.get("input") else _WITHOUT_INPUT
        prompt = form.format(instruction=row["instruction"], input=row.get("input") or "")
        return prompt, row["output"]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"], row["completion"]
    raise CalibrationError(
        f"a row has {', '.join(map(str, row)) or 'no fields'}",
        where=where,
        fix="give text, or prompt and completion, or instruction, input and output",
    )


def _instruction(prompt: str, answer: str, tokenizer: Any, seq_len: int) -> Sample:
    """Prompt and answer are tokenised apart, so that no token is of both."""
    asked = tokenise(prompt, tokenizer, special_tokens=True)
    end = tokenizer.eos_token_id
    if len(asked) and end is not None and int(asked[-1]) == end:
        asked = asked[:-1]  # some tokenizers end everything that they are given
    said = tokenise(answer, tokenizer)
    marks = torch.tensor([] if end is None else [end], dtype=torch.int64)
    return Sample(torch.cat([asked, said, marks])[:seq_len], len(asked))


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
            fix="more data, or shorter rows: --set seq_len=128",
        )
    return list(rows[:-count]), list(rows[-count:])

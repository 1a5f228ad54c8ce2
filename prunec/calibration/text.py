"""Text files: reading, tokenising, and drawing windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunec.errors import CalibrationError
from prunec.models.digest import token_digest

# Above this a text is tokenised in pieces: the tokenizer keeps some 100 bytes a token meanwhile.
_PIECE = 1 << 22


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, line ends as "\\n".

    Raises:
        CalibrationError: absent, a directory, empty, binary, or in another encoding.
    """
    where = str(path)
    if not path.exists():
        raise CalibrationError(
            f"no such text file: {path}",
            fix="check the path; a data set of the Hub is hub:owner/name",
        )
    if path.is_dir():
        raise CalibrationError(f"{path.name} is a directory", where=where, fix="name a text file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path.name} is not UTF-8 text: byte {error.start} cannot be read",
            where=where,
            fix="convert it to UTF-8, or name another file",
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read {path.name}: {error.strerror}", where=where) from error
    if "\0" in text:
        raise CalibrationError(f"{path.name} is binary: it has zero bytes", where=where)
    if not text.strip():
        raise CalibrationError(f"{path.name} is empty", where=where)
    return text


def tokenise(text: str, tokenizer: Any, *, special_tokens: bool = False) -> Tensor:
    """Token ids of a text, int64 [tokens]; `special_tokens` adds those the tokenizer adds.

    One call of the tokenizer for up to 4 million characters. A longer text goes in pieces that
    end at line ends, without special tokens after the first: at each such seam the tokens may
    differ from those of one call.
    """
    ids: list[int] = []
    for piece in _pieces(text):
        ids += tokenizer(
            piece,
            add_special_tokens=special_tokens and not ids,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1
        if end == 0:  # a line of millions of characters
            end = start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def draw_windows(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """`count` windows of `length` consecutive tokens, int64 [count, length].

    Drawn at random, from `seed` and the tokens alone. They do not overlap where the text is long
    enough for that; else no two start at the same token; else, in a text with too few starts,
    they repeat.
    """
    return tokens[draw_positions(tokens, count, length, seed)]


def draw_positions(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Where the tokens of `draw_windows` stand in the text, int64 [count, length]."""
    generator = seeded(seed, token_digest(tokens))
    spare, last = len(tokens) - count * length, len(tokens) - length
    if spare >= 0:
        first = int(torch.randint(min(spare, length - 1) + 1, (1,), generator=generator))
        cells = torch.randperm((len(tokens) - first) // length, generator=generator)[:count]
        starts = first + cells * length
    elif last + 1 >= count:
        starts = torch.randperm(last + 1, generator=generator)[:count]
    else:
        starts = torch.randint(last + 1, (count,), generator=generator)
    return starts[:, None] + torch.arange(length)


def seeded(seed: int, content: str) -> torch.Generator:
    """A generator for what is drawn from some content: its own, whatever is drawn beside it."""
    digest = hashlib.sha256(f"{seed} {content}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

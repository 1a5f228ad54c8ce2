"""Cells of a table that is narrower than its text: names fold where they can be read on."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

# Words; of one longer than a line the parts that end in a dot, a slash or "="; of one still longer
# those that end in an underscore or a hyphen.
_PARTS = (r"\s*\S+\s*", r".+?(?:[./=]+|$)", r".+?(?:[_-]+|$)")


def folded(text: str, width: int) -> str:
    """`text` in lines of at most `width` columns where its parts allow it.

    >>> folded("model.layers.0.self_attn.q_proj", 16)
    'model.layers.0.\\nself_attn.q_proj'
    """
    lines = []
    for line in text.split("\n"):
        lines.append("")
        for part in _parts(line, width, _PARTS):
            if lines[-1] and cell_len((lines[-1] + part).rstrip()) > width:
                lines.append("")
            lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _parts(text: str, width: int, patterns: tuple[str, ...]) -> Iterator[str]:
    """The text in parts that should stay whole: only what is too long is divided further."""
    if not patterns or cell_len(text.rstrip()) <= width:
        yield text
        return
    for part in re.findall(patterns[0], text):
        yield from _parts(part, width, patterns[1:])


class Cell:
    """A text in a column, as wide as its longest line where that is allowed."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(folded(self._text, options.max_width), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        lines = folded(self._text, options.max_width).split("\n")
        widest = min(options.max_width, max(map(cell_len, lines)))
        return Measurement(min(widest, 1), widest)

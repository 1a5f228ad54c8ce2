"""What the user sees: tables on stdout, progress on stderr, no colour codes in a pipe."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.progress import Task as BarTask
from rich.table import Table
from rich.text import Text

from prunec.cli.folding import Cell
from prunec.errors import ExportError
from prunec.events import Task, duration
from prunec.staging import write_whole

PIPE_WIDTH = 120
LIVE_ROWS = 12
_NARROW = 80


class _Count(MofNCompleteColumn):
    """How many of how many; nothing where the number of parts is not known."""

    def render(self, task: BarTask) -> Text:
        return Text() if task.total is None else super().render(task)


class _Board(Bars):
    """Progress bars under the last lines of the table that their steps fill."""

    rows: Sequence[Mapping[str, str]] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        if self.rows:
            table = Table(*self.rows[-1], box=None, pad_edge=False)
            for row in self.rows[-LIVE_ROWS:]:
                table.add_row(*map(Cell, row.values()))
            yield table
        yield self.make_tasks_table(self.tasks)


class _Bar:
    """A `events.Task` drawn as one rich progress bar."""

    def __init__(self, bars: _Board, description: str, total: int | None) -> None:
        self._bars = bars
        self._id = bars.add_task(description, total=total)

    def advance(self, n: int = 1) -> None:
        self._bars.advance(self._id, n)

    def update(self, description: str) -> None:
        self._bars.update(self._id, description=description)

    def row(self, cells: Mapping[str, str]) -> None:
        self._bars.rows = [*self._bars.rows, cells][-LIVE_ROWS:]

    def close(self) -> None:
        self._bars.rows = ()
        self._bars.remove_task(self._id)


class Screen:
    """The terminal, as an `events.Progress` that also prints tables and remembers seconds.

    With `json` the JSON has stdout to itself and tables go to stderr. `quiet` leaves only errors
    and the JSON. `seconds` holds each outermost step in the order they ended.
    """

    def __init__(self, *, quiet: bool = False, json: str | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._json = json
        self._depth = 0
        self._out = _console(stderr=json == "-", quiet=quiet)
        self._err = _console(stderr=True, quiet=quiet)
        self._bars = _Board(
            TextColumn("{task.description}"),
            BarColumn(),
            _Count(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._err,
            transient=True,
            disable=quiet or not self._err.is_terminal,
        )
        check_file_target(None if json in (None, "-") else Path(str(json)), "--json")

    def hush(self) -> None:
        """From here on as with `quiet`."""
        self._out.quiet = self._err.quiet = self._bars.disable = True

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        bar = _Bar(self._bars, description, total)
        started = time.perf_counter()
        if self._depth == 0:
            self._bars.start()
        self._depth += 1
        try:
            yield bar
        finally:
            self._depth -= 1
            bar.close()
            if self._depth == 0:
                self._bars.stop()
        if self._depth == 0:
            seconds = time.perf_counter() - started
            self.seconds[description] = self.seconds.get(description, 0.0) + seconds
            self._err.print(f"{description}: {duration(seconds)}", style="dim")

    def message(self, text: str) -> None:
        self._err.print(text)

    def say(self, text: str = "") -> None:
        """One paragraph of the result. `text` is printed as it is, without rich markup."""
        self._out.print(text, markup=False)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        words: Sequence[int] = (0,),
    ) -> None:
        """A table. The columns `words` (by index) hold text, the others figures.

        Heads of figures take two lines: what they save in width the words have.
        """
        table = self._table(title)
        for index, column in enumerate(columns):
            table.add_column(
                column if index in words else column.replace(" ", "\n", 1),
                justify="left" if index in words else "right",
                no_wrap=index not in words,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*map(Cell, row))
        self._out.print(table)

    def facts(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Pairs of a name and a text."""
        table = self._table(title, show_header=False)
        for name, text in rows:
            table.add_row(Cell(name), Cell(text))
        self._out.print(table)

    def _table(self, title: str, *, show_header: bool = True) -> Table:
        """A ruled table; where columns are few, one without lines between its own."""
        table = Table(title=title, title_justify="left", show_header=show_header)
        if self._out.width < _NARROW:
            table.box, table.padding = box.SIMPLE_HEAD, 0
        return table

    def timings(self) -> None:
        """How long each step took."""
        rows = [[step, duration(seconds)] for step, seconds in self.seconds.items()]
        rows.append(["all", duration(sum(self.seconds.values()))])
        self.table("Time", ["step", ""], rows)

    def write_json(self, value: Mapping[str, Any] | Sequence[Any]) -> None:
        """Write `value` where ``--json`` said, if it did: a file, or ``-`` for stdout.

        JSON has no word for what is not finite: such a figure is null.
        """
        if self._json is None:
            return
        finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
        text = json.dumps(finite, indent=2) + "\n"
        if self._json == "-":
            sys.stdout.write(text)
            return
        try:
            write_text(Path(self._json), text)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ExportError(f"cannot write {self._json}: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a device or a pipe just gets the text."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    write_whole(path, text.encode("utf-8"))


def _console(*, stderr: bool, quiet: bool) -> Console:
    console = Console(stderr=stderr, quiet=quiet, highlight=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def check_file_target(path: Path | None, option: str) -> None:
    """Raises ExportError for a file that cannot be written: before the work, not after it."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ExportError(f"no such directory: {path.parent}", where=f"{option} {path}")
    if path.is_dir():
        raise ExportError(f"{path} is a directory", where=f"{option} {path}", fix="name a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ExportError(f"cannot write {path}", where=f"{option} {path}")

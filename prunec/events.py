"""How long work reports progress: a protocol with no output of its own (the CLI renders it)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One step under way."""

    def advance(self, n: int = 1) -> None:
        """`n` more of the step's `total` are done."""

    def update(self, description: str) -> None:
        """Say what the step is doing now."""

    def row(self, cells: Mapping[str, str]) -> None:
        """What one part of the step came to, by column: a line of a table that grows."""


class Progress(Protocol):
    """Where steps are announced. A step lasts as long as its context.

    >>> with silent.task("layers", total=2) as task:
    ...     task.advance()
    """

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Task]:
        """Open a step of `total` parts, or of unknown length."""

    def message(self, text: str) -> None:
        """One line that the user should see, such as what is being downloaded."""


class _SilentTask:
    def advance(self, n: int = 1) -> None:
        pass

    def update(self, description: str) -> None:
        pass

    def row(self, cells: Mapping[str, str]) -> None:
        pass


class _Silent:
    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        yield _SilentTask()

    def message(self, text: str) -> None:
        pass


silent: Progress = _Silent()


def duration(seconds: float) -> str:
    """A time as a person says it.

    >>> duration(0.42), duration(75), duration(7500)
    ('0.4 s', '1 min 15 s', '2 h 05 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02} min"

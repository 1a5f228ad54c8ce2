"""How long work reports progress: a protocol with no output of its own (the CLI renders it)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One step under way."""

    def advance(self, n: int = 1) -> None:
        """`n` more of the step's `total` are done."""

    def update(self, description: str) -> None:
        """Say what the step is doing now."""


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


class _Silent:
    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        yield _SilentTask()

    def message(self, text: str) -> None:
        pass


silent: Progress = _Silent()

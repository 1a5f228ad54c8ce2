"""Temporary folders, and the locks by which a user is known.

A lock ends with its process, however that ends. So a folder that nobody has locked was left by a
killed process, and the next one that needs one of that name removes it.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

_MARK, _RANDOM = "part-", "????????"  # as mkdtemp ends its names


@contextmanager
def sibling(path: Path) -> Iterator[Path]:
    """A private folder beside ``path``, to be renamed by the block; it is gone afterwards.

    Raises:
        OSError: it cannot be made.
    """
    with no_empty_parents(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _private(f".{path.name}.{_MARK}", path.parent) as folder:
            yield folder


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with _private(f".{path.name}.{_MARK}", path.absolute().parent) as folder:
        (folder / path.name).write_bytes(content)
        (folder / path.name).replace(path)


@contextmanager
def temporary(place: Path | None = None) -> Iterator[Path]:
    """A private folder in ``place``, by default where temporary files are; gone afterwards.

    Raises:
        OSError: it cannot be made.
    """
    with _private(f"prunec-{_MARK}", place or Path(tempfile.gettempdir())) as folder:
        yield folder


def temporary_of(owner: object, place: Path | None = None) -> Path:
    """As `temporary`, but the folder goes with ``owner``.

    Raises:
        OSError: it cannot be made.
    """
    stack = ExitStack()
    folder = stack.enter_context(temporary(place))
    weakref.finalize(owner, stack.close)
    return folder


@contextmanager
def no_empty_parents(path: Path) -> Iterator[None]:
    """Parents of ``path`` that the block makes go again if nothing is left in them afterwards."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # something is in it, or it was not made
                parent.rmdir()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What Ctrl-C and SIGTERM raise, they raise when the block is over.

    So what it makes is known to those who tidy up. It is for blocks that end at once.
    """
    arrived: list[int] = []
    raising: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other is interrupted
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        raising = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in raising:
        signal.signal(number, lambda sent, _: arrived.append(sent))
    try:
        yield
    finally:
        for number, handler in raising.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


def lock(path: Path) -> int | None:
    """Lock a file or directory until the descriptor, the result, is closed or the process ends.

    None where the system or the file system has no such locks.

    Raises:
        BlockingIOError: another process has it.
        FileNotFoundError: it is gone, perhaps with its last user.
    """
    try:
        import fcntl
    except ImportError:  # Windows: one writer is up to the user
        return None
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _private(prefix: str, parent: Path) -> Iterator[Path]:
    for left in parent.glob(glob.escape(prefix) + _RANDOM):
        _remove_abandoned(left)
    folder, held = None, None
    try:
        with uninterrupted():
            folder, held = _made(prefix, parent)
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _made(prefix: str, parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # Before it was locked, it may have passed for an abandoned one.
        with suppress(BlockingIOError, FileNotFoundError):
            return folder, lock(folder)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError):  # in use, or another user's
        held = lock(folder)
        if held is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)

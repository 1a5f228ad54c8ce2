"""A directory that appears whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from prunec.errors import ExportError
from prunec.staging import sibling

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def check_target(directory: Path, *, overwrite: bool = False, holds: str = "config.json") -> None:
    """Refuse early what `staged` would refuse: call it before hours of work.

    Args:
        holds: the file by which a directory that may be replaced is known; prunec.json is another.

    Raises:
        ExportError: `directory` exists and may not be replaced, or cannot be created.
    """
    if directory.is_symlink() or directory.exists():
        if not overwrite:
            raise ExportError(
                "the output directory exists", where=str(directory), fix="--overwrite"
            )
        if not directory.is_dir():
            raise ExportError("the output is a file", where=str(directory), fix="name a directory")
        inside = {path.name for path in directory.iterdir()}
        if inside and inside.isdisjoint({holds, "prunec.json"}):
            raise ExportError(
                "the output directory holds something else than a model",
                where=str(directory),
                fix="remove it yourself, or name another",
            )
    _check_writable(directory)


def check_shard_size(size: str) -> None:
    """Refuse early what transformers would refuse when it writes.

    Raises:
        ExportError: it is no number of KB, MB, GB or TB.
    """
    if not re.fullmatch(r"[0-9]*[1-9][0-9]* ?[KMGT]B", size.upper()):
        raise ExportError(f"no size of a weight file: {size!r}", fix="such as 500MB or 5GB")


def _check_writable(path: Path) -> None:
    parent = next(p for p in path.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError("cannot write here", where=str(parent), fix="name another directory")


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse before writing what would not fit: some writers abort the process on a full disk.

    Raises:
        ExportError: fewer bytes are free where `folder` is.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ExportError(
            "the disk is too full",
            where=f"{folder.parent}: {needed_bytes / 1e6:,.0f} MB are needed, "
            f"{free / 1e6:,.0f} MB are free",
            so="nothing was written",
            fix="free some space, or name a directory elsewhere",
        )


@contextmanager
def staged(
    directory: Path, *, overwrite: bool = False, holds: str = "config.json"
) -> Iterator[Path]:
    """A private temporary sibling of `directory` that takes its name if the block succeeds.

    If it does not (an error, a full disk, Ctrl-C), nothing is left of it and an existing directory
    is as it was.

    Raises:
        ExportError: as `check_target`, or the file system refuses.
    """
    check_target(directory, overwrite=overwrite, holds=holds)

    def deliver(temporary: Path, target: Path) -> None:
        # By now another process may have written it: then this one comes too late.
        check_target(directory, overwrite=overwrite, holds=holds)
        (_replace if overwrite else Path.rename)(temporary, target)

    with _beside(directory.resolve(), deliver) as temporary:
        yield temporary


@contextmanager
def staged_file(path: Path, *, inside: str, overwrite: bool = False) -> Iterator[Path]:
    """A private temporary folder whose file `inside` becomes `path` if the block succeeds.

    Raises:
        ExportError: `path` exists and may not be replaced, or the file system refuses.
    """
    _check_file(path, overwrite=overwrite)

    def deliver(temporary: Path, target: Path) -> None:
        _check_file(path, overwrite=overwrite)
        (temporary / inside).replace(target)

    with _beside(path.resolve(), deliver) as temporary:
        yield temporary


def _check_file(path: Path, *, overwrite: bool) -> None:
    if path.is_symlink() or path.exists():
        if not overwrite:
            raise ExportError("the output file exists", where=str(path), fix="--overwrite")
        if path.is_dir():
            raise ExportError("the output is a directory", where=str(path), fix="name a file")
    _check_writable(path)


@contextmanager
def _beside(path: Path, deliver: Callable[[Path, Path], object]) -> Iterator[Path]:
    """A temporary folder beside `path` that `deliver` turns into it; nothing is left otherwise."""
    try:
        with sibling(path) as temporary:
            yield temporary
            _open_up(temporary)
            deliver(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError | SafetensorError) or _is_full(error):
            raise _refused(error, path) from error
        raise


def _open_up(folder: Path) -> None:
    """Give everything the rights that it would have if the user had written it directly."""
    probe = folder / ".rights"
    probe.mkdir()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for path in (folder, *folder.rglob("*")):
        path.chmod(usual if path.is_dir() else usual & 0o666)


def _replace(temporary: Path, directory: Path) -> None:
    """Give `temporary` the name of `directory`, if there is one, in one step where possible."""
    if not directory.exists():
        temporary.rename(directory)
    elif not _exchange(temporary, directory):
        with sibling(directory) as aside:
            old = directory.rename(aside / directory.name)
            try:
                temporary.rename(directory)
            except BaseException:
                old.rename(directory)
                raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically, where the system can."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return int(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)) == 0


def _is_full(error: BaseException) -> bool:
    """Also as the Rust libraries of tokenizers and safetensors say it, in types of their own."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(
        f"os error {n})" in str(error) for n in full
    )


def _refused(error: BaseException, directory: Path) -> ExportError:
    full = _is_full(error)
    return ExportError(
        "the disk is full" if full else f"the file system refuses: {error}",
        where=str(directory),
        so="nothing was written",
        fix="free some space, or name a directory elsewhere" if full else None,
    )

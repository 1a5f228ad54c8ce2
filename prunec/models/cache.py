"""Results that are slow to make and safe to keep: one directory each in a per-user cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from prunec.errors import ModelError
from prunec.staging import sibling


def cache_directory() -> Path:
    """$PRUNEC_CACHE, else `prunec` in the platform's per-user cache directory."""
    if chosen := os.environ.get("PRUNEC_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "prunec"


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The cache's directory `name`; made by `build(empty directory)` where it is absent.

    `name` must identify the content (a digest in it): an entry is never rewritten. It appears
    whole or not at all: it is built in a temporary sibling and renamed. Where two processes
    build the same entry, the first to finish keeps it.

    Raises:
        ModelError: the cache cannot be written, such as on a full disk.
    """
    entry = cache_directory() / name
    if entry.is_dir():
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with sibling(entry) as building:
            build(building)
            _keep(building, entry)
    except (OSError, SafetensorError) as error:
        raise _unwritable(entry, error) from error
    return entry


def _keep(building: Path, entry: Path) -> None:
    # mkdtemp makes directories private; the entry gets what the user's umask gives.
    umask = os.umask(0)
    os.umask(umask)
    building.chmod(0o777 & ~umask)
    try:
        building.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise


def _unwritable(entry: Path, error: OSError | SafetensorError) -> ModelError:
    return ModelError(
        f"cannot write prunec's cache: {getattr(error, 'strerror', None) or error}",
        where=str(entry),
        fix="free some space, or set PRUNEC_CACHE to a directory that can be written",
    )

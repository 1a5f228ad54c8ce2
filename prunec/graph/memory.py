"""Memory that is free, and memory that was freed but not given back."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def free_bytes() -> int:
    """What the system could give to this process now."""
    import psutil

    return int(psutil.virtual_memory().available)


@contextmanager
def settled_heap() -> Iterator[None]:
    """Inside, a collection looks only at objects made since: a traced graph is large and stays.

    Without this the collections between sites take longer than pruning them.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release_freed() -> None:
    """Give freed memory back to the system, where the allocator keeps it in pieces.

    Between two sites thousands of tensors of every size come and go; without this a fifth of the
    process's memory is holes.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """As `release_freed`, without a search for objects that nobody reaches: milliseconds."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)

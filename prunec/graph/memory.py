"""Memory that was freed but not given back."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_freed() -> None:
    """Give freed memory back to the system, where the allocator keeps it in pieces.

    Between two sites thousands of tensors of every size come and go; without this a fifth of the
    process's memory is holes.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)

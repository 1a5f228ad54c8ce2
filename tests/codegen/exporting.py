"""Tiny pruned directories to export, written without the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from slicing import shrunk

from prunec.codegen import hf
from prunec.codegen.shrink import Shrunk


def written(name: str, directory: Path, *, alike: bool = False, **options: Any) -> Shrunk:
    """A tiny model of that architecture, pruned and written as a directory."""
    *_, result = shrunk(name, alike=alike)
    return saved(result, directory, **options)


def saved(result: Shrunk, directory: Path, **options: Any) -> Shrunk:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "accept", lambda *_: [])
        hf.save(result, directory, **options)
    return result

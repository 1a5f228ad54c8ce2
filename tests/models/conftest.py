from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_tiny_llama


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's directory: not to be changed."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def directory(tmp_path: Path, saved: Path) -> Path:
    """A copy of it that a test may spoil."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path

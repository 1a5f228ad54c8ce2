from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_model import TEXT, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} {TEXT}" for i in range(200)))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def data() -> Path:
    """The project's shared texts, which a user's machine does not have."""
    folder = Path(os.environ.get("PRUNEC_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the shared test data is absent: set PRUNEC_DATA to its folder")
    return folder

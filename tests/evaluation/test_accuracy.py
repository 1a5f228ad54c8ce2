from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import TEXT, tiny_tokenizer
from tiny_readers import bert, marking_tokenizer
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from prunec.errors import CalibrationError, ModelError
from prunec.evaluation import accuracy, loaded_accuracy, masked_accuracy


class Copies(nn.Module):
    """Says of every position that its own token stands there, and of the mask that it is a 5."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        said = torch.where(input_ids == 1, 5, input_ids)
        return SimpleNamespace(logits=100 * torch.nn.functional.one_hot(said, 320).float())


def test_only_masked_tokens_count() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "</s>"
    found = masked_accuracy(Copies(), tokenizer, TEXT * 4, window=20)
    ids = torch.tensor(tokenizer(TEXT * 4).input_ids)
    windows = len(ids) // 20
    assert found.samples == 3 * windows
    fives = float((ids[: windows * 20] == 5).float().mean())
    assert found.value == pytest.approx(0.0) if fives == 0 else found.value < 0.5


def test_a_masked_language_model_is_scored_alike_twice() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "</s>"
    model = BertForMaskedLM(config).eval()
    first = masked_accuracy(model, tokenizer, TEXT * 4, window=20)
    assert first == masked_accuracy(model, tokenizer, TEXT * 4, window=20)
    assert 4 < first.nll < 8  # about log 320: it has learnt nothing
    with pytest.raises(CalibrationError, match="no mask token"):
        masked_accuracy(model, tiny_tokenizer(), TEXT * 4, window=20)


def test_windows_are_cut_to_what_the_encoder_reads() -> None:
    found = masked_accuracy(bert(), marking_tokenizer(), TEXT * 20)  # reads 64 tokens
    whole = masked_accuracy(bert(), marking_tokenizer(), TEXT * 20, window=64)
    assert found == whole


def test_classes_from_a_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given_batches.py").write_text(
        "import torch\n"
        "def batches():\n"
        "    yield torch.eye(4), torch.tensor([0, 1, 2, 0])\n"
        "    yield {'input': torch.eye(4), 'labels': torch.tensor([-100, 1, 2, -100])}\n"
        "def nothing():\n"
        "    return 3\n"
        "def unlabelled():\n"
        "    return [torch.eye(4)]\n"
    )
    monkeypatch.chdir(tmp_path)
    found = loaded_accuracy(nn.Identity(), "given_batches:batches")
    assert (found.samples, found.value) == (6, pytest.approx(5 / 6))
    assert found.stderr == pytest.approx((5 / 6 * 1 / 6 / 5) ** 0.5)
    with pytest.raises(CalibrationError, match="not batches"):
        loaded_accuracy(nn.Identity(), "given_batches:nothing")
    with pytest.raises(CalibrationError, match="without labels"):
        loaded_accuracy(nn.Identity(), "given_batches:unlabelled")
    with pytest.raises(ModelError, match="cannot import"):
        loaded_accuracy(nn.Identity(), "given_batches:absent")
    with pytest.raises(CalibrationError, match="do not go with logits"):
        accuracy(nn.Identity(), [(torch.eye(4), torch.zeros(3, dtype=torch.int64))])
    with pytest.raises(CalibrationError, match="numbers from 0 to 3"):
        accuracy(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 4]))])
    with pytest.raises(CalibrationError, match="does not fit Identity"):
        accuracy(nn.Identity(), [{"pixels": torch.eye(4), "labels": torch.arange(4)}])
    with pytest.raises(CalibrationError, match="Linear does not take a batch") as caught:
        accuracy(nn.Linear(3, 2), [(torch.eye(4), torch.arange(4))])
    assert "its inputs are input [4, 4]" in str(caught.value)
    with pytest.raises(CalibrationError, match="ids is of type list, not a tensor"):
        accuracy(nn.Identity(), [{"input": torch.eye(4), "ids": ["a"], "labels": torch.arange(4)}])
    with pytest.raises(CalibrationError, match="no labels"):
        accuracy(nn.Identity(), [(torch.eye(1), torch.tensor([-100]))])

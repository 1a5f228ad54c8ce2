"""The commands on a tiny model: what they write, print and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_model import TEXT, write_tiny_llama
from typer.testing import CliRunner, Result

import prunec
from prunec.cli.app import app

DRAW = ("--calibration", "text.txt", "--samples", "4", "--seq-len", "32")
RECOVERIES = ("recipes", "list", "--recovery")
FACTORY = """
import torch
from torch import nn

def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)), torch.randn(3, 6)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text and a factory; tests of this file add to it under names of their own."""
    folder = tmp_path_factory.mktemp("commands")
    write_tiny_llama(folder / "model")
    (folder / "text.txt").write_text(TEXT * 40)
    (folder / "tiny_factory.py").write_text(FACTORY)
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PRUNEC_CACHE", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def pruned(folder: Path) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run("prune", "model", "-o", "small", "--ratio", "0.3", *DRAW, "--json", "small.json")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    return result


def printed_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json", "-").stdout)


def test_trace_says_what_is_in_the_graph() -> None:
    found = printed_json("trace", "model")
    assert found["front_end"] == "torch.export"
    assert found["parameters"] == 25_760
    assert found["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert found["missing_rules"] == {}
    assert "Every operator was understood." in run("trace", "model").stdout


def test_a_config_is_traced_without_weights() -> None:
    assert printed_json("trace", "model/config.json")["parameters"] == 25_760


def test_analyze_lists_groups_and_pinned_dims() -> None:
    found = printed_json("analyze", "model")
    channels = [group for group in found["groups"] if group["kind"] == "ffn_channel"]
    assert [group["name"] for group in channels] == [
        "model.layers.0.mlp/ffn_channel",
        "model.layers.1.mlp/ffn_channel",
    ]
    assert channels[0]["units"] == 48
    assert channels[0]["parameters_per_unit"] == 3 * 32
    assert {pinned["parameter"] for pinned in found["pinned"]} == {"model.embed_tokens.weight"}


def test_analyze_folds_layers_and_says_why_on_request() -> None:
    assert "model.layers.*.mlp/ffn_channel" in run("analyze", "model").stdout
    assert "addressed by position" not in run("analyze", "model").stdout
    assert "addressed by position" in run("analyze", "model", "--why").stdout


def test_analyze_draws_one_block(folder: Path) -> None:
    run("analyze", "model", "--svg", "block.svg")
    svg = (folder / "block.svg").read_text()
    assert svg.startswith("<svg")
    assert "ffn_channel" in svg


def test_any_module_is_analyzed_through_a_factory() -> None:
    found = printed_json("analyze", "tiny_factory:perceptron")
    assert [(group["kind"], group["units"]) for group in found["groups"]] == [("ffn_channel", 12)]


def test_any_module_is_pruned_through_a_factory(folder: Path) -> None:
    """Its directory is no transformers model: what opens it is said, and what cannot says why."""
    report = printed_json("prune", "tiny_factory:perceptron", "-o", "plain", "--ratio", "0.5")
    assert report["realised_ratio"] == pytest.approx(0.5, abs=0.05)
    module = torch.export.load(folder / "plain" / "model.pt2").module()
    assert module(input=torch.zeros(7, 6)).shape == (7, 4)
    said = {"check": "the directory holds a plain PyTorch", "trace": "the directory has no config"}
    for command, words in said.items():
        result = CliRunner().invoke(app, [command, "plain"])
        assert result.exit_code == 2
        assert f"error: {words}" in result.output
    run("prune", "tiny_factory:perceptron", "-o", "plain", "--recipe", "magnitude", "--overwrite")


def test_prune_writes_a_directory_and_says_what_it_cost(pruned: Result, folder: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (folder / "small").iterdir()
    }
    report = json.loads((folder / "small.json").read_text())
    assert report["out"] == "small"
    assert report["realised_ratio"] == pytest.approx(0.3, rel=0.02)
    assert len(report["sites"]) == 4
    assert f"{report['parameters'][1]:,}" in pruned.stdout
    for column in ("wanted", "realised"):
        assert column in pruned.stdout
    model = prunec.load(folder / "small")
    assert sum(weight.numel() for weight in model.parameters()) == report["parameters"][1]


def test_prune_says_how_long_each_step_took(pruned: Result) -> None:
    steps = ("open model", "trace the model", "pruning", "write the directory", "all")
    assert all(f" {step} " in pruned.stdout for step in steps)
    assert "write the directory: " in pruned.stderr


def test_eval_is_a_list_in_the_order_asked_for(pruned: Result) -> None:
    found = printed_json(
        "eval", "small", "model", "--ppl", "text.txt", "--window", "32", "--max-windows", "3"
    )
    assert [entry["model"] for entry in found] == ["small", "model"]
    assert [entry["windows"] for entry in found] == [3, 3]
    assert found[0]["parameters"] < found[1]["parameters"]
    assert all(entry["perplexity"] > 1 for entry in found)
    assert found[0]["digest"] == found[1]["digest"]


def test_a_pruned_directory_is_analyzed_at_its_own_sizes(pruned: Result, folder: Path) -> None:
    report = json.loads((folder / "small.json").read_text())
    assert printed_json("trace", "small")["parameters"] == report["parameters"][1]


def test_a_plan_is_carried_out_as_it_is(pruned: Result, folder: Path) -> None:
    before = json.loads((folder / "small.json").read_text())
    for holder in ("small.json", "small/plan.json"):
        again = printed_json("prune", "model", "--plan", holder, "--dry-run")
        assert again["plan"] == before["plan"]
        assert again["parameters"] == before["parameters"]


def test_a_dry_run_reads_no_weights_and_writes_nothing(folder: Path) -> None:
    before = set(folder.iterdir())
    found = printed_json("prune", "model/config.json", "--ratio", "0.25", "--dry-run")
    assert found["out"] is None
    assert found["target"] == pytest.approx(0.25 * found["block_parameters"], abs=1)
    assert sum(wanted for _, wanted in found["wanted"].values()) == pytest.approx(
        found["target"], abs=len(found["wanted"])
    )
    assert set(folder.iterdir()) == before


def test_settings_change_the_recipe(folder: Path) -> None:
    found = printed_json(
        "prune",
        *("model", "-o", "narrow", "--recipe", "magnitude", *DRAW),
        *("--set", "units=ffn_channel", "--set", "importance.norm=l1"),
    )
    assert found["recipe"]["units"] == ["ffn_channel"]
    assert found["recipe"]["importance"] == {"name": "magnitude", "norm": "l1"}
    assert {name.rpartition("/")[2] for name in found["plan"]["groups"]} == {"ffn_channel"}


def test_recipes_are_listed_and_shown_as_the_yaml_that_prune_takes(folder: Path) -> None:
    assert {recipe["name"] for recipe in printed_json("recipes", "list")} >= {
        "slimgpt",
        "magnitude",
    }
    text = run("recipes", "show", "slimgpt").stdout
    assert yaml.safe_load(text)["importance"]["name"] == "obs"
    (folder / "mine.yaml").write_text(text)
    shown = run("recipes", "show", "mine.yaml").stdout
    assert shown == text


def test_recoveries_are_listed_and_shown_as_the_yaml_that_recover_takes(folder: Path) -> None:
    found = {recovery["name"]: recovery for recovery in printed_json(*RECOVERIES)}
    assert set(found) == {"llm-pruner", "slimgpt", "slimllm"}
    for name, recovery in found.items():
        text = run("recipes", "show", name, "--recovery").stdout
        assert yaml.safe_load(text) == recovery
        (folder / "training.yaml").write_text(text)
        assert run("recipes", "show", "training.yaml", "--recovery").stdout == text

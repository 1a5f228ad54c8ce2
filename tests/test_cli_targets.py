"""Targets, constraints and bounds of the search on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import TEXT, write_tiny_llama
from typer.testing import CliRunner

from prunec.cli.app import app
from prunec.errors import PlanError

DRAW = ("--calibration", "text.txt", "--samples", "4", "--seq-len", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    write_tiny_llama(folder / "model")
    (folder / "text.txt").write_text(TEXT * 20)
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")


def found(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["prune", *arguments, "--json", "-"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_dry_run_says_what_would_go() -> None:
    outline = found("model/config.json", "--target", "flops=70%", "--dry-run")
    assert outline["goal"] == "flops=70%"
    assert outline["ratio"] is None
    assert outline["target"] > 0
    assert outline["wanted"]


def test_an_allocation_that_looks_at_data_is_not_outlined() -> None:
    outline = found("model/config.json", "--recipe", "auto", "--dry-run")
    assert outline["wanted"] == {}


def test_a_target_and_constraints_hold_in_the_report() -> None:
    report = found(
        *("model", "-o", "small", "--recipe", "magnitude", *DRAW),
        *("--target", "params=22k", "--hardware", "tp=2", "--protect", "0"),
    )
    assert report["parameters"][1] == pytest.approx(22_000, rel=0.005)
    assert report["ratio"] is None
    assert report["aim"]["target"] == "params=22000"
    assert report["aim"]["reached"] == report["parameters"][1]
    assert report["recipe"]["constraints"] == {
        "tensor_parallel": 2,
        "protect": ["0"],
        "align": 8,
    }
    first, last = (
        [site for site in report["sites"] if site["block"] == f"model.layers.{i}"] for i in (0, 1)
    )
    assert all(site["removed"] == 0 for site in first)
    for site in last:
        assert all(n % 2 == 0 for name, n in site["kept"].items() if "query_head" not in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "0.2", "--target", "flops=70%"), "a ratio and a target were both given"),
        (("--target", "flops=70"), "at least"),
        (("--target", "weights=70%"), "not a target"),
        (("--hardware", "tpu"), "no hardware preset"),
        (("--protect", "9"), "cannot protect block 9"),
        (("--minutes", "3"), "no option 'minutes'"),
        (("--recipe", "auto", "--effort", "slow"), "effort='slow' is not possible"),
        (("--min-ratio", "0.5", "--max-ratio", "0.2"), "not possible"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    options: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(app, ["prune", "model/config.json", "--dry-run", *options])
    assert isinstance(result.exception, PlanError | SystemExit)
    assert message in f"{result.exception} {getattr(result.exception, 'so', '')} {result.output}"

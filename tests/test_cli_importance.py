"""``prunec analyze --importance``: scores in the table, in the JSON and in the picture's colours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from prunec.cli.app import app

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.h = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.last(self.h(self.first(x)))

def blocks():
    return Stack(), torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delitem(sys.modules, "scored_models", raising=False)
    (tmp_path / "scored_models.py").write_text(FACTORY)
    return tmp_path


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["analyze", "scored_models:blocks", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_scores_in_table_json_and_picture(folder: Path) -> None:
    shown = run("--importance", "obs", "--json", "scores.json", "--dot", "scored.dot")
    assert "Importance of a unit: obs" in shown.output
    assert "of loss" in shown.output
    link = json.loads((folder / "scores.json").read_text())
    assert link["importance"] == "obs"
    groups = {g["name"]: g["importance"] for g in link["groups"] if "importance" in g}
    assert set(groups) == {"h.0/ffn_channel", "h.1/ffn_channel"}
    assert sum(found["share"] for found in groups.values()) == pytest.approx(1)
    for found in groups.values():
        (row,) = found["scores"]
        assert len(row) == 12
        assert row.count(None) == 1
        assert found["minimum"] <= found["median"] <= found["maximum"]
    run("--dot", "plain.dot")
    assert (folder / "scored.dot").read_text() != (folder / "plain.dot").read_text()


def test_scores_are_those_of_the_criterion_on_the_example(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--importance", "wanda", "--json", "scores.json", "--quiet")
    monkeypatch.syspath_prepend(folder)
    import scored_models

    model, example = scored_models.blocks()
    with torch.no_grad():
        inner = model.h[0].up(model.first(example)).relu()
    weight = model.h[0].down.weight.detach().double()
    truth = weight.abs().sum(0) * inner.double().square().mean(0).sqrt()
    link = json.loads((folder / "scores.json").read_text())
    (row,) = next(g for g in link["groups"] if g["name"] == "h.0/ffn_channel")["importance"][
        "scores"
    ]
    known = [
        (found, wanted)
        for found, wanted in zip(row, truth.tolist(), strict=True)
        if found is not None
    ]
    assert len(known) == 11
    assert all(found == pytest.approx(wanted, rel=1e-5) for found, wanted in known)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--importance", "obss"), "did you mean 'obs'"),
        (("--importance", "obs", "--set", "dampin=1"), "did you mean 'damping'"),
        (("--importance", "taylor", "--set", "term=third"), "term='third' is not possible"),
        (("--importance", "taylor"), "computes no loss of its own"),
        (("--set", "term=vector"), "no importance is named"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], message: str) -> None:
    assert message in run(*arguments, code=2).output

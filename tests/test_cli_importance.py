"""``prunec analyze --importance``: scores in the table, in the JSON and in the picture's colours."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner, Result

from prunec.api import score
from prunec.cli.app import app
from prunec.models import example_inputs
from prunec.passes.recipe import Part

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


def test_units_are_scored_at_the_weight_that_reads_them() -> None:
    """Beside a criterion that ranks by weights alone units that no weight sums over, too."""
    config = T5Config(
        vocab_size=20,
        d_model=12,
        d_kv=4,
        d_ff=10,
        num_layers=1,
        num_heads=3,
        tie_word_embeddings=True,
    )
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    part = Part("magnitude", {"aggregation": "last"})
    example = example_inputs(model)
    found = {g.group: g for g in score(model, importance=part, calibration=[example]).groups}
    assert "hidden" in found
    rows = model.encoder.block[0].layer[0].SelfAttention.o.weight.double().square().sum(0)
    scores = found["encoder.block.0.layer.0.SelfAttention/head"].scores[0]
    wanted = rows.reshape(3, 4).sum(1).numpy()
    for unit in range(3):
        assert math.isnan(scores[unit]) or scores[unit] == pytest.approx(wanted[unit])

    masks = score(model, importance=Part("fisher", {"of": "masks"}), calibration=[example])
    assert {group.group for group in masks.groups} == set(found)

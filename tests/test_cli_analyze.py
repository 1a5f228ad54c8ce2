"""``prunec analyze``: the pictures and files that it writes, and what it refuses before working."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import networkx as nx
import pytest
from typer.testing import CliRunner, Result

from prunec.cli.app import app

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())

class Head(nn.Module):
    def forward(self, x):
        return x @ torch.ones(6, 6)

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.h = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.last(self.h(self.first(x)))

def blocks():
    return Stack(), torch.randn(2, 4)

def perceptron():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)), torch.randn(3, 6)

def nothing():
    return Head(), torch.randn(3, 6)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delitem(sys.modules, "drawn_models", raising=False)
    (tmp_path / "drawn_models.py").write_text(FACTORY)
    return tmp_path


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["analyze", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_everything_is_written_in_one_run(folder: Path) -> None:
    files = ("--svg", "a.svg", "--dot", "a.dot", "--html", "a.html", "--json", "a.json")
    run("drawn_models:blocks", "--level", "blocks", *files)
    assert "h.0 to 1 (2 alike)" in (folder / "a.svg").read_text()
    assert (folder / "a.dot").read_text().startswith("digraph")
    assert "drawn_models:blocks" in (folder / "a.html").read_text()
    data = json.loads((folder / "a.json").read_text())
    assert data["model"] == "drawn_models:blocks"
    assert len(nx.node_link_graph(data, edges="edges")) == len(data["nodes"])


def test_a_block_and_a_group_can_be_named(folder: Path) -> None:
    run("drawn_models:blocks", "--block", "h.1", "--svg", "block.svg")
    assert ">norm<" in (folder / "block.svg").read_text()
    run("drawn_models:blocks", "--group", "h.1/ffn_channel", "--svg", "group.svg")
    assert ">h.1/ffn_channel<" in (folder / "group.svg").read_text()


def test_what_couples_blocks_is_told_from_what_lies_in_one() -> None:
    shown = run("drawn_models:blocks").stdout
    across, inside = shown.split("h.* (2 blocks)", 1)
    assert "couples 2 blocks" in across
    assert "h.*/ffn_channel" in inside


def test_units_of_depth_are_shown_per_block(folder: Path) -> None:
    shown = run("drawn_models:blocks", "--json", "a.json").stdout
    assert "Depth: h.* (2 blocks)" in shown
    (row,) = (line for line in shown.split("Depth: ")[1].splitlines() if "h.*/mlp" in line)
    count = 6 + 6 + 6 * 12 + 12 + 12 * 6 + 6
    cells = [cell.strip() for cell in row.split("│")[1:5]]
    assert cells == ["h.*/mlp", "2", str(count), str(2 * 2 * 2 * 6 * 12)]
    branches = json.loads((folder / "a.json").read_text())["branches"]
    assert [found["parameters"] for found in branches] == [count, count]


@pytest.mark.parametrize("level", ["blocks", "groups", "ops"])
def test_a_model_without_blocks_is_drawn_whole(folder: Path, level: str) -> None:
    run("drawn_models:perceptron", "--level", level, "--svg", "a.svg")
    assert "ffn_channel 12" in (folder / "a.svg").read_text()


def test_a_model_without_groups_is_drawn_and_explored_all_the_same(folder: Path) -> None:
    run("drawn_models:nothing", "--level", "blocks", "--svg", "a.svg", "--html", "a.html")
    assert "0 groups" in (folder / "a.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--svg", "absent/a.svg"), "no such directory: absent"),
        (("--html", "absent/a.html"), "no such directory: absent"),
        (("--svg", "a.pdf"), "ends in .svg or .png"),
        (("--svg", "a.svg", "--block", "7"), "no module '7'"),
        (("--svg", "a.svg", "--group", "h.1/ffn"), "no group 'h.1/ffn'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_nothing(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    result = run("drawn_models:blocks", *options, code=2)
    assert message in result.stderr
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == [
        "drawn_models.py"
    ]

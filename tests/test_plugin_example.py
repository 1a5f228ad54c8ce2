"""The example in examples/plugin_importance installs, and prunes by its own name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from plugins import installed
from torch import Tensor, nn

import prunec

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin_importance"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.layers(self.enter(x)))


@pytest.fixture
def _installed(tmp_path: Path) -> Iterator[None]:
    with installed(EXAMPLE, tmp_path):
        yield


@pytest.mark.usefixtures("_installed")
def test_the_example_prunes_the_channels_of_least_energy() -> None:
    model = Net()
    batches = [{"x": torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))}]
    settings = {"importance": "output-energy", "importance.root": True}
    result = prunec.prune(
        model, recipe="magnitude", ratio=0.25, calibration=batches, settings=settings
    )
    with torch.no_grad():
        inner = model.layers[0].up(model.enter(batches[0]["x"])).relu().flatten(0, 1)
        energy = inner.square().mean(0) * model.layers[0].down.weight.square().sum(0)
    keep = result.plan.groups["layers.0/ffn_channel"]
    best = energy.sqrt().topk(keep.count).indices.sort().values.tolist()
    assert keep.rows[()] == tuple(best)
    assert str(result.report.recipe.importance) == "output-energy{root=True}"


def test_the_criterion_is_short() -> None:
    source = (EXAMPLE / "prunec_output_energy.py").read_text()
    body = source[source.index("@dataclass") :].splitlines()
    assert len([line for line in body if line.strip()]) <= 20

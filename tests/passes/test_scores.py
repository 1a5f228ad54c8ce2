"""Saved scores: another target reads no data, and a file of anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prunec
from prunec.errors import CheckpointError, PlanError, VerifyError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def squares(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(inputs["x"]).square().mean()


def data(seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(3, 7, 5, generator=generator)} for _ in range(4)]


def prune(model: nn.Module | None = None, **options):
    return prunec.prune(Net() if model is None else model, **{"ratio": 0.3, **options})


METHODS = {
    "obs": {"recipe": "slimgpt"},
    "taylor": {"recipe": "magnitude", "settings": {"importance": "taylor"}, "loss": squares},
    "residual": {
        "recipe": "slimgpt",
        "settings": {"compensation": "least-squares", "compensation.target": "residual"},
    },
    "swaps": {"recipe": "slimgpt", "settings": {"importance.swap": True}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_second_target_reads_no_data_and_equals_a_first_run(method: str, tmp_path: Path) -> None:
    options = METHODS[method]
    first = prune(**options, calibration=data(), scores=tmp_path / "a")
    again = prune(**options, scores=tmp_path / "a")
    assert first.plan == again.plan
    other = prune(**options, ratio=0.5, scores=tmp_path / "a")
    fresh = prune(**options, ratio=0.5, calibration=data(), scores=tmp_path / "b")
    for one, two in ((first, again), (other, fresh)):
        assert one.plan == two.plan
        for name, tensor in one.model.state_dict().items():
            assert torch.equal(tensor, two.model.state_dict()[name])
    assert other.report.realised_ratio == pytest.approx(0.5, abs=0.02)
    assert other.report.calibration["one_shot"] is True
    assert other.report.calibration["batches"] == 4
    assert other.report.to_json()


def test_scores_of_a_static_criterion_without_data_change_nothing(tmp_path: Path) -> None:
    plain = prune(recipe="magnitude", calibration=data())
    saved = prune(recipe="magnitude", calibration=data(), scores=tmp_path / "a")
    taylor = METHODS["taylor"]
    assert plain.plan == saved.plan
    assert (
        prune(**taylor, calibration=data()).plan
        == prune(**taylor, calibration=data(), scores=tmp_path / "t").plan
    )


def test_one_shot_differs_from_sequential_where_inputs_matter(tmp_path: Path) -> None:
    """Else the word would mean nothing: the second block sees what the pruned first one makes."""
    options = {"recipe": "slimgpt", "calibration": data(), "ratio": 0.5}
    one_shot = prune(**options, scores=tmp_path / "a").model.state_dict()
    sequential = prune(**options).model.state_dict()
    assert any(
        one_shot[name].shape != sequential[name].shape
        or not torch.allclose(one_shot[name], sequential[name], atol=1e-6)
        for name in one_shot
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": Net(seed=7)}, "are of another model"),
        ({"settings": {"importance.damping": 0.1}}, r"another importance: Obs\(.*damping=0.01"),
        ({"calibration": data(2)}, "are of another calibration"),
        ({"recipe": "magnitude"}, r"another importance: Obs\(.* now it is Magnitude"),
    ],
)
def test_scores_of_something_else_are_refused(change, message: str, tmp_path: Path) -> None:
    prune(recipe="slimgpt", calibration=data(), scores=tmp_path / "a")
    with pytest.raises(CheckpointError, match=message) as caught:
        prune(**{"recipe": "slimgpt", "scores": tmp_path / "a", **change})
    assert str(tmp_path / "a") in str(caught.value)


def test_a_compensation_that_needs_more_is_refused(tmp_path: Path) -> None:
    options = {"recipe": "magnitude", "settings": {"importance": "wanda"}}
    prune(**options, calibration=data(), scores=tmp_path / "a")
    settings = {"importance": "wanda", "compensation": "obs"}
    with pytest.raises(CheckpointError, match="lack what this compensation reads: input_gram"):
        prune(recipe="magnitude", settings=settings, scores=tmp_path / "a")


def test_another_loss_is_refused(tmp_path: Path) -> None:
    prune(**METHODS["taylor"], calibration=data(), scores=tmp_path / "a")
    other = {**METHODS["taylor"], "loss": lambda model, inputs: model(inputs["x"]).abs().mean()}
    with pytest.raises(CheckpointError, match=r"another loss: .*squares, and now it is .*lambda"):
        prune(**other, scores=tmp_path / "a")


def test_what_is_no_scores_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="no scores can be read"):
        prune(calibration=data(), scores=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    with pytest.raises(PlanError, match="cannot save scores here"):
        prune(calibration=data(), scores=tmp_path / "absent" / "a")
    with pytest.raises(PlanError, match="needs calibration data"):
        prune(scores=tmp_path / "new")


def test_truncated_scores_are_refused(tmp_path: Path) -> None:
    prune(recipe="slimgpt", calibration=data(), scores=tmp_path / "a")
    index = json.loads((tmp_path / "a" / "scores.json").read_text())
    file = tmp_path / "a" / index["sites"]["layers.1.down"]["file"]
    assert load_file(file)["input_gram"].dtype == torch.float32
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot read the scores"):
        prune(recipe="slimgpt", scores=tmp_path / "a")


def test_nothing_is_left_of_scores_that_fail(tmp_path: Path) -> None:
    model = Net()
    model.layers[2].up.weight[0, 0] = torch.nan
    with pytest.raises(VerifyError, match="NaN or Inf"):
        prune(model, recipe="slimgpt", calibration=data(), scores=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []

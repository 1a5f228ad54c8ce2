"""Convolutions as sites: against least squares on their patches, and networks of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refitted import Batches, kept, pruned, refit
from torch import Tensor, nn

import prunec
from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.passes.oracles.mask import slicing_difference


class Convolutions(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


PAIRS = {
    "1d": (nn.Conv1d(3, 8, 3), nn.Conv1d(8, 5, 3, padding="same"), (4, 3, 30)),
    "2d": (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, (3, 2), 2, (1, 0), (1, 2)), (4, 3, 14, 15)),
    "3d": (nn.Conv3d(2, 6, 1), nn.Conv3d(6, 4, (1, 2, 2)), (3, 2, 4, 6, 5)),
    "groups": (nn.Conv2d(3, 12, 3), nn.Conv2d(12, 6, 3, groups=3), (6, 3, 12, 12)),
    "transposed": (
        nn.Conv2d(3, 8, 3),
        nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1, dilation=2),
        (6, 3, 11, 12),
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_convolution_is_refitted_on_its_patches(kind: str) -> None:
    torch.manual_seed(0)
    first, second, shape = PAIRS[kind]
    model = Convolutions(first, second).double().eval()
    data: Batches = [{"x": torch.randn(shape, dtype=torch.float64)} for _ in range(3)]
    coupling = couple(trace(model, data[0]))
    result = pruned(coupling, data, {"conv_channel"})
    name = "second.weight"
    channels = 0 if kind == "transposed" else 1
    keep = kept(result, coupling, name, channels)
    weight = model.second.weight.detach()
    groups = model.second.groups
    outputs = weight.shape[1] if channels == 0 else len(weight)
    for group in range(groups):
        rows, made = [], []
        for batch in data:
            x = model.first(batch["x"]).relu().detach()
            y = model.second(x).detach() - model.second.bias.detach().view(-1, *[1] * (x.ndim - 2))
            of_group = y.flatten(2).unflatten(1, (groups, -1))[:, group]  # [n, out, positions]
            made.append(of_group.transpose(1, 2).flatten(0, 1))
            rows.append(_patches(model.second, x, group))
        x, y = torch.cat(rows), torch.cat(made)
        expected = refit(x, y, keep.repeat_interleave(weight[0, 0].numel()))
        found = result.weights[name]
        if channels == 0:
            found = found.transpose(0, 1)
        found = found[group * outputs // groups : (group + 1) * outputs // groups].flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    example = coupling.program.example
    assert slicing_difference(coupling, result.selection, result.weights, example) < 1e-9


def _patches(layer: nn.Module, x: Tensor, group: int) -> Tensor:
    """``[positions, columns]`` of one group, by laying each element of a kernel over the input."""
    weight = layer.weight.detach()
    transposed = isinstance(layer, nn.ConvTranspose2d)
    per = (weight.shape[1] if transposed else len(weight)) // layer.groups
    columns = []
    probe = torch.zeros_like(weight)
    first = (slice(None), 0) if transposed else (group * per,)
    for index in np.ndindex(*probe[first].shape):
        probe.zero_()
        probe[first][index] = 1.0
        y = torch.func.functional_call(
            layer, {"weight": probe, "bias": torch.zeros_like(layer.bias)}, (x,)
        )
        columns.append(y[:, 0 if transposed else group * per].flatten())
    return torch.stack(columns, dim=1)


class Network(nn.Module):
    """Convolutions in a row, one of them depthwise, with norms; then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.wide, self.narrow = nn.Conv2d(24, 48, 1, bias=False), nn.Conv2d(48, 32, 3)
        self.first, self.second, self.third = (nn.BatchNorm2d(n) for n in (24, 24, 48))
        self.head = nn.Linear(32 * 9, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.depthwise(self.first(self.stem(x)).relu())).relu()
        x = self.third(self.wide(x)).relu()
        return self.head(F.adaptive_avg_pool2d(self.narrow(x).relu(), 3).flatten(1))


@pytest.mark.parametrize("recipe", ["slimgpt", "slimllm", "flap-no-bias", "wanda-sp", "magnitude"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_a_network_of_convolutions_meets_its_ratio(recipe: str, ratio: float) -> None:
    model = Network().eval()
    data = [{"x": torch.randn(4, 3, 8, 8)} for _ in range(3)]
    before = sum(parameter.numel() for parameter in model.parameters())
    result = prunec.prune(model, recipe=recipe, ratio=ratio, calibration=data)
    after = sum(parameter.numel() for parameter in result.model.parameters())
    assert 1 - after / before == pytest.approx(ratio, abs=0.005)
    assert result.report.realised_ratio == pytest.approx(1 - after / before)
    assert not result.report.skipped
    assert len(result.report.sites) == 3
    assert result.model(data[0]["x"]).shape == (4, 7)


def test_compensation_helps_a_network_of_convolutions() -> None:
    model = Network().eval()
    data = [{"x": torch.randn(4, 3, 8, 8)} for _ in range(6)]
    errors = []
    for compensation in ("none", "obs", "least-squares"):
        result = prunec.prune(
            model,
            recipe="slimgpt",
            ratio=0.4,
            calibration=data,
            settings={"compensation": compensation},
        )
        program = result.program
        errors.append(sum(float((program.run(**b) - model(b["x"])).square().sum()) for b in data))
    assert max(errors[1:]) < 0.7 * errors[0]

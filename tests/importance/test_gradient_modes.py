"""What a model computes without gradients has none: against plain reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from prunec.graph.trace import trace_loss
from prunec.importance.gradients import gradient_statistics
from prunec.importance.statistics import statistic_of

Gate = Callable[[nn.Module, Tensor], Tensor]


def without(gate: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.sigmoid(gate(x))


def detached(gate: nn.Module, x: Tensor) -> Tensor:
    return torch.sigmoid(gate(x)).detach()


def regained(gate: nn.Module, x: Tensor) -> Tensor:
    """Gradients within a region that has none, by way of autocast."""
    with torch.no_grad():
        lost = gate(x)
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            kept = torch.sigmoid(gate(x) + lost)
    return kept


def plain(gate: nn.Module, x: Tensor) -> Tensor:
    return torch.sigmoid(gate(x))


class Gated(nn.Module):
    """Blocks whose gates are computed in one of these ways."""

    def __init__(self, gate: Gate):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
        self._gate = gate
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for up, gate, down in zip(self.up, self.gate, self.down, strict=True):
            x = x + down(up(x) * self._gate(gate, x))
        return x


def energy(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = model(inputs["x"]).sin().square().mean()
    return result


@pytest.mark.parametrize("gate", [without, detached, regained, plain])
def test_gradients_are_those_of_plain_reverse_mode(gate: Gate) -> None:
    model = Gated(gate)
    sample = {"x": torch.randn(2, 4, generator=torch.manual_seed(1), dtype=torch.float64)}
    parameters = dict(model.requires_grad_(True).named_parameters())
    truth = torch.autograd.grad(energy(model, sample), [*parameters.values()], allow_unused=True)
    assert any(gradient is None for gradient in truth) == (gate in (without, detached))
    model.requires_grad_(False)
    program = trace_loss(model, energy, sample)
    axes = [(name, 0) for name in parameters]
    found = gradient_statistics(program, [sample], ["weight_grad"], axes)
    for (name, parameter), gradient in zip(parameters.items(), truth, strict=True):
        wanted = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(found[statistic_of("weight_grad", name)], wanted)

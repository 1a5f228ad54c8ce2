"""Inputs that break formulas: every criterion gives a whole, finite curve, or one clear error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from sites import attention, channels, weight_of
from torch import Tensor, nn

import prunec
from prunec.errors import VerifyError
from prunec.importance.fisher import Fisher
from prunec.importance.influence import DepthCriterion
from prunec.importance.problem import SiteProblem
from prunec.importance.statistics import collector, statistic_of
from prunec.importance.taylor import Taylor
from prunec.registry import names, plugin

INPUTS = {
    "rank deficient": lambda x: x[:3].repeat(7, 1),
    "all zero": torch.zeros_like,
    "duplicated columns": lambda x: x[:, :1].expand(-1, x.shape[1]).clone(),
    "huge": lambda x: x * 1e18,
    "one huge column": lambda x: torch.cat((x[:, :1] * 1e12, x[:, 1:]), dim=1),
    "tiny": lambda x: x * 1e-18,
    "constant": lambda x: torch.ones_like(x) * 3,
    "one token": lambda x: x[:1],
}


def feed_forward() -> SiteProblem:
    site = channels(10)
    rows = np.arange(10).reshape(1, 10, 1)
    (unit_set,) = site.unit_sets
    whole = replace(unit_set, positions={("gate", 0): rows, **unit_set.positions})
    parameters = {"gate": weight_of(10, 3, seed=5), **site.parameters}
    producers = (("gate", 0), ("up", 0))
    return replace(
        site,
        unit_sets=(whole,),
        parameters=parameters,
        producers=producers,
        readers=(("down", 1),),
    )


def heads() -> SiteProblem:
    producers = (("q", 0), ("k", 0), ("v", 0))
    return replace(attention(3, 2, 2), producers=producers, readers=(("o", 1),))


def statistics_of(problem: SiteProblem, x: Tensor, kinds: frozenset[str]) -> dict[str, Tensor]:
    """What streaming collectors make of these activations, and gradients of the same kind."""
    found: dict[str, Tensor] = {}
    for name in ("input_gram", "input_mean", "input_square", "input_var"):
        if name in kinds:
            statistic = collector(name, site="site")
            statistic.update(x)
            found[name] = statistic.finish()
    for parameter, _ in problem.producers:
        width = problem.parameters[parameter].shape[1]
        found[statistic_of("producer_square", parameter)] = x[:, :width].double().square().mean(0)
    for axis in dict.fromkeys(axis for s in problem.unit_sets for axis in s.positions):
        length = problem.parameters[axis[0]].shape[axis[1]]
        slope = x.double().mean(0).repeat(9)[:length]
        for name in ("taylor_vector", "taylor_element1", "taylor_element2", "taylor_mixed"):
            found[statistic_of(name, *axis)] = slope.abs()
        found[statistic_of("mask_grad", *axis)] = slope[None]
    return found


CRITERIA = {
    **{
        name: plugin("importance", name)
        for name in names("importance")
        if not isinstance(plugin("importance", name)(), DepthCriterion)
    },
    "mixed": lambda: Taylor("mixed"),
    "masks": lambda: Fisher("masks"),
    "swapping obs": lambda: plugin("importance", "obs")(swap=True),
    "diagonal obs": lambda: plugin("importance", "obs")(score="diagonal", damping=0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.filterwarnings("ignore:.*singular.*")
def test_every_criterion_ranks_whatever_comes(criterion: str, kind: str, dtype) -> None:
    chosen = CRITERIA[criterion]()
    for problem in (feed_forward(), heads()):
        generator = torch.Generator().manual_seed(0)
        columns = problem.weight.shape[1]
        x = INPUTS[kind](torch.randn(21, columns, generator=generator))
        if dtype == torch.float16:
            x = x.clamp(-6e4, 6e4)
        statistics = statistics_of(problem, x.to(dtype), chosen.statistics)
        problem = replace(problem, weight=problem.weight.to(dtype))
        curve = chosen.rank(problem, statistics)
        whole = problem.size({s.group: s.units for s in problem.unit_sets})
        least = problem.size({s.group: s.minimum for s in problem.unit_sets})
        assert curve.parameters[-1] == whole - least
        assert np.isfinite(curve.loss).all()
        assert (curve.loss > -1e-6 * max(1.0, float(np.abs(curve.loss).max()))).all()
        part = chosen.rank(problem, statistics, limit=(whole - least) // 2)
        assert np.isfinite(part.loss).all()


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)) for _ in range(2)
        )
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.leave(x)


def energy(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(inputs["x"]).float().square().mean()


@pytest.mark.parametrize("importance", ["obs", "taylor", "slimllm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_one_token_prune_end_to_end(importance: str, dtype) -> None:
    compensation = "obs" if importance == "obs" else "none"
    result = prunec.prune(
        Net(dtype),
        recipe="slimgpt",
        ratio=0.3,
        calibration=[{"x": torch.ones(1, 1, 4, dtype=dtype)}],
        settings={"importance": importance, "compensation": compensation},
        loss=energy,
    )
    assert result.report.realised_ratio == pytest.approx(0.3, abs=0.05)
    for tensor in result.model.state_dict().values():
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()


def test_an_overflowing_half_precision_activation_is_one_error() -> None:
    model = Net(torch.float16)
    model.enter.weight.fill_(6e4)
    with pytest.raises(VerifyError, match="NaN or Inf"):
        prunec.prune(
            model, ratio=0.3, calibration=[{"x": torch.ones(1, 5, 4, dtype=torch.float16) * 100}]
        )

"""Targets between whole units: the nearest total that there is, by trying all of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.importance.curves import Removal, RemovalCurve
from prunec.passes.allocation.uniform import Uniform
from prunec.passes.sites import Site, find_sites
from prunec.passes.targets.budget import Budget
from prunec.passes.targets.constraints import Constraints
from prunec.passes.targets.goal import Goal
from prunec.passes.targets.question import block_budget
from prunec.passes.targets.target import Target


class Block(nn.Module):
    def __init__(self, width: int, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(8, width, bias=bias)
        self.gate = nn.Linear(8, width, bias=bias) if gated else None
        self.down = nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = F.relu(self.up(x))
        return x + self.down(up if self.gate is None else up * self.gate(x))


class Blocks(nn.Module):
    """A unit of the four blocks has 26, 16, 24 and 17 parameters."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((6, True, True), (9, False, False), (5, True, False), (7, False, True))
        self.blocks = nn.ModuleList(Block(n, gated=g, bias=b) for n, g, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def coupling() -> CouplingGraph:
    return couple(trace(Blocks().eval(), {"x": torch.randn(2, 8)}))


def spent(budget: Budget, sites: list[Site], units: Mapping[str, int]) -> None:
    """Every site gives what it is asked for, of units that cost this much."""
    for site in sites:
        (group,) = site.groups
        count = group.size - group.minimum
        removals = tuple(Removal(group.name, (unit,)) for unit in range(count))
        cost = np.arange(1, count + 1) * units[site.name]
        budget.choose(site, RemovalCurve(removals, np.arange(1.0, count + 1), cost))
    budget.close()


@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_the_nearest_total_is_found_or_named(coupling: CouplingGraph, multiple: int) -> None:
    sites, _ = find_sites(coupling, ("ffn_channel",))
    limits = Constraints({"ffn_channel": multiple})
    cost = dict(zip([site.name for site in sites], (26, 16, 24, 17), strict=True))
    gives = []
    for site in sites:
        (group,) = site.groups
        kept = range(limits.least(group), group.size + 1, limits.step(group))
        gives.append([(group.size - n) * cost[site.name] for n in kept])
    totals = np.unique([sum(counts) for counts in itertools.product(*gives)])
    whole = 26 * 6 + 16 * 9 + 24 * 5 + 17 * 7
    refused = 0
    for wanted in range(int(totals[0]), int(totals[-1]) + 1):
        goal = Goal.on(coupling, Target.parse(f"params={whole - wanted}"))
        budget = block_budget(coupling, sites, Uniform(), goal, constraints=limits)
        nearest, said = np.abs(totals - wanted).min(), ""
        try:
            spent(budget, sites, cost)
        except PlanError as error:
            said = str(error.so)
            refused += 1
        assert abs(budget.removed - wanted) <= max(nearest, goal.tolerance), (wanted, totals)
        assert bool(said) == (nearest > goal.tolerance)
        left = f"come to is {whole - budget.removed:,.0f} parameters left"
        assert not said or (said.startswith("the nearest") and left in said)
    assert refused, "every total was met: nothing was tried"

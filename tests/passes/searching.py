"""A tiny model that allocations search on, surveyed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor

from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.passes.allocation.context import Context
from prunec.passes.allocation.search import Search
from prunec.passes.allocation.survey import DenseSurvey
from prunec.passes.allocation.uniform import Allocation
from prunec.passes.recipe import load_recipe
from prunec.passes.setup import Setup
from prunec.passes.sites import Site, find_sites
from prunec.passes.slice import Weights
from prunec.passes.targets.budget import Budget
from prunec.passes.targets.constraints import Constraints
from prunec.passes.targets.question import block_budget

SMALL = {"fit_tokens": 200, "held_tokens": 100, "levels": 4}


def batches(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (2, 16), generator=generator)}
        for _ in range(count)
    ]


@cache
def surveyed() -> tuple[CouplingGraph, list[Site], DenseSurvey]:
    coupling = couple(trace(tiny_llama(), batches()[0]))
    sites, _ = find_sites(coupling, load_recipe("auto").units)
    return coupling, sites, DenseSurvey(setup_of(coupling, sites))


def setup_of(coupling: CouplingGraph, sites: Sequence[Site]) -> Setup:
    recipe = load_recipe("auto")
    criterion = recipe.importance.build("importance")
    compensation = recipe.compensation.build("compensation")
    return Setup(coupling, sites, criterion, compensation, batches(), Weights(coupling))


def budget(allocation: Allocation, ratio: float, limits: Constraints | None = None) -> Budget:
    coupling, sites, survey = surveyed()
    return block_budget(coupling, sites, allocation, ratio, survey=survey, constraints=limits)


@cache
def searched() -> Allocation:
    """An allocation that repeats what one normal search found."""
    found = shares(budget(Search(**SMALL), 0.4))
    return Fixed(tuple(found))


@dataclass(frozen=True)
class Fixed:
    """Shares as given."""

    given: tuple[int, ...]
    needs_data: ClassVar[bool] = False

    def shares(self, context: Context) -> dict[str, float]:
        return {r.site: float(n) for r, n in zip(context.rooms, self.given, strict=True)}


def shares(made: Budget) -> list[int]:
    return [made.share(site) for site in surveyed()[1]]

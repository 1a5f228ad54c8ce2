"""Search: exact dynamic programming, a pool that never loses, and the whole on a tiny model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor

from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.passes.allocation.context import Context, Room
from prunec.passes.allocation.evolution import Pool, evolve
from prunec.passes.allocation.levels import cheapest_levels, stitch
from prunec.passes.allocation.search import Search, perturbed, spared
from prunec.passes.allocation.survey import DenseSurvey
from prunec.passes.allocation.trials import split
from prunec.passes.allocation.uniform import Allocation, LogIncrease
from prunec.passes.recipe import load_recipe
from prunec.passes.setup import Setup
from prunec.passes.sites import Site, find_sites
from prunec.passes.slice import Weights
from prunec.passes.targets.budget import Budget, block_budget
from prunec.passes.targets.constraints import Constraints

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
    recipe = load_recipe("auto")
    sites, _ = find_sites(coupling, recipe.units)
    criterion = recipe.importance.build("importance")
    compensation = recipe.compensation.build("compensation")
    setup = Setup(coupling, sites, criterion, compensation, batches(), Weights(coupling))
    return coupling, sites, DenseSurvey(setup)


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


site_levels = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.floats(0, 10)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(site_levels, st.integers(0, 18))
def test_dynamic_programming_equals_exhaustive_search(
    sites: list[list[tuple[int, float]]], need: int
) -> None:
    costs = [np.array([cost for cost, _ in levels]) for levels in sites]
    losses = [np.array([loss for _, loss in levels]) for levels in sites]
    choices = itertools.product(*(range(len(levels)) for levels in sites))

    def total(of: Sequence[np.ndarray], genes: Sequence[int]) -> float:
        return float(sum(values[level] for values, level in zip(of, genes, strict=True)))

    enough = [total(losses, genes) for genes in choices if total(costs, genes) >= need]
    if not enough:
        with pytest.raises(ValueError, match="do not add up"):
            cheapest_levels(losses, costs, need)
        return
    found = cheapest_levels(losses, costs, need)
    assert total(costs, found) >= need
    assert total(losses, found) == pytest.approx(min(enough), abs=1e-12)


def test_the_pool_keeps_the_best_and_its_bounds() -> None:
    scores = {1.0: 3.0, 2.0: 1.0, 3.0: 2.0, 9.0: None}
    tried: list[float] = []

    def trial(candidate: Mapping[str, float]) -> float:
        tried.append(candidate["a"])
        score = scores[candidate["a"]]
        if score is None:
            raise PlanError("cannot be met")
        return score

    pool = Pool(trial, most=4)
    for value in (9.0, 1.0, 2.0, 2.0, 3.0, 1.5):
        pool.try_({"a": value})
    assert tried == [9.0, 1.0, 2.0, 3.0]
    assert pool.best == {"a": 2.0}
    assert not pool.open


def test_a_pool_out_of_time_still_tries_one() -> None:
    pool = Pool(lambda shares: shares["a"], most=4, deadline=time.monotonic() - 1)
    pool.try_({"a": 2.0})
    pool.try_({"a": 1.0})
    assert pool.best == {"a": 2.0}


def test_evolution_finds_the_bottom_of_a_bowl_and_never_leaves_the_best_parent() -> None:
    goal = (3, 1, 4, 1)
    generator = np.random.default_rng(0)

    def mutate(genes: tuple[int, ...]) -> tuple[int, ...]:
        child = list(genes)
        child[int(generator.integers(len(child)))] += int(generator.choice([-1, 1]))
        return tuple(child)

    def score(genes: tuple[int, ...], generation: int) -> float:
        return sum((a - b) ** 2 for a, b in zip(genes, goal, strict=True))

    found = evolve([(0, 0, 0, 0)], mutate=mutate, score=score, generations=40, children=8)
    assert found == goal
    stays = evolve([goal], mutate=mutate, score=score, generations=5, children=8)
    assert stays == goal


def test_sparing_one_kind_leaves_the_other() -> None:
    rooms = [
        Room("a", "0", 10, 8, ("head",)),
        Room("f", "0", 30, 28, ("ffn_channel",)),
    ]
    found = spared({"a": 4.0, "f": 6.0}, rooms)
    assert found[0] == {"a": 4.0, "f": 6.0}
    assert {"a": 0.0, "f": 6.0} in found
    assert {"a": 4.0, "f": 3.0} in found
    drawn = [perturbed(found[0], rooms, np.random.default_rng(0)) for _ in range(2)]
    assert drawn[0] == drawn[1] != found[0]


def test_never_worse_than_log_increase_on_its_own_objective() -> None:
    trials = surveyed()[2].trials(fit_tokens=200, held_tokens=100)
    found = trials.repruned(budget(searched(), 0.4))
    start = trials.repruned(budget(LogIncrease(), 0.4))
    assert found < start


def test_the_same_seed_gives_the_same_shares_and_they_meet_the_target() -> None:
    first = shares(budget(searched(), 0.4))
    # What is repeated was rounded to whole parameters.
    assert first == pytest.approx(shares(budget(Search(**SMALL), 0.4)), abs=1)
    assert sum(first) == pytest.approx(sum(shares(budget(LogIncrease(), 0.4))), abs=len(first))


def test_searched_shares_obey_constraints() -> None:
    limits = Constraints(maximum=0.5, protect=("0",))
    _, sites, _ = surveyed()
    made = budget(Search(effort="fast", **SMALL), 0.2, limits)
    for site in sites:
        most = 0.0 if site.block == "model.layers.0" else 0.5
        assert made.share(site) <= most * made.account(site).parameters + 1


def test_no_minutes_give_the_start() -> None:
    short = budget(Search(minutes=1e-6, **SMALL), 0.4)
    assert shares(short) == shares(budget(LogIncrease(), 0.4))


def test_level_zero_everywhere_is_the_dense_model_and_more_is_farther() -> None:
    coupling, sites, survey = surveyed()
    trials = survey.trials(fit_tokens=200, held_tokens=100, levels=4)
    assert trials.stitched({site.name: 0 for site in sites}) == pytest.approx(0, abs=1e-6)
    last = {site.name: len(trials.levels[site.name].removed) - 1 for site in sites}
    assert trials.stitched(last) > trials.stitched({site.name: 1 for site in sites}) > 0
    assert stitch(coupling, []).selection.counts == {}
    for levels in trials.levels.values():
        assert levels.removed[0] == 0
        assert (np.diff(levels.removed) > 0).all()
        assert (np.diff(levels.loss) >= 0).all()


def test_no_batch_is_both_fitted_and_judged_on() -> None:
    data = batches(16)
    fit, held = split(data, fit_tokens=10**9, held_tokens=10**9)
    assert len(fit) == 12
    assert len(held) == 4
    assert not {id(batch) for batch in fit} & {id(batch) for batch in held}
    few, one = split(data, fit_tokens=64, held_tokens=1)
    assert len(few) == 2
    assert len(one) == 1
    assert split(data[:1], fit_tokens=1, held_tokens=1) == (data[:1], data[:1])


@pytest.mark.parametrize(
    "options", [{"effort": "slow"}, {"minutes": 0}, {"levels": 1}, {"held_tokens": 0}]
)
def test_options_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(PlanError, match=r"^search"):
        Search(**options)

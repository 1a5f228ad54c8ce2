"""What a search is made of: exact dynamic programming, a pool that never loses, its steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import surveyed

from prunec.errors import PlanError
from prunec.passes.allocation.context import Context
from prunec.passes.allocation.evolution import Pool, evolve
from prunec.passes.allocation.levels import cheapest_levels
from prunec.passes.allocation.search import bend, spare, waved
from prunec.passes.allocation.space import Space
from prunec.passes.targets.room import Room

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


def test_a_pool_begins_no_trial_that_would_end_late() -> None:
    left = iter([-1.0])
    late = Pool(lambda shares: shares["a"], 4, lambda: next(left))
    assert late.try_({"a": 2.0})
    assert not late.try_({"a": 1.0})
    assert late.best == {"a": 2.0}

    def slow(shares: Mapping[str, float]) -> float:
        time.sleep(0.02)
        return shares["a"]

    pool = Pool(slow, 4, lambda: 0.05)
    assert pool.try_({"a": 2.0})
    assert pool.affords(1)
    assert not pool.affords(3)


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


ROOMS = [
    Room("a", "0", 10, 8, ("head",), 12),
    Room("f", "0", 30, 28, ("ffn_channel",), 33),
    Room("b", "1", 10, 8, ("head",), 12),
    Room("g", "1", 30, 28, ("ffn_channel",), 33),
]


def space() -> Space:
    context = Context(0.25, {"0": 40, "1": 40}, ROOMS)
    return Space(context, surveyed()[2].trials(fit_tokens=200, held_tokens=100))


START = {"a": 3.0, "f": 7.0, "b": 3.0, "g": 7.0}


def searched_by(
    step: Callable[[Pool], None], score: Callable[[Mapping[str, float]], float]
) -> Mapping[str, float]:
    pool = Pool(score, 60)
    step(pool)
    return pool.best


def test_the_kind_that_is_better_spared_is_found() -> None:
    for goal in (6.0, 3.0, 1.5, 0.0):
        found = searched_by(
            lambda pool: spare(pool, space(), START),
            lambda s, goal=goal: abs(s["a"] + s["b"] - goal),
        )
        assert found["a"] + found["b"] == pytest.approx(goal, abs=0.6)
        assert sum(found.values()) == pytest.approx(20)
    found = searched_by(lambda pool: spare(pool, space(), START), lambda s: s["f"] + s["g"])
    assert found["f"] + found["g"] == pytest.approx(4)


def test_waves_find_a_slope() -> None:
    def score(shares: Mapping[str, float]) -> float:
        return abs(shares["f"] - 9) + abs(shares["a"] - 3) + abs(shares["b"] - 3)

    def step(pool: Pool) -> None:
        pool.try_(START)
        bend(pool, space())

    found = searched_by(step, score)
    assert found["f"] == pytest.approx(9, abs=0.5)
    assert sum(found.values()) == pytest.approx(20)


def test_branches_that_are_left_out_stay_so() -> None:
    found = space().scaled({"a": 12.0, "f": 4.0, "b": 1.0, "g": 2.0})
    assert found["a"] == 12
    assert sum(found.values()) == pytest.approx(20)
    changed = waved(found, ROOMS, ("head",), 0, 1.0)
    assert changed["a"] == 12
    assert changed["b"] > found["b"]
    assert space().scaled({"a": 13.0, "f": 4.0, "b": 1.0, "g": 2.0})["a"] <= 8

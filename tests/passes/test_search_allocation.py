"""Search: exact dynamic programming, a pool that never loses, and the whole on a tiny model."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor, nn

import prunec
from prunec.errors import CheckpointError, PlanError
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.passes.allocation.context import Context, Room
from prunec.passes.allocation.evolution import Pool, evolve
from prunec.passes.allocation.levels import cheapest_levels, stitch
from prunec.passes.allocation.search import Search, bend, spare, waved
from prunec.passes.allocation.space import Space
from prunec.passes.allocation.survey import DenseSurvey
from prunec.passes.allocation.trials import split
from prunec.passes.allocation.uniform import Allocation, LogIncrease
from prunec.passes.depth import drop
from prunec.passes.plan import Plan
from prunec.passes.prune import prune_sites
from prunec.passes.recipe import load_recipe
from prunec.passes.setup import Setup
from prunec.passes.sites import Site, find_sites
from prunec.passes.slice import Weights
from prunec.passes.targets.budget import Budget, block_budget, block_parameters
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


def test_no_minutes_give_the_guess_that_needs_no_trial() -> None:
    short = shares(budget(Search(minutes=1e-6, **SMALL), 0.4))
    start = shares(budget(LogIncrease(), 0.4))
    assert sum(short) == pytest.approx(sum(start), abs=len(start))
    for attention, ffn in ((0, 1), (2, 3)):
        assert short[attention] < start[attention]
        assert short[ffn] >= start[ffn]


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


@dataclass(frozen=True)
class LeavesOut:
    """One branch goes whole, the first FFN gives the rest."""

    branch: int
    needs_data: ClassVar[bool] = False

    def shares(self, context: Context) -> dict[str, float]:
        need = context.target * sum(context.blocks.values())
        gone = context.rooms[self.branch]
        ffn = next(room for room in context.rooms if "ffn_channel" in room.kinds)
        return {gone.site: gone.branch, ffn.site: need - gone.branch}


@pytest.mark.parametrize("branch", [2, 3])
def test_a_share_of_the_whole_branch_leaves_it_out(branch: int) -> None:
    coupling, sites, _ = surveyed()
    made = budget(LeavesOut(branch), 0.35)
    assert len(made.dropped) == 1
    pruned = prune_sites(setup_of(coupling, sites), made)
    shorter = drop(coupling, made.dropped)
    plan = Plan.of(coupling, pruned.selection, made.dropped)
    left = sum(block_parameters(shorter, plan.selection(shorter).counts).values())
    total = sum(block_parameters(coupling).values())
    assert total - left == made.removed
    assert made.removed / total == pytest.approx(0.35, abs=0.004)
    assert set(pruned.sites[branch].kept.values()) == {0}
    # The stream is silenced where the delivered model lacks the branch.
    weights = Weights(shorter)
    weights.select(plan.selection(shorter), {n: pruned.weights[n] for n in shorter.program.state})
    streams = [present.stream(batches(2)) for present in (pruned.weights, weights)]
    for silent, without in zip(*(stream.finish() for stream in streams), strict=True):
        torch.testing.assert_close(silent, without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", [2, 3])
def test_a_run_that_leaves_a_branch_out_is_delivered(
    branch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "shares", lambda _, context: LeavesOut(branch).shares(context))
    result = prunec.prune(tiny_llama(), recipe="auto", ratio=0.35, calibration=batches())
    assert len(result.plan.dropped) == 1
    assert result.plan.groups
    assert result.report.realised_ratio == pytest.approx(0.35, abs=0.004)
    assert any("dropping equals silencing" in check for check in result.report.checks)


def test_the_last_level_of_a_branch_costs_all_its_output() -> None:
    _, sites, survey = surveyed()
    branches = {site.name: 10**6 for site in sites[:2]}
    trials = survey.trials(fit_tokens=200, held_tokens=100, levels=4, branches=branches)
    for site in sites:
        levels = trials.levels[site.name]
        assert (levels.removed[-1] == 10**6) == (site.name in branches)
        assert (np.diff(levels.loss) >= 0).all()
    last = {site.name: len(trials.levels[site.name].removed) - 1 for site in sites[:2]}
    assert trials.stitched(last) > 0


def test_a_narrower_stream_counts_towards_the_target_and_is_delivered() -> None:
    @dataclass(frozen=True)
    class Narrow:
        needs_data: ClassVar[bool] = False

        def shares(self, context: Context) -> dict[str, float]:
            assert context.narrower
            left = context.narrower(0.75)
            assert left.target < context.target
            assert left.narrower is None
            return {**LogIncrease().shares(left), "hidden": 0.75}

    coupling, sites, _ = surveyed()
    made = budget(Narrow(), 0.5)
    pruned = prune_sites(setup_of(coupling, sites), made)
    before = sum(block_parameters(coupling).values())
    left = sum(block_parameters(coupling, pruned.selection.counts).values())
    assert 1 - left / before == pytest.approx(0.5, abs=0.003)
    hidden = next(group for group in coupling.groups if group.kind == "hidden")
    assert pruned.selection.counts[hidden.dim.root] == round(0.75 * hidden.size)
    with pytest.raises(PlanError, match="narrower residual stream"):
        budget(Narrow(), 0.05)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_run_that_searches_is_delivered_and_meets_its_target(hidden: bool) -> None:
    settings = {"allocation.minutes": None, "allocation.effort": "fast"}
    settings |= {f"allocation.{key}": value for key, value in SMALL.items()}
    result = prunec.prune(
        tiny_llama(),
        recipe="auto",
        ratio=0.4,
        calibration=batches(),
        settings=settings | {"allocation.hidden": hidden},
    )
    assert result.report.realised_ratio == pytest.approx(0.4, abs=0.005)


def test_a_run_that_goes_on_searches_no_second_time(tmp_path: Path) -> None:
    """What the journal holds is used: with other shares in it, others are asked for."""
    options = {"allocation.effort": "fast", "allocation.minutes": None}
    options |= {f"allocation.{key}": value for key, value in SMALL.items()}

    def run(model: nn.Module, *, resume: bool) -> prunec.api.Result:
        return prunec.prune(
            model,
            recipe="auto",
            settings=options,
            ratio=0.4,
            calibration=batches(),
            checkpoint=tmp_path / "progress",
            resume=resume,
        )

    first = run(tiny_llama(), resume=False)
    kept = tmp_path / "progress" / "shares.json"
    shares = json.loads(kept.read_text())
    kept.write_text(json.dumps(dict(zip(shares, reversed(shares.values()), strict=True))))
    for site in (tmp_path / "progress").glob("[0-9]*-*"):
        site.unlink()
    again = run(tiny_llama(), resume=True)
    wanted = [[site.wanted for site in result.report.sites] for result in (first, again)]
    assert wanted[0] != wanted[1]
    kept.write_text("[")
    with pytest.raises(CheckpointError):
        run(tiny_llama(), resume=True)

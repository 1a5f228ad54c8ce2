"""Curves, survivors and the static criteria that fill them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sites import attention, channels, crossing, gram_of

from prunec.errors import PlanError, VerifyError
from prunec.importance.curves import Removal, RemovalCurve, Survivors
from prunec.importance.fluctuation import Fluctuation
from prunec.importance.magnitude import Magnitude
from prunec.importance.obs import Obs
from prunec.importance.problem import UnitSet
from prunec.importance.random import Random
from prunec.importance.wanda import Wanda
from prunec.registry import plugin


def curve_of(*parameters: int) -> RemovalCurve:
    removals = tuple(Removal("g", (i,)) for i in range(len(parameters)))
    return RemovalCurve(removals, np.zeros(len(parameters)), np.array(parameters, dtype=np.int64))


@pytest.mark.parametrize(
    ("parameters", "steps"), [(0, 0), (4, 0), (5, 0), (6, 1), (10, 1), (24, 2), (26, 3), (999, 3)]
)
def test_steps_for_is_the_nearest(parameters, steps):
    assert curve_of(10, 20, 30).steps_for(parameters) == steps


def test_a_curve_without_steps():
    assert curve_of().steps_for(100) == 0


def test_keep_of_heads_and_groups():
    problem = attention()
    removals = (
        Removal("attn/query_head", (2, 0, 1)),
        Removal("attn/kv_group", (1,)),
        Removal("attn/query_head", (0, -1, 2)),
    )
    curve = RemovalCurve(removals, np.zeros(3), np.zeros(3, dtype=np.int64))
    assert curve.keep(problem, 0)["attn/query_head"].all()
    keep = curve.keep(problem, 1)
    assert keep["attn/kv_group"].tolist() == [[True] * 3]
    assert keep["attn/query_head"].tolist() == [
        [True, True, False],
        [False, True, True],
        [True, False, True],
    ]
    keep = curve.keep(problem, 2)
    assert keep["attn/kv_group"].tolist() == [[True, False, True]]
    # The companion that went takes its row along.
    assert keep["attn/query_head"].tolist() == [
        [True, True, False],
        [False, False, False],
        [True, False, True],
    ]
    assert curve.keep(problem, 3)["attn/query_head"].sum(axis=1).tolist() == [1, 0, 1]
    with pytest.raises(PlanError, match="cannot take 4 steps"):
        curve.keep(problem, 4)


@pytest.mark.parametrize("criterion", [Obs(), Magnitude(), Random(), Wanda(), Fluctuation()])
@pytest.mark.parametrize(
    "problem", [attention(), attention(2, 5), crossing(), crossing(3, 2), channels(9, minimum=2)]
)
def test_every_curve_goes_down_to_the_minimum_and_counts_exactly(criterion, problem):
    columns = problem.weight.shape[1]
    gram = gram_of(columns)
    statistics = {"input_gram": gram, "input_square": gram.diagonal(), "input_var": gram.diagonal()}
    curve = criterion.rank(problem, {name: statistics[name] for name in criterion.statistics})
    full = {s.group: s.units for s in problem.unit_sets}
    for steps in range(len(curve.removals) + 1):
        keep = curve.keep(problem, steps)
        counts = {}
        for s in problem.unit_sets:
            # Equal count in every row that is left.
            (counts[s.group],) = {int(row.sum()) for row in keep[s.group] if row.any()}
        removed = 0 if steps == 0 else curve.parameters[steps - 1]
        assert removed == problem.size(full) - problem.size(counts)
        if "attn/kv_group" in keep:
            rows = keep["attn/query_head"].any(axis=1)
            assert (rows == keep["attn/kv_group"][0]).all()
    assert counts == {s.group: s.minimum for s in problem.unit_sets}
    assert (np.diff(curve.loss) >= 0).all()
    assert (np.diff(curve.parameters) > 0).all()
    assert curve.loss.dtype == np.float64
    assert curve.parameters.dtype == np.int64
    again = criterion.rank(problem, statistics)
    assert again.removals == curve.removals


@pytest.mark.parametrize("limit", [0, 1, 40, 10**9])
@pytest.mark.parametrize("criterion", [Obs(), Magnitude(), Random()])
def test_limit_stops_early(criterion, limit):
    problem, statistics = attention(), {"input_gram": gram_of(18)}
    whole = criterion.rank(problem, statistics)
    part = criterion.rank(problem, statistics, limit=limit)
    assert part.removals == whole.removals[: len(part.removals)]
    assert len(part.removals) == min(int((whole.parameters < limit).sum()) + (limit > 0), 4)


def test_a_group_that_frees_nothing_is_an_error():
    problem = replace(channels(4), size=lambda counts: 7)
    with pytest.raises(PlanError, match="frees no parameters"):
        Magnitude().rank(problem, {})


def test_overlapping_groups_do_not_count_what_is_gone():
    """Head 0 of group 0 carries all of that group's weight; once it is gone the rest is cheap."""
    problem = attention(kv=2, per=2, dim=1)
    for parameter in problem.parameters.values():
        parameter.fill_(1e-3)
    problem.weight[:, 0] = 100.0
    survivors = Survivors(problem)
    survivors.remove(Removal("attn/query_head", (0, 0)))
    groups, heads = problem.unit_sets
    assert survivors.counts == {"attn/kv_group": 2, "attn/query_head": 1}
    assert survivors.columns.tolist() == [False, True, False, True]
    assert survivors.positions["o", 1].tolist() == [False, True, False, True]
    assert [s.group for s in survivors.removable()] == [groups.group]
    survivors.remove(Removal("attn/kv_group", (0,)))
    assert survivors.open_rows(heads.group).tolist() == [1]
    assert survivors.removable() == []


# Magnitude


def test_magnitude_is_the_norm_of_everything_that_goes():
    problem = channels(7)
    up, down = problem.parameters["up"], problem.parameters["down"]
    for norm, power in (("l2", 2), ("l1", 1)):
        expected = up.abs().pow(power).sum(1) + down.abs().pow(power).sum(0)
        curve = Magnitude(norm=norm).rank(problem, {})
        order = [r.units[0] for r in curve.removals]
        assert order == expected.argsort().tolist()[:-1]
        np.testing.assert_allclose(np.diff(curve.loss, prepend=0), expected[order])


@pytest.mark.parametrize(
    ("aggregation", "fold"),
    [
        ("sum", lambda up, down: up + down),
        ("mean", lambda up, down: (up + down) / 2),
        ("max", torch.maximum),
        ("prod", torch.mul),
        ("first", lambda up, down: up),
        ("last", lambda up, down: down),
    ],
)
def test_magnitude_aggregations(aggregation, fold):
    problem = channels(9)
    expected = fold(
        problem.parameters["up"].square().sum(1), problem.parameters["down"].square().sum(0)
    )
    curve = Magnitude(aggregation=aggregation).rank(problem, {})
    assert [r.units[0] for r in curve.removals] == expected.argsort().tolist()[:-1]


def test_magnitude_compares_heads_with_groups_per_parameter():
    problem = attention(kv=3, per=3)
    curve = Magnitude().rank(problem, {})
    heads = problem.parameters["q"].square().sum(1) + problem.parameters["o"].square().sum(0)
    heads = heads.view(3, 3, 2).sum(2)
    keys = (problem.parameters["k"].square() + problem.parameters["v"].square()).sum(1)
    groups = heads.sum(1) + keys.view(3, 2).sum(1)
    # Dim 2, hidden 7, out 5: a head is 24 parameters, three go at once; a group is 72 + 28.
    by_heads, by_groups = heads.min(1).values.sum() / 72, groups.min() / 100
    first = curve.removals[0]
    if by_heads <= by_groups:
        assert first == Removal("attn/query_head", tuple(heads.argmin(1).tolist()))
    else:
        assert first == Removal("attn/kv_group", (int(groups.argmin()),))
    assert curve.loss[0] == pytest.approx(float(min(heads.min(1).values.sum(), groups.min())))


def test_ties_go_by_index():
    problem = channels(6)
    for parameter in problem.parameters.values():
        parameter.fill_(1.0)
    assert [r.units[0] for r in Magnitude().rank(problem, {}).removals] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"norm": "l3"}, {"aggregation": "median"}])
def test_magnitude_options_that_are_not_possible(options):
    with pytest.raises(PlanError, match=r"^magnitude: "):
        Magnitude(**options)


def test_a_score_that_is_not_finite():
    problem = channels(6)
    problem.parameters["up"][4] = float("nan")
    with pytest.raises(VerifyError, match="score of unit 4 of mlp/ffn_channel is nan"):
        Magnitude().rank(problem, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_magnitude_of_large_half_precision_weights_does_not_overflow(dtype):
    problem = channels(6)
    parameters = {name: (p * 1e4).to(dtype) for name, p in problem.parameters.items()}
    curve = Magnitude().rank(replace(problem, parameters=parameters), {})
    assert np.isfinite(curve.loss).all()


# Random


def test_random_depends_on_the_seed_and_the_group():
    problem = channels(40)
    other = replace(problem, unit_sets=(replace(problem.unit_sets[0], group="mlp/other"),))
    other = replace(other, size=lambda counts: counts["mlp/other"] * 8)
    orders = [
        tuple(r.units[0] for r in Random(seed).rank(site, {}).removals)
        for site, seed in ((problem, 0), (problem, 1), (other, 0))
    ]
    assert len(set(orders)) == 3


def test_random_favours_neither_heads_nor_groups():
    first = [Random(seed).rank(attention(), {}, limit=1).removals[0].group for seed in range(300)]
    assert 100 < first.count("attn/kv_group") < 200


# Wanda, fluctuation


def test_wanda_and_fluctuation_formulas():
    problem, square = channels(8), torch.rand(8, dtype=torch.float64)
    curve = Wanda().rank(problem, {"input_square": square})
    expected = (problem.weight.abs() * square.sqrt()).sum(0)
    assert [r.units[0] for r in curve.removals] == expected.argsort().tolist()[:-1]
    np.testing.assert_allclose(curve.loss, expected.sort().values.cumsum(0)[:-1])
    curve = Fluctuation().rank(problem, {"input_var": square})
    expected = (problem.weight.square() * square).sum(0)
    assert [r.units[0] for r in curve.removals] == expected.argsort().tolist()[:-1]
    np.testing.assert_allclose(curve.loss, expected.sort().values.cumsum(0)[:-1])


# The problem


@pytest.mark.parametrize(
    ("columns", "companions", "minimum"),
    [
        (np.arange(4).reshape(2, 2), (), 1),
        (np.arange(4).reshape(2, 2, 1), (), 1),
        (np.zeros((1, 2, 1), dtype=np.int64), (), 1),
        (np.arange(4).reshape(1, 4, 1), (), 0),
        (np.arange(4).reshape(1, 4, 1), (), 5),
    ],
)
def test_unit_sets_that_are_bugs(columns, companions, minimum):
    with pytest.raises(AssertionError):
        UnitSet("g", companions, columns, {}, minimum)


def test_built_ins_are_plug_ins():
    assert plugin("importance", "obs") is Obs
    assert plugin("importance", "magnitude") is Magnitude
    assert plugin("importance", "random") is Random

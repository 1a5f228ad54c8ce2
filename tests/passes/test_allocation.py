"""Ratios per block."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunec.errors import PlanError
from prunec.passes.allocation.uniform import LogIncrease, Uniform
from prunec.registry import plugin


@pytest.mark.parametrize("allocation", [Uniform(), LogIncrease()])
@settings(deadline=None)
@given(
    blocks=st.integers(1, 80),
    target=st.floats(0, 0.9),
    sizes=st.randoms(use_true_random=False),
)
def test_the_mean_is_the_target(allocation, blocks, target, sizes):
    assert np.mean(allocation.ratios(blocks, target)) == pytest.approx(target, abs=1e-12)
    weights = [sizes.randint(1, 10**9) for _ in range(blocks)]
    ratios = allocation.ratios(blocks, target, sizes=weights)
    assert np.average(ratios, weights=weights) == pytest.approx(target, abs=1e-12)
    assert len(ratios) == blocks
    assert all(0 <= ratio <= 0.9 + 1e-12 for ratio in ratios)
    assert all(a <= b + 1e-12 for a, b in pairwise(ratios))


@pytest.mark.parametrize(("target", "last"), [(0.2, 0.2495), (0.5, 0.635)])
def test_slimgpts_recipe_at_32_blocks(target, last):
    """METHODS 1.4: r_0 = .0625 gives .2495 at 20 %, r_0 = .125 gives .635 at 50 %."""
    ratios = LogIncrease().ratios(32, target)
    assert ratios[0] == pytest.approx(min(0.3125 * target, 0.125))
    assert ratios[-1] == pytest.approx(last, abs=1e-3)


@pytest.mark.parametrize(
    ("target", "first", "last"),
    [
        (0.20, 0.0, 0.272),
        (0.20, 0.0625, 0.2495),
        (0.20, 0.125, 0.227),
        (0.25, 0.0, 0.340),
        (0.25, 0.0625, 0.3175),
        (0.25, 0.125, 0.295),
        (0.33, 0.0, 0.449),
        (0.33, 0.0625, 0.426),
        (0.33, 0.125, 0.404),
        (0.50, 0.0, 0.680),
        (0.50, 0.0625, 0.657),
        (0.50, 0.125, 0.635),
    ],
)
def test_last_ratio_for_a_given_first(target, first, last):
    """The table of METHODS 1.4."""
    assert LogIncrease(first=first).ratios(32, target)[-1] == pytest.approx(last, abs=1e-3)


@pytest.mark.parametrize("blocks", [2, 3, 30, 40])
def test_the_curve_is_equation_6(blocks):
    ratios = LogIncrease(maximum=0.99).ratios(blocks, 0.2)
    first, last = ratios[0], ratios[-1]
    expected = first + (last - first) * np.log(np.arange(blocks) + 1) / np.log(blocks)
    np.testing.assert_allclose(ratios, expected, rtol=1e-12)


def test_clamped_blocks_pass_on_what_they_cannot_give():
    ratios = LogIncrease(maximum=0.6).ratios(10, 0.5)
    assert np.mean(ratios) == pytest.approx(0.5, abs=1e-15)
    assert ratios[-1] == 0.6
    assert ratios.count(0.6) > 1
    assert ratios[0] == 0.125
    free = [r for r in ratios if r < 0.6]
    growth = np.log(np.arange(len(free)) + 1)[1:]
    np.testing.assert_allclose(np.diff((np.array(free[1:]) - 0.125) / growth), 0, atol=1e-12)


def test_the_first_block_gives_more_only_when_all_others_are_at_their_maximum():
    ratios = LogIncrease(maximum=0.6).ratios(4, 0.55)
    assert ratios == pytest.approx([0.4, 0.6, 0.6, 0.6])


@pytest.mark.parametrize(
    ("allocation", "blocks", "target", "largest"),
    [
        (LogIncrease(), 30, 0.95, "90.0%"),
        (LogIncrease(), 1, 0.95, "90.0%"),
        (LogIncrease(maximum=0.5), 12, 0.51, "50.0%"),
        (LogIncrease(first=0.1, maximum=0.5), 4, 0.45, "40.0%"),
    ],
)
def test_too_much_names_the_largest(allocation, blocks, target, largest):
    with pytest.raises(PlanError) as caught:
        allocation.ratios(blocks, target)
    assert caught.value.so == f"the largest ratio it can reach is {largest}"


def test_the_largest_is_reached():
    assert LogIncrease(first=0.1, maximum=0.5).ratios(4, 0.4) == pytest.approx([0.1, 0.5, 0.5, 0.5])
    assert LogIncrease(maximum=0.5).ratios(4, 0.5) == pytest.approx([0.5] * 4)


def test_one_block():
    assert LogIncrease().ratios(1, 0.3) == [0.3]
    assert LogIncrease(first=0.1).ratios(1, 0.3) == [0.3]
    assert Uniform().ratios(1, 0.3) == [0.3]


@pytest.mark.parametrize("allocation", [Uniform(), LogIncrease()])
@pytest.mark.parametrize("target", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_ratio_that_is_none(allocation, target):
    with pytest.raises(PlanError):
        allocation.ratios(4, target)


@pytest.mark.parametrize("allocation", [Uniform(), LogIncrease()])
def test_no_blocks(allocation):
    with pytest.raises(PlanError, match="no block to prune"):
        allocation.ratios(0, 0.2)


@pytest.mark.parametrize("options", [{"first": -0.1}, {"first": 0.95}, {"maximum": 1.5}])
def test_options_that_are_not_possible(options):
    with pytest.raises(PlanError, match=r"^log-increase: "):
        LogIncrease(**options)


def test_a_first_above_the_target():
    with pytest.raises(PlanError, match=r"cannot start at 30.0% to remove 20.0%"):
        LogIncrease(first=0.3).ratios(4, 0.2)


def test_built_ins_are_plug_ins():
    assert plugin("allocation", "uniform") is Uniform
    assert plugin("allocation", "log-increase") is LogIncrease

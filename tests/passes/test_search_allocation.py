"""A search on a tiny model: its objective, its bounds, its settings."""

from __future__ import annotations

import numpy as np
import pytest
from searching import SMALL, batches, budget, searched, shares, surveyed

from prunec.errors import PlanError
from prunec.passes.allocation.levels import stitch
from prunec.passes.allocation.search import Search
from prunec.passes.allocation.trials import split
from prunec.passes.allocation.uniform import LogIncrease
from prunec.passes.targets.constraints import Constraints


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

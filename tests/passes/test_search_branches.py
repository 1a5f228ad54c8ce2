"""Searched runs that leave out branches or features of the stream, and go on after a kill."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from searching import SMALL, batches, budget, setup_of, surveyed
from tiny_model import tiny_llama
from torch import nn

import prunec
from prunec.errors import CheckpointError, PlanError
from prunec.passes.allocation.context import Context
from prunec.passes.allocation.search import Search
from prunec.passes.allocation.uniform import LogIncrease
from prunec.passes.depth import drop
from prunec.passes.plan import Plan
from prunec.passes.prune import prune_sites
from prunec.passes.slice import Weights
from prunec.passes.targets.goal import block_parameters


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

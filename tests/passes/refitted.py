"""Runs on given sites, and what least squares makes of the rows that a weight reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunec.graph.coupling import CouplingGraph
from prunec.importance.obs import Obs
from prunec.passes.compensation.closed_form import ObsCompensation
from prunec.passes.prune import Pruned, prune_sites
from prunec.passes.setup import Setup
from prunec.passes.sites import find_sites
from prunec.passes.slice import Weights
from prunec.passes.targets.question import block_budget
from prunec.registry import plugin

Batches = list[Mapping[str, Tensor]]


def pruned(
    coupling: CouplingGraph,
    data: Batches,
    units: set[str],
    ratio: float = 0.3,
    criterion: object = None,
    compensation: object = None,
) -> Pruned:
    """Exact least squares, with as little damping as works."""
    mend = ObsCompensation(damping=0.0) if compensation is None else compensation
    rank = Obs(damping=0.0) if criterion is None else criterion
    by_weight = not rank.statistics
    sites, skipped = find_sites(coupling, units, by_weight=by_weight)
    assert sites
    assert not skipped
    weights = Weights(coupling, coupling.program.state)
    setup = Setup(coupling, sites, rank, mend, data, weights)
    budget = block_budget(coupling, sites, plugin("allocation", "uniform")(), ratio)
    return prune_sites(setup, budget)


def refit(rows: Tensor, outputs: Tensor, keep: Tensor) -> Tensor:
    """``[out, kept]``: least squares of the outputs on the columns that stay."""
    solved = torch.linalg.lstsq(rows[:, keep], outputs, driver="gelsd")
    return solved.solution.T


def kept(result: Pruned, coupling: CouplingGraph, parameter: str, axis: int) -> Tensor:
    mask = result.selection.mask(coupling.layout.parameters[parameter][axis])
    assert mask is not None
    assert not mask.all()
    return torch.from_numpy(mask)

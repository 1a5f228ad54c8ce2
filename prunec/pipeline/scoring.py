"""Scores of a model's units on data, without removing any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from prunec.calibration import Calibration, collect
from prunec.calibration.given import Batch, forward_inputs
from prunec.errors import PlanError
from prunec.events import Progress, silent
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import Loss, trace
from prunec.importance.influence import DepthCriterion
from prunec.passes.compensation.closed_form import NoCompensation
from prunec.passes.recipe import Part
from prunec.passes.setup import Setup
from prunec.passes.sites import Site, find_sites
from prunec.passes.slice import Weights
from prunec.passes.statistics.dense import GroupScores, dense_sites, score_groups
from prunec.passes.statistics.prior import prior_statistics, reads_no_input

Batches = Calibration | Iterable[Any]
"""What `prunec.calibration.calibrate` gives, or any iterable of inputs by name."""


def model_inputs(model: nn.Module, calibration: Calibration, loss: Loss | None) -> list[Batch]:
    """What the model itself reads of each batch; the rest is read by the loss alone."""
    return [forward_inputs(model, batch, loss=loss is not None) for batch in calibration.batches]


def check_width(criterion: Any) -> None:
    """Raises PlanError for a criterion of whole branches or blocks, which ranks no units inside."""
    if isinstance(criterion, DepthCriterion):
        raise PlanError(
            f"{type(criterion).__name__} ranks branches and blocks, not units inside them",
            fix="prune depth (units=block), or take another importance",
        )


@dataclass(frozen=True)
class Scored:
    """A model's coupling, and what the units of each group are worth on some data.

    Attributes:
        groups: one entry a group that has a site, in graph order.
        calibration: digest and size of the data, as a report holds them.
    """

    coupling: CouplingGraph
    groups: tuple[GroupScores, ...]
    calibration: Mapping[str, Any]


def score(
    model: nn.Module,
    *,
    importance: str | Part,
    calibration: Batches,
    loss: Loss | None = None,
    progress: Progress = silent,
) -> Scored:
    """Score the units of every group of the dense model; nothing is removed.

    Args:
        model: any nn.Module; not changed.
        importance: the name of a criterion, or a Part with its options.
        calibration, loss: as in :func:`prune`.

    Raises:
        PluginError, PlanError: no such criterion, or no such option of it.
        CalibrationError: batches that are none, or that do not fit the model.
        VerifyError: NaN or Inf in the weights or activations.
    """
    part = Part(importance, {}) if isinstance(importance, str) else importance
    criterion = part.build("importance")
    check_width(criterion)
    data = collect(calibration, model)
    batches = model_inputs(model, data, loss)
    with progress.task("trace the model"):
        coupling = couple(trace(model, batches[0]))
    sites = _sites(coupling, by_weight=reads_no_input(criterion))
    names = criterion.statistics
    prior = prior_statistics(model, sites, names, data.batches, loss=loss, progress=progress)
    setup = Setup(
        coupling,
        sites,
        criterion,
        NoCompensation(),
        batches,
        Weights(coupling),
        prior=prior,
        progress=progress,
    )
    scored = [
        group
        for site, problem, statistics in dense_sites(setup, names)
        for group in score_groups(site, problem, criterion, statistics)
    ]
    return Scored(coupling, tuple(scored), data.to_json())


def _sites(coupling: CouplingGraph, *, by_weight: bool) -> list[Site]:
    """Where each group is scored: at the weight that reads it, else, if they do, by its weights."""
    kinds = {group.kind for group in coupling.groups}
    sites, skipped = find_sites(coupling, kinds)
    if not by_weight:
        return sites
    unread = {item.group for item in skipped}
    whole, _ = find_sites(coupling, kinds, by_weight=True)
    apart = [replace(s, groups=tuple(g for g in s.groups if g.name in unread)) for s in whole]
    return [site for site in apart if site.groups] + sites

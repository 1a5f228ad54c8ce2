"""Scores of a model's groups on calibration data: opened, printed, and made colours of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prunec.errors import PlanError

if TYPE_CHECKING:
    from prunec.api import Scored
    from prunec.cli.console import Screen
    from prunec.passes.recipe import Part
    from prunec.passes.statistics.dense import GroupScores


def build_importance(
    name: str | None, settings: Sequence[str], calibration: Sequence[str] | None
) -> Part | None:
    """The criterion that the user named, proven to build before anything is loaded."""
    from prunec.cli.opening import parse_settings
    from prunec.passes.recipe import Part

    if name is None:
        if settings or calibration:
            raise PlanError(
                "--calibration and --set say how to score, but no importance is named",
                fix="add --importance NAME, such as obs",
            )
        return None
    part = Part(name, parse_settings(settings))
    part.build("importance")
    return part


def open_scored(
    spec: str,
    part: Part,
    screen: Screen,
    *,
    calibration: list[str],
    samples: int,
    seq_len: int | None,
    seed: int,
    loss: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> Scored:
    """The MODEL with its weights, its groups scored."""
    from prunec.api import score
    from prunec.cli.opening import open_batches, open_loss, open_source

    differentiated = open_loss(loss, part)
    source = open_source(
        spec, screen, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if part.build("importance").statistics:
        batches = open_batches(source, calibration, samples, seq_len, seed, screen)
    else:
        batches = [source.example]
    return score(
        source.model, importance=part, calibration=batches, loss=differentiated, progress=screen
    )


def show_scores(screen: Screen, part: Part, groups: Sequence[GroupScores]) -> None:
    """A row a group: the loss that a unit adds when its turn comes, least first."""
    from prunec.passes.statistics.dense import loss_shares

    rows = []
    for group, share in zip(groups, loss_shares(groups), strict=True):
        counted = group.scores[np.isfinite(group.scores)]
        figures = [counted.min(), np.median(counted), counted.max()] if len(counted) else []
        rows.append([group.group, *(f"{float(f):.3g}" for f in figures), f"{share:.2%}"])
    columns = ("group", "least", "median", "most", "share of loss")
    screen.table(f"Importance of a unit: {part}", columns, rows)


def describe_scores(groups: Sequence[GroupScores]) -> dict[str, Mapping[str, Any]]:
    """What the JSON says of each group."""
    from prunec.passes.statistics.dense import loss_shares

    shares = loss_shares(groups)
    return {g.group: g.to_json(share) for g, share in zip(groups, shares, strict=True)}


def colours(groups: Sequence[GroupScores]) -> dict[str, float] | None:
    """A figure per group for the pictures: the logarithm of its loss per parameter."""
    rates = {g.group: abs(g.loss) / g.parameters for g in groups if g.parameters and g.loss}
    return {name: math.log10(rate) for name, rate in rates.items()} or None

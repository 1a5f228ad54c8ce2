"""Scores of the dense model on disk, so that a second target costs no pass over the data.

A run with scores is one-shot: every site is ranked and mended from what the dense model did there,
and not, as otherwise, from what the already pruned part before it does. What is saved is therefore
true for any target. A directory holds ``scores.json`` (of what model, criterion and calibration)
and one safetensors file a site (its statistics, and its removal curve down to the minimum).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunec.errors import CheckpointError, PlanError
from prunec.graph.selection import Selection
from prunec.importance.blocks import joined, plain_name
from prunec.importance.curves import Criterion, Removal, RemovalCurve
from prunec.importance.gradients import GRADIENT_STATISTICS
from prunec.importance.problem import SiteProblem
from prunec.models.checkpoint import NO_JSON, is_inside
from prunec.models.digest import state_digest
from prunec.passes.compensation.closed_form import Compensation
from prunec.passes.distributed import processes
from prunec.passes.sites import Site
from prunec.passes.statistics.measure import Statistics
from prunec.staging import sibling

_FORMAT = 1
_INDEX = "scores.json"
_EXAMPLE = "example.safetensors"


@dataclass(frozen=True)
class Origin:
    """What scores are of. Equal origins give equal scores.

    Attributes:
        model: digest of the weights and the config.
        importance: the criterion with all its options.
        loss: what was differentiated, None where nothing was.
        regression: what a compensation fits, None where nothing.
        calibration: digest of the inputs, None where none were given.
    """

    model: str
    importance: str
    loss: str | None
    regression: str | None
    calibration: str | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        criterion: Criterion,
        compensation: Compensation,
        loss: Callable[..., Any] | None,
        batches: Sequence[Mapping[str, Tensor]],
        weights: Mapping[str, Tensor] | None = None,
    ) -> Origin:
        """The origin of a run.

        A callable loss counts by where it is defined, not by what it computes.
        """
        names = criterion.statistics | compensation.statistics
        differentiated = bool(names & set(GRADIENT_STATISTICS))
        regression = compensation.regression
        return cls(
            model=state_digest(model, weights),
            importance=repr(criterion),
            loss=_loss_name(loss) if differentiated else None,
            regression=None if regression is None else repr(regression),
            calibration=_digest(batches) if batches else None,
        )


@dataclass(frozen=True, eq=False)
class Scores:
    """Saved scores, read site by site as they are asked for.

    Attributes:
        origin: what they are of.
        calibration: the calibration in words, as a report has it.
        example: the first batch, so that the model can be traced as it was.
    """

    directory: Path
    origin: Origin
    calibration: Mapping[str, Any]
    example: Mapping[str, Tensor]
    _files: Mapping[str, str]
    _groups: Mapping[str, Sequence[str]]

    def check(self, origin: Origin, sites: Sequence[Site], names: Collection[str]) -> None:
        """Whether these scores serve a run.

        Args:
            sites: of the run.
            names: the statistics that its criterion and compensation read.

        Raises:
            CheckpointError: they do not; says what differs.
        """
        for field, ours in vars(self.origin).items():
            wanted = getattr(origin, field)
            if ours != wanted and not (field == "calibration" and wanted is None):
                raise self._refused(f"are of another {field}", f"{ours}, and now it is {wanted}")
        for site in sites:
            if site.name not in self._files:
                raise self._refused("lack a site", f"{site.name} was not scored")
            groups = [group.name for group in site.groups]
            if list(self._groups[site.name]) != groups:
                held = ", ".join(self._groups[site.name])
                raise self._refused("are of other units", f"{held}, and now {', '.join(groups)}")
        for site in sites[:1]:
            with self._reading(site) as file:
                kept = {plain_name(key) for key in file.keys()}  # noqa: SIM118
            if missing := sorted(set(names) - kept):
                raise self._refused("lack what this compensation reads", ", ".join(missing))

    def take(self, site: Site) -> Statistics:
        """The statistics of a site of the dense model, fp64."""
        with self._reading(site) as file:
            keys = [key for key in file.keys() if not key.startswith("curve.")]  # noqa: SIM118
            return {key: file.get_tensor(key).double() for key in keys}

    def pass_by(self, site: Site) -> None:
        """Nothing streams."""

    def skip(self, site: Site) -> None:
        """Nothing was taken."""

    def select(self, selection: Selection) -> None:
        """The dense model's statistics do not change when units go."""

    def curve(self, site: Site) -> RemovalCurve:
        """The removal curve of a site of the dense model, down to its minimum."""
        with self._reading(site) as file:
            group, units, loss, parameters = (
                file.get_tensor(f"curve.{part}").numpy()
                for part in ("group", "units", "loss", "parameters")
            )
            names = self._groups[site.name]
            removals = tuple(
                Removal(names[g], tuple(row[row > _ABSENT].tolist()))
                for g, row in zip(group, units, strict=True)
            )
            return RemovalCurve(removals, loss, parameters)

    @contextmanager
    def _reading(self, site: Site) -> Iterator[Any]:
        path = self.directory / self._files[site.name]
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (OSError, SafetensorError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"cannot read the scores: {error}", where=str(path), fix="score again"
            ) from error

    def _refused(self, what: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"the scores {what}: {why}",
            where=str(self.directory),
            fix="name another directory, or remove this one to score again",
        )


class Shelf:
    """The place of a run's scores: what is there, or where they go.

    Attributes:
        saved: the scores of an earlier run, None where there are none yet.

    Raises:
        CheckpointError: what is there are no scores.
        PlanError: nothing can be saved there.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        there = processes().agreed(directory.exists)
        self.saved = _open_scores(directory) if there else None
        if self.saved is None:
            _check_place(directory)

    def scores(
        self,
        origin: Origin,
        calibration: Mapping[str, Any],
        measured: Iterable[tuple[Site, SiteProblem, Statistics]],
        criterion: Criterion,
        example: Mapping[str, Tensor],
    ) -> Scores:
        """What is saved; before that, save what is measured, whole or not at all.

        Args:
            measured: the sites of the dense model with all statistics that the run reads; asked
                for only where nothing is saved.
            example: the batch that the model was traced with.

        Raises:
            VerifyError: NaN or Inf at a site.
        """
        if self.saved is None:
            together = processes()
            if together.first:
                self._save(origin, calibration, measured, criterion, example)
            else:
                deque(measured, maxlen=0)  # sums over all processes need this one's part
            together.agreed(lambda: None)  # by then they are written
            self.saved = _open_scores(self._directory)
        return self.saved

    def _save(
        self,
        origin: Origin,
        calibration: Mapping[str, Any],
        measured: Iterable[tuple[Site, SiteProblem, Statistics]],
        criterion: Criterion,
        example: Mapping[str, Tensor],
    ) -> None:
        try:
            with sibling(self._directory.absolute()) as staging:
                index: dict[str, Any] = {}
                for number, (site, problem, statistics) in enumerate(measured):
                    file = f"{number:03d}.safetensors"
                    save_file(_site_tensors(site, problem, statistics, criterion), staging / file)
                    groups = [group.name for group in site.groups]
                    index[site.name] = {"file": file, "groups": groups}
                contents = {key: value.cpu().contiguous() for key, value in example.items()}
                save_file(contents, staging / _EXAMPLE)
                document = {
                    "format": _FORMAT,
                    "origin": vars(origin),
                    "calibration": dict(calibration),
                    "sites": index,
                }
                text = json.dumps(document, indent=2) + "\n"
                (staging / _INDEX).write_text(text, encoding="utf-8")
                staging.chmod(0o755)
                staging.rename(self._directory)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot save scores: {getattr(error, 'strerror', None) or error}",
                where=str(self._directory),
                fix="free some space, or name a directory elsewhere",
            ) from error


def _open_scores(directory: Path) -> Scores:
    """Scores that a run has saved.

    Raises:
        CheckpointError: the directory holds none.
    """
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        if index.get("format") != _FORMAT:
            raise CheckpointError(
                f"the scores have format {index.get('format')}, not {_FORMAT}",
                where=str(directory),
                fix="remove them to score again",
            )
        files = {site: found["file"] for site, found in index["sites"].items()}
        if not all(map(is_inside, files.values())):
            raise ValueError("the index names a file that is not one of its directory")
        with safe_open(directory / _EXAMPLE, "pt") as file:
            example = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Scores(
            directory=directory,
            origin=Origin(**index["origin"]),
            calibration=dict(index["calibration"]),
            example=example,
            _files=files,
            _groups={
                site: [str(name) for name in found["groups"]]
                for site, found in index["sites"].items()
            },
        )
    except (OSError, *NO_JSON, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"no scores can be read: {error}",
            where=str(directory),
            fix="name a directory that --scores wrote, or one that does not exist yet",
        ) from error


def _check_place(directory: Path) -> None:
    """Refuse before the work a place where scores could not be saved.

    Raises:
        PlanError: the place cannot be written.
    """
    parent = directory.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PlanError(
            "cannot save scores here", where=str(parent), fix="name a place that can be written"
        )


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """sha256 (hex) of all inputs, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _loss_name(loss: Callable[..., Any] | None) -> str:
    """How scores name a loss: the model's own, or where a callable is defined."""
    if loss is None:
        return "the model's own"
    return f"{loss.__module__}:{getattr(loss, '__qualname__', type(loss).__qualname__)}"


_ABSENT = -2
"""Fills up rows of units; -1 stands for a companion that is gone."""


def _site_tensors(
    site: Site, problem: SiteProblem, statistics: Statistics, criterion: Criterion
) -> dict[str, Tensor]:
    members = {member.parameter for group in site.groups for member in group.members}
    held = {key: _stored(value) for key, value in statistics.items() if _belongs(key, members)}
    curve = criterion.rank(problem, joined(problem, statistics))
    return {**held, **_curve_tensors(curve, [group.name for group in site.groups])}


def _curve_tensors(curve: RemovalCurve, groups: Sequence[str]) -> dict[str, Tensor]:
    width = max((len(removal.units) for removal in curve.removals), default=0)
    units = np.full((len(curve.removals), width), _ABSENT, dtype=np.int32)
    for row, removal in zip(units, curve.removals, strict=True):
        row[: len(removal.units)] = removal.units
    group = np.array([groups.index(removal.group) for removal in curve.removals], dtype=np.int32)
    return {
        "curve.group": torch.from_numpy(group),
        "curve.units": torch.from_numpy(units),
        "curve.loss": torch.from_numpy(curve.loss),
        "curve.parameters": torch.from_numpy(curve.parameters),
    }


def _stored(statistic: Tensor) -> Tensor:
    """Matrices in fp32: half the room, and their damping is far above its rounding."""
    kept = statistic.detach().cpu().contiguous()
    return kept.float() if kept.ndim > 1 else kept


def _belongs(key: str, members: Collection[str]) -> bool:
    """Whether a statistic is of the site's input or of one of its members."""
    _, _, parameter = key.partition(" ")
    return not parameter or parameter.split(" ")[0] in members

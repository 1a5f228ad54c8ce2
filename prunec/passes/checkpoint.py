"""Progress on disk: what was decided at each site, so that a killed run goes on to the same bytes.

A run that goes on streams its batches through the same segments as the first one did, but takes the
decisions of the sites already passed from here: no statistics, no scores, no solves. Activations
are not saved, so what lies on disk is bounded by the weights that compensation changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import prunec
from prunec.errors import CheckpointError
from prunec.importance.problem import BoolArray
from prunec.staging import lock, no_empty_parents, temporary_of, uninterrupted

_RUN = "run.json"
_LOCK = ".lock"
_SHARES = "shares.json"
_DECISIONS = "[0-9]*-*"
_KEPT, _UPDATED = "kept.", "updated."


@dataclass(frozen=True)
class Decision:
    """What was decided at one site.

    Attributes:
        removed: parameters.
        spent: the budget's account after it (`Budget.spent`).
        error: accumulated loss, relative (None where the statistics do not tell).
        kept: bool masks by group name; empty if nothing was removed.
        updated: tensors that compensation changed, by name.
        curve: (parameters removed, error then) at a few steps of the removal curve.
    """

    removed: int
    spent: tuple[float, float]
    error: float | None = None
    kept: Mapping[str, BoolArray] = field(default_factory=dict)
    updated: Mapping[str, Tensor] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()


class Journal:
    """The decisions of one run, one file a site: ``0007-<sha256 of its bytes>.safetensors``.

    Made by `opened_journal`, or `temporary_journal` for a run that is not to be resumed.
    """

    def __init__(self, folder: Path, owner: object = None) -> None:
        self._folder, self._owner = folder, owner
        self._files = {int(path.name[:4]): path for path in sorted(folder.glob(_DECISIONS))}

    @property
    def run(self) -> str | None:
        """What tells this run from all others, as `run_of` says."""
        return run_of(self._folder)

    def recall(self, number: int) -> Decision | None:
        """The decision of the site visited as `number`, its tensors left on disk; None if new.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._files.get(number)
        if path is None:
            return None
        try:
            if _digest(path.read_bytes()) != path.stem[5:]:
                raise _damaged(path)
            with safe_open(path, framework="np") as file:
                record = json.loads(file.metadata()["record"])
                names = list(file.keys())
                kept = {n[len(_KEPT) :]: file.get_tensor(n) for n in names if n.startswith(_KEPT)}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise _damaged(path) from error
        changed = [n[len(_UPDATED) :] for n in names if n.startswith(_UPDATED)]
        updated = _Filed(path, changed, self._owner)
        carry, cost = record["spent"]
        curve = tuple((count, loss) for count, loss in record["curve"])
        return Decision(record["removed"], (carry, cost), record["error"], kept, updated, curve)

    def record(self, number: int, decision: Decision) -> None:
        """Write a decision, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        tensors = {_KEPT + n: torch.from_numpy(np.array(k)) for n, k in decision.kept.items()}
        tensors |= {_UPDATED + n: t.contiguous().cpu() for n, t in decision.updated.items()}
        facts = {"removed": decision.removed, "spent": decision.spent, "error": decision.error}
        record = json.dumps({**facts, "curve": decision.curve})
        content = save(tensors, {"record": record})
        path = self._folder / f"{number:04d}-{_digest(content)}.safetensors"
        _write(path, content)
        self._files[number] = path

    def recall_shares(self) -> dict[str, float] | None:
        """What an allocation found in the run that goes on here; None if it had not.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._folder / _SHARES
        if not path.is_file():
            return None
        try:
            return {str(name): float(share) for name, share in json.loads(path.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise _damaged(path) from error

    def record_shares(self, shares: Mapping[str, float]) -> None:
        """Write what an allocation found.

        Raises:
            CheckpointError: it cannot be written.
        """
        _write(self._folder / _SHARES, json.dumps(dict(shares), indent=1).encode())


class _Filed(Mapping[str, Tensor]):
    """The changed tensors of one site, each read when it is asked for."""

    def __init__(self, path: Path, names: list[str], owner: object) -> None:
        self._path, self._names, self._owner = path, names, owner

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(_UPDATED + name)
            return tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def temporary_journal() -> Journal:
    """One in a private directory that goes with it: for tensors that memory has no room for."""
    owner = _Owner()
    return Journal(temporary_of(owner), owner)


class _Owner:
    """Lives as long as something may still be read from a temporary journal."""


_RESERVED: ContextVar[frozenset[Path]] = ContextVar("reserved", default=frozenset())


@contextmanager
def reserved(folder: Path, worth: Collection[str] = (_DECISIONS, _SHARES)) -> Iterator[None]:
    """Keep other processes from a folder of progress meanwhile.

    Afterwards it goes if there is nothing to go on from. Within the block it may be reserved again.

    Args:
        worth: patterns of the names that a run can go on from.

    Raises:
        CheckpointError: another process has it, or it cannot be made.
    """
    folder = folder.absolute()
    if folder in _RESERVED.get():
        yield
        return
    with no_empty_parents(folder), ExitStack() as ours:
        with uninterrupted():
            held = _locked(folder)
            if held is not None:
                ours.callback(os.close, held)
            ours.callback(_remove_unless_worth, folder, worth)
            token = _RESERVED.set(_RESERVED.get() | {folder})
            ours.callback(_RESERVED.reset, token)
        yield


@contextmanager
def opened_journal(
    where: str | Path | None, run: Mapping[str, Any], *, resume: bool
) -> Iterator[Journal | None]:
    """The journal in a directory, which no other process may use meanwhile; None for None.

    Args:
        run: what makes a run the same beside versions: recipe, model, data, as plain data.
        resume: go on from what is there; else it is removed first.

    Raises:
        CheckpointError: it belongs to another run (naming what differs), is damaged, in use, or
            cannot be written.
    """
    if where is None:
        yield None
        return
    folder = Path(where)
    run = {"prunec": prunec.__version__, "torch": torch.__version__, **run}
    with reserved(folder):
        if resume and (folder / _RUN).is_file():
            _check_same(folder / _RUN, run)
        else:
            _empty(folder)
            _write(folder / _RUN, json.dumps(run, indent=1, sort_keys=True).encode())
        for leftover in folder.glob(".*.part"):
            leftover.unlink()
        yield Journal(folder)


def progress_folder(out: Path) -> Path:
    """Where the progress of a run that writes ``out`` is kept: a hidden directory beside it."""
    return out.absolute().with_name(f".{out.absolute().name}.progress")


def run_of(folder: Path) -> str | None:
    """What tells the run with its progress in this folder from all others; None if nothing does.

    The result holds it too. So progress beside the result of the same run has served its end.
    """
    try:
        return _digest((folder / _RUN).read_bytes())
    except OSError:
        return None


def remove_progress(folder: Path) -> None:
    """Remove the progress of a run that is done; what tells whose it is goes after the rest."""
    for path in folder.glob("*/"):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        _empty(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_unless_worth(folder: Path, worth: Collection[str]) -> None:
    if not any(path for pattern in worth for path in folder.glob(pattern)):
        remove_progress(folder)


def _locked(folder: Path) -> int | None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / _LOCK).touch(mode=0o600)
        return lock(folder / _LOCK)
    except BlockingIOError as error:
        raise CheckpointError(
            "another run is writing here", where=str(folder), fix="wait for it, or name another OUT"
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def _check_same(path: Path, run: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path) from error
    now = json.loads(json.dumps(run))
    if not isinstance(before, dict):
        raise _damaged(path)
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differing:
        said = (f"{key}: {before.get(key)} then, {now.get(key)} now" for key in differing)
        raise CheckpointError(
            "the saved progress belongs to another run",
            where=str(path.parent),
            so="; ".join(said),
            fix="start again without --resume (resume=False), which removes it",
        )


def _empty(folder: Path) -> None:
    for path in sorted(folder.glob("*"), key=lambda path: path.name == _RUN):
        if path.name != _LOCK and path.is_file():  # folders are of activations that wait
            path.unlink()


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name[:12]}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot keep progress: {error.strerror or error}",
        where=str(folder),
        fix="free some space, or name a directory elsewhere",
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        "the saved progress is damaged",
        where=str(path),
        fix="start again without --resume (resume=False), which removes it",
    )

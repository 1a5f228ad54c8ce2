"""Several processes on one run, as torchrun or `accelerate launch` start them.

Each streams its share of the calibration batches. What is summed over tokens is summed over the
processes, the first decides, and all carry its decision out: one plan, the same weights everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from prunec.errors import PlanError, ProcessError

T = TypeVar("T")
# A process that dies closes its connections at once; this is for one that hangs.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Processes:
    """The processes of this run; one, where nothing was launched."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that decides and writes."""
        return self.rank == 0

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's batches.

        Raises:
            PlanError: there are fewer batches than processes.
        """
        if self.size > 1 and len(batches) < self.size:
            raise PlanError(
                f"{len(batches)} calibration batches for {self.size} processes",
                fix="give more batches, or launch fewer processes",
            )
        return batches if self.size == 1 else list(batches)[self.rank :: self.size]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, in place."""
        if self.size > 1:
            with _together():
                dist.all_reduce(tensor)
        return tensor

    def agreed(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in every process."""
        if self.size == 1:
            return decide()
        box: list[Any] = [decide() if self.first else None]
        with _together():
            dist.broadcast_object_list(box, src=0)
        decided: T = box[0]
        return decided


def processes() -> Processes:
    """Those of torch's process group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size())


def writes() -> bool:
    """Whether this is the process that will write, as the launcher's variables say."""
    return _world_size() < 2 or int(os.environ.get("RANK", "0")) == 0


@contextmanager
def launched() -> Iterator[Processes]:
    """Join the processes that a launcher started, by the variables that it set.

    Raises:
        ProcessError: they cannot be reached.
    """
    if _world_size() < 2 or dist.is_initialized():
        yield processes()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _together():
        dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield processes()
    finally:
        dist.destroy_process_group()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ProcessError(
            f"another process of this run has ended: {reason[-1]}",
            so="nothing was written",
            fix="look at what the others said, and start the run again",
        ) from error

"""Where the values of a batch wait between two stops: in memory, or each in a mapped file."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from prunec.errors import CheckpointError, PlanError
from prunec.graph.memory import free_bytes
from prunec.staging import temporary_of

Environment = dict[fx.Node, Any]

_SMALL_BYTES = 1 << 16  # not worth a file
_FREE_SHARE = 4  # of the free memory, this part may be values that wait


class Place(Protocol):
    """Where values wait."""

    def keep(self, live: Environment, before: Mapping[fx.Node, Any]) -> Environment:
        """The values of a batch as they wait; `before` is how those of the same batch did last."""

    def expect(self, size: int) -> None:
        """So many bytes are about to wait, all batches together."""


@dataclass(frozen=True)
class Memory:
    """Values wait as tensors in memory, whatever the device that computes them."""

    def keep(self, live: Environment, before: Mapping[fx.Node, Any]) -> Environment:
        return {node: of_tensors(value, _on_host) for node, value in live.items()}

    def expect(self, size: int) -> None:
        """There is room, or there is none."""


def _on_host(tensor: Tensor) -> Tensor:
    """In memory that a GPU reads and writes directly, where it comes from one."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


class Disk:
    """Values wait in files of a private folder, which goes with this object.

    Args:
        parent: where the folder is made, by default where temporary files are. What a run that
            was killed left in the same place is removed first.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = parent

    def keep(self, live: Environment, before: Mapping[fx.Node, Any]) -> Environment:
        """As `Place.keep`. What lies on disk already is not written again."""
        return {
            node: before[node]
            if isinstance(before.get(node), Filed)
            else of_tensors(value, self._filed)
            for node, value in live.items()
        }

    def expect(self, size: int) -> None:
        """The disk is asked when it is written."""

    def _filed(self, tensor: Tensor) -> Tensor | Filed:
        return tensor.cpu() if tensor.nbytes < _SMALL_BYTES else Filed(tensor, self._folder, self)

    @cached_property
    def _folder(self) -> Path:
        parent = self._parent
        try:
            if parent is not None:
                parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return temporary_of(self, parent)
        except OSError as error:
            raise _full(parent or Path(tempfile.gettempdir()), error) from error


class Either:
    """Memory; disk from the moment on at which values would take a quarter of what is free."""

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self._place: Memory | Disk = Memory()

    def keep(self, live: Environment, before: Mapping[fx.Node, Any]) -> Environment:
        return self._place.keep(live, before)

    def expect(self, size: int) -> None:
        if size * _FREE_SHARE > free_bytes():
            self._place = self._disk


class Filed:
    """A tensor in a file of its own. The file goes with it."""

    def __init__(self, tensor: Tensor, folder: Path, owner: object) -> None:
        # Axes in the order in which they lie in memory, so that it comes back as it was.
        steps = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda axis: -steps[axis])
        packed = tensor.permute(order).contiguous()
        self._back = [order.index(axis) for axis in range(tensor.ndim)]
        self._shape, self._dtype, self._owner = packed.shape, packed.dtype, owner
        try:
            handle, name = tempfile.mkstemp(dir=folder)
            self._path = Path(name)
            weakref.finalize(self, self._path.unlink, missing_ok=True)
            with os.fdopen(handle, "wb") as file:
                file.write(packed.cpu().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise _full(folder, error) from error

    def read(self) -> Tensor:
        """The tensor, mapped: pages come into memory as they are read, and can leave it."""
        flat = torch.from_file(
            str(self._path), shared=False, size=self._shape.numel(), dtype=self._dtype
        )
        return flat.view(self._shape).permute(self._back)


def place_named(name: str, parent: Path | None = None) -> Place:
    """The place that a user names: memory, disk, or auto (`Either`).

    Args:
        parent: as `Disk` takes it.

    Raises:
        PlanError: there is no such place.
    """
    places: dict[str, Callable[[], Place]] = {
        "auto": lambda: Either(Disk(parent)),
        "memory": Memory,
        "disk": lambda: Disk(parent),
    }
    if name not in places:
        raise PlanError(f"no place {name!r} for activations", fix=f"one of: {', '.join(places)}")
    return places[name]()


def present(waiting: Mapping[fx.Node, Any], device: torch.device) -> Environment:
    """Values that waited, as tensors on a device."""

    def there(value: Tensor | Filed) -> Tensor:
        tensor = value.read() if isinstance(value, Filed) else value
        return tensor.to(device, non_blocking=device.type == "cuda")

    return {node: of_tensors(value, there) for node, value in waiting.items()}


def of_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """A node's value with its tensors changed: it is one, several, or none."""
    if isinstance(value, (list, tuple)):
        return [of_tensors(item, change) for item in value]
    return change(value) if isinstance(value, (Tensor, Filed)) else value


def _full(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot keep activations on disk: {error.strerror or error}",
        where=str(folder),
        fix="free some space, point TMPDIR at a larger disk, or give fewer or shorter samples",
    )

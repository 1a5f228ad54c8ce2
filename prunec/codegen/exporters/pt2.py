"""``.pt2``: a torch.export program, opened by ``torch.export.load`` with torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from prunec.codegen.exporters.compare import Engine, measure
from prunec.codegen.exporters.exporter import Finding
from prunec.codegen.exporters.source import ModelDirectory
from prunec.errors import TraceError

_ENGINE = Engine("pt2", "torch", hidden=("prunec", "transformers"))


@dataclass(frozen=True)
class Pt2:
    """The model as one program without Python: ``torch.export.load(f).module()(input_ids=...)``."""

    file: ClassVar[str] = "model.pt2"
    alone: ClassVar[bool] = True

    def can_express(self, source: ModelDirectory) -> Sequence[str]:
        return untraceable(source)

    def needed_bytes(self, source: ModelDirectory) -> int:
        return source.weight_bytes

    def write(self, source: ModelDirectory, folder: Path) -> Sequence[str]:
        torch.export.save(source.traced.program, folder / self.file)
        return source.traced.fixed

    def check(self, source: ModelDirectory, folder: Path) -> Finding:
        """In a fresh process that can import neither prunec nor transformers."""
        return measure(_ENGINE, source, folder / self.file)


def untraceable(source: ModelDirectory) -> list[str]:
    """Why torch.export cannot take the model; empty if it can."""
    try:
        source.traced  # noqa: B018 - computed once, and kept
    except TraceError as error:
        return [error.message]
    return []

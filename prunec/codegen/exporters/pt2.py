"""``.pt2``: a torch.export program, opened by ``torch.export.load`` with torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from prunec.codegen.battery import tolerance
from prunec.codegen.exporters.compare import measure
from prunec.codegen.exporters.exporter import Finding
from prunec.codegen.exporters.source import ModelDirectory
from prunec.codegen.exporters.traced import named_forward
from prunec.errors import TraceError


@dataclass(frozen=True)
class Pt2:
    """The model as one program without Python: ``torch.export.load(f).module()(input_ids=...)``."""

    file: ClassVar[str] = "model.pt2"
    alone: ClassVar[bool] = True

    def can_express(self, source: ModelDirectory) -> Sequence[str]:
        return untraceable(source)

    def write(self, source: ModelDirectory, folder: Path) -> Sequence[str]:
        torch.export.save(source.traced.program, folder / self.file)
        return source.traced.fixed

    def check(self, source: ModelDirectory, folder: Path) -> Finding:
        """In a fresh process that can import neither prunec nor transformers."""
        traced = source.traced
        return measure(
            "pt2",
            "torch",
            folder / self.file,
            named_forward(source.model, list(traced.example)),
            traced.cases,
            limit=tolerance(source.model),
            hidden=("prunec", "transformers"),
        )


def untraceable(source: ModelDirectory) -> list[str]:
    """Why torch.export cannot take the model; empty if it can."""
    try:
        source.traced  # noqa: B018 - computed once, and kept
    except TraceError as error:
        return [error.message]
    return []

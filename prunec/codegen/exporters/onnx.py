"""ONNX, for onnxruntime, OpenVINO and other runtimes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch

from prunec.codegen.exporters.compare import Engine, absent, measure
from prunec.codegen.exporters.exporter import Finding
from prunec.codegen.exporters.pt2 import untraceable
from prunec.codegen.exporters.source import ModelDirectory
from prunec.errors import ExportError

_LOG = logging.getLogger("torch.onnx")
_ENGINE = Engine("onnx", "onnxruntime", limit=1e-3)
LARGE_BYTES = 1_500_000_000  # one protobuf holds 2 GiB
FIX = 'pip install "prunec[onnx]"'


@dataclass(frozen=True)
class Onnx:
    """The traced program translated operator by operator; the same inputs, output ``logits``.

    In fp32 where the weights have 16 bits: onnxruntime's CPU kernels know no bf16.
    """

    file: ClassVar[str] = "model.onnx"
    alone: ClassVar[bool] = True

    def can_express(self, source: ModelDirectory) -> Sequence[str]:
        return untraceable(source.single)

    def needed_bytes(self, source: ModelDirectory) -> int:
        return source.single.weight_bytes

    def write(self, source: ModelDirectory, folder: Path) -> Sequence[str]:
        for package in ("onnx", "onnxscript"):
            if find_spec(package) is None:
                raise ExportError(f"ONNX export needs {package}", fix=FIX)
        source, stored = source.single, source
        traced = source.traced
        try:
            with _no_warnings():
                made = torch.onnx.export(traced.program, dynamo=True, verbose=False, optimize=True)
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(f"torch.onnx cannot translate the model: {reason}") from error
        assert made is not None
        made.model.graph.outputs[0].name = "logits"
        large = source.weight_bytes > LARGE_BYTES
        made.save(folder / self.file, external_data=large)
        notes = ["the weights are in model.onnx.data beside it"] if large else []
        if source is not stored:
            notes.append("its 16-bit weights are fp32 in the file")
        return [*traced.fixed, *notes]

    def check(self, source: ModelDirectory, folder: Path) -> Finding:
        missing = absent("onnxruntime", "onnxruntime", "onnxruntime", FIX)
        return missing or measure(_ENGINE, source.single, folder / self.file)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """It warns of every operator of torchvision that it cannot register."""
    level = _LOG.level
    _LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOG.setLevel(level)

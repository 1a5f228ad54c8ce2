"""Which engines can open a delivered directory: run where they are installed, else said to be."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

from prunec.codegen.exporters.compare import named
from prunec.codegen.exporters.exporter import Exporter, Finding
from prunec.codegen.exporters.source import ModelDirectory
from prunec.errors import ExportError, VerifyError
from prunec.registry import plugin
from prunec.staging import temporary


@dataclass(frozen=True)
class Engine:
    """One program that may open the directory.

    Attributes:
        name: of the engine.
        opens: "yes", "code" (it runs modeling_prunec.py), "export" (another form of it) or "no".
        reason: why, or by what command.
        state: "measured", "engine absent", or "not run".
    """

    name: str
    opens: str
    reason: str
    state: str = "not run"


@dataclass(frozen=True)
class _Reader:
    """An engine that reads an exported form; `stock`: what the stock class opens it opens too."""

    name: str
    package: str
    form: str
    stock: bool = False


_READERS = (
    _Reader("llama.cpp", "llama_cpp", "gguf"),
    _Reader("onnxruntime", "onnxruntime", "onnx"),
    _Reader("SGLang, TensorRT-LLM, mlx-lm", "sglang", "deci", stock=True),
    _Reader("any that knows the stock class", "transformers", "padded", stock=True),
)


def engines(source: ModelDirectory, *, measure: bool) -> Iterator[Engine]:
    """The table of engines for a directory whose model runs in transformers.

    Args:
        measure: export to a temporary folder for the engines that are installed, and compare.
    """
    table, uniform = source.table, "prunec" not in source.config
    how = "yes" if uniform else "code"
    code = "the stock class" if uniform else "trust_remote_code=True, or prunec.load"
    yield Engine(named("transformers"), how, code, "measured")
    if int(table.get("transformers", 4)) > 4:
        yield Engine("transformers 4.57", "no", "the names of its parameters are those of 5")
    else:
        yield Engine("transformers 4.57", how, code)
    yield _vllm(table, uniform)
    yield Engine("peft LoRA", how, "target modules as for the dense model", _state("peft"))
    rows: Mapping[str, Any] = source.config.get("per_layer_config") or {}
    alike = uniform or not any("num_key_value_heads" in row for row in rows.values())
    prefix = "one number of KV heads" if alike else "it assumes one number of KV heads"
    yield Engine("peft prefix tuning", "yes" if alike else "no", prefix, _state("peft"))
    for reader in _READERS:
        if reader.stock and uniform:
            reason = "as the dense model, if it knows that"
            yield Engine(reader.name, "yes", reason, _state(reader.package))
        else:
            yield _read_by(reader, source, measure)


def _state(package: str) -> str:
    return "engine absent" if find_spec(package) is None else "not run"


def _vllm(table: Mapping[str, Any], uniform: bool) -> Engine:
    state = _state("vllm")
    if uniform:
        return Engine("vLLM", "yes", "as the dense model, if it knows that", state)
    if table["skip"]:
        return Engine("vLLM", "no", "its Transformers backend reads no removed sub-layers", state)
    reason = "its Transformers backend reads per_layer_config: --trust-remote-code"
    return Engine("vLLM", "code", reason, state)


def _read_by(reader: _Reader, source: ModelDirectory, measure: bool) -> Engine:
    exporter = cast(Exporter, plugin("exporters", reader.form)())
    command, state = f"prunec export --to {reader.form}", _state(reader.package)
    try:
        if reasons := list(exporter.can_express(source)):
            return Engine(reader.name, "no", "; ".join(reasons), state)
        room = shutil.disk_usage(tempfile.gettempdir()).free > exporter.needed_bytes(source)
        if measure and room and state == "not run":
            finding = _measured(exporter, source)
            return Engine(reader.name, "export", f"{command}: {finding.detail}", finding.state)
    except ExportError as error:
        return Engine(reader.name, "no", error.message, state)
    except VerifyError as error:
        return Engine(reader.name, "no", error.where or error.message, "measured")
    return Engine(reader.name, "export", command, state)


def _measured(exporter: Exporter, source: ModelDirectory) -> Finding:
    with temporary() as folder:
        exporter.write(source, folder)
        return exporter.check(source, folder)

"""The directory that is exported: its config, its sizes, its model, each read once when needed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunec.codegen.acceptance import align
from prunec.codegen.exporters.traced import Traced, trace_dynamic
from prunec.codegen.load import load, read_config
from prunec.errors import ModelError
from prunec.models import example_inputs

T = TypeVar("T")
_HALF = ("F16", "BF16")  # as safetensors names them
_TABLES = ("shapes", "added", "attrs", "skip")
_STOCK: Mapping[str, Any] = {name: {} for name in _TABLES}


@dataclass(frozen=True, eq=False)
class ModelDirectory:
    """A transformers directory with safetensors, of prunec or not.

    Attributes:
        dtype: that the model is opened with; None: that of its checkpoint.
    """

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    dtype: torch.dtype | None = None
    _results: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> ModelDirectory:
        """Raises ModelError where there is no model."""
        config = read_config(path)
        if not list(path.glob("*.safetensors")):
            raise ModelError("not a model directory with safetensors", where=str(path))
        table = config.get("prunec", _STOCK)
        if not (isinstance(table, dict) and all(isinstance(table.get(k), dict) for k in _TABLES)):
            raise ModelError(
                f"config.json: `prunec` has no tables {', '.join(_TABLES)}", where=str(path)
            )
        return cls(path, config)

    @property
    def table(self) -> Mapping[str, Any]:
        """`prunec` of the config: what the generated class does; empty for a stock directory."""
        return cast(Mapping[str, Any], self.config.get("prunec", _STOCK))

    @cached_property
    def single(self) -> ModelDirectory:
        """The same, with 16-bit weights opened in fp32."""
        half = any(kind in _HALF for _, kind in self._headers.values())
        return ModelDirectory(self.path, self.config, torch.float32) if half else self

    @cached_property
    def weight_bytes(self) -> int:
        """As the model has them when it is open, or as its files hold them."""
        stored = sum(file.stat().st_size for file in self.path.glob("*.safetensors"))
        halves = (shape for shape, kind in self._headers.values() if kind in _HALF)
        return stored if self.dtype is None else stored + 2 * sum(map(math.prod, halves))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, of all files."""
        return {name: shape for name, (shape, _) in self._headers.items()}

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor name -> its shape and safetensors' name of its type."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                        part = tensors.get_slice(name)
                        found[name] = tuple(part.get_shape()), str(part.get_dtype())
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file.name} is damaged: {error}", where=str(file)) from error
        return found

    @cached_property
    def model(self) -> nn.Module:
        """The model, in eval mode."""
        typed: dict[str, Any] = {} if self.dtype is None else {"dtype": self.dtype}
        model: nn.Module = load(self.path, **typed).requires_grad_(False)
        align(model)  # as the engine's process does: its addresses decide the last bits
        return model

    def once(self, function: Callable[[ModelDirectory], T]) -> T:
        """What `function` finds in this directory, computed on first use."""
        if function not in self._results:
            self._results[function] = function(self)
        found: T = self._results[function]
        return found

    def copy_tokenizer(self, folder: Path) -> None:
        """Copy what is neither weights nor the model's config: the tokenizer, generation config."""
        patterns = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja")
        for pattern in (*patterns, "generation_config.json", "preprocessor_config.json"):
            for path in self.path.glob(pattern):
                shutil.copy(path, folder)

    @cached_property
    def example(self) -> dict[str, Tensor]:
        return example_inputs(self.model)

    @cached_property
    def traced(self) -> Traced:
        """Raises TraceError where torch.export cannot take the model."""
        return trace_dynamic(self.model, self.example)

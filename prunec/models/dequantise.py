"""A quantised checkpoint as a plain one: converted once, a tensor at a time, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunec.errors import ModelError
from prunec.events import Progress
from prunec.models.cache import cached
from prunec.models.checkpoint import INDEX, PICKLES, check_weights, read_json
from prunec.models.digest import file_digest
from prunec.models.packed import FORMATS, Format, quantisation

# Part of the cache's key: raise it when the conversion changes.
_CONVERSION = 1
_SHARD_BYTES = 1_000_000_000
# What reading parts raises that are not of one weight.
_MISFITS = (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError)
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of its weights' quantisation, None for plain weights."""
    for place in (config, config.get("text_config")):
        if isinstance(place, Mapping) and isinstance(place.get("quantization_config"), Mapping):
            found: Mapping[str, Any] = place["quantization_config"]
            return found
    return None


def dequantised(directory: Path, progress: Progress) -> Path:
    """A transformers directory with the weights of a quantised checkpoint as plain numbers.

    Made once for each content of its files, then kept in prunec's cache; weights are in the dtype
    that the config names, bf16 where it names none.

    Raises:
        ModelError: the weights are not quantised, or in a format that cannot be read without its
            kernels, by name; their parts do not fit together; or the cache cannot be written.
    """
    config = read_json(directory / "config.json")
    settings = settings_of(config)
    if settings is None:
        raise ModelError(
            "the weights are not quantised", where=str(directory), fix="leave --dequantise out"
        )
    name = quantisation(settings)
    if name not in FORMATS:
        raise ModelError(
            f"weights quantised with {name} cannot be dequantised here",
            where=str(directory),
            fix="prune the checkpoint that it was made from; these can be: " + ", ".join(FORMATS),
        )
    files = check_weights(directory)
    contents = "".join(file_digest(path) for path in (directory / "config.json", *files))
    digest = hashlib.sha256(contents.encode()).hexdigest()[:16]

    def convert(place: Path) -> None:
        with progress.task(f"dequantise {directory.name} (once)", total=len(files)) as task:
            shards = _Shards(place)
            for tensor_name, tensor in _plain(files, FORMATS[name], settings, _dtype(config)):
                shards.add(tensor_name, tensor)
                task.update(f"dequantise {tensor_name}")
            shards.close()
        _copy_rest(directory, place, config)

    return cached(f"models/{directory.resolve().name}-{digest}-v{_CONVERSION}", convert)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    return _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.bfloat16)


def _plain(
    files: tuple[Path, ...], form: Format, settings: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the plain checkpoint."""
    homes: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            homes |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> Tensor:
        with safe_open(homes[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    used: set[str] = set()
    for name in homes:
        leaf = name.rpartition(".")[2]
        stem = name.removesuffix(leaf)
        others = [part for part in form.others if stem + part in homes]
        if leaf == form.main and others:
            parts = {part: read(stem + part) for part in (form.main, *others)}
            used |= {stem + part for part in parts}
            try:
                weight = form.read(parts, settings)
            except _MISFITS as error:
                raise ModelError(
                    f"the parts of a quantised weight do not fit together: {error}",
                    where=f"{stem}weight",
                    fix="download the checkpoint again, or prune the one that it was made from",
                ) from error
            yield f"{stem}weight", weight.to(dtype).contiguous()
    for name in homes:
        if name not in used and name.rpartition(".")[2] not in form.ignored:
            tensor = read(name)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


class _Shards:
    """Writes tensors as the shards of a checkpoint, one in memory at a time."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._open: dict[str, Tensor] = {}
        self._homes: dict[str, str] = {}
        self._bytes = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._open and self._bytes + tensor.nbytes > _SHARD_BYTES:
            self._flush()
        self._open[name] = tensor
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        self._flush()
        index = {"metadata": {"total_size": self._total}, "weight_map": self._homes}
        (self._place / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        file = f"model-{len(set(self._homes.values())) + 1:05}.safetensors"
        save_file(self._open, self._place / file, {"format": "pt"})
        self._homes |= dict.fromkeys(self._open, file)
        self._open, self._bytes = {}, 0


def _copy_rest(directory: Path, place: Path, config: Mapping[str, Any]) -> None:
    """Everything but the weights; the config without its quantisation."""
    for path in directory.iterdir():
        weights = path.suffix in {".safetensors", *PICKLES} or path.name == INDEX
        if path.is_file() and not weights and path.name != "config.json":
            shutil.copyfile(path, place / path.name)
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    if isinstance(plain.get("text_config"), Mapping):
        inner = plain["text_config"]
        plain["text_config"] = {k: v for k, v in inner.items() if k != "quantization_config"}
    (place / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")

"""The weight files of a checkpoint directory, checked by their headers before anything loads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from prunec.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"})
NO_JSON = (ValueError, RecursionError)  # no text, no JSON, or nested without end
_HEADER_LIMIT = 100_000_000  # safetensors refuses longer headers, too


def check_weights(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a model directory, each whole and holding what the index says.

    Reads headers only: milliseconds, however large the model.

    Raises:
        ModelError: no weights, pickled weights only, a missing shard, a truncated file.
    """
    if (directory / INDEX).is_file():
        return _check_shards(directory)
    if (directory / WEIGHTS).is_file():
        safetensors_names(directory / WEIGHTS)
        return (directory / WEIGHTS,)
    raise _no_weights(directory)


def safetensors_names(path: Path) -> frozenset[str]:
    """Names of the tensors in a safetensors file, which must be as long as its header says.

    Raises:
        ModelError: it is not safetensors, or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
        if length > min(_HEADER_LIMIT, size):
            raise _corrupt(path, f"it is not a whole safetensors file ({size} bytes)")
        header = _header(path, file.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (KeyError, IndexError, TypeError) as error:
        raise _corrupt(path, "its safetensors header cannot be read") from error
    if size != end:
        state = "truncated" if size < end else "longer than its header says"
        raise _corrupt(path, f"it is {state}: {size} bytes where {end} are expected")
    return frozenset(tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path.name}: {error.strerror}", where=str(path)) from error
    except NO_JSON as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} does not hold a JSON object", where=str(path))
    return value


def _check_shards(directory: Path) -> tuple[Path, ...]:
    index = directory / INDEX
    placement = read_json(index).get("weight_map")
    if not isinstance(placement, dict) or not placement:
        raise ModelError(f"{INDEX} has no weight_map", where=str(index))
    for name in placement.values():
        if not is_inside(name):
            raise ModelError(
                f"{INDEX} names a file that is not one of its directory: {str(name)[:80]!r}",
                where=str(index),
                so="a checkpoint must not reach for other files",
                fix="take the checkpoint from a source that you trust",
            )
    shards = tuple(directory / name for name in sorted(set(placement.values())))
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise ModelError(
            f"{len(absent)} of {len(shards)} weight files are missing: {', '.join(absent[:3])}",
            where=str(directory),
            fix="download or copy the missing files again",
        )
    for shard in shards:
        wanted = {name for name, home in placement.items() if home == shard.name}
        if lost := sorted(wanted - safetensors_names(shard)):
            raise _corrupt(shard, f"it lacks {len(lost)} tensors of the index, such as {lost[0]}")
    return shards


def is_inside(name: object) -> bool:
    """Whether an index names a safetensors file of its own directory."""
    return is_plain(name) and str(name).endswith(".safetensors")


def is_plain(name: object) -> bool:
    """Whether a name found in a file is that of a file in a given directory, and no path."""
    return isinstance(name, str) and not set(name) & set("/\\\0")


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except NO_JSON as error:
        raise _corrupt(path, "its safetensors header cannot be read") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its safetensors header cannot be read")
    return header


def _corrupt(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path.name} is damaged: {what}", where=str(path), fix="download or copy the file again"
    )


def _no_weights(directory: Path) -> ModelError:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if "adapter_model.safetensors" in names:
        return ModelError(
            "the directory holds an adapter, not a model",
            where=str(directory),
            fix="merge the adapter into its base model and save that",
        )
    if ggufs:
        return ModelError(
            "the directory holds no safetensors weights",
            where=str(directory),
            fix=f"name the GGUF file itself: {directory / ggufs[0]}",
        )
    if pickles:
        return pickled(directory / pickles[0])
    return ModelError(
        f"no weights here: neither {WEIGHTS} nor {INDEX}",
        where=str(directory),
        fix=f"complete the directory; to analyse without weights: {directory / 'config.json'}",
    )


def pickled(path: Path) -> ModelError:
    """The error for weights that are a pickle: opening one runs the code in it."""
    return ModelError(
        f"{path.name} is a pickle or another old format; prunec opens safetensors only",
        where=str(path),
        so="opening a pickle can run any code that its author put there",
        fix="if you trust it, load it where it was made and call"
        " model.save_pretrained(directory), which writes safetensors",
    )

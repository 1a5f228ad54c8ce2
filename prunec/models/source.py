"""MODEL, as users name it: one function opens every form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunec.errors import ModelError
from prunec.events import Progress, silent
from prunec.graph.memory import free_bytes
from prunec.models import factory, gguf, hub
from prunec.models.checkpoint import PICKLES, check_weights, pickled, read_json
from prunec.models.dequantise import dequantised
from prunec.models.digest import state_digest
from prunec.models.example import example_inputs
from prunec.models.pretrained import (
    Opening,
    Weights,
    open_config,
    open_directory,
    open_stored,
    open_tokenizer_in,
)
from prunec.models.store import tensor_shapes

_FREE_SHARE = 3  # the dense weights, the sliced ones, and what proves them
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_FORMS = (
    "MODEL is smollm2, a directory, a Hub id, a .gguf file, a config.json, or"
    " package.module:factory"
)


@dataclass(frozen=True, eq=False)
class Source:
    """An opened model.

    `model` is in eval mode and its parameters need no gradient. `tokenizer` is None where there
    is none (vision models, factories, a config alone). `example` has inputs to trace with, by
    keyword. Out of core `model` is on meta and `weights` reads its parameters from the files, one
    when it is asked for; else `weights` is None. `spec` is what the user wrote; `digest` is the
    `state_digest` of the model; `device` is where it is to be computed.
    """

    model: nn.Module
    tokenizer: Any | None
    example: dict[str, Tensor]
    spec: str
    digest: str
    weights: Mapping[str, Tensor] | None = None
    device: str = "cpu"


def open_model(
    spec: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    weights: Weights = "load",
    trust_remote_code: bool = False,
    out_of_core: bool | None = False,
    dequantise: bool = False,
    load_pruned: Callable[[Path], nn.Module] | None = None,
    progress: Progress = silent,
) -> Source:
    """Open a MODEL: ``smollm2`` (the demo model), a directory, a Hub id, a ``.gguf`` file, a
    ``config.json``, or ``package.module:factory``.

    `dtype` is a torch dtype's name, or "auto" for the checkpoint's. `weights` "meta" reads the
    config only (shapes without values; what prunec wrote is loaded all the same), "random" draws
    weights with seed 0; a config.json opens on meta unless "random" is asked for, and a factory's
    module is taken as it comes, cast to `dtype`. `load_pruned` opens directories that prunec wrote
    (prunec.codegen passes itself in: this room is below it). `out_of_core` leaves the weights of a
    transformers checkpoint in its files (see `Source`); None does so where they would take more
    than a third of the free memory, which pruning them in memory needs. `dequantise` converts a
    quantised checkpoint first (see prunec.models.dequantise).

    Raises:
        ModelError: the model cannot be opened; the message says why and what to do.
    """
    opening = Opening(_dtype(dtype), weights, trust_remote_code, progress)
    place = _device(device)
    example: dict[str, Tensor] | None = None
    tokenizer: Any | None = None
    stored: Mapping[str, Tensor] | None = None
    if isinstance(path := _locate(spec, opening), Path):
        path = dequantised(path, progress) if dequantise else path
        if _stays_stored(path, opening, out_of_core):
            model, stored = open_stored(path, opening)
        else:
            model = _open_path(path, opening, load_pruned)
        tokenizer = _tokenizer_near(path, trust_remote_code)
    else:
        model, example = factory.call_factory(spec)
        model = model if opening.dtype is None else model.to(opening.dtype)
    if not any(parameter.is_meta for parameter in model.parameters()):
        model = model.to(place)
    model = model.eval().requires_grad_(False)
    example = example_inputs(model) if example is None else example
    digest = state_digest(model, stored)
    return Source(model, tokenizer, _cast(example, model), spec, digest, stored, str(place))


def find_model(spec: str, *, trust_remote_code: bool = False, progress: Progress = silent) -> None:
    """See that there is such a MODEL; one of the Hub is downloaded.

    Raises:
        ModelError: it is absent.
    """
    _locate(spec, Opening(None, "load", trust_remote_code, progress))


def open_tokenizer(
    spec: str, *, trust_remote_code: bool = False, progress: Progress = silent
) -> Any | None:
    """The tokenizer of a MODEL, without its weights; None where it has none.

    Raises:
        ModelError: the model is absent, or its tokenizer does not load.
    """
    opening = Opening(None, "meta", trust_remote_code, progress)
    path = _locate(spec, opening)
    return _tokenizer_near(path, trust_remote_code) if path else None


def _locate(spec: str, opening: Opening) -> Path | None:
    """The directory or config file that a spec stands for; None for a factory."""
    if spec == gguf.SMOLLM2:
        return gguf.converted(gguf.smollm2_file(), opening.progress)
    path = Path(spec).expanduser()
    if path.exists():
        return _existing(path, opening)
    if factory.is_factory(spec):
        return None
    if hub.is_hub_id(spec) and path.suffix not in {".gguf", ".json", ".safetensors", *PICKLES}:
        return hub.download(
            spec,
            weights=opening.weights == "load",
            trust_remote_code=opening.trust_remote_code,
        )
    raise ModelError(f"no such model: {spec}", fix=f"check the path; {_FORMS}")


def _existing(path: Path, opening: Opening) -> Path:
    if path.is_dir() or path.suffix == ".json":
        return path
    if path.suffix == ".gguf":
        return gguf.converted(path, opening.progress)
    if path.suffix == ".safetensors":
        raise ModelError(
            f"{path.name} holds weights only",
            where=str(path),
            fix=f"name its directory: {path.parent}",
        )
    if path.suffix in PICKLES:
        raise pickled(path)
    raise ModelError(f"{path.name} is not a model", where=str(path), fix=_FORMS)


def _stays_stored(path: Path, opening: Opening, asked: bool | None) -> bool:
    """Whether the weights of a checkpoint stay in its files.

    Raises:
        ModelError: that was asked for, but this MODEL has no such files.
    """
    config = path / "config.json"
    if opening.weights != "load" or asked is False:
        return False
    if not config.is_file() or "prunec" in read_json(config):
        if asked:
            raise ModelError(
                "out of core works on a transformers checkpoint that prunec has not pruned yet",
                where=str(path),
                fix="leave --out-of-core (out_of_core=True) out",
            )
        return False
    shapes = [t for file in check_weights(path) for t in tensor_shapes(file).values()]
    size = sum(t.numel() * (opening.dtype or t.dtype).itemsize for t in shapes)
    if asked is None and size * _FREE_SHARE > (free := free_bytes()):
        opening.progress.message(
            f"the weights take {size / 1e9:.1f} GB, more than 1/{_FREE_SHARE} of the"
            f" {free / 1e9:.1f} GB of free memory: working out of core"
        )
        return True
    return bool(asked)


def _open_path(
    path: Path, opening: Opening, load_pruned: Callable[[Path], nn.Module] | None
) -> nn.Module:
    if path.is_file():
        return open_config(path, _without_loading(opening))
    if not (path / "config.json").is_file():
        raise ModelError("the directory has no config.json", where=str(path), fix=_FORMS)
    # The stock class would build the dense shapes, so these are loaded even where "meta" would do.
    if load_pruned and opening.weights != "random" and "prunec" in read_json(path / "config.json"):
        model = load_pruned(path)
        return model if opening.dtype is None else model.to(opening.dtype)
    return open_directory(path, opening)


def _without_loading(opening: Opening) -> Opening:
    kind: Weights = "random" if opening.weights == "random" else "meta"
    return Opening(opening.dtype, kind, opening.trust_remote_code, opening.progress)


def _tokenizer_near(path: Path, trust_remote_code: bool) -> Any | None:
    directory = path.parent if path.is_file() else path
    return open_tokenizer_in(directory, trust_remote_code=trust_remote_code)


def _dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in _DTYPES:
        raise ModelError(f"no dtype {name!r}", fix=f"one of: {', '.join((*_DTYPES, 'auto'))}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        fix = "use cpu, or cuda" if torch.cuda.is_available() else "use cpu"
        raise ModelError(f"no device {name!r} here: {reason}", fix=fix) from error
    return device


def _cast(example: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The example in the model's dtype where it is floating point, and on its device."""
    weight = next(model.parameters(), None)
    if weight is None:
        return example
    device = torch.device("cpu") if weight.is_meta else weight.device
    return {
        name: value.to(device, weight.dtype) if value.is_floating_point() else value.to(device)
        for name, value in example.items()
    }

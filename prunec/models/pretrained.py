"""transformers models: a directory with weights, or a config without."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from prunec.errors import ModelError
from prunec.events import Progress
from prunec.models.checkpoint import check_weights, is_plain, read_json
from prunec.models.packed import FORMATS, quantisation
from prunec.models.quiet import quiet
from prunec.models.store import Store, tensor_shapes

Weights = Literal["load", "random", "meta"]

# What transformers raises for a model that it cannot open.
OPENING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    SafetensorError,
    struct.error,
    StrictDataclassError,
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
_MOST_LAYERS = 10_000
_TRUST = "if you trust the code in it, allow it: --trust-remote-code (trust_remote_code=True)"


@dataclass(frozen=True)
class Opening:
    """How a model is opened: `dtype` None means that of the checkpoint."""

    dtype: torch.dtype | None
    weights: Weights
    trust_remote_code: bool
    progress: Progress


def open_directory(directory: Path, opening: Opening) -> nn.Module:
    """The model in a transformers directory: config.json and safetensors.

    Raises:
        ModelError: no config, no weights, damaged or pickled weights, weights that are not those
            of the model's class, or a class that transformers does not know.
    """
    config = read_config(directory / "config.json", opening)
    if opening.weights != "load":
        return build(config, directory, opening)
    check_weights(directory)
    with as_model_errors(directory), quiet():
        entry = _entry(config, opening)
        model, found = entry.load(
            str(directory),
            config=config,
            dtype=opening.dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **entry.trust,
        )
    _check_complete(model, found, directory, opening.progress)
    return _typed(model)


def open_stored(directory: Path, opening: Opening) -> tuple[nn.Module, Store]:
    """The model in a transformers directory on meta, and where its weights can be read.

    transformers itself loads the checkpoint, from tensors that have shapes only: names, dtypes and
    complaints are those of `open_directory`. Buffers are real.

    Raises:
        ModelError: as `open_directory`.
    """
    config = read_config(directory / "config.json", opening)
    files = check_weights(directory)
    shapes = {name: tensor for path in files for name, tensor in tensor_shapes(path).items()}
    with as_model_errors(directory), quiet():
        entry = _entry(config, opening)
        model, found = entry.load(
            None,
            config=config,
            state_dict=shapes,
            dtype=opening.dtype or _stored_dtype(config, shapes),
            device_map={"": "meta"},
            output_loading_info=True,
            **entry.trust,
        )
        _check_complete(model, found, directory, opening.progress)
        store = Store(model, files)
        if model.can_generate() and (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(directory))
    model.config._name_or_path = str(directory)
    _make_buffers_real(model, build(config, directory, opening), store)
    return _typed(model), store


def _stored_dtype(config: PreTrainedConfig, shapes: Mapping[str, torch.Tensor]) -> torch.dtype:
    """What dtype="auto" means: that of the config, else of the first floating-point tensor."""
    floats = (t.dtype for t in shapes.values() if t.is_floating_point())
    named = config.dtype
    return named if isinstance(named, torch.dtype) else next(floats, torch.float32)


def _make_buffers_real(model: Any, built: nn.Module, store: Store) -> None:
    """Buffers as the class makes them (rotary frequencies) or as the files hold them."""
    for name, buffer in dict(built.named_buffers()).items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = store.get(name, buffer)


def open_config(path: Path, opening: Opening) -> nn.Module:
    """The model of a config file without its weights: on meta, or random where asked for.

    On meta its parameters have shapes only; non-persistent buffers, which no checkpoint holds
    (such as rotary frequencies), are real.
    """
    return build(read_config(path, opening), path, opening)


def build(config: PreTrainedConfig, where: Path, opening: Opening) -> nn.Module:
    """A model from its config: `opening.weights` "random" draws them (seed 0), else meta."""
    dtype = opening.dtype or config.dtype or torch.float32
    with as_model_errors(where), quiet(), torch.random.fork_rng():
        entry = _entry(config, opening)
        torch.manual_seed(0)
        if opening.weights == "random":
            return _typed(entry.create(config)).to(dtype)
        with init_empty_weights(include_buffers=False):
            model = _typed(entry.create(config))
        # init_empty_weights replaces every parameter by one of its own, tied ones too.
        model.tie_weights()  # type: ignore[operator]
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model


def read_config(path: Path, opening: Opening) -> PreTrainedConfig:
    """The config of a transformers model from its JSON file.

    Raises:
        ModelError: absent, not JSON, no or an unknown model_type, fields of a wrong type, or a
            number of layers that no model has.
    """
    values = read_json(path)
    _check_depth(values, path)
    if not isinstance(values.get("model_type"), str):
        raise ModelError(f"{path.name} has no model_type: not a model's config", where=str(path))
    known = values["model_type"] in transformers.CONFIG_MAPPING
    if not known and not (opening.trust_remote_code and "auto_map" in values):
        fix = _TRUST if "auto_map" in values else "a newer transformers may know it"
        raise ModelError(
            f"transformers {transformers.__version__} has no model type {values['model_type']!r}",
            where=str(path),
            fix=fix,
        )
    with as_model_errors(path), quiet():
        config = AutoConfig.from_pretrained(
            str(path.parent if path.name == "config.json" else path),
            trust_remote_code=opening.trust_remote_code,
            local_files_only=True,
        )
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"{path.name} is not a model's config", where=str(path))
    _refuse_quantised(config, path)
    return config


def _check_depth(values: Mapping[str, Any], path: Path) -> None:
    """Modules are built one by one: a damaged number of layers would never come to an end."""
    for name, value in values.items():
        if name.endswith(("layer", "layers")) and isinstance(value, int) and value > _MOST_LAYERS:
            raise ModelError(f"{name} is {value}, more than any model has", where=str(path))
        if isinstance(value, dict):
            _check_depth(value, path)


def _refuse_quantised(config: PreTrainedConfig, path: Path) -> None:
    """Packed weights have no columns that could be cut; transformers would run them as they are."""
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return
    method = quantisation(settings if isinstance(settings, dict) else vars(settings))
    raise ModelError(
        f"the checkpoint's weights are quantised ({method}), which prunec does not cut",
        where=str(path),
        fix="prune the checkpoint that it was made from and quantise the result"
        + (", or add --dequantise (dequantise=True)" if method in FORMATS else ""),
    )


def open_tokenizer_in(directory: Path, *, trust_remote_code: bool) -> Any | None:
    """The tokenizer in a directory; None where it has no tokenizer files.

    Raises:
        ModelError: the files are there but do not load.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        with as_model_errors(directory, "the tokenizer"), quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory), trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:
        if type(error) is not Exception:  # which tokenizers raises for what it cannot read
            raise
        raise _not_opened(directory, "the tokenizer", error) from error
    templates = getattr(tokenizer, "chat_template", None)
    for name in templates if isinstance(templates, dict) else ():
        if not is_plain(name):
            raise ModelError(
                f"the tokenizer names a chat template {name!r}, which is no name of a file",
                where=str(directory),
                so="it would be written outside of the output directory",
                fix="take the tokenizer from a source that you trust",
            )
    return tokenizer


@dataclass(frozen=True)
class _Entry:
    """Two ways into one model class, and the keywords they take."""

    load: Callable[..., Any]
    create: Callable[[PreTrainedConfig], Any]
    trust: dict[str, bool]


def _entry(config: PreTrainedConfig, opening: Opening) -> _Entry:
    """The class of a config: the one it names, else what transformers maps its type to."""
    named = config.architectures[0] if config.architectures else None
    auto_map: dict[str, str] = getattr(config, "auto_map", None) or {}
    if opening.trust_remote_code and (auto := _remote_class(auto_map, named)):
        trust = {"trust_remote_code": True}
        return _Entry(auto.from_pretrained, lambda c: auto.from_config(c, **trust), trust)
    cls = getattr(transformers, named, None) if named else None
    if cls is None and auto_map:
        # The stock class of its type may have the same weights and compute something else.
        raise ModelError(f"the model's class {named} is the checkpoint's own code", fix=_TRUST)
    cls = cls or mapped_class(config)
    if cls is None:
        raise ModelError(f"no transformers model takes a {type(config).__name__}")
    return _Entry(cls.from_pretrained, cls, {})


def _remote_class(auto_map: dict[str, str], named: str | None) -> Any | None:
    """The Auto class under which the checkpoint's own code offers the class it names."""
    offers = {auto: home for auto, home in auto_map.items() if auto.startswith("AutoModel")}
    exact = [auto for auto, home in offers.items() if named and home.endswith(f".{named}")]
    for auto in (*exact, *offers):
        return getattr(transformers, auto)
    return None


def mapped_class(config: PreTrainedConfig) -> Any | None:
    """The class for a config that names none: the head that its type is most used with."""
    heads: tuple[str, ...]
    if config.is_encoder_decoder:
        heads = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
    elif getattr(config, "is_decoder", False):
        heads = ("CAUSAL_LM",)
    else:  # an encoder is in both of the first two, a decoder in the second alone
        heads = ("MASKED_LM", "CAUSAL_LM")
    others = (
        "ZERO_SHOT_IMAGE_CLASSIFICATION",  # two encoders, of which the next would take one
        "IMAGE_CLASSIFICATION",
        "IMAGE_TEXT_TO_TEXT",
        "AUDIO_CLASSIFICATION",
        "CTC",
    )
    mappings = [f"MODEL_FOR_{head}_MAPPING" for head in (*heads, *others)]
    for name in (*mappings, "MODEL_MAPPING"):
        mapping = getattr(transformers, name)
        if type(config) in mapping:
            cls = mapping[type(config)]
            return cls[0] if isinstance(cls, tuple) else cls
    return None


def refuse_missing(model: Any, found: dict[str, Any], directory: Path) -> None:
    """Raise ModelError where the loading info of transformers lists weights that no file holds."""
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{len(missing)} weights of {type(model).__name__} are not in the files,"
            f" such as {missing[0]}",
            where=str(directory),
            so="they would be random numbers",
            fix="complete the checkpoint, or correct `architectures` in its config.json",
        )


def _check_complete(model: Any, found: dict[str, Any], directory: Path, progress: Progress) -> None:
    refuse_missing(model, found, directory)
    if unused := sorted(found["unexpected_keys"]):
        progress.message(
            f"{len(unused)} tensors in {directory.name} are not part of"
            f" {type(model).__name__}, such as {unused[0]}: left out"
        )


def _typed(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


@contextmanager
def as_model_errors(where: Path, what: str = "the model") -> Iterator[None]:
    """Raise ModelError for whatever transformers raises when it cannot open something."""
    try:
        yield
    except OPENING_ERRORS as error:
        raise _not_opened(where, what, error) from error


def _not_opened(where: Path, what: str, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(f"transformers cannot open {what}: {lines[0]}", where=str(where))

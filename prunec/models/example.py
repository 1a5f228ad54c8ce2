"""Inputs to trace a transformers model with, made from its config and forward signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from prunec.errors import ModelError
from prunec.models.context import context_length

# Sizes that are unlikely to equal one of the model's own, so that the analysis can tell them apart.
_BATCH, _SEQUENCE, _TARGET = 2, 11, 7
_IMAGE = 64


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Minimal inputs by keyword: fixed random values, batch 2, no attention mask (no padding).

    Text ids are int64 [2, 11] of ordinary tokens, decoder ids [2, 7]; images [2, channels,
    height, width]; audio as long as the config asks for. They are on the model's device, and on
    the CPU where the model is on meta.

    Raises:
        ModelError: the model takes something else; a factory can then give example inputs.
    """
    main = _main_name(model)
    config: Any = getattr(model, "config", None)
    if config is None or main not in _MAKERS:
        raise ModelError(
            f"no example inputs are known for {type(model).__name__}"
            + (f" (its main input is {main!r})" if main else ""),
            fix="write a factory that returns (model, example inputs): package.module:factory",
        )
    generator = torch.Generator().manual_seed(0)
    inputs = {name: _MAKERS[name](model, config, generator) for name in _main_inputs(model, main)}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in _forward(model):
        inputs["decoder_input_ids"] = _token_ids(model, config, generator, _TARGET)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {
        name: value if device.type == "meta" else value.to(device) for name, value in inputs.items()
    }


def _main_name(model: nn.Module) -> str | None:
    """The main input; where it goes by a name of the class's own, one that is taken as well."""
    main = getattr(model, "main_input_name", None)
    known = (name for name in _forward(model) if name in _MAKERS)
    return main if main is None or main in _MAKERS else next(known, main)


def _main_inputs(model: nn.Module, main: str) -> list[str]:
    """The main input, and its counterpart where two encoders are compared with each other."""
    config: Any = model.config
    parts = all(getattr(config, f"{part}_config", None) is not None for part in ("text", "vision"))
    # A text decoder that reads images marks their place by a token; without one it takes both.
    marker = any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    both = {"input_ids", "pixel_values"}
    if parts and not marker and both <= set(_forward(model)):
        return sorted(both)
    return [main]


def _token_ids(
    model: nn.Module, config: Any, generator: torch.Generator, length: int = _SEQUENCE
) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = int(text.vocab_size)
    length = min(length, context_length(model) or length)
    # Padding, begin and end marks change what some models compute: masks, positions, pooling.
    special = {
        value
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        for value in _flat(getattr(text, name, None))
    }
    ordinary = torch.tensor([i for i in range(size) if i not in special] or [0])
    picks = torch.randint(len(ordinary), (_BATCH, length), generator=generator)
    return ordinary[picks]


def _pixels(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    places = [config, *(getattr(config, f"{n}_config", None) for n in ("vision", "backbone"))]
    size = _first(places, "image_size", default=_IMAGE)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = _first(places, "num_channels", "in_channels", default=3)
    frames = _first(places, "num_frames", default=None)
    leading = (_BATCH,) if frames is None else (_BATCH, frames)
    return torch.randn(*leading, channels, height, width, generator=generator)


def _features(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    places = [config, getattr(config, "encoder_config", None)]
    per_frame = _first(
        places, "input_feat_per_channel", "feature_projection_input_dim", default=None
    )
    if per_frame is None and not hasattr(config, "max_source_positions"):
        per_frame = _first(places, "num_mel_bins", default=80)
    if per_frame is not None:
        return torch.randn(_BATCH, 64, int(per_frame), generator=generator)
    # A spectrogram of fixed length, which two convolutions halve to the encoder's positions.
    frames = 2 * int(config.max_source_positions)
    return torch.randn(_BATCH, int(config.num_mel_bins), frames, generator=generator)


def _values(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    if strides := getattr(config, "conv_stride", None):
        return torch.randn(_BATCH, 20 * prod(strides), generator=generator)
    if getattr(config, "num_mel_bins", None) is None:  # the wave itself
        return torch.randn(_BATCH, 4000, generator=generator)
    return torch.randn(
        _BATCH, int(config.max_length), int(config.num_mel_bins), generator=generator
    )


_MAKERS: dict[str, Callable[[nn.Module, Any, torch.Generator], Tensor]] = {
    "input_ids": _token_ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _values,
}


def _forward(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _first(places: list[Any], *names: str, default: Any) -> Any:
    found = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in found if value is not None), default)


def _flat(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [int(value)]

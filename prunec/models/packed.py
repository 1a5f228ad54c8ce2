"""Quantised tensors as numbers again: the formats of packed weights that plain torch can read.

Each reader takes the parts that a checkpoint stores for one weight, by their suffix, and gives the
weight ``[out, in]`` in fp32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunec.errors import ModelError

Parts = Mapping[str, Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A way to store a weight in parts.

    Attributes:
        main: suffix of the part that holds the numbers; `weight` takes its place.
        others: suffixes of its further parts, those that some weights lack included.
        read: the weight from the parts, given the quantisation settings.
        ignored: suffixes of tensors that belong to the quantised computation alone.
    """

    main: str
    others: tuple[str, ...]
    read: Callable[[Parts, Settings], Tensor]
    ignored: tuple[str, ...] = ()


def _fp8(parts: Parts, settings: Settings) -> Tensor:
    """``w = q s``, s one number for all, for each row, or for each block of a grid."""
    weight = parts["weight"].float()
    scale = next((parts[name] for name in ("weight_scale_inv", "weight_scale") if name in parts), 1)
    if not isinstance(scale, Tensor) or scale.numel() == 1:
        return weight * float(scale)
    # Exponents alone, as e8m0 bytes, in some checkpoints.
    scale = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    grid = scale.reshape(len(scale), -1)
    block = settings.get("weight_block_size") or [
        math.ceil(size / cells) for size, cells in zip(weight.shape, grid.shape, strict=True)
    ]
    row, column = (torch.arange(n) // int(b) for n, b in zip(weight.shape, block, strict=True))
    return weight * grid[row[:, None], column]


def _unpacked(packed: Tensor, bits: int, axis: int) -> Tensor:
    """The unsigned numbers in int32 words, the lowest bits first, along an axis."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    words = packed.movedim(axis, -1)[..., None]
    numbers = (words >> shifts) & (2**bits - 1)
    found: Tensor = numbers.flatten(-2).movedim(-1, axis)
    return found


def _bits(settings: Settings, allowed: tuple[int, ...]) -> int:
    bits = settings.get("bits", settings.get("w_bit"))
    if bits not in allowed:
        raise ModelError(
            f"{settings.get('quant_method')} weights of {bits} bits cannot be dequantised",
            fix=f"{', '.join(map(str, allowed))} can; prune the checkpoint that it was made from",
        )
    return int(bits)


def _gptq(parts: Parts, settings: Settings) -> Tensor:
    """``w = s (q - z)`` by group of inputs; the first version of the format stores z - 1."""
    bits = _bits(settings, (2, 4, 8))
    numbers = _unpacked(parts["qweight"], bits, 0)  # [in, out]
    zeros = _unpacked(parts["qzeros"], bits, 1)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)
    size = settings.get("group_size", -1)
    size = len(numbers) if size in (-1, None) else size
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(len(numbers)) // size
    return ((numbers - zeros[group]).float() * parts["scales"].float()[group]).T


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbouring outputs lies in a word of AutoAWQ's gemm kernel."""


def _awq(parts: Parts, settings: Settings) -> Tensor:
    """``w = s (q - z)`` by group of inputs, eight outputs interleaved in a word."""
    _bits(settings, (4,))
    if (version := str(settings.get("version", "gemm")).lower()) != "gemm":
        raise ModelError(
            f"awq weights of version {version} cannot be dequantised",
            fix="prune the checkpoint that it was made from",
        )

    def ordered(packed: Tensor) -> Tensor:
        numbers = _unpacked(packed, 4, 1)
        return numbers.view(len(numbers), -1, 8)[..., list(_AWQ_ORDER)].flatten(1)

    numbers, zeros = ordered(parts["qweight"]), ordered(parts["qzeros"])
    per_group = len(numbers) // len(zeros)
    group = torch.arange(len(numbers)) // per_group
    return ((numbers - zeros[group]).float() * parts["scales"].float()[group]).T


_NESTED = "weight.nested_absmax"


def _bnb4(parts: Parts, settings: Settings) -> Tensor:
    """A table of 16 values times the largest of each block; these may be quantised once more."""
    (state,) = (value for name, value in parts.items() if "quant_state." in name)
    facts = json.loads(bytes(state.tolist()))
    packed = parts["weight"].flatten()
    numbers = torch.stack((packed >> 4, packed & 15), dim=1).flatten().long()
    largest = parts["weight.absmax"]
    if _NESTED in parts:
        outer = parts[_NESTED][torch.arange(len(largest)) // int(facts["nested_blocksize"])]
        largest = parts["weight.nested_quant_map"][largest.long()] * outer
        largest = largest + float(facts["nested_offset"])
    count = math.prod(facts["shape"])
    block = torch.arange(count) // int(facts["blocksize"]) if count <= len(numbers) else numbers
    values = parts["weight.quant_map"].float()[numbers[:count]] * largest.float()[block]
    return values.view(*facts["shape"])


def _bnb8(parts: Parts, settings: Settings) -> Tensor:
    """int8 times the largest of each row, over 127."""
    return parts["weight"].float() * (parts["SCB"].float()[:, None] / 127)


_BNB4_PARTS = (
    "weight.absmax",
    "weight.quant_map",
    _NESTED,
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)
_FP8 = Format(
    "weight",
    ("weight_scale_inv", "weight_scale"),
    _fp8,
    ("input_scale", "input_scale_ub", "activation_scale"),
)
FORMATS: Mapping[str, Format] = {
    "fp8": _FP8,
    "fbgemm_fp8": _FP8,
    "gptq": Format("qweight", ("qzeros", "scales", "g_idx"), _gptq),
    "awq": Format("qweight", ("qzeros", "scales"), _awq),
    "bitsandbytes 4-bit": Format("weight", _BNB4_PARTS, _bnb4),
    "bitsandbytes 8-bit": Format("weight", ("SCB", "weight_format"), _bnb8),
}
"""What can be dequantised, by the name that `quantisation` gives it."""


def quantisation(settings: Settings) -> str:
    """How the weights of a checkpoint are quantised, from its config's quantization_config."""
    method = settings.get("quant_method")
    name = str(getattr(method, "value", method))
    if name == "bitsandbytes":
        name += " 4-bit" if settings.get("load_in_4bit") else " 8-bit"
    return name

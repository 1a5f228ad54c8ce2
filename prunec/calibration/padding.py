"""Samples in batches of one shape: what is shorter is padded, and masks say where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prunec.calibration.forms import IGNORED, Fields
from prunec.errors import CalibrationError

MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
"""The tokens that a model reads, and the input that says which of them are no padding."""


def batched(samples: Sequence[Fields], size: int, pad: int = 0) -> list[Fields]:
    """Samples in batches of `size`, all padded on the right to the longest of all.

    Args:
        samples: all with the same inputs, without a sample axis.
        size: divides their number.
        pad: the token id in the padding, of which no statistic and no loss is taken.

    Raises:
        CalibrationError: inputs of other names, or of shapes that no padding makes equal.
    """
    names = check_alike(samples)
    columns = {name: [sample[name] for sample in samples] for name in names}
    stacked: Fields = {}
    for name, values in columns.items():
        stacked[name] = _stacked(name, values, pad)
        mask = MASKS.get(name)
        if mask is not None and mask not in columns:
            lengths = torch.tensor([len(value) for value in values])
            if bool((lengths < lengths.max()).any()):
                real = torch.arange(int(lengths.max())) < lengths[:, None]
                stacked[mask] = real.long()
    return [
        {name: value[first : first + size] for name, value in stacked.items()}
        for first in range(0, len(samples), size)
    ]


def _stacked(name: str, values: Sequence[Tensor], pad: int) -> Tensor:
    if len({tuple(value.shape) for value in values}) == 1:
        return torch.stack(list(values))
    tokens = all(value.ndim == 1 and not value.is_floating_point() for value in values)
    if not tokens:
        shapes = sorted({str(list(value.shape)) for value in values})
        raise CalibrationError(
            f"samples of {name} have different shapes: {', '.join(shapes[:4])}",
            so="all batches must be alike, and only tokens can be padded",
            fix="give them in one shape",
        )
    longest = max(len(value) for value in values)
    fill = IGNORED if name == "labels" else pad if name in MASKS else 0
    return torch.stack([F.pad(value, (0, longest - len(value)), value=fill) for value in values])


def check_alike(samples: Sequence[Fields]) -> list[str]:
    """The names of the inputs that all samples have.

    Raises:
        CalibrationError: they differ.
    """
    names = list(samples[0])
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise CalibrationError(
                f"samples have different inputs: {', '.join(names)}; {', '.join(sample)}",
                fix="calibrate on sources of one kind",
            )
    return names


def token_count(batches: Sequence[Fields]) -> int:
    """Tokens that are no padding, of encoder and decoder together; 0 where there are no tokens."""
    return sum(
        int(batch[mask].sum()) if mask in batch else batch[name].numel()
        for batch in batches
        for name, mask in MASKS.items()
        if name in batch
    )

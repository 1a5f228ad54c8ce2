"""Convolutions, pooling, resampling and padding: channels are units, positions are not."""

from __future__ import annotations

from collections.abc import Sequence

from prunec.errors import DimError
from prunec.graph.dims import Dim, as_product
from prunec.graph.rules.registry import RULES, Call, Resized, Result, Value
from prunec.graph.selection import Selection

_CONVOLUTIONS = (
    *("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution"),
    *("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d"),
)


@RULES.register(*_CONVOLUTIONS)
def convolution(call: Call) -> Result:
    """[n, c, x...] with a kernel [o, c / groups, k...], or [c, o / groups, k...] transposed."""
    dims, weight = call.dims("input"), call.dims("weight")
    groups = int(call.arg("groups"))
    transposed = "transpose" in call.name or bool(call.arg("transposed"))
    channel = len(dims) - (len(weight) - 2) - 1
    ours, theirs = dims[channel], weight[0] if transposed else weight[1]
    if groups == 1:
        call.unify(ours, theirs)
        out = weight[1] if transposed else weight[0]
    else:
        out = _grouped(call, ours, weight, groups, transposed)
    for dim in (ours, out):
        call.note(dim, "channel")
    if call.dims("bias"):
        call.unify(out, call.dims("bias")[0])
    for dim in weight[2:]:
        call.pin(dim, "a kernel position")
    return (*dims[:channel], out, *_positions(call, call.shape[channel + 1 :]))


def _grouped(
    call: Call, channels: Dim, weight: Sequence[Dim], groups: int, transposed: bool
) -> Dim:
    """Channels in blocks; block g of the input makes block g of the output."""
    group, inner = as_product(channels, [groups, channels.size // groups])
    if transposed:
        weight_group, weight_inner = as_product(weight[0], [groups, weight[0].size // groups])
        call.unify(group, weight_group)
        call.unify(inner, weight_inner)
        if weight[1].size == 1:
            return group
        raise DimError("a grouped transposed convolution with several outputs a group")
    out_group, _ = as_product(weight[0], [groups, weight[0].size // groups])
    call.unify(group, out_group)
    if inner.size > 1:
        call.unify(inner, weight[1])
    return weight[0]


@RULES.resizes(*_CONVOLUTIONS)
def resize_convolution(call: Call, selection: Selection) -> Resized:
    groups = int(call.arg("groups"))
    channel = len(call.dims("input")) - (len(call.dims("weight")) - 2) - 1
    channels = call.dims("input")[channel]
    if groups == 1 or not selection.touches(channels):
        return Resized()
    group, _ = as_product(channels, [groups, channels.size // groups])
    return Resized({"groups": selection.size(group)})


def _positions(call: Call, sizes: Sequence[int]) -> tuple[Dim, ...]:
    result = tuple(call.fresh(size) for size in sizes)
    for dim in result:
        call.pin(dim, "a position")
    return result


_RESAMPLED = tuple(
    f"aten::{name}"
    for name in (
        *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("_adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bicubic2d_aa"),
        *("_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_nearest3d"),
        *("grid_sampler", "grid_sampler_2d"),
    )
)


@RULES.register(*_RESAMPLED)
def resample(call: Call) -> Result:
    """Pooling and interpolation: trailing positions change, the axes before them stay."""
    dims = call.dims(call.first)
    spatial = _spatial_rank(call.name)
    lead = len(dims) - spatial
    for dim in dims[lead:]:
        call.pin(dim, "a position")
    return [Value((*dims[:lead], *_positions(call, shape[lead:]))) for shape in call.shapes]


def _spatial_rank(name: str) -> int:
    digits = [int(c) for c in name.removesuffix("_with_indices") if c.isdigit()]
    return digits[-1] if digits else 2


@RULES.register("aten::pad", "aten::constant_pad_nd", "aten::reflection_pad1d", usage="move")
def pad(call: Call) -> Result:
    dims = list(call.dims("self"))
    for axis, size in enumerate(call.shape):
        if dims[axis].size != size:
            call.pin(dims[axis], "padded")
            dims[axis] = call.fresh(size)
            call.pin(dims[axis], "padded")
    return tuple(dims)


@RULES.register("aten::im2col")
def unfold_windows(call: Call) -> Result:
    """[..., c, h, w] to [..., c x window, windows]."""
    *lead, channel, height, width = call.dims("self")
    result = call.fresh(call.shape[-2])
    kept, window = as_product(result, [channel.size, result.size // channel.size])
    call.unify(kept, channel)
    call.pin(window, "a kernel position")
    for dim in (height, width):
        call.pin(dim, "a position")
    return (*lead, result, *_positions(call, call.shape[-1:]))


@RULES.register("aten::col2im")
def fold_windows(call: Call) -> Result:
    """[..., c x window, windows] to [..., c, h, w]."""
    *lead, channels, windows = call.dims("self")
    channel, window = as_product(channels, [call.shape[-3], channels.size // call.shape[-3]])
    call.pin(window, "a kernel position")
    call.pin(windows, "a position")
    return (*lead, channel, *_positions(call, call.shape[-2:]))


@RULES.register("aten::pixel_shuffle", "aten::pixel_unshuffle")
def shuffle(call: Call) -> Result:
    """Channels and positions are mixed: only the batch axes survive."""
    dims = call.dims("self")
    for dim in dims[1:]:
        call.pin(dim, "mixed with positions")
    rest = tuple(call.fresh(size) for size in call.shape[1:])
    for dim in rest:
        call.pin(dim, "mixed with positions")
    return (dims[0], *rest)


_FOURIER = tuple(
    f"aten::fft_{inverse}{real}fft{rank}"
    for inverse in ("", "i")
    for real in ("", "r", "h")
    for rank in ("", "2", "n")
)


@RULES.register(*_FOURIER)
def fourier(call: Call) -> Result:
    """Frequencies stand where positions stood, on the axes transformed."""
    dims = list(call.dims("self"))
    axes = call.arg("dim")
    for axis in range(len(dims)) if axes is None else axes if isinstance(axes, list) else [axes]:
        call.pin(dims[axis], "mixed by a Fourier transform")
        dims[axis] = call.fresh(call.shape[axis])
        call.pin(dims[axis], "mixed by a Fourier transform")
    return tuple(dims)

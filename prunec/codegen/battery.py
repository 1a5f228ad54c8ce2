"""The comparisons that a shrunk module must stand: shapes, padding, attention code, caches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = dict[str, Tensor]
SHAPES = ((2, 7), (1, 1), (3, 12))  # (batch, sequence)
# what a module with wrong numbers in it raises; anything else is a bug of ours
FORWARD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Check:
    """One way to run a model.

    Attributes:
        name: as reported.
        inputs: by keyword.
        attention: the attention implementation, None where the model has no choice.
        decode: the last token through the cache of the others, instead of all at once.
        real: bool [batch, sequence] of the positions that padding leaves, None for all.
    """

    name: str
    inputs: Inputs
    attention: str | None = None
    decode: bool = False
    real: Tensor | None = field(default=None, repr=False)


def checks(
    model: Any, example: Mapping[str, Tensor], shapes: Sequence[tuple[int, int]] = SHAPES
) -> list[Check]:
    """The battery for one model. Not all may apply to it: `fit.usable` asks the reference.

    Tokens: every shape; the largest also with the first row padded on the left, and both of these
    through the cache. Each under every attention implementation.
    """
    found = []
    for attention in attention_choices(model):
        for batch, length in shapes:
            inputs = resized(model, example, batch, length)
            size = f"{batch} x {length}" if _text_names(example) else f"batch {batch}"
            found.append(Check(_named(size, attention), inputs, attention))
        if _text_names(example) and length > 2:
            found += _more_ways(model, found[-1], size)
    return found


def own_shape(example: Mapping[str, Tensor]) -> tuple[int, int]:
    """(batch, sequence) of the example itself: all that a module of fixed length can be run at."""
    first = example[next(iter(_text_names(example)), next(iter(example)))]
    return first.shape[0], first.shape[1] if first.ndim > 1 else 1


def _more_ways(model: Any, plain: Check, size: str) -> list[Check]:
    """Left padding, and the last token from the cache of the others."""
    accepts, found = set(inspect.signature(model.forward).parameters), []
    if "attention_mask" in accepts:
        name = _named(f"{size}, left padding", plain.attention)
        found.append(_left_padded(replace(plain, name=name)))
    if _caches(model, accepts):
        decoding = {"": plain, ", left padding": found[0]} if found else {"": plain}
        for way, check in decoding.items():
            name = _named(f"{size}{way}, cached decoding", plain.attention)
            found.append(replace(check, name=name, decode=True))
    return found


def _named(way: str, attention: str | None) -> str:
    return f"{way}, {attention} attention" if attention else way


def _left_padded(check: Check) -> Check:
    """Half of the first row masked. An encoder's mask leaves all of the decoder's positions."""
    decoded = _decoded(list(check.inputs))
    batch, length = check.inputs[decoded].shape
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 2] = 0
    real = mask.bool() if decoded == "input_ids" else None
    return replace(check, inputs={**check.inputs, "attention_mask": mask}, real=real)


def attention_choices(model: Any) -> list[str | None]:
    """The attention implementations that the model can be switched between, its own first."""
    current = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if current is None or not hasattr(model, "set_attn_implementation"):
        return [None]
    names: list[str | None] = [current]
    for name in ("eager", "sdpa"):
        supported = name == "eager" or getattr(model, "_supports_sdpa", False)
        if name != current and supported and model._can_set_attn_implementation():
            names.append(name)
    return names


def _text_names(example: Mapping[str, Tensor]) -> list[str]:
    return [n for n, t in example.items() if t.ndim == 2 and not t.is_floating_point()]


def _decoded(names: Sequence[str]) -> str:
    return "decoder_input_ids" if "decoder_input_ids" in names else "input_ids"


def _caches(model: Any, accepts: set[str]) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate and can_generate() and {"past_key_values", "use_cache"} <= accepts)


def resized(model: nn.Module, example: Mapping[str, Tensor], batch: int, length: int) -> Inputs:
    """Seeded random inputs like `example`: another batch size and, for tokens, another length.

    Tokens beside an image keep the example's order, as some of them stand for its parts; `length`
    more follow, from among the example's last.
    """
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    made = {}
    beside = "input_ids" in example and any(t.is_floating_point() for t in example.values())
    for name, tensor in example.items():
        if name == "input_ids" and beside:
            row = tensor[0].cpu()
            more = row[-4:][torch.randint(min(4, len(row)), (batch, length), generator=generator)]
            made[name] = torch.cat([row.expand(batch, -1), more], 1)
        elif tensor.ndim == 2 and not tensor.is_floating_point():
            if name.endswith("input_ids"):
                known = torch.arange(1, _vocabulary(model, tensor))
            else:  # a mask, types, positions: values that occur
                known = tensor.cpu().flatten()
            made[name] = known[torch.randint(len(known), (batch, length), generator=generator)]
        elif tensor.is_floating_point():
            shape = (batch, *tensor.shape[1:])
            made[name] = torch.randn(shape, generator=generator, dtype=torch.float32)
        else:
            made[name] = tensor[:1].expand(batch, *tensor.shape[1:]).clone()
    return made


def _vocabulary(model: nn.Module, example: Tensor) -> int:
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    config = getattr(model, "config", None)
    known = getattr(config, "vocab_size", None)
    return int(known) if known else max(2, min([int(example.max()) + 1, *sizes]))


@contextmanager
def _attention(model: Any, name: str | None) -> Iterator[None]:
    if name is None or model.config._attn_implementation == name:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def outputs(model: nn.Module, check: Check) -> list[Tensor]:
    """The floating-point outputs of one check, logits first; padding positions left out."""
    with _attention(model, check.attention):
        run = _decode_last if check.decode else _at_once
        found = run(model, check.inputs)
    return _without_padding(found, check)


@torch.no_grad()
def whole_outputs(model: nn.Module, check: Check) -> list[Tensor]:
    """All outputs for the inputs of a check, padding included: never through a cache."""
    with _attention(model, check.attention):
        return _at_once(model, check.inputs)


def expected(whole: list[Tensor], check: Check) -> list[Tensor]:
    """What `check` must give, from the reference's outputs for its inputs."""
    return _without_padding([whole[0][:, -1:]] if check.decode else whole, check)


def _without_padding(found: list[Tensor], check: Check) -> list[Tensor]:
    if check.real is None:
        return found
    batch, length = check.real.shape
    return [
        t[check.real[:, -t.shape[1] :].to(t.device)]
        if t.ndim > 1 and t.shape[0] == batch and t.shape[1] in (1, length)
        else t
        for t in found
    ]


def _at_once(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    accepts = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepts else {}
    return _tensors(model(**_cast(model, inputs), **extra))


def _cast(model: nn.Module, inputs: Inputs) -> Inputs:
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return inputs
    device = torch.device("cpu") if like.is_meta else like.device  # see prunec.codegen.streamed
    return {
        name: t.to(device, like.dtype if t.is_floating_point() else None)
        for name, t in inputs.items()
    }


def _decode_last(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Logits of the last position, computed from the cache of the others."""
    name = _decoded(list(inputs))
    inputs = _cast(model, inputs)
    tokens, mask = inputs[name], inputs.get("attention_mask")
    head = {**inputs, name: tokens[:, :-1]}
    if mask is not None and name == "input_ids":
        head["attention_mask"] = mask[:, :-1]
    past = model(**head, use_cache=True).past_key_values
    last = {**inputs, name: tokens[:, -1:]}
    return _tensors(model(**last, past_key_values=past, use_cache=True))[:1]


def _tensors(output: Any) -> list[Tensor]:
    values = list(output.values()) if isinstance(output, Mapping) else output
    leaves = pytree.tree_leaves(values)  # the feature maps of a backbone are a tuple
    return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest absolute difference over the largest absolute value; inf for other shapes or NaN."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if b.numel():
            a, b = a.double(), b.double().to(a.device)  # of a module and of a graph elsewhere
            gap = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
            worst = max(worst, float(gap) if torch.isfinite(gap) else float("inf"))
    return worst


def tolerance(model: nn.Module) -> float:
    """Relative: 1e-4 in fp32, 1e-9 in fp64, two units in the last place below."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    exact = {torch.float32: 1e-4, torch.float64: 1e-9}
    return exact.get(dtype, 2 * torch.finfo(dtype).eps)

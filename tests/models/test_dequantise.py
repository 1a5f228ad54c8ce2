"""Quantised checkpoints, packed here by the book, come out as the numbers that were packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_llama
from torch import Tensor

from prunec.errors import ModelError
from prunec.models import open_model
from prunec.models.packed import _AWQ_ORDER, _fp8
from prunec.models.quiet import quiet

Packed = tuple[dict[str, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))


def words(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers along the last axis as int32 words, the first in the lowest bits."""
    groups = numbers.long().unflatten(-1, (-1, 32 // bits))
    return (groups << torch.arange(0, 32, bits)).sum(-1).to(torch.int32)


def fp8(weight: Tensor) -> Packed:
    """Blocks of 16 x 16."""
    blocks = weight.unfold(0, 16, 16).unfold(1, 16, 16)
    scale = blocks.abs().amax((2, 3)) / 448
    grid = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    packed = (weight / grid).to(torch.float8_e4m3fn)
    return {"weight": packed, "weight_scale_inv": scale}, packed.float() * grid


def gptq(weight: Tensor, bits: int = 4) -> Packed:
    """Groups of 16 inputs, in an order of their own."""
    inputs = weight.T
    group = torch.randperm(len(inputs)) // 16
    zero = torch.randint(1, 2**bits, (int(group.max()) + 1, inputs.shape[1]))
    scale = (inputs.abs().max() / 2 ** (bits - 1) * torch.rand(zero.shape)).half()
    wide = scale.float()[group]
    numbers = (inputs / wide + zero[group]).round().clamp(0, 2**bits - 1)
    parts = {
        "qweight": words(numbers.T, bits).T.contiguous(),
        "qzeros": words(zero - 1, bits),
        "scales": scale,
        "g_idx": group.to(torch.int32),
    }
    return parts, ((numbers - zero[group]) * wide).T


def awq(weight: Tensor) -> Packed:
    inputs = weight.T
    group = torch.arange(len(inputs)) // 16
    zero = torch.randint(0, 16, (int(group.max()) + 1, inputs.shape[1]))
    scale = (inputs.abs().max() / 8 * torch.rand(zero.shape)).half()
    numbers = (inputs / scale.float()[group] + zero[group]).round().clamp(0, 15)

    def packed(values: Tensor) -> Tensor:
        """AutoAWQ packs output 0, 2, 4, 6, 1, 3, 5, 7 of each eight, lowest bits first."""
        return words(values.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2), 4)

    parts = {"qweight": packed(numbers), "qzeros": packed(zero), "scales": scale}
    return parts, ((numbers - zero[group]) * scale.float()[group]).T


def bnb4(weight: Tensor, nested: bool = True) -> Packed:
    """Blocks of 64, their largest values as bytes with a table of their own."""
    table = torch.linspace(-1, 1, 16)
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1)
    facts = {"blocksize": 64, "shape": list(weight.shape), "quant_type": "nf4"}
    parts = {"weight.quant_map": table}
    if nested:
        outer, offset = torch.linspace(-1, 1, 256), float(largest.mean())
        scale = (largest - offset).abs().max().reshape(1)
        codes = ((largest - offset)[:, None] / scale - outer).abs().argmin(1)
        largest = outer[codes] * scale + offset
        facts |= {"nested_blocksize": 256, "nested_offset": offset}
        parts |= {
            "weight.absmax": codes.to(torch.uint8),
            "weight.nested_absmax": scale,
            "weight.nested_quant_map": outer,
        }
    else:
        parts["weight.absmax"] = largest
    index = (blocks[..., None] / largest[:, None, None] - table).abs().argmin(-1)
    flat = index.flatten()
    parts["weight"] = (flat[::2] * 16 + flat[1::2]).to(torch.uint8)[:, None]
    state = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    parts["weight.quant_state.bitsandbytes__nf4"] = state
    return parts, (table[index] * largest[:, None]).reshape(weight.shape)


def bnb8(weight: Tensor) -> Packed:
    largest = weight.abs().amax(1)
    numbers = (weight / largest[:, None] * 127).round()
    return {"weight": numbers.to(torch.int8), "SCB": largest}, numbers * largest[:, None] / 127


WAYS: dict[str, tuple[Callable[[Tensor], Packed], dict[str, object]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "gptq, 8 bits": (lambda w: gptq(w, 8), {"quant_method": "gptq", "bits": 8, "group_size": 16}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
    "4-bit": (bnb4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "4-bit, plain": (
        lambda w: bnb4(w, nested=False),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "8-bit": (bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


def quantised(folder: Path, way: str) -> dict[str, Tensor]:
    """A tiny LLaMA with packed projections; what its weights come to."""
    pack, settings = WAYS[way]
    with quiet():
        write_tiny_llama(folder)
    torch.manual_seed(0)
    path = folder / "model.safetensors"
    plain, stored = load_file(path), {}
    for name, tensor in plain.items():
        if name.endswith("_proj.weight"):
            parts, plain[name] = pack(tensor)
            stem = name.removesuffix("weight")
            stored |= {stem + part: value.contiguous() for part, value in parts.items()}
        else:
            stored[name] = tensor
    save_file(stored, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return plain


@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_come_back(tmp_path: Path, way: str) -> None:
    plain = quantised(tmp_path / "model", way)
    with quiet():
        model = open_model(str(tmp_path / "model"), dequantise=True).model
    state = model.state_dict()
    assert sum(name.endswith("_proj.weight") for name in plain) == 14
    for name, tensor in plain.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_order_of_awq_is_the_inverse_of_its_packing() -> None:
    packing = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert packing[list(_AWQ_ORDER)].tolist() == list(range(8))


def test_fp8_equals_transformers() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts, _ = fp8(torch.randn(48, 32, generator=torch.manual_seed(0)))
    ours = _fp8(parts, {"weight_block_size": [16, 16]})
    theirs = Fp8Dequantize(None)._dequantize_one(*parts.values(), output_dtype=torch.float32)
    assert torch.equal(ours, theirs)


def test_scales_of_rows_of_blocks_that_do_not_divide_and_of_all() -> None:
    weight = torch.randn(5, 7).to(torch.float8_e4m3fn)
    rows, blocks = torch.rand(5, 1), torch.rand(2, 2)
    torch.testing.assert_close(
        _fp8({"weight": weight, "weight_scale": rows}, {}), weight.float() * rows
    )
    grid = blocks.repeat_interleave(4, 0)[:5].repeat_interleave(4, 1)[:, :7]
    found = _fp8({"weight": weight, "weight_scale_inv": blocks}, {"weight_block_size": [4, 4]})
    torch.testing.assert_close(found, weight.float() * grid)
    one = _fp8({"weight": weight, "weight_scale": torch.tensor(0.5)}, {})
    torch.testing.assert_close(one, weight.float() * 0.5)


def test_a_plain_checkpoint_has_nothing_to_dequantise(tmp_path: Path) -> None:
    with quiet():
        write_tiny_llama(tmp_path / "model")
    with pytest.raises(ModelError, match="not quantised"):
        open_model(str(tmp_path / "model"), dequantise=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "aqlm"}, "quantised with aqlm cannot be dequantised"),
        ({"quant_method": "gptq", "bits": 3}, "gptq weights of 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq weights of version gemv"),
        ({"quant_method": "fp8", "weight_block_size": [16]}, "do not fit together"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    quantised(
        tmp_path / "model",
        str(settings["quant_method"]) if settings["quant_method"] in WAYS else "fp8",
    )
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    with pytest.raises(ModelError, match=message), quiet():
        open_model(str(tmp_path / "model"), dequantise=True)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))

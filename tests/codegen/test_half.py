"""Models of 16-bit weights are compared in fp32, where rounding cannot hide an error."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from exporting import written
from safetensors.torch import load_file, save_file
from slicing import UNITS, build, by_plan, coupling_of, example_for, random_plan
from tiny_model import tiny_llama
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM

import prunec
import prunec.codegen.shrink
from prunec.codegen.battery import tolerance
from prunec.codegen.exporters.padded import Padded
from prunec.codegen.exporters.source import ModelDirectory
from prunec.codegen.shrink import shrink
from prunec.codegen.streamed import in_single
from prunec.errors import ExportError, VerifyError
from prunec.passes.oracles.mask import verify_sliced
from prunec.passes.recipe import load_recipe
from prunec.passes.slice import slice_state

HALVES = (torch.bfloat16, torch.float16)


def halved(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The weights in `dtype`; buffers, such as the frequencies of rotary positions, stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_model_computes_in_single_and_stays_as_it_is(dtype: torch.dtype) -> None:
    model, tokens = halved(tiny_llama(), dtype), torch.arange(3, 15).view(2, 6)
    wanted = copy.deepcopy(model).float()(tokens).logits
    with in_single(model, None) as single:
        found = single(tokens).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.is_meta for p in model.parameters())
    assert model(tokens).logits.dtype == dtype


def test_a_module_that_names_no_blocks_is_widened_as_a_whole() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)  # reads a child's weight
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed: torch.Tensor = self.attention(x, x, x)[0]
            return self.norm(mixed)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Attends().to(torch.bfloat16).eval(), torch.randn(2, 5, 8)
    wanted = copy.deepcopy(model).float()(x)
    with torch.no_grad(), in_single(model, None) as single:
        torch.testing.assert_close(single(x), wanted, rtol=1e-6, atol=1e-6)


def test_an_error_smaller_than_rounding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = halved(build("llama"), torch.bfloat16)
    coupling, example = coupling_of(model), example_for(model)
    sliced = by_plan(model, coupling, random_plan(coupling, UNITS))
    assert (
        "2 x 9, left padding, sdpa attention (whole model)"
        in shrink(model, sliced, example=example).checks
    )
    put_together = prunec.codegen.shrink.assemble

    def with_an_error(*given: object) -> nn.Module:
        made = put_together(*given)  # type: ignore[arg-type]
        weight = made.get_parameter("lm_head.weight") * (1 + tolerance(model) / 2)
        made.get_submodule("lm_head").weight = nn.Parameter(weight)
        return made

    monkeypatch.setattr(prunec.codegen.shrink, "assemble", with_an_error)
    with pytest.raises(VerifyError, match="differs from the masked model"):
        shrink(model, sliced, example=example)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_model_loses_hidden_features(dtype: torch.dtype) -> None:
    model = halved(tiny_llama(), dtype)
    recipe = load_recipe("llm-pruner").override({"mode": "channel"})
    batches = [{"input_ids": torch.arange(3, 43).view(2, 20)}]
    result = prunec.prune(model, recipe=recipe, ratio=0.3, calibration=batches)
    assert result.model.config.hidden_size < model.config.hidden_size
    assert result.model.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_the_mask_oracle_of_a_half_program_is_as_strict(dtype: torch.dtype) -> None:
    coupling = coupling_of(halved(build("llama"), dtype))
    selection = random_plan(coupling, UNITS).selection(coupling)
    sliced = slice_state(coupling, selection, coupling.program.state)
    assert verify_sliced(coupling, selection, sliced) < 1e-5


@pytest.mark.engine("onnxruntime")
@pytest.mark.parametrize("dtype", HALVES)
def test_onnx_of_a_half_model_is_in_single(dtype: torch.dtype, tmp_path: Path) -> None:
    halved(build("llama"), dtype).save_pretrained(tmp_path / "half")
    done = prunec.export(tmp_path / "half", "onnx", tmp_path / "half.onnx")
    assert done.finding.state == "measured"
    assert done.notes == ("its 16-bit weights are fp32 in the file",)
    weights = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert done.files["model.onnx"] > 1.8 * weights


def test_padding_by_other_weights_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by less than rounding to 16 bits allows."""
    written("phi3", tmp_path / "single")
    model = prunec.load(tmp_path / "single", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    done = prunec.export(tmp_path / "half", "padded", tmp_path / "stock")
    assert done.finding.state == "measured"
    write = Padded.write

    def with_an_error(self: Padded, source: ModelDirectory, folder: Path) -> object:
        notes = write(self, source, folder)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] *= 1 + tolerance(model) / 2
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return notes

    monkeypatch.setattr(Padded, "write", with_an_error)
    with pytest.raises(VerifyError, match="is not the model"):
        prunec.export(tmp_path / "half", "padded", tmp_path / "wrong")


def test_nearly_the_llama_graph_is_none(tmp_path: Path) -> None:
    """Logits over 1.004: less than rounding to 16 bits allows."""
    config = GraniteConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        attention_multiplier=8**-0.5,
        logits_scaling=1.004,
    )
    torch.manual_seed(0)
    model = halved(GraniteForCausalLM(config), torch.bfloat16)
    model.save_pretrained(tmp_path / "granite")
    with pytest.raises(ExportError) as caught:
        prunec.export(tmp_path / "granite", "gguf", tmp_path / "out.gguf")
    assert "its logits would be off by 4.0e-03" in str(caught.value.where)

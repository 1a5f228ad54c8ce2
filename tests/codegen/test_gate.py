"""What the acceptance gate compares: what the class can run, in finite numbers, to the bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from slicing import shrunk
from torch import Tensor

from prunec.codegen.gate import accept, prepare
from prunec.errors import VerifyError


@pytest.fixture
def written(tmp_path: Path) -> tuple[Any, Path]:
    *_, result = shrunk("gpt2")
    (tmp_path / "model").mkdir()
    result.model.save_pretrained(tmp_path / "model")
    return result, tmp_path


def compared(written: tuple[Any, Path]) -> list[str]:
    result, folder = written
    return prepare(result.model, folder / "model", "AutoModelForCausalLM", result.example, folder)


def test_a_class_of_one_size_is_compared_at_that(
    written: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others fold several code books into the batch."""
    result, folder = written
    rows, length = size = result.example["input_ids"].shape
    forward = result.model.forward

    @functools.wraps(forward)
    def folded(input_ids: Tensor, **kwargs: Any) -> Any:
        if input_ids.shape != size:
            raise RuntimeError(f"shape {list(input_ids.shape)} is invalid")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(result.model, "forward", folded)
    name, *_ = compared(written)
    assert name.startswith(f"{rows} x {length}, ")
    tensors = load_file(folder / "tensors.safetensors")
    assert [len(t) for name, t in tensors.items() if name.endswith(".out")] == [rows]


def test_both_sides_run_without_gradients(
    written: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch folds a product by a weight that wants one: what mamba computes has other last bits."""
    model = written[0].model
    wanting: list[bool] = []
    seen = model.register_forward_pre_hook(
        lambda *_: wanting.append(any(p.requires_grad for p in model.parameters()))
    )
    with seen, monkeypatch.context() as patched:
        patched.setattr("prunec.codegen.gate._generates", lambda *_: False)
        model.requires_grad_(True)
        compared(written)
        after = [parameter.requires_grad for parameter in model.parameters()]
        model.requires_grad_(False)
    assert wanting
    assert not any(wanting)
    assert all(after)


def test_a_model_without_finite_numbers_is_not_delivered(written: tuple[Any, Path]) -> None:
    weight = written[0].model.transformer.ln_f.weight
    before = weight[0].item()
    weight[0] = float("inf")
    try:
        with pytest.raises(VerifyError, match="no finite numbers"):
            compared(written)
    finally:
        weight[0] = before


def test_the_gate_has_no_prunec_and_wants_every_tensor(tmp_path: Path) -> None:
    """Neither code that leans on prunec nor a tensor that comes up random passes."""
    *_, result = shrunk("llama")
    result.model.save_pretrained(tmp_path / "out")

    def refused() -> str:
        with pytest.raises(VerifyError) as caught:
            accept(result.model, tmp_path / "out", "AutoModelForCausalLM", result.example)
        return str(caught.value.where)

    code = tmp_path / "out" / "modeling_prunec.py"
    text = code.read_text()
    code.write_text(f"import prunec\n{text.partition('from __future__ import annotations')[2]}")
    assert "not found in your environment: prunec" in refused()
    code.write_text(text)
    weights = tmp_path / "out" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.input_layernorm.weight"]  # of ones, as it would come up
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "missing_keys: ['model.layers.1.input_layernorm.weight']" in refused()


def test_the_gate_compares_bits(tmp_path: Path) -> None:
    *_, result = shrunk("gpt_neox")
    result.model.save_pretrained(tmp_path / "out")
    weight = result.model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight
    before = weight[0, 0].item()
    weight[0, 0] = before + 1e-3
    try:
        with pytest.raises(VerifyError) as caught:
            accept(result.model, tmp_path / "out", "AutoModelForCausalLM", result.example)
    finally:
        weight[0, 0] = before
    assert "logits differ by" in str(caught.value.where)
    assert caught.value.fix is None


def test_a_buffer_that_a_cast_has_rounded_is_named(tmp_path: Path) -> None:
    """No file holds it: the class makes it anew, in full precision."""
    *_, result = shrunk("llama")
    result.model.save_pretrained(tmp_path / "out")
    frequencies = result.model.model.rotary_emb.inv_freq
    before = frequencies.clone()
    frequencies.copy_(frequencies.bfloat16())
    try:
        with pytest.raises(VerifyError) as caught:
            accept(result.model, tmp_path / "out", "AutoModelForCausalLM", result.example)
    finally:
        frequencies.copy_(before)
    assert "logits differ by" in str(caught.value.where)
    assert "its class makes another model.rotary_emb.inv_freq" in str(caught.value.so)
    assert "from_pretrained(..., dtype=...)" in str(caught.value.fix)

"""LoRA of stacked experts: what trains, that the adapter and the merged model agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import TEXT, tiny_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from prunec.codegen.rewrite import rewrite
from prunec.errors import PlanError
from prunec.recovery.adapters import attach, find_targets
from prunec.recovery.recover import recover
from prunec.recovery.settings import load_recovery

pytestmark = [pytest.mark.engine("peft"), pytest.mark.filterwarnings("ignore")]
EXAMPLE = {"input_ids": torch.arange(22).reshape(2, 11)}
IDS = torch.arange(40).reshape(2, 20)
TRAIN = {"steps": 6, "seq_len": 32, "batch_size": 4, "rank": 2, "learning_rate": 0.01}


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval().requires_grad_(False)


def opened(folder: Path) -> Any:
    return MixtralForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def test_experts_are_found_by_structure() -> None:
    found = find_targets(mixtral(), EXAMPLE)
    assert set(found.stacks) == {
        f"model.layers.{i}.mlp.experts.{name}"
        for i in (0, 1)
        for name in ("gate_up_proj", "down_proj")
    }
    assert "model.layers.0.self_attn.q_proj" in found.layers
    assert "lm_head" not in found.layers


def test_dropout_of_experts_is_refused() -> None:
    with pytest.raises(PlanError, match="stacked experts takes no dropout"):
        attach(mixtral(), load_recovery("lora").override({"dropout": 0.1}), EXAMPLE)


def test_the_adapter_on_its_base_is_the_merged_model(tmp_path: Path) -> None:
    from peft import PeftModel

    mixtral().save_pretrained(tmp_path / "small")
    (tmp_path / "t.txt").write_text(TEXT * 40)
    small = opened(tmp_path / "small")
    before = {name: value.clone() for name, value in small.state_dict().items()}
    found = recover(
        small, tiny_tokenizer(), str(tmp_path / "t.txt"), load_recovery("lora").override(TRAIN),
        work=tmp_path / "work", base=str(tmp_path / "small"),
    )  # fmt: skip
    assert found.report.improved
    assert found.report.after < found.report.before - 0.05
    after: Any = found.model
    for i in (0, 1):
        for name in ("gate_up_proj", "down_proj"):
            path = f"model.layers.{i}.mlp.experts.{name}"
            assert not torch.equal(after.state_dict()[path], before[path]), path
    rewrite(after, tmp_path / "small", tmp_path / "mended", changes={}, tokenizer=tiny_tokenizer())
    assert found.adapter is not None
    adapted = PeftModel.from_pretrained(opened(tmp_path / "small"), found.adapter).eval()
    with torch.no_grad():
        merged = opened(tmp_path / "mended")(IDS).logits
        assert torch.allclose(adapted(IDS).logits, merged, rtol=1e-4, atol=1e-4)
        assert torch.allclose(after(IDS).logits, merged, rtol=1e-5, atol=1e-5)

"""What stands in the way of delivery is mended, or refused, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

import prunec
from prunec.codegen.remade import as_loaded
from prunec.errors import ModelError
from prunec.events import silent

BATCHES = [{"input_ids": torch.arange(3, 43).view(2, 20)}]


class Says:
    """A progress that keeps what it is told, and allows nothing that takes time if `idle`."""

    def __init__(self, *, idle: bool = False) -> None:
        self.said: list[str] = []
        self._idle = idle

    def message(self, line: str) -> None:
        self.said.append(line)

    def task(self, description: str, total: int | None = None) -> Any:
        if self._idle:
            pytest.fail(f"it computes: {description}")
        return silent.task(description, total)


def test_a_model_that_was_cast_is_delivered_as_it_would_be_loaded(tmp_path: Path) -> None:
    cast, progress = tiny_llama().to(torch.bfloat16), Says()
    rounded = cast.model.rotary_emb.inv_freq.clone()
    result = prunec.prune(cast, ratio=0.3, calibration=BATCHES, progress=progress)
    assert "has rounded model.rotary_emb.inv_freq and 1 more: pruned with" in progress.said[0]
    assert torch.equal(cast.model.rotary_emb.inv_freq, rounded)  # not mutated
    result.save(tmp_path / "small")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert opened.dtype == torch.bfloat16
    exact = tiny_llama().model.rotary_emb.inv_freq
    for model in (result.model, opened):
        assert torch.equal(model.get_buffer("model.rotary_emb.inv_freq"), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_what_the_cast_has_rounded_is_made_anew(dtype: torch.dtype) -> None:
    cast = tiny_llama().to(dtype)
    found = as_loaded(cast, silent)
    assert found is not cast
    weights = zip(found.parameters(), cast.parameters(), strict=True)
    assert all(new.data_ptr() == old.data_ptr() for new, old in weights)
    cast.model.rotary_emb.inv_freq *= 2  # what somebody else put there is not ours to undo
    cast.model.rotary_emb.original_inv_freq *= 2
    assert as_loaded(cast, silent) is cast
    whole = tiny_llama()
    assert as_loaded(whole, silent) is whole


def test_modules_that_are_no_models_of_transformers_stay_as_they_are() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.arange(5.0), persistent=False)
    half = module.half()
    assert as_loaded(half, silent) is half
    half.config = {"size": 5}  # type: ignore[assignment]
    assert as_loaded(half, silent) is half


@pytest.mark.engine("peft")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_is_refused_first_and_merged_it_passes() -> None:
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ModelError, match=r"under an adapter \(peft\)") as caught:
            prunec.prune(model, ratio=0.3, calibration=BATCHES, progress=Says(idle=True))
        assert caught.value.fix == "merge first: model = model.merge_and_unload()"
        assert str(caught.value.where).endswith("model.layers.0.self_attn.q_proj")
    merged = adapted.merge_and_unload()
    assert prunec.prune(merged, ratio=0.3, calibration=BATCHES).report.realised_ratio > 0.2


@pytest.mark.engine("peft")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_tuned_prompt_is_refused_first() -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    for kind in (PromptTuningConfig, PrefixTuningConfig):
        config = kind(num_virtual_tokens=4, task_type="CAUSAL_LM")
        tuned: Any = get_peft_model(tiny_llama(), config)
        with pytest.raises(ModelError, match="a prompt or a prefix that was tuned"):
            prunec.prune(tuned, ratio=0.3, calibration=BATCHES, progress=Says(idle=True))

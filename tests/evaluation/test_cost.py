from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from prunec.evaluation import file_size, measure, parameter_count
from prunec.evaluation.comparison import speed_metrics
from prunec.evaluation.latency import resident_growth
from prunec.evaluation.size import parameter_bytes


def test_shared_parameters_count_once() -> None:
    model = tiny_llama()
    attention, ffn = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48
    expected = VOCABULARY * 32 + 2 * (attention + ffn + 2 * 32) + 32
    assert parameter_count(model) == expected
    assert parameter_bytes(model.to(torch.bfloat16)) == 2 * expected
    assert parameter_count(model.to("meta")) >= expected
    two = nn.ModuleList([nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)])
    assert parameter_count(two) == 30
    two[1].weight = nn.Parameter(two[0].weight.data)
    assert parameter_count(two) == 15


def test_file_size_is_that_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "sub" / "b").write_bytes(b"x" * 5)
    assert file_size(tmp_path) == 15


def test_generation_is_timed_token_by_token() -> None:
    model = tiny_llama()
    # Its own settings would end after a token: they must not.
    own = GenerationConfig(max_length=2, eos_token_id=list(range(VOCABULARY)), pad_token_id=0)
    model.generation_config = own
    speed = measure(model, batch=2, prompt=8, new_tokens=5, repeats=2)
    assert speed.prefill_ms > 0
    assert speed.decode_ms_per_token is not None
    assert 0 < speed.decode_ms_per_token < 1000
    assert speed.threads == torch.get_num_threads()
    assert (speed.batch, speed.prompt, speed.new_tokens) == (2, 8, 5)
    assert speed.peak_memory_bytes >= parameter_bytes(model)
    assert model.generation_config is own


def test_prefill_and_decode_are_told_apart() -> None:
    model = tiny_llama()
    lengths: list[int] = []

    def wait(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        lengths.append(arguments[0].shape[1])
        time.sleep(0.2 if lengths[-1] > 1 else 0.02)

    model.model.embed_tokens.register_forward_pre_hook(wait)
    speed = measure(model, prompt=16, new_tokens=4, repeats=1)
    assert lengths == [16, 1, 1, 1] * 3  # warm-up, time, memory: with a KV cache
    assert speed.prefill_ms > 200
    assert speed.decode_ms_per_token is not None
    assert speed.decode_ms_per_token > 20


def test_a_model_that_does_not_generate_is_timed_on_its_example() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    speed = measure(BertForMaskedLM(config).eval(), repeats=1)
    assert speed.prefill_ms > 0
    assert (speed.batch, speed.prompt, speed.new_tokens) == (2, None, None)
    assert speed.decode_ms_per_token is None
    assert speed_metrics(speed)[0].how.startswith(
        "medians, batch 2, one pass of the example inputs"
    )


def test_a_module_of_ones_own_is_timed_on_the_inputs_given() -> None:
    assert measure(nn.Linear(4, 3), example={"input": torch.ones(5, 4)}, repeats=1).batch == 5


def test_a_model_of_few_positions_is_timed_within_them() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12,
    )  # fmt: skip
    speed = measure(LlamaForCausalLM(config).eval(), repeats=1)
    assert (speed.prompt, speed.new_tokens) == (6, 6)


@pytest.mark.parametrize("megabytes", [64, 256])
def test_growth_sees_memory_that_is_freed_again(megabytes: int) -> None:
    with resident_growth() as growth:
        for _ in range(3):
            block = torch.ones(megabytes << 18)
            block.mul_(2)
            del block
    assert 0.9 * megabytes < growth() / (1 << 20) < 1.3 * megabytes

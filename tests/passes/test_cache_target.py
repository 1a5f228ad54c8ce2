"""What a `kv-cache` target counts is what transformers keeps of a token."""

from __future__ import annotations

import pytest
import torch
from tiny_model import VOCABULARY
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from prunec.errors import PlanError
from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.models.example import example_inputs
from prunec.passes.targets.costs import KvCache


def counted(model: PreTrainedModel) -> float:
    model.eval().requires_grad_(False)
    return KvCache(couple(trace(model, example_inputs(model)))).whole()


def kept(model: PreTrainedModel) -> float:
    """Bytes that transformers' own cache holds, by tokens of which it is."""
    cache = model(**example_inputs(model), use_cache=True).past_key_values
    parts = [getattr(cache, f"{name}_attention_cache", None) for name in ("self", "cross")]
    tensors: list[Tensor] = [
        tensor
        for part in ([cache] if None in parts else parts)
        for layer in part.layers
        for tensor in (layer.keys, layer.values)
    ]
    return sum(tensor[0, :, 0].nbytes for tensor in tensors)


def bert(**more: object) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        **more,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_of_an_encoder_and_a_decoder_the_encoders_own_attention_is_not_kept(attention: str) -> None:
    t5 = T5Config(
        vocab_size=VOCABULARY,
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=3,
        attn_implementation=attention,
    )
    bart = BartConfig(
        vocab_size=VOCABULARY,
        d_model=24,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        attn_implementation=attention,
    )
    for model in (T5ForConditionalGeneration(t5), BartForConditionalGeneration(bart)):
        assert counted(model) == kept(model) == 2 * 2 * 2 * 24 * 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_sees_later_tokens_keeps_no_cache(attention: str) -> None:
    with pytest.raises(PlanError, match="keeps no cache of keys and values"):
        counted(BertForMaskedLM(bert(attn_implementation=attention)))
    decoder = BertLMHeadModel(bert(attn_implementation=attention, is_decoder=True))
    assert counted(decoder) == kept(decoder) == 2 * 2 * 24 * 4


def test_weights_without_values_do_as_well() -> None:
    with torch.device("meta"):
        model = BertLMHeadModel(bert(is_decoder=True))
    for name, buffer in BertLMHeadModel(bert(is_decoder=True)).named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)
    assert counted(model) == 2 * 2 * 24 * 4

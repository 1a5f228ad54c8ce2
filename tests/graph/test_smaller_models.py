"""A reference of another kind: a smaller model, built from its own configuration.

Units that a norm or a router runs over have no masked twin with zeroed weights. The library's own
smaller model, with the sliced weights loaded, is one that shares no code with the analysis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.passes.oracles.mask import relative_difference
from prunec.passes.oracles.oracle import choose, redraw
from prunec.passes.slice import slice_program, slice_state, sliced_parameters

TOKENS = {"input_ids": torch.arange(5, 27).reshape(2, 11)}
DECODER: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GROUPED = {**DECODER, "num_key_value_heads": 3, "head_dim": 8}
EXPERTS = {**GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2}


def llama(**changes: Any) -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**{**GROUPED, **changes}))


def mixtral(**changes: Any) -> nn.Module:
    return T.MixtralForCausalLM(T.MixtralConfig(**{**EXPERTS, **changes}))


def gpt_neox(**changes: Any) -> nn.Module:
    return T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**{**DECODER, **changes}))


def bert(**changes: Any) -> nn.Module:
    return T.BertForMaskedLM(T.BertConfig(**{**DECODER, **changes}))


def traced(model: nn.Module) -> CouplingGraph:
    return couple(redraw(trace(model.eval().requires_grad_(False), TOKENS)))


@pytest.mark.parametrize(
    ("build", "kind", "changes"),
    [
        (llama, "hidden", {"hidden_size": 24}),
        (llama, "kv_group", {"num_key_value_heads": 1, "num_attention_heads": 2}),
        (llama, "query_head", {"num_attention_heads": 3}),
        (llama, "ffn_channel", {"intermediate_size": 20}),
        (mixtral, "expert", {"num_local_experts": 3}),
        (mixtral, "hidden", {"hidden_size": 24}),
        (gpt_neox, "ffn_channel", {"intermediate_size": 20}),
        (bert, "ffn_channel", {"intermediate_size": 20}),
    ],
)
def test_the_sliced_program_is_the_smaller_model(
    build: Callable[..., nn.Module], kind: str, changes: dict[str, Any]
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        coupling = traced(build())
        smaller = build(**changes).eval().requires_grad_(False)
    selection = choose([group for group in coupling.groups if group.kind == kind])
    state = slice_state(coupling, selection, coupling.program.state)
    weights = dict(sliced_parameters(coupling, selection, state).weights)
    smaller.load_state_dict(weights, strict=False)
    assert {name for name, _ in smaller.named_parameters()} <= set(weights)
    result = slice_program(coupling, selection, state).run(None, **TOKENS)
    assert relative_difference(result, smaller(**TOKENS).logits) < 1e-5

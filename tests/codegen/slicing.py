"""Tiny models of real architectures, and slicings of them from explicit or random choices."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

from prunec.codegen.shrink import Shrunk, shrink
from prunec.graph.coupling import CouplingGraph, Group, couple
from prunec.graph.selection import Sliced
from prunec.graph.trace import trace
from prunec.passes.plan import GroupKeep, Plan
from prunec.passes.slice import pad_state, slice_state, sliced_parameters

VOCABULARY = 61
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 6}
UNITS = ("ffn_channel", "head", "query_head", "kv_group")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "llama_mha": lambda: T.LlamaForCausalLM(T.LlamaConfig(**HEADS)),
    # as in SmolLM2: as many KV groups as query heads in each, and a base of its own
    "llama_square": lambda: T.LlamaForCausalLM(
        T.LlamaConfig(
            **{**DECODER, "num_attention_heads": 9, "hidden_size": 72},
            head_dim=8,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**DECODER)),
    "qwen3": lambda: T.Qwen3ForCausalLM(
        T.Qwen3Config(
            **DECODER,
            head_dim=12,
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        )
    ),
    "gemma2": lambda: T.Gemma2ForCausalLM(
        T.Gemma2Config(**DECODER, head_dim=12, query_pre_attn_scalar=12, sliding_window=6)
    ),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**DECODER)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2, **TOKENS)),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**HEADS)),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(
            **{k: v for k, v in HEADS.items() if k != "intermediate_size"},
            ffn_dim=40,
            word_embed_proj_dim=48,
        )
    ),
    "falcon": lambda: T.FalconForCausalLM(
        T.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_kv_heads=3,
            new_decoder_architecture=True,
            **TOKENS,
        )
    ),
    "mixtral": lambda: T.MixtralForCausalLM(
        T.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    ),
    "bloom": lambda: T.BloomForCausalLM(
        T.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=3, n_head=6, **TOKENS)
    ),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**HEADS)),
    "t5": lambda: T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=VOCABULARY,
            d_model=48,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=6,
            decoder_start_token_id=0,
        )
    ),
    "vit": lambda: T.ViTForImageClassification(
        T.ViTConfig(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            intermediate_size=40,
            image_size=16,
            patch_size=8,
            num_labels=5,
        )
    ),
}


def build(name: str) -> nn.Module:
    """With weights of unit gain: at the default initialisation errors hide."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        scale = 0.2 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        parameter.copy_(parameter.mean() + noise * scale if parameter.ndim < 2 else noise * scale)
    return model


@functools.cache
def prepared(name: str) -> tuple[nn.Module, CouplingGraph]:
    """A tiny model of that architecture and its coupling; shared, not to be changed."""
    model = build(name)
    return model, coupling_of(model)


def shrunk(
    name: str, kinds: Sequence[str] = UNITS, **plan: Any
) -> tuple[nn.Module, CouplingGraph, Plan, Shrunk]:
    """A tiny model pruned in every layer differently, and put together."""
    model, coupling = prepared(name)
    chosen = random_plan(coupling, kinds, **plan)
    sliced = by_plan(model, coupling, chosen)
    return model, coupling, chosen, shrink(model, sliced, example=example_for(model))


def masked_logits(coupling: CouplingGraph, plan: Plan) -> Tensor:
    """What the shrunk model must compute for the example, by the mask oracle on the graph."""
    selection, program = plan.selection(coupling), coupling.program
    state = pad_state(coupling, selection, slice_state(coupling, selection, program.state))
    return program.run(state, **program.example)


def example_for(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = {"input_ids": torch.randint(3, VOCABULARY, (2, 11))}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 11))
    return ids


def coupling_of(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> CouplingGraph:
    return couple(trace(model, dict(example or example_for(model))))


def by_plan(model: nn.Module, coupling: CouplingGraph, plan: Plan) -> Sliced:
    selection = plan.selection(coupling)
    state = coupling.program.state
    return sliced_parameters(coupling, selection, slice_state(coupling, selection, state))


def random_plan(
    coupling: CouplingGraph,
    kinds: Sequence[str],
    *,
    seed: int = 0,
    alike: bool = False,
    count: Mapping[str, int] | None = None,
    parts: Mapping[str, tuple[float, float]] | None = None,
) -> Plan:
    """Other units, and other numbers of them, in every layer; `alike`: the same numbers.

    `parts`: by kind, between which parts of the units stay; half of them or more by default.
    """
    rng, shared = random.Random(seed), {}
    groups = {}
    for group in coupling.groups:
        if group.kind in kinds and not group.normalised and group.size > max(1, group.minimum):
            low, high = (parts or {}).get(group.kind, (0.5, 1.0))
            least = max(group.minimum, int(low * group.size))
            kept = rng.randint(least, min(int(high * group.size), group.size - 1))
            if alike:
                kept = shared.setdefault((group.kind, group.size), kept)
            kept = (count or {}).get(group.kind, kept)
            groups[group.name] = GroupKeep(group.size, _rows(coupling, group, groups, kept, rng))
    return Plan(groups)


def _rows(
    coupling: CouplingGraph,
    group: Group,
    decided: Mapping[str, GroupKeep],
    kept: int,
    rng: random.Random,
) -> dict[tuple[int, ...], tuple[int, ...]]:
    keys: list[tuple[int, ...]] = [()]
    for companion in group.companions:
        units = (
            decided[companion].rows[()] if companion in decided else range(coupling[companion].size)
        )
        keys = [(*key, unit) for key in keys for unit in units]
    return {key: tuple(sorted(rng.sample(range(group.size), kept))) for key in keys}

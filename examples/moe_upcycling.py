"""A mixture of experts made from a dense model, then less of it: experts that are little used go.

A small LLaMA is trained on source code, its feed-forward copied into six experts (sparse
up-cycling, Komatsuzaki et al. 2022), trained on, and the experts of each layer that the router
picks least are removed: rows of the router and slices of the stacked weights together.
"""

from __future__ import annotations

import python_text
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import prunec
from prunec.api import apply_plan
from prunec.passes.plan import GroupKeep, Plan

EXPERTS, KEPT, LENGTH = 6, 4, 48
SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def loss(model: nn.Module, text: Tensor) -> Tensor:
    logits = model(input_ids=text[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def upcycled(dense: LlamaForCausalLM) -> MixtralForCausalLM:
    """Every expert a copy of the dense feed-forward with a little noise, every router new."""
    model = MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2)
    )
    missing = model.load_state_dict(dense.state_dict(), strict=False).missing_keys
    assert all(".mlp." in name for name in missing), missing
    with torch.no_grad():
        for old, new in zip(dense.model.layers, model.model.layers, strict=True):
            experts, mlp = new.mlp.experts, old.mlp
            both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            experts.gate_up_proj.copy_(both + 0.02 * torch.randn_like(experts.gate_up_proj))
            experts.down_proj.copy_(mlp.down_proj.weight.expand_as(experts.down_proj))
    return model


@torch.no_grad()
def usage(model: MixtralForCausalLM, text: Tensor) -> list[Tensor]:
    """Per layer, how often each expert is among the two that a token goes to."""
    routed = model(input_ids=text, output_router_logits=True).router_logits
    return [torch.bincount(r.topk(2).indices.flatten(), minlength=EXPERTS) for r in routed]


def main() -> dict[str, float]:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES))
    python_text.train(dense, loss, steps=80, length=LENGTH)
    model = upcycled(dense)
    python_text.train(model, loss, steps=40, length=LENGTH, rate=1e-3)

    text = python_text.windows(32, LENGTH, seed=1000)
    coupling = prunec.couple(prunec.trace(model, {"input_ids": text[:2]}))
    experts = [group for group in coupling.groups if group.kind == "expert"]
    keeps = {}
    for group, used in zip(experts, usage(model, text), strict=True):
        kept = tuple(sorted(used.topk(KEPT).indices.tolist()))
        print(f"{group.name}: used {used.tolist()}, kept {kept}")
        keeps[group.name] = GroupKeep(group.size, {(): kept})
    result = apply_plan(model, Plan(keeps), example={"input_ids": text[:2]})

    before = python_text.bits_per_byte(model, loss, length=LENGTH)
    after = python_text.bits_per_byte(result.model, loss, length=LENGTH)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, result.model)]
    print(f"parameters {sizes[0]:,} -> {sizes[1]:,}; bits per byte {before:.3f} -> {after:.3f}")
    assert result.model.config.num_local_experts == KEPT  # alike in all layers: a stock model
    return {"before": before, "after": after, "parameters": sizes[1] / sizes[0]}


if __name__ == "__main__":
    main()

"""Forwards without control flow or sizes that depend on the data, for torch.export to follow.

Each computes what the class's own forward computes. They run while prunec traces a model; what is
delivered runs the class's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution
from transformers.models.qwen4_exp.modeling_qwen4_exp import apply_rotary_pos_emb


def dbrx_experts(self: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """DbrxExperts: every expert sees every token, and counts where the router picked it.

    Args:
        hidden_states: [batch, sequence, hidden].
        index, weights: [tokens, k], the experts of each token and what they count.
    """
    tokens = hidden_states.reshape(-1, self.hidden_size)
    counted = weights.new_zeros(len(weights), self.num_experts).scatter(1, index, weights)
    mlp = self.mlp
    inner = mlp.activation_fn(tokens @ mlp.w1.T) * (tokens @ mlp.v1.T)
    inner = inner.view(-1, self.num_experts, self.ffn_hidden_size) * counted.unsqueeze(-1)
    return (inner.flatten(1) @ mlp.w2).view(hidden_states.shape)


def longcat_experts(self: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """LongcatFlashExperts: likewise; the last experts pass a token on as it is.

    Args:
        hidden_states: [tokens, hidden].
        index, weights: [tokens, k], the experts of each token and what they count.
    """
    routed, weights = self.num_routed_experts, weights.to(hidden_states.dtype)
    counted = weights.new_zeros(len(weights), self.total_experts).scatter(1, index, weights)
    gate_up = torch.einsum("th,eih->tei", hidden_states, self.gate_up_proj[:routed])
    gate, up = gate_up.chunk(2, dim=-1)
    inner = self.act_fn(gate) * up * counted[:, :routed].unsqueeze(-1)
    passed = hidden_states * counted[:, routed:].sum(-1, keepdim=True)
    return torch.einsum("tei,ehi->th", inner, self.down_proj) + passed


def switch_router(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SwitchTransformersTop1Router: without making its classifier anew.

    Returns:
        One-hot [batch, sequence, experts] of those that have room; the probability of each token's
        expert, [batch, sequence, 1]; the logits.
    """
    classifier = self.classifier
    bias = None if classifier.bias is None else classifier.bias.to(self.dtype)
    logits = F.linear(hidden_states.to(self.dtype), classifier.weight.to(self.dtype), bias)
    probabilities = logits.softmax(-1).to(hidden_states.dtype)
    chosen = F.one_hot(probabilities.argmax(-1), self.num_experts)
    room = chosen.cumsum(-2) <= self.expert_capacity
    return chosen * room, probabilities.max(-1, keepdim=True).values, logits


def switch_experts(self: Any, hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
    """SwitchTransformersExperts: likewise, each of them a module of its own.

    Args:
        hidden_states: [tokens, hidden].
        selected: [tokens, 1, experts], ones at the expert of each token that has room.
        weights: [tokens, 1], what the expert of each token counts.
    """
    counted = selected.squeeze(1).to(hidden_states.dtype) * weights
    results = (expert(hidden_states) for expert in self.values())
    return sum(result * counted[:, i, None] for i, result in enumerate(results))


def blt_patcher(
    self: Any,
    input_ids: Tensor | None = None,
    *,
    patch_size: int | None = None,
    threshold: float | None = None,
    max_patch_length: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """BltPatcher: as many patches as there could be; those too many are empty, at the end.

    Later patches do not reach earlier ones, and no token belongs to an empty patch.
    """
    if patch_size is None or threshold is None or max_patch_length is not None:
        raise NotImplementedError("patches by a threshold of entropy, and of any length, only")
    checks = Distribution._validate_args  # which look into the logits
    Distribution.set_default_validate_args(False)
    try:
        entropies, _, logits = type(self).forward(self, input_ids, **kwargs)
    finally:
        Distribution.set_default_validate_args(checks)
    return entropies, _patch_lengths(entropies, threshold), logits


def _patch_lengths(entropies: Tensor, threshold: float) -> Tensor:
    """int64 [batch, sequence + 1]: patches start at tokens 0, 1 and after each high entropy."""
    batch, length = entropies.shape
    positions = torch.arange(2, length + 1, device=entropies.device)
    starts = torch.where(entropies[:, 1:] > threshold, positions, length + 1).sort(dim=1).values
    first = positions.new_tensor([0, 1]).expand(batch, 2)
    last = positions.new_full((batch, 1), length)
    return torch.cat([first, starts, last], dim=1).diff(dim=1)


def qwen4_exp_indexer(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    past_key_values: Any,
) -> Tensor:
    """Qwen4ExpTextQSAIndexer: all queries at once, the blocks of keys that one lacks masked.

    Of n keys that a query sees, in order, each `compress_ratio` are a block; the best blocks count,
    and the keys left over.

    Returns:
        bool [batch, 1, queries, keys]: which keys count.
    """
    batch, length, _ = hidden_states.shape
    cos, sin = position_embeddings
    q, keys = self.index_qk_proj(hidden_states).split(
        [self.index_n_heads * self.index_head_dim, self.index_kv_heads * self.index_head_dim], -1
    )
    q = self.q_layernorm(q.reshape(batch, length, -1, self.index_head_dim))
    q = apply_rotary_pos_emb(q, cos=cos[:, -length:], sin=sin[:, -length:], unsqueeze_dim=2)

    seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    seen = seen[:, 0].expand(batch, length, -1)
    rank = seen.long().cumsum(-1) - 1  # of a key among those that the query sees
    count = seen.shape[-1] // self.compress_ratio
    if count == 0:
        return seen.unsqueeze(1)
    complete = seen.sum(-1, keepdim=True) // self.compress_ratio
    order = (~seen).long().argsort(dim=-1, stable=True)[..., : count * self.compress_ratio]
    order = order.view(batch, length, count, self.compress_ratio)

    rows = torch.arange(batch, device=q.device)[:, None, None]
    pooled = keys[rows[..., None], order].float().mean(-2).to(keys.dtype)
    starts = order[..., 0]
    pooled = self.k_layernorm(pooled).unsqueeze(3)
    turned = {"cos": cos[rows, starts], "sin": sin[rows, starts], "unsqueeze_dim": 3}
    pooled = apply_rotary_pos_emb(pooled, **turned).squeeze(3)
    scores = torch.einsum("bqhd,bqnd->bqnh", q.float(), pooled.float()).relu().sum(-1)
    scores = scores / math.sqrt(self.index_head_dim)
    chosen = torch.arange(count, device=q.device) < complete
    for existing in range(self.block_topk + 1, count + 1):  # one by one: ties fall as in the class
        best = scores[..., :existing].topk(self.block_topk, -1).indices
        chosen = torch.where(
            complete == existing, torch.zeros_like(chosen).scatter(-1, best, True), chosen
        )
    block = (rank // self.compress_ratio).clamp(0, count - 1)
    left_over = rank >= complete * self.compress_ratio
    return (seen & (left_over | chosen.gather(-1, block))).unsqueeze(1)

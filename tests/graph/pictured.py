"""Toy models for the tests of pictures: blocks that repeat, and blocks that do not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace

HIDDEN, HEADS, WIDTH, VOCABULARY = 12, 3, 4, 23


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, HEADS, -1) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        return self.out(mixed.transpose(1, 2).reshape(batch, length, HEADS * WIDTH))


class Gated(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, channels, bias=False)
        self.up = nn.Linear(HIDDEN, channels, bias=False)
        self.down = nn.Linear(channels, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, channels: int, attends: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.attention = Attention() if attends else Gated(channels + 1)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.mlp = Gated(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Toy(nn.Module):
    """A causal model in all but the mask. ``runs`` runs its layers several times over."""

    def __init__(self, layers: Sequence[Layer], runs: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.runs = runs

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(self.runs):
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


def coupled(layers: Sequence[Layer], runs: int = 1) -> CouplingGraph:
    torch.manual_seed(0)
    model = Toy(layers, runs).requires_grad_(False)
    return couple(trace(model, torch.arange(10).reshape(2, 5)))


@cache
def three_layers() -> CouplingGraph:
    """Three layers that differ in nothing but their number of channels."""
    return coupled([Layer(channels) for channels in (7, 7, 9)])

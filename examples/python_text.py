"""Text that every Python has, its own library's source, as bytes to train small models on."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import tarfile
import textwrap
from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor], Tensor]


def windows(count: int, length: int, *, held_out: bool = False, seed: int = 0) -> Tensor:
    """Random windows of source code: int64 [count, length], each a byte below 128."""
    modules = [textwrap] if held_out else [argparse, ast, json.decoder, tarfile, inspect]
    source = "".join(inspect.getsource(module) for module in modules)
    text = torch.tensor(list(source.encode("ascii", "ignore")))
    starts = torch.randint(len(text) - length, (count,), generator=_generator(seed))
    return text[starts[:, None] + torch.arange(length)]


def train(model: nn.Module, loss: Loss, *, steps: int, length: int, rate: float = 3e-3) -> None:
    """AdamW on batches of 32 windows."""
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    for step in range(steps):
        optimiser.zero_grad()
        loss(model, windows(32, length, seed=step)).backward()
        optimiser.step()
    model.eval().requires_grad_(False)


@torch.no_grad()
def bits_per_byte(model: nn.Module, loss: Loss, *, length: int) -> float:
    """Of a module of the library that was not trained on; lower is better, 7 is chance."""
    text = windows(64, length, held_out=True, seed=1)
    return float(loss(model, text)) / 0.6931


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

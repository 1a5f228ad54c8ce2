"""Delivered directories that users' programs are run on: tiny ones, and SmolLM2.

Heads, KV groups and FFN differ in every layer; in all but "tiny" one attention and one MLP are gone.
They are cut at random but for the one `by_recipe`, and written by `Result.save`, through the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as T
from slicing import UNITS, coupling_of, random_plan
from tiny_model import VOCABULARY, tiny_tokenizer
from torch import Tensor

import prunec
from prunec.calibration import calibrate
from prunec.models import open_model
from prunec.passes.depth import drop

TINY = ("tiny", "tiny, skipped")
# Of the blocks' parameters -> the parts of its FFN that a layer keeps.
SMOLLM2 = {"smollm2 -20%": (0.97, 1.0), "smollm2 -50%": (0.38, 0.79)}


def deliver(name: str, folder: Path) -> Path:
    """Write one of the above; the directory."""
    if name in TINY:
        dropped = ("model.layers.0/attention", "model.layers.2/mlp") if name != "tiny" else ()
        return pruned(_tiny(), _tokens(), dropped, {}, folder, tokenizer=tiny_tokenizer())
    source = open_model("smollm2")
    dropped = ("model.layers.7/attention", "model.layers.12/mlp")
    parts = {"ffn_channel": SMOLLM2[name]}
    return pruned(source.model, source.example, dropped, parts, folder, tokenizer=source.tokenizer)


def by_recipe(ratio: float, text: Path, folder: Path) -> Path:
    """SmolLM2 by the recipe slimgpt on a text, so that it can still read."""
    source = open_model("smollm2")
    calibration = calibrate([str(text)], source.tokenizer, samples=16, seq_len=512)
    result = prunec.prune(source.model, recipe="slimgpt", ratio=ratio, calibration=calibration)
    result.save(folder / "pruned", tokenizer=source.tokenizer)
    return folder / "pruned"


def pruned(
    model: Any,
    example: Mapping[str, Tensor],
    dropped: Sequence[str],
    parts: Mapping[str, tuple[float, float]],
    folder: Path,
    **options: Any,
) -> Path:
    """Cut a model at random and save it in `folder` / "pruned"."""
    rest = drop(coupling_of(model, example), dropped)
    plan = replace(random_plan(rest, UNITS, parts=parts), dropped=tuple(dropped))
    result = prunec.apply_plan(model, plan, example=example)
    result.save(folder / "pruned", **options)
    return folder / "pruned"


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 25).reshape(2, 11)}


def _tiny() -> T.LlamaForCausalLM:
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.15,
    )
    return T.LlamaForCausalLM(config).eval().requires_grad_(False)

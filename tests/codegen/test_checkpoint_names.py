"""Names of tensors in files: transformers' older ones where it turns them back, else the class's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slicing import UNITS, build, by_plan, coupling_of, example_for, random_plan
from torch import nn

from prunec.codegen.hf import save
from prunec.codegen.load import load
from prunec.codegen.shrink import Shrunk, shrink
from prunec.passes.plan import GroupKeep, Plan


def opened(name: str, folder: Path) -> Any:
    """As a user has it: from a checkpoint, whose names transformers remembers for saving."""
    model: Any = build(name)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval().requires_grad_(False)


def names(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def pruned(model: nn.Module, *, alike: bool) -> Shrunk:
    """Widths are multiples of 16 bytes, as experts' kernels want them."""
    coupling = coupling_of(model)
    count = {"ffn_channel": 32} | ({"kv_group": 2, "query_head": 2, "head": 3} if alike else {})
    plan = random_plan(coupling, UNITS, count=count, alike=alike)
    if not alike:
        widths = [name for name in plan.groups if name.endswith("ffn_channel")]
        narrow = {n: GroupKeep(40, {(): tuple(range(20 + 4 * i))}) for i, n in enumerate(widths)}
        plan = Plan({**plan.groups, **narrow})
    return shrink(model, by_plan(model, coupling, plan), example=example_for(model))


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral"])
def test_of_a_generated_class_they_are_its_own(name: str, tmp_path: Path) -> None:
    """transformers does not turn its older names back for a class that is not its own."""
    model = opened(name, tmp_path / "dense")
    assert not names(tmp_path / "dense") <= model.state_dict().keys()
    result = pruned(model, alike=False)
    save(result, tmp_path / "small")  # through the gate: a process without prunec opens it
    assert names(tmp_path / "small") == result.model.state_dict().keys()
    example, again = example_for(model), load(tmp_path / "small")
    with torch.no_grad():
        wanted = result.model(**example).logits
        assert torch.equal(again(**example).logits, wanted)
        again.save_pretrained(tmp_path / "again")
        assert names(tmp_path / "again") == names(tmp_path / "small")
        assert torch.equal(load(tmp_path / "again")(**example).logits, wanted)


def test_of_a_stock_class_they_are_those_of_its_checkpoints(tmp_path: Path) -> None:
    model = opened("mixtral", tmp_path / "dense")
    result = pruned(model, alike=True)
    save(result, tmp_path / "small")
    assert not (tmp_path / "small" / "modeling_prunec.py").exists()
    assert names(tmp_path / "small") == names(tmp_path / "dense")
    weight = load_file(tmp_path / "small" / "model.safetensors")
    first = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    assert weight[first].shape == (32, 48)

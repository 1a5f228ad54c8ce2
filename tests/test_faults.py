"""Failing writes, poisoned weights and files that reach out: an error of ours, no damage."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from test_out_of_core import module, states, vectors
from tiny_model import write_tiny_llama

import prunec
from prunec.errors import CheckpointError, ModelError, PlanError, PrunecError, VerifyError
from prunec.models import open_model
from prunec.models.checkpoint import check_weights
from prunec.models.quiet import quiet


def test_progress_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        states(tmp_path)
    assert not tmp_path.exists()


def test_progress_in_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot keep progress"):
        states(tmp_path / "file" / "below")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_weights(poison: float) -> None:
    model = module()
    with torch.no_grad():
        next(model.parameters())[0, 0] = poison
    with pytest.raises(VerifyError, match="NaN or Inf"):
        prunec.prune(model, ratio=0.25, calibration=vectors())


def test_poisoned_activations() -> None:
    batches = vectors()
    batches[1]["input"][0, 0] = float("nan")
    with pytest.raises(VerifyError, match="calibration batch 1"):
        prunec.prune(module(), ratio=0.25, calibration=batches)


@pytest.mark.parametrize("recipe", ["slimgpt", "flap", "wanda-sp"])
def test_channels_without_variance_and_singular_grams(recipe: str) -> None:
    """Fewer tokens than columns, all of them alike: a result, or an error that is ours."""
    batches = [{"input": torch.zeros(7, 6)} for _ in range(2)]
    try:
        result = prunec.prune(module(), recipe=recipe, ratio=0.25, calibration=batches)
    except PrunecError:
        return
    assert all(bool(tensor.isfinite().all()) for tensor in result.program.state.values())


def test_frozen_parameters_are_pruned_like_others() -> None:
    """Also by a criterion that differentiates."""
    plans = []
    for wanting in (False, True):
        model = module().requires_grad_(wanting)
        how = {"recipe": "llm-pruner", "loss": lambda m, x: m(**x).square().mean()}
        plans.append(prunec.prune(model, ratio=0.25, calibration=vectors(), **how).plan.to_json())
    assert plans[0] == plans[1]


def test_a_model_in_which_nothing_can_be_pruned() -> None:
    with pytest.raises(PlanError, match="nothing can be pruned in this model"):
        prunec.prune(torch.nn.Linear(6, 6).eval(), ratio=0.25, calibration=vectors())


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7]
)
def test_an_index_cannot_reach_out_of_its_directory(tmp_path: Path, name: object) -> None:
    with quiet():
        write_tiny_llama(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not one of its directory"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
    ],
)
def test_quantised_checkpoints_are_refused_by_name(
    tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    with quiet():
        write_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelError, match=rf"quantised \({named}\)"):
        open_model(str(tmp_path))

"""A program on another device: the same calls, and on a GPU the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama, write_tiny_llama

import prunec
from prunec.graph.retarget import on_device
from prunec.graph.trace import trace
from prunec.models import open_model
from prunec.models.quiet import quiet

INPUTS = {"input_ids": torch.randint(2, VOCABULARY, (2, 9), generator=torch.manual_seed(0))}


def test_every_device_in_the_calls_is_replaced() -> None:
    """On meta no value can come from a device that was overlooked."""
    meta = torch.device("meta")
    program = on_device(trace(tiny_llama(), INPUTS), meta)
    state = {name: tensor.to(meta) for name, tensor in program.state.items()}
    result = program.run(state, **INPUTS)  # which come to where the tensors are
    assert result.is_meta
    assert result.shape == (2, 9, VOCABULARY)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@needs_gpu
@pytest.mark.parametrize("out_of_core", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"recipe": "slimgpt"},
        {"recipe": "flap"},
        {"recipe": "llm-pruner"},
        {"recipe": "llm-pruner", "settings": {"mode": "channel"}},
        {"recipe": "short-gpt", "ratio": 0.5},
    ],
)
def test_batches_on_the_cpu_and_weights_on_the_gpu(
    tmp_path: Path, out_of_core: bool, how: dict[str, Any]
) -> None:
    write_tiny_llama(tmp_path / "model")
    found = []
    for place in ("cpu", "cuda"):
        with quiet():
            source = open_model(str(tmp_path / "model"), device=place, out_of_core=out_of_core)
            result = prunec.prune(
                source.model,
                calibration=[INPUTS] * 2,
                weights=source.weights,
                device=place if out_of_core else None,
                **{"ratio": 0.25, **how},
            )
            result.save(tmp_path / place)
        found.append(result)
    assert found[0].plan.to_json() == found[1].plan.to_json()


@needs_gpu
def test_a_gpu_computes_the_same_plan_and_weights_within_1e_3() -> None:
    """fp32 on both; sums run in another order."""
    found = []
    for place in ("cpu", "cuda"):
        model = tiny_llama().to(place)
        batches = [{"input_ids": INPUTS["input_ids"].to(place)}] * 2
        found.append(prunec.prune(model, recipe="slimgpt", ratio=0.25, calibration=batches))
    assert found[0].plan.to_json() == found[1].plan.to_json()
    ours, theirs = (dict(result.model.named_parameters()) for result in found)
    for name, tensor in ours.items():
        assert torch.allclose(theirs[name].cpu(), tensor, rtol=1e-3, atol=1e-3), name

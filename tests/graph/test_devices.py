"""A program on another device: the same calls, and on a GPU the same numbers."""

from __future__ import annotations

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama

import prunec
from prunec.graph.retarget import on_device
from prunec.graph.trace import trace

INPUTS = {"input_ids": torch.randint(2, VOCABULARY, (2, 9), generator=torch.manual_seed(0))}


def test_every_device_in_the_calls_is_replaced() -> None:
    """On meta no value can come from a device that was overlooked."""
    meta = torch.device("meta")
    program = on_device(trace(tiny_llama(), INPUTS), meta)
    state = {name: tensor.to(meta) for name, tensor in program.state.items()}
    result = program.run(state, input_ids=INPUTS["input_ids"].to(meta))
    assert result.is_meta
    assert result.shape == (2, 9, VOCABULARY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
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

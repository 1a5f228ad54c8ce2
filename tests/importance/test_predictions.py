"""How far predictions are from the dense model's: against the definition in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor

from prunec.errors import PlanError
from prunec.graph.program import Program
from prunec.graph.trace import trace
from prunec.importance import predictions
from prunec.importance.predictions import Predictions

BATCHES, SAMPLES, LENGTH = 2, 2, 9


@pytest.fixture(scope="module")
def traced() -> tuple[Program, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (BATCHES, SAMPLES, LENGTH), generator=generator)
    batches = [{"input_ids": rows} for rows in ids]
    return trace(tiny_llama(), batches[0]), batches


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(BATCHES, SAMPLES, LENGTH, 7, generator=generator)


def by_definition(dense: Tensor, other: Tensor) -> Tensor:
    p, q = dense.double().softmax(-1), other.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def test_the_mean_over_all_tokens(traced: tuple[Program, list[dict[str, Tensor]]]) -> None:
    dense, other = logits(1), logits(2)
    found = Predictions(*traced, dense)
    wanted = by_definition(dense, other)
    assert found.divergence(other) == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert found.divergence(other[1:], [1]) == pytest.approx(float(wanted[1].mean()), rel=1e-5)
    assert found.divergence(dense) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("limit", ["most", "memory"])
def test_tokens_are_drawn_where_not_all_are_held(
    traced: tuple[Program, list[dict[str, Tensor]]], limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "memory":
        monkeypatch.setattr(predictions, "_BYTES", 4 * 7 * 3 * BATCHES)
    dense, other = logits(1), logits(2)
    most = 3 if limit == "most" else None
    found = [
        Predictions(*traced, dense, most=most, seed=seed).divergence(other) for seed in range(400)
    ]
    wanted = by_definition(dense, other)
    assert len(set(found)) > 300  # of 816 ^ 2 draws
    spread = float(wanted.flatten(1).var(1).mean()) / (3 * BATCHES)
    assert sum(found) / 400 == pytest.approx(float(wanted.mean()), abs=4 * (spread / 400) ** 0.5)


def test_a_token_that_is_ruled_out_adds_nothing(
    traced: tuple[Program, list[dict[str, Tensor]]],
) -> None:
    dense, other = logits(1), logits(2)
    for output in (dense, other):
        output[..., 0] = -math.inf
    wanted = by_definition(dense[..., 1:], other[..., 1:]).mean()
    assert Predictions(*traced, dense).divergence(other) == pytest.approx(float(wanted), rel=1e-5)


def test_what_is_not_finite_is_refused(traced: tuple[Program, list[dict[str, Tensor]]]) -> None:
    dense, broken = logits(1), logits(2)
    broken[1, 0, 3, 2] = math.nan
    with pytest.raises(PlanError, match="NaN or Inf"):
        Predictions(*traced, dense).divergence(broken)

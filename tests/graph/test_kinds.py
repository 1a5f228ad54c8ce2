"""Kinds of units, told from the graph."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from programs import coupled, inputs, net
from torch import Tensor
from torch.nn import functional as F

from prunec.graph.coupling import couple
from prunec.graph.trace import trace


def kinds(forward: object, **sizes: tuple[int, ...]) -> dict[str, int]:
    return {g.kind: g.size for g in coupled(net(forward, **sizes), inputs(2, 5, 6)).groups}


def test_read_and_write_of_a_state_in_one_projection_are_no_rotary_pair() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        write, read = F.linear(x, p.both).split([4, 4], -1)
        scores = torch.matmul(read, write.transpose(1, 2))
        return F.linear(torch.matmul(scores, F.linear(x, p.v)), p.o)

    assert kinds(forward, both=(8, 6), v=(7, 6), o=(3, 7)) == {"qk_dim": 4, "value_dim": 7}


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_a_rotation_turns_is_a_rotary_pair(interleaved: bool) -> None:
    angles = torch.arange(20.0).reshape(5, 4)

    def turned(x: Tensor) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        if interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(p: object, x: Tensor) -> Tensor:
        scores = torch.matmul(turned(F.linear(x, p.q)), turned(F.linear(x, p.k)).transpose(1, 2))
        return F.linear(torch.matmul(scores, F.linear(x, p.v)), p.o)

    found = kinds(forward, q=(8, 6), k=(8, 6), v=(7, 6), o=(3, 7))
    assert found == {"rope_pair": 4, "value_dim": 7}


def test_a_state_space_model_has_no_rotary_pairs() -> None:
    config = T.MambaConfig(
        vocab_size=31, hidden_size=12, state_size=5, num_hidden_layers=1, time_step_rank=3
    )
    model = T.MambaForCausalLM(config).requires_grad_(False)
    groups = couple(trace(model, {"input_ids": torch.arange(8).reshape(2, 4)})).groups
    assert [g.size for g in groups if g.kind == "qk_dim"] == [5]
    assert not [g for g in groups if g.kind == "rope_pair"]

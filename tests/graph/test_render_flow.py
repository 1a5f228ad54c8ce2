"""What pictures are made of: the steps of a program, and its repeated blocks."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from pictured import Layer, coupled, three_layers
from torch import Tensor, nn

from prunec.graph.coupling import couple
from prunec.graph.render.flow import find_flow
from prunec.graph.render.fold import Block, fold, quotient
from prunec.graph.trace import trace


def blocks(layers: list[Layer], runs: int = 1) -> list[Block]:
    coupling = coupled(layers, runs)
    return [item for item in fold(coupling, find_flow(coupling)).items if isinstance(item, Block)]


def test_a_layer_is_its_parameters_joins_and_residual_sums() -> None:
    flow = find_flow(three_layers())
    lines = []
    for step in flow.steps[:12]:
        sources = [source for source, target in flow.edges if target == step.index]
        name = f"{step.index} {step.kind} {step.module}".rstrip()
        lines.append(f"{name}: {', '.join(step.operators)} of {sources}")
    assert_expected_inline(
        "\n".join(lines),
        """\
0 input: tensors_0 of []
1 weights embed: embedding of [0]
2 weights layers.0.norm1: layer_norm of [1]
3 weights layers.0.attention.qkv: linear of [2]
4 join layers.0.attention: scaled_dot_product_attention of [3]
5 weights layers.0.attention.out: linear of [4]
6 sum layers.0: add of [1, 5]
7 weights layers.0.norm2: layer_norm of [6]
8 weights layers.0.mlp.gate: linear of [7]
9 weights layers.0.mlp.up: linear of [7]
10 join layers.0.mlp: mul of [8, 9]
11 weights layers.0.mlp.down: linear of [10]""",
    )


def test_activations_are_named_on_the_edge_that_they_lie_on() -> None:
    flow = find_flow(three_layers())
    (values,) = [
        values
        for (source, target), values in flow.edges.items()
        if flow.steps[source].module == "layers.0.mlp.gate"
    ]
    assert [flow.through[value] for value in values] == [("silu",)]


def test_layers_that_differ_in_sizes_only_are_one_block() -> None:
    coupling = three_layers()
    folding = fold(coupling, find_flow(coupling))
    (block,) = folding.blocks()
    assert (block.module, block.times) == ("layers.0", 3)
    assert set(folding.shown.values()) >= set(block.steps())


def test_a_pattern_of_layers_folds_as_a_whole() -> None:
    (block,) = blocks([Layer(7, attends=i % 2 == 0) for i in range(4)])
    assert block.modules == (("layers.0", "layers.1"), ("layers.2", "layers.3"))
    assert [inner.module for inner in block.items if isinstance(inner, Block)] == [
        "layers.0",
        "layers.1",
    ]


def test_layers_of_different_structure_stay_apart() -> None:
    found = blocks([Layer(7), Layer(7), Layer(7, attends=False)])
    assert [(block.module, block.times) for block in found] == [("layers.0", 2), ("layers.2", 1)]


def test_a_shared_layer_is_one_block_that_runs_several_times() -> None:
    (block,) = blocks([Layer(7)], runs=3)
    assert block.modules == (("layers.0",),) * 3


def test_boxes_merge_unless_that_closes_a_cycle() -> None:
    inputs = {0: set[int](), 1: {0}, 2: {1}, 3: {2}, 4: {3}}
    names = {0: "a", 1: "a", 2: "b", 3: "a", 4: "b"}
    assert quotient(inputs, names.__getitem__) == {0: 0, 1: 0, 2: 2, 3: 3, 4: 4}


class Recurrent(nn.Module):
    """A recurrence unrolled by the trace: four times ``state = gate * state + value``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(6, 5), nn.Linear(6, 5)
        self.out = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate(x).sigmoid(), self.value(x)
        states = [value[:, 0]]
        for step in range(1, 5):
            states.append(gate[:, step] * states[-1] + value[:, step])
        return x + self.out(torch.stack(states, dim=1))


def test_an_unrolled_recurrence_is_one_join_and_no_residual_sum() -> None:
    flow = find_flow(couple(trace(Recurrent(), torch.zeros(2, 5, 6))))
    assert [(step.kind, step.module) for step in flow.steps] == [
        ("input", ""),
        ("weights", "gate"),
        ("weights", "value"),
        ("join", ""),
        ("weights", "out"),
        ("sum", ""),
        ("output", ""),
    ]

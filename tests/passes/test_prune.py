"""The prune pass on tiny models: budgets are met, weights are mended, shared weights are one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, GPT2Config, GPT2LMHeadModel

from prunec.errors import PlanError, VerifyError
from prunec.graph.cost import parameter_count
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.passes.oracles.mask import slicing_difference
from prunec.passes.plan import Plan
from prunec.passes.prune import Pruned, prune_sites
from prunec.passes.recipe import load_recipe
from prunec.passes.setup import Setup
from prunec.passes.sites import find_sites
from prunec.passes.slice import Weights, slice_program
from prunec.passes.targets.goal import block_parameters
from prunec.passes.targets.question import block_budget

LENGTH = 24


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)}
        for _ in range(count)
    ]


_COUPLED: dict[int, tuple[nn.Module, CouplingGraph]] = {}


def coupled(model: nn.Module) -> CouplingGraph:
    """Tracing takes most of these tests' time: once a model."""
    if id(model) not in _COUPLED:
        _COUPLED[id(model)] = (model, couple(trace(model, batches()[0])))
    return _COUPLED[id(model)][1]


LLAMA = tiny_llama()


def run(
    model: nn.Module, ratio: float, recipe: str = "slimgpt", **settings: str
) -> tuple[CouplingGraph, Pruned]:
    coupling = coupled(model)
    chosen = load_recipe(recipe).override(settings)
    sites, _ = find_sites(coupling, chosen.units)
    budget = block_budget(coupling, sites, chosen.allocation.build("allocation"), ratio)
    criterion = chosen.importance.build("importance")
    compensation = chosen.compensation.build("compensation")
    setup = Setup(coupling, sites, criterion, compensation, batches(), Weights(coupling))
    return coupling, prune_sites(setup, budget)


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.5])
@pytest.mark.parametrize("recipe", ["slimgpt", "magnitude"])
def test_the_total_is_met_and_slicing_equals_masking(ratio: float, recipe: str) -> None:
    coupling, pruned = run(LLAMA, ratio, recipe)
    before = sum(block_parameters(coupling).values())
    after = sum(block_parameters(coupling, pruned.selection.counts).values())
    one_channel = 3 * LLAMA.config.hidden_size
    assert abs(ratio * before - (before - after)) <= one_channel
    assert parameter_count(coupling, pruned.selection.counts) == sum(
        pruned.weights[name].numel() for name in coupling.program.parameters
    )
    example = coupling.program.example
    difference = slicing_difference(coupling, pruned.selection, pruned.weights, example)
    assert difference < 1e-4


def test_compensation_lowers_the_output_error_of_the_same_selection() -> None:
    dense = coupled(LLAMA).program
    errors = []
    for compensation in ("none", "obs"):
        coupling, pruned = run(LLAMA, 0.3, compensation=compensation)
        program = slice_program(coupling, pruned.selection, pruned.weights)
        gaps = [program.run(**batch) - dense.run(**batch) for batch in batches()]
        errors.append(sum(float(gap.square().sum()) for gap in gaps))
    assert errors[1] < 0.8 * errors[0]


def test_a_shared_weight_is_pruned_once_on_the_inputs_of_all_its_calls() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    coupling, pruned = run(AlbertForMaskedLM(config).eval(), 0.3)
    kinds = {coupling[name].kind for name in Plan.of(coupling, pruned.selection).groups}
    assert kinds == {"ffn_channel", "head"}
    example = coupling.program.example
    difference = slicing_difference(coupling, pruned.selection, pruned.weights, example)
    assert difference < 1e-4


def test_weights_stored_input_first_are_mended_too() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    coupling, pruned = run(GPT2LMHeadModel(config).eval(), 0.3)
    example = coupling.program.example
    difference = slicing_difference(coupling, pruned.selection, pruned.weights, example)
    assert difference < 1e-4
    assert {report.block for report in pruned.sites} == {"transformer.h.0", "transformer.h.1"}


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.0, "ratio of 0 is not possible"),
        (1.0, "ratio of 1 is not possible"),
        (-0.2, "ratio of -0.2"),
        (0.97, "cannot be removed"),
    ],
)
def test_ratios_that_cannot_be(ratio: float, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        run(LLAMA, ratio)


def test_the_largest_ratio_is_said_and_can_be_reached() -> None:
    with pytest.raises(PlanError) as raised:
        run(LLAMA, 0.97)
    assert raised.value.so is not None
    largest = float(raised.value.so.rsplit(" ", 1)[1])
    coupling, pruned = run(LLAMA, largest - 0.001, allocation="uniform")
    counts = {coupling.by_dim[dim].kind: count for dim, count in pruned.selection.counts.items()}
    assert counts["ffn_channel"] <= 2


def test_nan_in_a_weight_names_the_node() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(VerifyError, match="NaN or Inf") as raised:
        run(model, 0.3)
    assert "model.layers.1.mlp" in str(raised.value.where)


def _tiny_gpt2() -> nn.Module:
    """Its layers see batch and sequence as one axis."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [tiny_llama, _tiny_gpt2])
def test_padding_does_not_count(make: Callable[[], nn.Module]) -> None:
    model = make()
    plain = batches(2)
    ones = torch.ones_like(plain[0]["input_ids"])
    padded = [{**batch, "attention_mask": ones.clone()} for batch in plain]
    for batch in padded:
        batch["attention_mask"][:, -5:] = 0
    scrambled = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in padded]
    for batch in scrambled:
        batch["input_ids"][:, -5:] = 7
    coupling = couple(trace(model, padded[0]))
    recipe = load_recipe("slimgpt")
    sites, _ = find_sites(coupling, recipe.units)
    kept, weights = [], []
    for data in (padded, scrambled):
        criterion = recipe.importance.build("importance")
        compensation = recipe.compensation.build("compensation")
        setup = Setup(coupling, sites, criterion, compensation, data, Weights(coupling))
        budget = block_budget(coupling, sites, recipe.allocation.build("allocation"), 0.3)
        pruned = prune_sites(setup, budget)
        kept.append(Plan.of(coupling, pruned.selection))
        weights.append(dict(pruned.weights))
    assert kept[0] == kept[1]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)

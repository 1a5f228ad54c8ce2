"""Biases from end to end: fitted, seen by later sites, delivered, reopened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import prunec
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.passes.compensation.biases import with_biases
from prunec.passes.compensation.closed_form import BiasCompensation
from prunec.passes.sites import find_sites

UNITS = ("ffn_channel", "head", "query_head", "kv_group")
LENGTH = 16


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(2, VOCABULARY, (2, LENGTH), generator=generator)}
        for _ in range(count)
    ]


def tiny_gpt2() -> nn.Module:
    """Its layers have biases of their own, and keep their weights input first."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def coupled(model: nn.Module) -> CouplingGraph:
    return couple(trace(model, batches()[0]))


def prune(model: nn.Module, compensation: str = "bias", ratio: float = 0.4) -> prunec.Result:
    settings = {"importance": "fluctuation", "compensation": compensation}
    return prunec.prune(
        model, recipe="magnitude", ratio=ratio, calibration=batches(), settings=settings
    )


def test_places_for_biases_change_nothing_until_they_are_filled() -> None:
    coupling = coupled(tiny_llama())
    sites, _ = find_sites(coupling, UNITS)
    assert not any(site.takes_bias for site in sites)
    before = coupling.program
    after = with_biases(before, sites)
    assert after.added == {f"{site.name}.bias" for site in sites}
    assert after.parameters == before.parameters
    torch.testing.assert_close(after.run(**before.example), before.run(**before.example))
    again = couple(after)
    sites, _ = find_sites(again, UNITS)
    assert [site.readings[0].bias for site in sites] == [f"{site.name}.bias" for site in sites]
    assert with_biases(after, sites) is after
    hidden = again.layout.parameters["model.layers.0.mlp.down_proj.weight"][0]
    assert again.layout.parameters["model.layers.0.mlp.down_proj.bias"][0].root is hidden.root


def test_biases_that_the_model_has_are_found_and_none_is_added() -> None:
    coupling = coupled(tiny_gpt2())
    sites, _ = find_sites(coupling, UNITS)
    assert [site.readings[0].bias for site in sites] == [f"{site.name}.bias" for site in sites]
    assert with_biases(coupling.program, sites) is coupling.program


class _ReadsItTwice(nn.Module):
    """The second linear's bias is used elsewhere too, so it is not free to change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) + 2 * self.down.bias


def test_a_bias_that_something_else_reads_is_left_alone() -> None:
    coupling = couple(trace(_ReadsItTwice().eval(), torch.randn(3, 8)))
    (site,), _ = find_sites(coupling, ["ffn_channel"])
    assert not site.takes_bias
    assert not with_biases(coupling.program, [site]).added


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_bias_takes_up_the_mean_of_what_is_removed(make) -> None:
    """Site by site, the mean output of the pruned layer is that of the dense one on its inputs."""
    model = make()
    result = prune(model)
    names = [site.site for site in result.report.sites if site.removed]
    assert names
    before = {name: model.get_submodule(name) for name in names}
    after = {name: result.model.get_submodule(name) for name in names}
    last = names[-1]
    seen: dict[str, list[Tensor]] = {"in": [], "out": []}

    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["in"].append(inputs[0].flatten(0, -2))
        seen["out"].append(output.flatten(0, -2))

    handle = after[last].register_forward_hook(record)
    for batch in batches():
        result.model(**batch)
    handle.remove()
    kept = torch.tensor(result.plan.groups[_group(result, last)].rows[()])
    dense, x = before[last], torch.cat(seen["in"])
    weight = dense.weight if isinstance(dense, nn.Linear) else dense.weight.T
    native = dense.bias if dense.bias is not None else torch.zeros(len(weight))
    plain = x @ weight[:, kept].T + native
    fitted = torch.cat(seen["out"]) - plain
    assert fitted.std(0).max() < 1e-5  # a constant in every channel
    assert fitted.abs().max() > 1e-3


def _group(result: prunec.Result, site: str) -> str:
    return next(name for name in result.plan.groups if name.startswith(site.rpartition(".")[0]))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_biases_are_delivered_and_reopen_without_prunec(make, tmp_path: Path) -> None:
    model = make()
    result = prune(model)
    native = {name for name, _ in model.named_parameters()}
    new = {name for name, _ in result.model.named_parameters()} - native
    assert bool(new) == (make is tiny_llama)
    assert all(name.endswith(".bias") for name in new)
    for name in new:
        assert result.model.get_parameter(name).abs().max() > 0
    result.save(tmp_path / "out")  # a fresh process opens it and compares
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    batch = batches()[0]
    assert torch.equal(reopened(**batch).logits, result.model(**batch).logits)
    assert set(reopened.config.prunec["added"] if new else {}) == new
    counted = sum(parameter.numel() for parameter in result.model.parameters())
    assert result.report.parameters[1] == counted


@pytest.mark.parametrize("recipe", ["flap", "slimllm"])
@pytest.mark.parametrize("target", ["params=72%", "memory=60%"])
def test_fitted_biases_count_towards_a_target(recipe: str, target: str) -> None:
    model = tiny_llama()
    result = prunec.prune(model, recipe=recipe, target=target, calibration=batches())
    dense, left = (sum(p.numel() for p in m.parameters()) for m in (model, result.model))
    aim, size = result.report.aim, 4 if target.startswith("memory") else 1
    assert aim["reached"] == left * size
    assert abs(left / dense - float(target[-3:-1]) / 100) <= 0.005 * float(target[-3:-1]) / 100


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_slicing_equals_masking_with_biases_and_the_graph_is_the_module(make) -> None:
    result = prune(make())
    batch = batches()[1]
    torch.testing.assert_close(
        result.program.run(**batch), result.model(**batch).logits, rtol=1e-4, atol=1e-4
    )


def test_a_bias_is_better_than_none() -> None:
    model = tiny_llama()
    gaps = []
    for compensation in ("none", "bias"):
        smaller = prune(model, compensation, ratio=0.3).model
        pairs = ((smaller(**b).logits, model(**b).logits) for b in batches())
        gaps.append(sum(float((a - b).square().sum()) for a, b in pairs))
    assert gaps[1] < gaps[0]


def test_without_a_place_the_weights_stay_as_they_are() -> None:
    weight, keep = torch.randn(4, 6), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    mended = BiasCompensation().compensate(weight, {"input_mean": torch.ones(6)}, keep)
    assert mended.bias is None
    assert torch.equal(mended.weight, weight[:, keep])

"""Experts as sites: each against least squares on the tokens that it gets, and whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refitted import Batches, kept, pruned, refit
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import prunec
from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.passes.compensation.closed_form import NoCompensation
from prunec.passes.oracles.mask import slicing_difference
from prunec.passes.sites import find_sites
from prunec.passes.slice import Weights
from prunec.passes.statistics.measure import Measurement
from prunec.passes.targets.goal import block_parameters
from prunec.registry import plugin


class Experts(nn.Module):
    """Five experts, two for each token, in one of the forms that such layers are written in."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.router = nn.Linear(6, 5, bias=False, dtype=torch.float64)
        self.router.weight = drawn(5, 6)
        self.up, self.down = drawn(5, 6, 10), drawn(5, 10, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        if self.form in ("bmm", "einsum"):
            routing = torch.zeros(len(tokens), 5, dtype=x.dtype).scatter(1, chosen, weights)
            if self.form == "bmm":
                h = torch.bmm(tokens.expand(5, -1, -1), self.up).relu()
                y = torch.bmm(h, self.down) * routing.T.unsqueeze(-1)
                return x + y.sum(0).view(x.shape)
            h = torch.einsum("th,ehi->tei", tokens, self.up).relu()
            y = torch.einsum("tei,eih->teh", h, self.down)
            return x + (y * routing.unsqueeze(-1)).sum(1).view(x.shape)
        rows, ids = tokens.repeat_interleave(2, 0), chosen.flatten()
        if self.form == "chosen for tokens":
            h = torch.einsum("th,tkhi->tki", tokens, self.up[chosen]).relu()
            y = torch.einsum("tki,tkih->tkh", h, self.down[chosen])
            return x + (y * weights.unsqueeze(-1)).sum(1).view(x.shape)
        if self.form == "chosen":
            h = torch.bmm(rows.unsqueeze(1), self.up[ids]).relu()
            y = torch.bmm(h, self.down[ids]).squeeze(1) * weights.flatten().unsqueeze(-1)
            return x + y.view(len(tokens), 2, 6).sum(1).view(x.shape)
        ids, order = ids.sort()
        ends = torch.histc(ids.double(), 5, 0, 4).cumsum(0).to(torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        h = product(tokens[order // 2], self.up, ends).relu()
        y = product(h, self.down, ends) * weights.flatten()[order].unsqueeze(-1)
        return x + y[order.argsort()].view(len(tokens), 2, 6).sum(1).view(x.shape)


FORMS = ("bmm", "einsum", "chosen", "chosen for tokens", "sorted")


def of_experts(model: Experts, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per expert the inputs of `down`, and what it makes of them, for the tokens sent there."""
    tokens = x.flatten(0, 1)
    _, chosen = model.router(tokens).softmax(-1).topk(2)
    found = []
    for expert in range(5):
        mine = tokens[(chosen == expert).any(1)]
        h = (mine @ model.up[expert]).relu().detach()
        found.append((h, (h @ model.down[expert]).detach()))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_each_expert_is_refitted_on_the_tokens_that_it_gets(form: str) -> None:
    model = Experts(form).eval()
    generator = torch.Generator().manual_seed(1)
    data: Batches = [
        {"x": torch.randn(3, 20, 6, generator=generator, dtype=torch.float64)} for _ in range(3)
    ]
    coupling = couple(trace(model, data[0]))
    result = pruned(coupling, data, {"ffn_channel"})
    keep = kept(result, coupling, "down", 1)
    batches = [of_experts(model, batch["x"]) for batch in data]
    losses = torch.zeros(10, dtype=torch.float64)
    for expert in range(5):
        h = torch.cat([batch[expert][0] for batch in batches])
        y = torch.cat([batch[expert][1] for batch in batches])
        torch.testing.assert_close(
            result.weights["down"][expert].T, refit(h, y, keep), rtol=1e-8, atol=1e-8
        )
        for channel in range(10):
            stay = torch.arange(10) != channel
            losses[channel] += (h[:, stay] @ refit(h, y, stay).T - y).square().sum()
    first = losses.argmin()
    assert not keep[first]
    example = coupling.program.example
    assert slicing_difference(coupling, result.selection, result.weights, example) < 1e-9


def test_all_forms_of_experts_lose_the_same_units() -> None:
    generator = torch.Generator().manual_seed(1)
    data: Batches = [
        {"x": torch.randn(3, 20, 6, generator=generator, dtype=torch.float64)} for _ in range(3)
    ]
    for name in ("wanda", "fluctuation", "pearson", "feature-space", "obs"):
        criterion = plugin("importance", name)()
        found = []
        for form in FORMS:
            coupling = couple(trace(Experts(form).eval(), data[0]))
            result = pruned(
                coupling,
                data,
                {"ffn_channel"},
                240 / 630,  # four channels, as the fused product wants an even number
                criterion=criterion,
                compensation=NoCompensation(),
            )
            found.append(kept(result, coupling, "down", 1).tolist())
        assert all(mask == found[0] for mask in found), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["obs", "magnitude", "wanda"])
def test_whole_experts_go(form: str, name: str) -> None:
    """With the rows of the router, and the others as the sliced model routes them."""
    model = nn.Sequential(Experts(form), Experts(form)).eval()
    generator = torch.Generator().manual_seed(1)
    data: Batches = [
        {"input": torch.randn(3, 20, 6, generator=generator, dtype=torch.float64)} for _ in range(2)
    ]
    coupling = couple(trace(model, data[0]))
    assert [group.kind for group in coupling.groups].count("expert") == 2
    criterion = plugin("importance", name)()
    result = pruned(
        coupling, data, {"expert"}, 0.4, criterion=criterion, compensation=NoCompensation()
    )
    assert [report.kept for report in result.sites] == [{"0/expert": 3}, {"1/expert": 3}]
    assert result.weights["0.router.weight"].shape == (3, 6)
    if form == "sorted":  # its two lookups by rank have no reference
        return
    example = coupling.program.example
    assert slicing_difference(coupling, result.selection, result.weights, example) < 1e-9


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_local_experts=5,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("recipe", ["slimgpt", "slimllm-no-bias", "wanda-sp", "flap-no-bias"])
def test_a_mixture_of_experts_meets_its_ratio(recipe: str, tmp_path: Path) -> None:
    """Widths of experts are multiples of 16 bytes, as the fused kernel wants them."""
    data = [{"input_ids": torch.randint(97, (2, 24))} for _ in range(4)]
    model = mixtral()
    coupling = couple(trace(model, data[0]))
    total = sum(block_parameters(coupling).values())
    four_channels = 4 * 3 * 24 * 5
    ratio = 10 * four_channels / total
    result = prunec.prune(
        model,
        recipe=recipe,
        ratio=ratio,
        calibration=data,
        settings={"units": "ffn_channel"},
    )
    assert result.report.realised_ratio == pytest.approx(ratio, rel=1e-9)
    assert all(count % 4 == 0 for site in result.report.sites for count in site.kept.values())
    assert {site.site.rpartition(".")[2] for site in result.report.sites} == {"down_proj"}
    assert not result.report.skipped
    if recipe == "slimgpt":
        result.save(tmp_path / "smaller")
        ids = data[0]["input_ids"]
        again = prunec.load(tmp_path / "smaller")
        torch.testing.assert_close(again(ids).logits, result.model(ids).logits)


def test_padding_does_not_count_with_experts() -> None:
    """Rows of padding are sorted among the others; what they hold must not matter."""
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = []
    for filler, seen in ((0, mask), (50, mask), (0, torch.ones_like(mask)), (50, mask | 1)):
        padded = torch.where(mask.bool(), ids, filler)
        data: Batches = [{"input_ids": padded, "attention_mask": seen}]
        coupling = couple(trace(mixtral().double(), data[0]))
        (site, _), _ = find_sites(coupling, {"ffn_channel"})
        weights = Weights(coupling, coupling.program.state)
        measurement = Measurement(weights.stream(data), [site], ["input_square"])
        taken = measurement.take(site)
        found.append(torch.stack([taken[f"input_square[{expert}]"] for expert in range(5)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[2], found[3], rtol=1e-3)

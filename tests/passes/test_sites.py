"""Sites beyond linear layers, each against least squares on the rows that its weights read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_model import tiny_llama
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import prunec
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.importance.obs import Obs
from prunec.passes.compensation.closed_form import NoCompensation, ObsCompensation
from prunec.passes.oracles.mask import slicing_difference
from prunec.passes.prune import Pruned, prune_sites
from prunec.passes.setup import Setup
from prunec.passes.sites import find_sites
from prunec.passes.slice import Weights
from prunec.passes.statistics.measure import Measurement
from prunec.passes.targets.budget import block_budget, block_parameters
from prunec.registry import plugin

Batches = list[Mapping[str, Tensor]]


def pruned(
    coupling: CouplingGraph,
    data: Batches,
    units: set[str],
    ratio: float = 0.3,
    criterion: object = None,
    compensation: object = None,
) -> Pruned:
    """Exact least squares, with as little damping as works."""
    mend = ObsCompensation(damping=0.0) if compensation is None else compensation
    rank = Obs(damping=0.0) if criterion is None else criterion
    by_weight = not rank.statistics
    sites, skipped = find_sites(coupling, units, by_weight=by_weight)
    assert sites
    assert not skipped
    weights = Weights(coupling, coupling.program.state)
    setup = Setup(coupling, sites, rank, mend, data, weights)
    budget = block_budget(coupling, sites, plugin("allocation", "uniform")(), ratio)
    return prune_sites(setup, budget)


def refit(rows: Tensor, outputs: Tensor, keep: Tensor) -> Tensor:
    """``[out, kept]``: least squares of the outputs on the columns that stay."""
    solved = torch.linalg.lstsq(rows[:, keep], outputs, driver="gelsd")
    return solved.solution.T


def kept(result: Pruned, coupling: CouplingGraph, parameter: str, axis: int) -> Tensor:
    mask = result.selection.mask(coupling.layout.parameters[parameter][axis])
    assert mask is not None
    assert not mask.all()
    return torch.from_numpy(mask)


class Convolutions(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


PAIRS = {
    "1d": (nn.Conv1d(3, 8, 3), nn.Conv1d(8, 5, 3, padding="same"), (4, 3, 30)),
    "2d": (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, (3, 2), 2, (1, 0), (1, 2)), (4, 3, 14, 15)),
    "3d": (nn.Conv3d(2, 6, 1), nn.Conv3d(6, 4, (1, 2, 2)), (3, 2, 4, 6, 5)),
    "groups": (nn.Conv2d(3, 12, 3), nn.Conv2d(12, 6, 3, groups=3), (6, 3, 12, 12)),
    "transposed": (
        nn.Conv2d(3, 8, 3),
        nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1, dilation=2),
        (6, 3, 11, 12),
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_convolution_is_refitted_on_its_patches(kind: str) -> None:
    torch.manual_seed(0)
    first, second, shape = PAIRS[kind]
    model = Convolutions(first, second).double().eval()
    data: Batches = [{"x": torch.randn(shape, dtype=torch.float64)} for _ in range(3)]
    coupling = couple(trace(model, data[0]))
    result = pruned(coupling, data, {"conv_channel"})
    name = "second.weight"
    channels = 0 if kind == "transposed" else 1
    keep = kept(result, coupling, name, channels)
    weight = model.second.weight.detach()
    groups = model.second.groups
    outputs = weight.shape[1] if channels == 0 else len(weight)
    for group in range(groups):
        rows, made = [], []
        for batch in data:
            x = model.first(batch["x"]).relu().detach()
            y = model.second(x).detach() - model.second.bias.detach().view(-1, *[1] * (x.ndim - 2))
            of_group = y.flatten(2).unflatten(1, (groups, -1))[:, group]  # [n, out, positions]
            made.append(of_group.transpose(1, 2).flatten(0, 1))
            rows.append(_patches(model.second, x, group))
        x, y = torch.cat(rows), torch.cat(made)
        expected = refit(x, y, keep.repeat_interleave(weight[0, 0].numel()))
        found = result.weights[name]
        if channels == 0:
            found = found.transpose(0, 1)
        found = found[group * outputs // groups : (group + 1) * outputs // groups].flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    example = coupling.program.example
    assert slicing_difference(coupling, result.selection, result.weights, example) < 1e-9


def _patches(layer: nn.Module, x: Tensor, group: int) -> Tensor:
    """``[positions, columns]`` of one group, by laying each element of a kernel over the input."""
    weight = layer.weight.detach()
    transposed = isinstance(layer, nn.ConvTranspose2d)
    per = (weight.shape[1] if transposed else len(weight)) // layer.groups
    columns = []
    probe = torch.zeros_like(weight)
    first = (slice(None), 0) if transposed else (group * per,)
    for index in np.ndindex(*probe[first].shape):
        probe.zero_()
        probe[first][index] = 1.0
        y = torch.func.functional_call(
            layer, {"weight": probe, "bias": torch.zeros_like(layer.bias)}, (x,)
        )
        columns.append(y[:, 0 if transposed else group * per].flatten())
    return torch.stack(columns, dim=1)


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


class Readers(nn.Module):
    """Two layers read the same rows, and a third what another function makes of the units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 9)
        self.one, self.two, self.three = nn.Linear(9, 4), nn.Linear(9, 3), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x)
        positive = h.relu()
        return self.one(positive) + self.three(h.tanh()), self.two(positive)


def test_several_readers_are_one_site() -> None:
    data: Batches = [{"x": torch.randn(50, 6, dtype=torch.float64)} for _ in range(2)]
    coupling = couple(trace(Readers().double().eval(), data[0]))
    (site,), _ = find_sites(coupling, {"ffn_channel"})
    assert [[r.parameter for r in given.readings] for given in site.inputs] == [
        ["one.weight", "two.weight"],
        ["three.weight"],
    ]
    model = Readers().double()
    result = pruned(coupling, data, {"ffn_channel"}, 0.4)
    keep = kept(result, coupling, "up.weight", 0)
    h = model.up(torch.cat([batch["x"] for batch in data])).detach()
    losses = torch.zeros(9, dtype=torch.float64)
    for layer, x in (("one", h.relu()), ("two", h.relu()), ("three", h.tanh())):
        y = (x @ getattr(model, layer).weight.T).detach()
        torch.testing.assert_close(
            result.weights[f"{layer}.weight"], refit(x, y, keep), rtol=1e-8, atol=1e-8
        )
        for unit in range(9):
            stay = torch.arange(9) != unit
            losses[unit] += (x[:, stay] @ refit(x, y, stay).T - y).square().sum()
    assert not keep[losses.argmin()]


def test_what_no_weight_reads_is_ranked_by_weights_or_said() -> None:
    example = {"input_ids": torch.zeros(1, 5, dtype=torch.int64)}
    coupling = couple(trace(tiny_llama(), example))
    kinds = {group.kind for group in coupling.groups}
    _, skipped = find_sites(coupling, kinds)
    reasons = {item.group.rpartition("/")[2]: item.reason for item in skipped}
    assert reasons.keys() == {"hidden", "rope_pair"}
    assert reasons["rope_pair"].startswith("scaled_dot_product_attention sums over it")
    assert "units=hidden" in reasons["hidden"]
    sites, skipped = find_sites(coupling, kinds, by_weight=True)
    assert not skipped
    assert {group.name for site in sites for group in site.groups} == {
        group.name for group in coupling.groups
    }
    for name in ("magnitude", "random"):
        criterion = plugin("importance", name)()
        result = pruned(
            coupling,
            [],
            kinds - {"hidden"},
            criterion=criterion,
            compensation=NoCompensation(),
        )
        gone = {coupling.by_dim[dim].kind for dim in result.selection.counts}
        assert "rope_pair" in gone
        assert slicing_difference(coupling, result.selection, result.weights, example) < 1e-4


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


class Network(nn.Module):
    """Convolutions in a row, one of them depthwise, with norms; then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.wide, self.narrow = nn.Conv2d(24, 48, 1, bias=False), nn.Conv2d(48, 32, 3)
        self.first, self.second, self.third = (nn.BatchNorm2d(n) for n in (24, 24, 48))
        self.head = nn.Linear(32 * 9, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.depthwise(self.first(self.stem(x)).relu())).relu()
        x = self.third(self.wide(x)).relu()
        return self.head(F.adaptive_avg_pool2d(self.narrow(x).relu(), 3).flatten(1))


@pytest.mark.parametrize("recipe", ["slimgpt", "slimllm", "flap-no-bias", "wanda-sp", "magnitude"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_a_network_of_convolutions_meets_its_ratio(recipe: str, ratio: float) -> None:
    model = Network().eval()
    data = [{"x": torch.randn(4, 3, 8, 8)} for _ in range(3)]
    before = sum(parameter.numel() for parameter in model.parameters())
    result = prunec.prune(model, recipe=recipe, ratio=ratio, calibration=data)
    after = sum(parameter.numel() for parameter in result.model.parameters())
    assert 1 - after / before == pytest.approx(ratio, abs=0.005)
    assert result.report.realised_ratio == pytest.approx(1 - after / before)
    assert not result.report.skipped
    assert len(result.report.sites) == 3
    assert result.model(data[0]["x"]).shape == (4, 7)


def test_compensation_helps_a_network_of_convolutions() -> None:
    model = Network().eval()
    data = [{"x": torch.randn(4, 3, 8, 8)} for _ in range(6)]
    errors = []
    for compensation in ("none", "obs", "least-squares"):
        result = prunec.prune(
            model,
            recipe="slimgpt",
            ratio=0.4,
            calibration=data,
            settings={"compensation": compensation},
        )
        program = result.program
        errors.append(sum(float((program.run(**b) - model(b["x"])).square().sum()) for b in data))
    assert max(errors[1:]) < 0.7 * errors[0]

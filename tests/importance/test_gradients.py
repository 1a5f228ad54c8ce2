"""Gradients by segments against autograd, and Taylor's terms against finite differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sites import attention, channels
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from prunec.errors import PlanError, TraceError, VerifyError
from prunec.graph import backward
from prunec.graph.coupling import couple
from prunec.graph.trace import trace, trace_loss
from prunec.importance.fisher import Fisher
from prunec.importance.gradients import GRADIENT_STATISTICS, gradient_statistics
from prunec.importance.statistics import statistic_of
from prunec.importance.taylor import Taylor
from prunec.models.loss import loss_samples, own_loss
from prunec.passes.problems import site_problem
from prunec.passes.sites import find_sites
from prunec.passes.statistics.prior import prior_statistics


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.up(x).mul_(2).chunk(2, dim=-1)
        return x + self.down(torch.cat((left.sigmoid(), right.tanh()), dim=-1))


class Net(nn.Module):
    """Blocks that write in place, share a weight and read one value across all borders."""

    def __init__(self, *, tied: bool = False, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.enter = nn.Linear(3, 6)
        self.layers = nn.ModuleList(Block(6, 8) for _ in range(3))
        self.leave = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        if tied:
            self.layers[2].down = self.layers[0].down
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.tanh(self.scale)  # no input: the same for all samples, yet it has a gradient
        first = hidden = self.enter(x)
        for layer in self.layers:
            hidden = layer(hidden) * gate
        return self.leave(hidden.mul_(1.5)) + first


def energy(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return (model(inputs["x"]).sin() * inputs["y"]).pow(2).mean()


def samples_of(count: int = 4, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "x": torch.randn(1, 5, 3, generator=generator, dtype=torch.float64).to(dtype),
            "y": torch.randn(1, 5, 6, generator=generator, dtype=torch.float64).to(dtype),
        }
        for _ in range(count)
    ]


def by_autograd(model: nn.Module, samples: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Per parameter the gradient of each sample's loss, by plain reverse mode."""
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for sample in samples:
        gradients = torch.autograd.grad(energy(model, sample), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            found[name].append(gradient)
    model.requires_grad_(False)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_by_segments_equal_plain_reverse_mode(tied: bool) -> None:
    model, samples = Net(tied=tied), samples_of()
    truth = by_autograd(model, samples)
    program = trace_loss(model, energy, samples[0])
    axes = [(name, 0) for name in truth]
    found = gradient_statistics(program, samples, ["weight_grad", "fisher_diag"], axes)
    for name, gradients in truth.items():
        mean = torch.stack(gradients).mean(0)
        squares = torch.stack(gradients).square().mean(0)
        assert mean.abs().max() > 1e-6
        torch.testing.assert_close(found[statistic_of("weight_grad", name)], mean)
        torch.testing.assert_close(found[statistic_of("fisher_diag", name)], squares)


def test_only_one_block_is_differentiated_at_a_time() -> None:
    model, samples = Net(), samples_of()
    program = trace_loss(model, energy, samples[0])
    open_now: set[str] = set()
    most: list[set[str]] = []

    class Watch:
        def update(self, parameter: str, gradient: Tensor) -> None:
            open_now.add(parameter)
            most.append(set(open_now))

        def finish(self, parameter: str) -> None:
            open_now.discard(parameter)

    wanted = [name for name in program.parameters if name.startswith("layers.")]
    backward.differentiate(program, samples, program.state.__getitem__, wanted, Watch())
    assert {len(names) for names in most} == {1, 2, 3}
    assert all(len({name.split(".")[1] for name in names}) == 1 for names in most)
    assert set().union(*most) == set(wanted)


def test_reductions_are_the_papers_formulas() -> None:
    model, samples = Net(), samples_of()
    truth = by_autograd(model, samples)
    program = trace_loss(model, energy, samples[0])
    name = "layers.1.up.weight"
    found = gradient_statistics(program, samples, GRADIENT_STATISTICS, [(name, 0), (name, 1)])
    w = model.get_parameter(name)
    g, f = torch.stack(truth[name]).mean(0), torch.stack(truth[name]).square().mean(0)
    for axis, over in ((0, 1), (1, 0)):
        expected = {
            "taylor_vector": (w * g).sum(over),
            "taylor_element1": (w * g).abs().sum(over),
            "taylor_element2": (w * f * w).abs().sum(over),
            "taylor_mixed": (w * g - w * f * w / 2).abs().sum(over),
            "mask_grad": (w * torch.stack(truth[name])).sum(over + 1),
        }
        for term, value in expected.items():
            torch.testing.assert_close(found[statistic_of(term, name, axis)], value)


def test_first_order_terms_equal_finite_differences() -> None:
    """The derivative of the mean loss as a row, and as one weight, is scaled towards zero."""
    model, samples = Net(), samples_of()
    program = trace_loss(model, energy, samples[0])
    name = "layers.1.up.weight"
    found = gradient_statistics(
        program, samples, ["taylor_vector", "taylor_element1", "mask_grad"], [(name, 0)]
    )
    weight = model.get_parameter(name)
    step = 1e-6

    def slope(*index: int, of: list[dict[str, Tensor]] = samples) -> float:
        losses = []
        kept = weight[index].clone()
        for factor in (1 + step, 1 - step):
            weight[index] = kept * factor
            losses.append(sum(float(energy(model, sample)) for sample in of) / len(of))
            weight[index] = kept
        return (losses[0] - losses[1]) / (2 * step)

    for row in range(len(weight)):
        vector = float(found[statistic_of("taylor_vector", name, 0)][row])
        assert vector == pytest.approx(slope(row), rel=1e-6, abs=1e-9)
        element = sum(abs(slope(row, column)) for column in range(weight.shape[1]))
        first = float(found[statistic_of("taylor_element1", name, 0)][row])
        assert first == pytest.approx(element, rel=1e-6, abs=1e-9)
        for sample in range(len(samples)):
            mask = float(found[statistic_of("mask_grad", name, 0)][sample, row])
            assert mask == pytest.approx(slope(row, of=[samples[sample]]), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_differentiated_in_single(dtype: torch.dtype) -> None:
    model = Net(dtype=dtype)
    for parameter in model.parameters():
        parameter.mul_(0.2)  # gradients below the smallest fp16
    samples = samples_of(2, dtype)
    program = trace_loss(model, energy, samples[0])
    axes = [("layers.0.up.weight", 0)]
    found = gradient_statistics(program, samples, ["fisher_diag"], axes)
    wide = Net(dtype=torch.float32)
    wide.load_state_dict(model.state_dict())
    again = [{name: value.float() for name, value in sample.items()} for sample in samples]
    program = trace_loss(wide, energy, again[0])
    truth = gradient_statistics(program, again, ["fisher_diag"], axes)
    key = statistic_of("fisher_diag", "layers.0.up.weight")
    assert found[key].dtype == torch.float32
    torch.testing.assert_close(found[key], truth[key])
    assert 0 < float(found[key].max()) < 6e-8


def test_a_parameter_that_the_loss_ignores_has_zeros() -> None:
    model, samples = Net(), samples_of()

    def first_only(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model.get_submodule("enter")(inputs["x"]).square().mean()

    program = trace_loss(model, first_only, samples[0])
    names = ["taylor_mixed", "mask_grad", "weight_grad"]
    found = gradient_statistics(program, samples, names, [("enter.weight", 0)])
    assert found[statistic_of("weight_grad", "enter.weight")].abs().min() > 0
    coupled = trace_loss(model, energy, samples[0])
    zeros = gradient_statistics(coupled, samples, names, [("enter.weight", 0)])
    assert zeros[statistic_of("taylor_mixed", "enter.weight", 0)].shape == (6,)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, inputs: torch.tensor(1.0),
        lambda model, inputs: inputs["x"].mean(),
        lambda model, inputs: model(inputs["x"]).square().mean().detach(),
        lambda model, inputs: torch.tensor(model(inputs["x"]).sum().item()),
    ],
)
def test_a_loss_without_gradients_is_refused(loss: Any) -> None:
    model, samples = Net(), samples_of()
    program = trace_loss(model, loss, samples[0])
    with pytest.raises(TraceError, match="no gradient in any weight"):
        gradient_statistics(program, samples, ["taylor_vector"], [("enter.weight", 0)])


def test_what_a_loss_raises_is_said_to_be_the_losss() -> None:
    with pytest.raises(TraceError, match="the loss of Net cannot be traced: KeyError: 'z'") as e:
        trace_loss(Net(), lambda model, inputs: inputs["z"].mean(), samples_of()[0])
    assert "inputs hold x, y" in str(e.value)


def test_a_loss_that_is_not_finite_names_the_sample() -> None:
    model, samples = Net(), samples_of()
    samples[2]["x"][0, 0, 0] = torch.nan
    program = trace_loss(model, energy, samples[0])
    with pytest.raises(VerifyError, match="loss of calibration sample 2 is nan"):
        gradient_statistics(program, samples, ["taylor_vector"], [("enter.weight", 0)])


def test_a_loss_that_is_no_scalar() -> None:
    samples = samples_of()
    with pytest.raises(TraceError, match="no floating-point scalar"):
        trace_loss(Net(), lambda model, inputs: model(inputs["x"]), samples[0])


# A language model, and what a criterion makes of it.

LLAMA = tiny_llama()


def text_batches(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (2, 12), generator=generator)}
        for _ in range(count)
    ]


def test_the_models_own_loss_of_a_language_model() -> None:
    samples = loss_samples(LLAMA, text_batches(), labels=True)
    assert len(samples) == 4
    assert all(sample["labels"].shape == (1, 12) for sample in samples)
    program = trace_loss(LLAMA, own_loss, samples[0])
    for sample in samples:
        with torch.no_grad():
            truth = LLAMA(**sample).loss
        torch.testing.assert_close(program.run(**sample), truth)


def test_padding_has_no_label() -> None:
    batch = text_batches(1)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 9:] = 0
    (first, _) = loss_samples(LLAMA, [{**batch, "attention_mask": mask}], labels=True)
    assert first["labels"][0, 9:].tolist() == [-100] * 3
    assert first["labels"][0, :9].tolist() == batch["input_ids"][0, :9].tolist()


def test_labels_of_a_decoder_are_the_tokens_that_follow() -> None:
    class Takes(nn.Module):
        def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor) -> Tensor:
            return labels

    ids = torch.arange(4)[None]
    batch = {"input_ids": ids, "decoder_input_ids": ids + 5}
    (sample,) = loss_samples(Takes(), [batch], labels=True)
    assert sample["labels"].tolist() == [[6, 7, 8, -100]]


def test_tokens_are_no_labels_of_a_model_that_learns_something_else() -> None:
    judge = LlamaForSequenceClassification(tiny_llama().config)  # one number a text: a reward
    with pytest.raises(PlanError, match="no labels, and LlamaForSequenceClassification does not"):
        loss_samples(judge, text_batches(1), labels=True)
    labelled = {**text_batches(1)[0], "labels": torch.ones(2)}
    assert len(loss_samples(judge, [labelled], labels=True)) == 2


def test_a_model_without_a_loss_says_what_to_do() -> None:
    model = Net()
    coupling = couple(trace(model, {"x": samples_of()[0]["x"]}))
    sites, _ = find_sites(coupling, [group.kind for group in coupling.groups])
    with pytest.raises(PlanError, match="computes no loss of its own") as caught:
        prior_statistics(model, sites, ["taylor_vector"], [{"x": samples_of()[0]["x"]}])
    assert "loss=callable" in str(caught.value)
    assert prior_statistics(model, sites, ["input_gram"], []) == {}


def test_every_criterion_of_gradients_ranks_every_site_of_a_language_model() -> None:
    batches = text_batches()
    coupling = couple(trace(LLAMA, batches[0]))
    sites, _ = find_sites(coupling, ["ffn_channel", "query_head", "kv_group"])
    names = set(GRADIENT_STATISTICS)
    prior = prior_statistics(LLAMA, sites, names, batches)
    chosen = [Taylor("vector"), Taylor("mixed", "max"), Fisher(), Fisher("masks")]
    for site in sites:
        problem = site_problem(site, coupling, coupling.program.state)
        for criterion in chosen:
            curve = criterion.rank(problem, prior)
            counts = {s.group: s.minimum for s in problem.unit_sets}
            whole = {s.group: s.units for s in problem.unit_sets}
            assert curve.parameters[-1] == problem.size(whole) - problem.size(counts)
            assert (np.diff(curve.loss) >= 0).all()
            assert curve.loss[-1] > 0
    feed_forward = site_problem(sites[1], coupling, coupling.program.state)
    name = "model.layers.0.mlp"
    assert feed_forward.readers == ((f"{name}.down_proj.weight", 1),)
    assert feed_forward.producers == (
        (f"{name}.gate_proj.weight", 0),
        (f"{name}.up_proj.weight", 0),
    )
    heads = site_problem(sites[0], coupling, coupling.program.state)
    name = "model.layers.0.self_attn"
    assert set(heads.producers) == {(f"{name}.{x}_proj.weight", 0) for x in "qkv"}


# The criteria by themselves.


def _statistics(problem, name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    found = {}
    for axis in dict.fromkeys(axis for s in problem.unit_sets for axis in s.positions):
        length = problem.parameters[axis[0]].shape[axis[1]]
        shape = (3, length) if name == "mask_grad" else (length,)
        found[statistic_of(name, *axis)] = torch.randn(
            shape, generator=generator, dtype=torch.float64
        )
    return found


@pytest.mark.parametrize(
    ("aggregation", "fold"),
    [
        ("sum", lambda up, down: up + down),
        ("mean", lambda up, down: (up + down) / 2),
        ("max", torch.maximum),
        ("prod", torch.mul),
        ("first", lambda up, down: up),
        ("last", lambda up, down: down),
    ],
)
def test_taylor_folds_members(aggregation, fold) -> None:
    problem = channels(9)
    statistics = _statistics(problem, "taylor_vector")
    up, down = (statistics[f"taylor_vector {axis}"].abs() for axis in ("up 0", "down 1"))
    expected = fold(up, down)
    curve = Taylor("vector", aggregation).rank(problem, statistics)
    order = [r.units[0] for r in curve.removals]
    assert order == expected.argsort().tolist()[:-1]
    np.testing.assert_allclose(np.diff(curve.loss, prepend=0), expected[order])


def test_fisher_of_masks_knows_that_columns_go_together() -> None:
    problem = replace(attention(kv=3, per=1), readers=(("o", 1),))
    problem = replace(problem, unit_sets=problem.unit_sets[:1])
    dots = torch.zeros(2, 6, dtype=torch.float64)
    dots[:, 0], dots[:, 1] = 5.0, -5.0  # head 0: large gradients that cancel
    dots[:, 2], dots[:, 3] = 1.0, 1.0
    dots[0, 4], dots[1, 4] = 2.0, -2.0  # head 2: cancels over samples only
    curve = Fisher("masks").rank(
        replace(problem, size=lambda c: c["attn/kv_group"]),
        {statistic_of("mask_grad", "o", 1): dots},
    )
    assert [r.units[0] for r in curve.removals] in ([0, 1], [0, 2])
    assert curve.loss.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    "make", [lambda: Taylor("element3"), lambda: Taylor(aggregation="min"), lambda: Fisher("heads")]
)
def test_options_of_gradient_criteria_that_are_not_possible(make) -> None:
    with pytest.raises(PlanError, match="is not possible") as caught:
        make()
    assert "use " in str(caught.value)

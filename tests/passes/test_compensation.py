"""Compensation against brute force and against the elimination that criteria do."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from prunec.errors import PlanError, VerifyError
from prunec.importance.elimination import start
from prunec.passes.compensation import NoCompensation, ObsCompensation
from prunec.registry import plugin


def site(columns: int = 11, out: int = 6, tokens: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    keep = torch.rand(columns, generator=generator) < 0.6
    return weight, x, keep


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("seed", range(5))
def test_without_damping_it_is_least_squares_on_the_tokens(seed):
    weight, x, keep = site(seed=seed)
    got = ObsCompensation(damping=0.0).compensate(weight, {"input_gram": x.T @ x}, keep).weight
    expected = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.01, 1.0])
def test_it_is_the_closed_form(damping):
    weight, x, keep = site()
    gram = damped(x.T @ x, damping)
    expected = weight @ gram[:, keep] @ torch.linalg.inv(gram[keep][:, keep])
    got = ObsCompensation(damping).compensate(weight, {"input_gram": x.T @ x}, keep).weight
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_it_is_what_elimination_arrives_at_in_any_order(damping):
    weight, x, keep = site()
    gram = x.T @ x
    expected = ObsCompensation(damping).compensate(weight, {"input_gram": gram}, keep).weight
    lost = (~keep).nonzero()[:, 0]
    for steps in (lost.split(1), lost.flip(0).split(2), (lost,)):
        state = start(weight, gram, damping, name="site")
        for columns in steps:
            state, _ = state.eliminate(columns)
        torch.testing.assert_close(state.weight.T, expected, rtol=1e-8, atol=1e-8)


def test_the_scale_of_the_gram_matrix_does_not_matter():
    weight, x, keep = site()
    one, other = (
        ObsCompensation().compensate(weight, {"input_gram": x.T @ x * s}, keep).weight
        for s in (1.0, 1e-20)
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_it_gets_closer_on_the_tokens_than_none():
    weight, x, keep = site()
    target = x @ weight.T
    none = NoCompensation().compensate(weight, {}, keep).weight
    obs = ObsCompensation().compensate(weight, {"input_gram": x.T @ x}, keep).weight
    error = [(target - x[:, keep] @ w.T).square().sum() for w in (none, obs)]
    assert error[1] < 0.5 * error[0]


def test_none_keeps_the_columns():
    weight, _, keep = site()
    assert torch.equal(NoCompensation().compensate(weight, {}, keep).weight, weight[:, keep])
    assert NoCompensation().statistics == frozenset()


def test_keeping_everything_changes_nothing():
    weight, x, _ = site()
    keep = torch.ones(11, dtype=torch.bool)
    got = ObsCompensation().compensate(weight, {"input_gram": x.T @ x}, keep)
    assert torch.equal(got.weight, weight)
    assert got.bias is None


def test_kept_columns_that_were_always_zero_keep_their_weight():
    weight, x, keep = site()
    dead = int(keep.nonzero()[0])
    x[:, dead] = 0
    got = ObsCompensation(damping=0.0).compensate(weight, {"input_gram": x.T @ x}, keep).weight
    assert torch.equal(got[:, 0], weight[:, dead])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_weights_dtype_and_fp64_accuracy(dtype):
    weight, x, keep = site()
    low = weight.to(dtype)
    before = low.clone()
    got = ObsCompensation().compensate(low, {"input_gram": (x.T @ x).float()}, keep).weight
    expected = (
        ObsCompensation().compensate(low.double(), {"input_gram": (x.T @ x).float()}, keep).weight
    )
    assert got.dtype == dtype
    assert torch.equal(got, expected.to(dtype))
    assert torch.equal(low, before)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_singular_gram_matrix_is_solved_and_logged(tokens, caplog):
    weight, x, keep = site(tokens=tokens)
    with caplog.at_level(logging.WARNING, "prunec"):
        got = (
            ObsCompensation(damping=0.0)
            .compensate(weight, {"input_gram": x.T @ x}, keep, name="mlp.down")
            .weight
        )
    assert "mlp.down: a " in caplog.text
    assert "singular" in caplog.text
    target = x @ weight.T
    assert (target - x[:, keep] @ got.T).abs().max() < 1e-4 * target.abs().max()


def test_all_zero_input_leaves_the_weights():
    weight, _, keep = site()
    zero = torch.zeros(11, 11)
    assert torch.equal(
        ObsCompensation().compensate(weight, {"input_gram": zero}, keep).weight, weight[:, keep]
    )


def test_nan_names_the_site():
    weight, x, keep = site()
    gram = x.T @ x
    gram[2, 3] = gram[3, 2] = float("nan")
    with pytest.raises(VerifyError) as caught:
        ObsCompensation().compensate(weight, {"input_gram": gram}, keep, name="mlp.down")
    assert caught.value.where == "mlp.down"


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_damping_that_is_not_possible(damping):
    with pytest.raises(PlanError, match="damping"):
        ObsCompensation(damping)


def test_built_ins_are_plug_ins():
    assert plugin("compensation", "none") is NoCompensation
    assert plugin("compensation", "obs") is ObsCompensation

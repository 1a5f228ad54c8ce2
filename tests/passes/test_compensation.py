"""Compensation against brute force and against the elimination that criteria do."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from prunec.errors import PlanError, VerifyError
from prunec.importance.elimination import start
from prunec.importance.statistics import collector
from prunec.passes.compensation.closed_form import (
    BiasCompensation,
    NoCompensation,
    ObsCompensation,
    ScaleBiasCompensation,
)
from prunec.passes.compensation.least_squares import LeastSquares
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


def joint(*parts: Tensor) -> Tensor:
    """E[z z^T] of z = (x, 1) or (x, 1, t)."""
    x, *rest = parts
    z = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype), *rest], dim=1)
    return z.T @ z / len(z)


def fitted(method: LeastSquares, weight, keep, fit: Tensor, held: Tensor | None = None, bias=True):
    statistics = {"fit_gram": fit} if held is None else {"fit_gram": fit, "held_gram": held}
    return method.compensate(weight, statistics, keep, bias=bias)


@pytest.mark.parametrize("target", ["own", "dense"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_least_squares_is_brute_force_regression_on_the_tokens(target, bias, seed):
    weight, x, keep = site(seed=seed)
    x = x + 3.0
    t = x @ weight.T
    parts = [x]
    if target == "dense":
        t = t + torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).double()
        parts.append(t)
    method = LeastSquares(target, bias=bias, damping=0.0, holdout=0.0)
    got = fitted(method, weight, keep, joint(*parts))
    kept = x[:, keep]
    design = torch.cat([kept, torch.ones(len(x), 1).double()], dim=1) if bias else kept
    expected = torch.linalg.lstsq(design, t).solution.T
    torch.testing.assert_close(got.weight, expected[:, : kept.shape[1]], rtol=1e-8, atol=1e-8)
    if bias:
        torch.testing.assert_close(got.bias, expected[:, -1], rtol=1e-8, atol=1e-8)
    else:
        assert got.bias is None


def test_least_squares_on_its_own_output_is_obs():
    weight, x, keep = site()
    got = fitted(LeastSquares(holdout=0.0), weight, keep, joint(x))
    expected = ObsCompensation().compensate(weight, {"input_gram": x.T @ x / len(x)}, keep)
    torch.testing.assert_close(got.weight, expected.weight, rtol=1e-10, atol=1e-10)


def test_without_a_place_for_a_bias_none_is_fitted():
    weight, x, keep = site()
    one = fitted(LeastSquares(bias=True, holdout=0.0), weight, keep, joint(x + 1), bias=False)
    other = fitted(LeastSquares(holdout=0.0), weight, keep, joint(x + 1))
    assert one.bias is None
    assert torch.equal(one.weight, other.weight)


def noisy(tokens: int, strength: float, seed: int):
    """The target is the site's own output and noise that no input explains."""
    weight, x, keep = site(columns=24, tokens=tokens, seed=seed)
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(99)).double()
    noise = torch.randn(tokens, len(weight), generator=torch.Generator().manual_seed(seed + 50))
    weight = site(columns=24, seed=7)[0]
    keep = torch.arange(24) % 3 != 0
    x = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(seed)).double() @ mix
    return weight, keep, x, x @ weight.T + strength * noise.double()


@pytest.mark.parametrize("seed", range(3))
def test_held_out_windows_keep_it_from_memorising_noise(seed):
    """With 20 tokens for 16 columns the noise can be fitted; what it then does is worse than obs."""
    weight, keep, x, t = noisy(20, 60.0, seed)
    _, _, unseen, truth = noisy(2000, 60.0, seed + 10)
    _, _, others, other_truth = noisy(40, 60.0, seed + 20)
    fit, held = joint(x, t), joint(others, other_truth)
    plain = fitted(LeastSquares("dense", holdout=0.0, damping=1e-6), weight, keep, fit)
    chosen = fitted(LeastSquares("dense", damping=1e-6), weight, keep, fit, held)

    def error(mended, x, t):
        return float((t - x[:, keep] @ mended.weight.T).square().mean())

    assert error(plain, x, t) < error(chosen, x, t)  # it fits the seen tokens better
    assert error(chosen, unseen, truth) < 0.8 * error(plain, unseen, truth)


def test_the_ridge_that_is_chosen_is_the_best_on_what_was_held_out():
    weight, keep, x, t = noisy(60, 20.0, 1)
    _, _, others, other_truth = noisy(60, 20.0, 2)
    fit, held = joint(x, t), joint(others, other_truth)
    errors = []
    candidates = [
        LeastSquares("dense", bias=True, damping=d, holdout=0.0) for d in (0.01, 0.1, 1.0, 10.0)
    ]
    anchor = ObsCompensation().compensate(weight, {"input_gram": _centred(x)}, keep).weight
    for method in candidates:
        # The anchor's damping goes along with the step's: hold it at 0.01.
        gram, cross = _centred(x), _centred(x, t)
        own = gram[keep][:, keep]
        ridge = method.damping * gram.diagonal().mean() * torch.eye(int(keep.sum())).double()
        moved = anchor + (cross[:, keep] - anchor @ own) @ torch.linalg.inv(own + ridge)
        errors.append((_held_error(moved, keep, x, t, others, other_truth), moved))
    errors.append((_held_error(anchor, keep, x, t, others, other_truth), anchor))
    got = fitted(LeastSquares("dense", bias=True), weight, keep, fit, held)
    best = min(errors, key=lambda pair: pair[0])
    torch.testing.assert_close(got.weight, best[1], rtol=1e-8, atol=1e-8)


def _centred(x: Tensor, t: Tensor | None = None) -> Tensor:
    other = x if t is None else t
    return (other - other.mean(0)).T @ (x - x.mean(0)) / len(x)


def _held_error(moved, keep, x, t, others, truth) -> float:
    bias = t.mean(0) - x[:, keep].mean(0) @ moved.T
    return float((truth - others[:, keep] @ moved.T - bias).square().sum() / len(truth))


@pytest.mark.parametrize("bias", [False, True])
def test_scale_and_bias_are_polyfit_channel_by_channel(bias):
    weight, x, keep = site()
    x = x + 2.0
    dense, pruned = x @ weight.T, x[:, keep] @ weight[:, keep].T
    statistics = {"input_gram": x.T @ x / len(x), "input_mean": x.mean(0)}
    got = ScaleBiasCompensation(bias).compensate(weight, statistics, keep, bias=True)
    for channel in range(len(weight)):
        y, seen = dense[:, channel].numpy(), pruned[:, channel].numpy()
        if bias:
            scale, shift = np.polyfit(seen, y, 1)
            assert got.bias is not None
            assert float(got.bias[channel]) == pytest.approx(shift, rel=1e-8, abs=1e-8)
        else:
            scale = seen @ y / (seen @ seen)
        expected = scale * weight[channel, keep]
        torch.testing.assert_close(got.weight[channel], expected, rtol=1e-8, atol=1e-8)
    assert (got.bias is None) == (not bias)


def test_scale_and_bias_of_a_channel_that_does_not_vary():
    """All kept inputs constant: no slope is there to fit, so only the bias moves."""
    weight, x, _ = site()
    keep = torch.arange(11) < 3
    x[:, keep] = 2.0
    statistics = {"input_gram": x.T @ x / len(x), "input_mean": x.mean(0)}
    got = ScaleBiasCompensation().compensate(weight, statistics, keep, bias=True)
    assert torch.equal(got.weight, weight[:, keep])
    mean = (x @ weight.T).mean(0)
    torch.testing.assert_close(got.bias, mean - 2.0 * weight[:, keep].sum(1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_one_token_repeated_says_nothing_of_slopes(tokens):
    """In fp32 the products leave a variance that is rounding, of either sign."""
    weight, x, keep = site(columns=48)
    row = x[:1].float().expand(tokens, -1)
    z = torch.cat((row, torch.ones(tokens, 1)), dim=1)
    moments = {name: collector(name, site="it") for name in ("input_gram", "input_mean")}
    fit = collector("input_gram", site="it")
    for taken, value in ((moments["input_gram"], row), (moments["input_mean"], row), (fit, z)):
        taken.update(value)
    statistics = {name: taken.finish() for name, taken in moments.items()}
    statistics["fit_gram"] = fit.finish()
    for method in (ScaleBiasCompensation(), LeastSquares("own", bias=True, holdout=0.0)):
        got = method.compensate(weight, statistics, keep, bias=True)
        assert torch.equal(got.weight, weight[:, keep])
        lost = row[0, ~keep].double() @ weight[:, ~keep].T
        torch.testing.assert_close(got.bias, lost, rtol=1e-4, atol=1e-4)


def test_flap_bias_is_the_mean_output_of_what_is_removed():
    weight, x, keep = site()
    x = x + 1.0
    got = BiasCompensation().compensate(weight, {"input_mean": x.mean(0)}, keep, bias=True)
    assert torch.equal(got.weight, weight[:, keep])
    torch.testing.assert_close(got.bias, (x[:, ~keep] @ weight[:, ~keep].T).mean(0))


METHODS = [
    BiasCompensation(),
    ScaleBiasCompensation(),
    ObsCompensation(),
    LeastSquares("own", bias=True),
    LeastSquares("dense", bias=True),
    LeastSquares("dense", damping=0.0),
]


def _everything(x: Tensor, t: Tensor, method) -> dict[str, Tensor]:
    parts = (x,) if getattr(method, "target", "own") == "own" else (x, t)
    moments = joint(*parts)
    gram, mean = x.T @ x / len(x), x.mean(0)
    return {"input_gram": gram, "input_mean": mean, "fit_gram": moments, "held_gram": moments}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:3].repeat(10, 1),  # rank 3
        torch.zeros_like,
        lambda x: x[:, :1].expand_as(x),  # one column eleven times
        lambda x: x * 1e12,
        lambda x: x[:1],  # one token
        lambda x: x * torch.tensor([1e6] + [1e-6] * 10).double(),
        torch.ones_like,  # constant columns
    ],
    ids=["rank", "zero", "duplicated", "huge", "token", "scales", "constant"],
)
def test_any_calibration_gives_finite_weights_no_worse_than_none(make, dtype, method):
    weight, x, keep = site()
    x, weight = make(x).contiguous(), weight.to(dtype)
    t = x @ weight.double().T
    got = method.compensate(weight, _everything(x, t, method), keep, bias=True)
    assert got.weight.dtype == dtype
    assert got.weight.shape == (6, int(keep.sum()))
    assert got.weight.isfinite().all()
    moved = got.weight.double()
    shift = 0.0 if got.bias is None else got.bias
    plain = (t - x[:, keep] @ weight[:, keep].double().T).square().mean()
    error = (t - x[:, keep] @ moved.T - shift).square().mean()
    rounding = (
        (x.abs() @ weight.abs().double().mean(0) * torch.finfo(dtype).eps * 4).square().mean()
    )
    assert float(error) <= float(plain) * (1 + 1e-6) + float(rounding) + 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "dens"}, "dens"),
        ({"holdout": 1.0}, "holdout of 1"),
        ({"tokens": "all"}, "all"),
        ({"damping": -1.0}, "damping -1"),
    ],
)
def test_options_that_are_not_possible(options, message):
    with pytest.raises(PlanError, match=message):
        LeastSquares(**options)

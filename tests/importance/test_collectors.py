"""Streaming statistics against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunec.errors import PlanError, VerifyError
from prunec.importance.statistics import STATISTICS, collector


def reference(name: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    mean = np.average(x, axis=0, weights=weight)
    return {
        "input_gram": lambda: (x * weight[:, None]).T @ x / weight.sum(),
        "input_mean": lambda: mean,
        "input_square": lambda: np.average(x**2, axis=0, weights=weight),
        "input_tokens": lambda: (x * np.sqrt(weight / weight.sum())[:, None])[weight > 0],
        "input_var": lambda: np.average((x - mean) ** 2, axis=0, weights=weight),
    }[name]()


@pytest.mark.parametrize("columns", [3, 256, 300, 700])
@pytest.mark.parametrize("name", STATISTICS)
def test_batches_equal_numpy(name, columns):
    torch.manual_seed(0)
    x = torch.randn(50, columns) * 3 + 1
    collected = collector(name, site="site")
    for batch in (x[:7], x[7:27].view(4, 5, columns), x[27:27], x[27:]):
        collected.update(batch)
    result = collected.finish()
    assert result.dtype == torch.float64
    expected = reference(name, x.double().numpy(), np.ones(50))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    if name == "input_gram":
        assert torch.equal(result, result.T)


@pytest.mark.parametrize("name", STATISTICS)
def test_fp64_inputs_keep_their_digits(name):
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64)
    collected = collector(name, site="site")
    collected.update(x[:11])
    collected.update(x[11:])
    np.testing.assert_allclose(
        collected.finish(), reference(name, x.numpy(), np.ones(40)), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("name", STATISTICS)
def test_masks_and_weights(name):
    torch.manual_seed(0)
    x = torch.randn(4, 10, 5, dtype=torch.float64)
    weight = torch.rand(4, 10, dtype=torch.float64)
    weight[weight < 0.3] = 0
    poisoned = x.clone()
    poisoned[weight == 0] = float("nan")
    for given, used in ((weight, weight), (weight > 0, (weight > 0).double())):
        collected = collector(name, site="site")
        for batch, mask in zip(poisoned, given, strict=True):
            collected.update(batch, mask)
        expected = reference(name, x.flatten(0, 1).numpy(), used.flatten().numpy())
        np.testing.assert_allclose(collected.finish(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", STATISTICS)
def test_half_precision_is_upcast(name, dtype):
    torch.manual_seed(0)
    x = (torch.randn(64, 5) * 300).to(dtype)  # squares overflow fp16
    collected = collector(name, site="site")
    collected.update(x)
    expected = reference(name, x.double().numpy(), np.ones(64))
    np.testing.assert_allclose(collected.finish(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", STATISTICS)
def test_squares_that_overflow_fp32(name):
    x = torch.randn(8, 3) * 1e25
    collected = collector(name, site="site")
    collected.update(x)
    expected = reference(name, x.double().numpy(), np.ones(8))
    np.testing.assert_allclose(collected.finish(), expected, rtol=1e-5)


def test_variance_does_not_cancel():
    torch.manual_seed(0)
    x = torch.randn(500, 2, dtype=torch.float64) + 1e8
    collected = collector("input_var", site="site")
    for batch in x.split(100):
        collected.update(batch)
    np.testing.assert_allclose(collected.finish(), x.numpy().var(axis=0), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", STATISTICS)
def test_nan_and_inf_name_the_site_and_the_batch(name, bad):
    collected = collector(name, site="model.layers.3.mlp.down_proj")
    collected.update(torch.ones(4, 6))
    x = torch.ones(4, 6)
    x[2, 5] = bad
    with pytest.raises(VerifyError) as caught:
        collected.update(x)
    assert caught.value.message == "NaN or Inf in calibration batch 1"
    assert caught.value.where == "the input of model.layers.3.mlp.down_proj, column 5"


@pytest.mark.parametrize("name", STATISTICS)
def test_no_token_is_an_error(name):
    collected = collector(name, site="site")
    with pytest.raises(VerifyError, match="no calibration token"):
        collected.finish()
    collected.update(torch.ones(4, 6), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(VerifyError, match="no calibration token"):
        collected.finish()


@pytest.mark.parametrize("name", STATISTICS)
def test_one_token_is_enough(name):
    collected = collector(name, site="site")
    collected.update(torch.tensor([[1.0, -2.0]]))
    np.testing.assert_allclose(
        collected.finish(), reference(name, np.array([[1.0, -2.0]]), np.ones(1))
    )


def test_inputs_stay_as_they_are():
    x = torch.randn(5, 4)
    before = x.clone()
    for name in STATISTICS:
        collected = collector(name, site="site")
        collected.update(x, torch.rand(5))
        collected.finish()
    assert torch.equal(x, before)


def test_lower_matmul_precision_does_not_reach_the_gram_matrix():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        x = torch.randn(64, 8)
        collected = collector("input_gram", site="site")
        collected.update(x)
        expected = x.double().T @ x.double() / 64
        np.testing.assert_allclose(collected.finish(), expected, rtol=1e-12, atol=1e-14)
    finally:
        torch.set_float32_matmul_precision(before)


def test_unknown_statistic():
    with pytest.raises(PlanError, match="no statistic named 'gram'"):
        collector("gram", site="site")

"""A Gram matrix that stands as its tokens gives what the matrix itself gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sites import attention, channels, crossing, weight_of
from torch import Tensor

from prunec.errors import VerifyError
from prunec.importance.elimination import start
from prunec.importance.gram import FullGram, TokenGram, Tokens, damp, energy
from prunec.importance.obs import Obs
from prunec.importance.statistics import collector
from prunec.passes.compensation.closed_form import ObsCompensation

SITES = {
    "channels": channels(40),
    "wide channels": channels(12, width=3),
    "many channels": channels(300, minimum=180),
    "heads": attention(4, 3, 3),
    "heads and value dims": crossing(3, 3, 4),
}


def tokens_of(columns: int, count: int = 7, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    size = torch.exp(0.5 * torch.randn(columns, generator=generator, dtype=torch.float64))
    return x * size / count**0.5


def forms(x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"input_tokens": x}, {"input_gram": x.T @ x}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("score", ["exact", "slimgpt", "diagonal"])
def test_units_go_in_the_same_order_at_the_same_loss(site, score):
    problem = SITES[site]
    few, full = forms(tokens_of(problem.weight.shape[1]))
    criterion = Obs(score=score, last_batch=3)
    one, other = criterion.rank(problem, few), criterion.rank(problem, full)
    assert one.removals == other.removals
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-9)


def test_swaps_are_the_same():
    problem = SITES["channels"]
    few, full = forms(tokens_of(40))
    one, other = (Obs(swap=True).rank(problem, s, limit=160) for s in (few, full))
    assert one.removals == other.removals
    assert one.removals != Obs().rank(problem, full, limit=160).removals
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_compensation_is_the_same(damping):
    weight, x = weight_of(6, 30), tokens_of(30)
    x[:, 4] = 0
    keep = torch.arange(30) % 3 != 0
    few, full = (
        ObsCompensation(damping).compensate(weight, statistics, keep).weight
        for statistics in forms(x)
    )
    torch.testing.assert_close(few, full, rtol=1e-6 if damping == 0 else 1e-9, atol=1e-9)


def test_restoring_columns_undoes_their_elimination():
    weight, x = weight_of(5, 24), tokens_of(24)
    before, _ = start(weight, Tokens(x), 0.01, name="site").eliminate(torch.tensor([3, 11, 20]))
    after, losses = before.eliminate(torch.tensor([7, 9]))
    found, gain = after.restore(torch.tensor([9, 7]))
    assert gain == pytest.approx(float(losses.sum()), rel=1e-9)
    torch.testing.assert_close(found.weight, before.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.columns, before.columns)


def test_no_matrix_of_all_columns_is_made(monkeypatch):
    """What lets a site of 11,008 columns be pruned in little memory."""
    largest = []
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda m: (largest.append(m.shape[-1]), factorise(m))[1]
    )
    problem = SITES["many channels"]
    Obs(last_batch=8).rank(problem, {"input_tokens": tokens_of(300)})
    assert max(largest) <= 9


def test_tokens_become_a_matrix_where_their_form_would_lose_digits():
    x = tokens_of(12)
    assert isinstance(damp(Tokens(x), 0.01, name="site"), TokenGram)
    assert isinstance(damp(Tokens(x), 0.0, name="site"), FullGram)
    assert isinstance(damp(Tokens(x), 1e-12, name="site"), FullGram)


def test_energy_of_both_forms():
    weight, x = weight_of(5, 24), tokens_of(24)
    assert energy(weight, Tokens(x)) == pytest.approx(energy(weight, x.T @ x))


def test_the_collectors_agree():
    generator = torch.Generator().manual_seed(0)
    few, full = collector("input_tokens", site="site"), collector("input_gram", site="site")
    for weight in (None, torch.tensor([1.0, 0.0, 0.5]), torch.tensor([True, False, True])):
        x = torch.randn(3, 20, generator=generator)
        few.update(x, weight)
        full.update(x, weight)
    rows = few.finish()
    assert rows.shape == (3 + 2 + 2, 20)
    torch.testing.assert_close(rows.T @ rows, full.finish(), rtol=1e-6, atol=1e-6)


def test_nan_in_a_token_is_named():
    x = torch.ones(3, 8)
    x[1, 5] = float("nan")
    with pytest.raises(VerifyError, match="calibration batch 0") as caught:
        collector("input_tokens", site="mlp.down").update(x)
    assert caught.value.where == "the input of mlp.down, column 5"


def test_nothing_seen_is_an_error():
    with pytest.raises(VerifyError, match="no calibration token"):
        collector("input_tokens", site="mlp.down").finish()

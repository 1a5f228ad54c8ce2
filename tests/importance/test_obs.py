"""The optimal brain surgeon against brute-force least squares."""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from sites import (
    attention,
    channels,
    crossing,
    damped,
    gram_of,
    removed_columns,
    residual,
    weight_of,
)

from prunec.errors import PlanError, VerifyError
from prunec.importance.curves import greedy_curve
from prunec.importance.elimination import Elimination, start
from prunec.importance.obs import Obs, _Surgeon, batch_sizes
from prunec.importance.problem import SiteProblem


def rank(problem: SiteProblem, gram: torch.Tensor, **options):
    limit = options.pop("limit", None)
    return Obs(**options).rank(problem, {"input_gram": gram}, limit=limit)


SITES = {
    "channels": channels(12),
    "wide channels": channels(6, width=3),
    "heads": attention(),
    "heads and value dims": crossing(),
    "one kv group": attention(kv=1, per=6),
    "one query per group": attention(kv=5, per=1),
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("score", ["exact", "slimgpt", "diagonal"])
def test_loss_is_the_least_squares_residual_after_every_step(site, damping, score):
    problem = SITES[site]
    gram = gram_of(problem.weight.shape[1])
    curve = rank(problem, gram, damping=damping, score=score)
    assert curve.removals
    for steps in range(1, len(curve.removals) + 1):
        gone = removed_columns(problem, curve, steps)
        truth, _ = residual(problem.weight, damped(gram, damping), gone)
        assert curve.loss[steps - 1] == pytest.approx(truth, rel=1e-8)


def test_surviving_weights_are_the_least_squares_optimum():
    weight, gram = weight_of(4, 9), gram_of(9)
    state = start(weight, gram, 0.01, name="site")
    for gone in ([4], [7, 0], [2, 8, 1]):
        state, _ = state.eliminate(torch.tensor(gone))
    _, best = residual(weight, damped(gram, 0.01), [4, 7, 0, 2, 8, 1])
    assert state.columns.tolist() == [3, 5, 6]
    torch.testing.assert_close(state.weight.T, best[:, [3, 5, 6]], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        state.inverse.apply(damped(gram, 0.01)[[3, 5, 6]][:, [3, 5, 6]]),
        torch.eye(3, dtype=torch.float64),
        rtol=0,
        atol=1e-8,
    )


@pytest.mark.parametrize("seed", range(4))
def test_channel_order_equals_exhaustive_recomputation(seed):
    problem, gram = channels(9, seed=seed), gram_of(9, seed=seed)
    curve = rank(problem, gram)
    gone: list[int] = []
    for removal in curve.removals:
        losses = {
            c: residual(problem.weight, damped(gram, 0.01), [*gone, c])[0]
            for c in range(9)
            if c not in gone
        }
        assert removal.units == (min(losses, key=losses.__getitem__),)
        gone.append(removal.units[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2)])
def test_head_order_equals_exhaustive_recomputation(shape, seed):
    kv, per = shape
    problem, gram = attention(kv, per, seed=seed), gram_of(kv * per * 2, seed=seed)
    regular = damped(gram, 0.01)
    curve = rank(problem, gram)
    groups, heads = problem.unit_sets
    counts = {"attn/kv_group": kv, "attn/query_head": per}
    gone: list[int] = []
    alive = {(g, h) for g in range(kv) for h in range(per)}

    def loss(columns):
        return residual(problem.weight, regular, columns)[0]

    for step, removal in enumerate(curve.removals):
        options = {}
        live_groups = sorted({g for g, _ in alive})
        if counts["attn/kv_group"] > 1:
            g = min(live_groups, key=lambda g: loss([*gone, *groups.columns[0, g].tolist()]))
            options["attn/kv_group"] = (
                (g,),
                loss([*gone, *groups.columns[0, g].tolist()]),
            )
        if counts["attn/query_head"] > 1:
            trial, units, waiting = list(gone), [-1] * kv, set(live_groups)
            while waiting:
                g, h = min(
                    sorted((g, h) for g, h in alive if g in waiting),
                    key=lambda gh: loss([*trial, *heads.columns[gh].tolist()]),
                )
                trial += heads.columns[g, h].tolist()
                units[g] = h
                waiting.remove(g)
            options["attn/query_head"] = (tuple(units), loss(trial))
        before = loss(gone)
        full = problem.size(counts)
        best = min(
            options,
            key=lambda name: (
                (options[name][1] - before)
                / (full - problem.size(counts | {name: counts[name] - 1}))
            ),
        )
        assert (removal.group, removal.units) == (best, options[best][0])
        counts[best] -= 1
        alive -= (
            {(g, h) for g, h in alive if g == removal.units[0]}
            if best == "attn/kv_group"
            else {(g, h) for g, h in enumerate(removal.units)}
        )
        gone = removed_columns(problem, curve, step + 1)
    assert counts == {"attn/kv_group": 1, "attn/query_head": 1}


@pytest.mark.parametrize("score", ["exact", "slimgpt"])
@pytest.mark.parametrize("width", [1, 2])
def test_batches_of_one_equal_one_at_a_time(score, width):
    problem = channels(260, width=width, minimum=200)
    gram = gram_of(260 * width)
    batched = rank(problem, gram, first_batch=1, last_batch=1, score=score)
    state = start(problem.weight, gram, 0.01, name="site")
    single = greedy_curve(problem, _Surgeon(state, score), limit=None)
    assert batched.removals == single.removals
    np.testing.assert_allclose(batched.loss, single.loss, rtol=1e-8)


def test_batched_loss_is_exact_inside_a_batch():
    problem = channels(256, minimum=150)
    gram = gram_of(256)
    curve = rank(problem, gram, first_batch=40, last_batch=40)
    for steps in (1, 17, 40, 41, 99):
        gone = removed_columns(problem, curve, steps)
        truth, _ = residual(problem.weight, damped(gram, 0.01), gone)
        assert curve.loss[steps - 1] == pytest.approx(truth, rel=1e-8)


def test_curve_to_a_smaller_target_is_the_beginning_of_the_longer():
    problem, gram = channels(300), gram_of(300)
    long, short = rank(problem, gram, limit=1600), rank(problem, gram, limit=800)
    assert short.removals == long.removals[: len(short.removals)]
    assert short.parameters[-2] < 800 <= short.parameters[-1]


def test_exact_score_beats_the_approximations_on_correlated_heads():
    worse = []
    for seed in range(8):
        problem, gram = channels(8, width=4, seed=seed), gram_of(32, seed=seed)
        exact, paper, plain = (
            rank(problem, gram, score=score).loss[3] for score in ("exact", "slimgpt", "diagonal")
        )
        worse.append((paper / exact, plain / exact))
    assert np.mean(worse, axis=0).min() > 1


def test_slimgpt_score_is_its_papers_formula():
    problem, gram = channels(4, width=3), gram_of(12)
    state = start(problem.weight, gram, 0.0, name="site")
    columns = torch.arange(12).view(4, 3)
    inverted = torch.linalg.inv(gram)
    for unit, score in zip(columns, state.block_scores(columns, "slimgpt"), strict=True):
        factor = torch.linalg.cholesky(inverted[unit][:, unit]).diagonal()
        expected = (problem.weight[:, unit].square() / factor.square()).sum()
        torch.testing.assert_close(score, expected, rtol=1e-9, atol=0)


def test_batch_sizes_of_slimgpts_code():
    """METHODS 1.3, simulated for I = 11008."""
    options = {"schedule": "slimgpt", "first": 1024, "last": 64}
    twenty = batch_sizes(11008, 2202, **options)
    assert (len(twenty), twenty[:3], twenty[-1]) == (21, [845, 166, 64], 39)
    assert len(batch_sizes(11008, 2752, **options)) == 25
    assert batch_sizes(11008, 3633, **options)[:3] == [1024, 524, 64]
    half = batch_sizes(11008, 5504, **options)
    assert (len(half), half[:4], half[-1]) == (54, [1024, 992, 240, 64], 48)


def test_geometric_batches_fall_from_first_to_last():
    sizes = batch_sizes(40000, 39990, schedule="geometric", first=1024, last=8)
    assert sum(sizes) == 39990
    assert sizes[0] == 1024
    assert min(sizes[:-1]) == 8
    assert all(a >= b for a, b in pairwise(sizes))
    assert batch_sizes(100, 3, schedule="geometric", first=1024, last=8) == [1, 1, 1]


def test_minimum_and_limit():
    problem, gram = channels(12, minimum=4), gram_of(12)
    assert len(rank(problem, gram).removals) == 8
    assert len(rank(problem, gram, limit=17).removals) == 3  # 8 parameters a unit
    assert rank(problem, gram, limit=0).removals == ()
    heads = attention()
    limited = rank(heads, gram_of(18), limit=100)
    assert limited.parameters[-1] >= 100
    assert all(limited.parameters[:-1] < 100)


# Numerics: nothing crashes, nothing is silent.


def test_dead_columns_go_first_and_cost_nothing():
    problem, gram = channels(10), gram_of(10)
    gram[[2, 7]] = 0
    gram[:, [2, 7]] = 0
    for damping in (0.0, 0.01):
        curve = rank(problem, gram, damping=damping)
        assert [r.units[0] for r in curve.removals[:2]] == [2, 7]
        assert curve.loss[1] == 0
        assert curve.loss[2] > 0


@pytest.mark.parametrize("site", SITES)
def test_all_zero_input(site):
    problem = SITES[site]
    columns = problem.weight.shape[1]
    curve = rank(problem, torch.zeros(columns, columns, dtype=torch.float64))
    assert curve.removals
    assert curve.loss[-1] == 0


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("site", SITES)
def test_duplicated_columns_go_for_free(site, damping, caplog):
    problem = SITES[site]
    columns = problem.weight.shape[1]
    half = gram_of(columns // 2)
    gram = torch.cat((torch.cat((half, half), 1), torch.cat((half, half), 1)), 0)
    with caplog.at_level(logging.WARNING, "prunec"):
        curve = rank(problem, gram, damping=damping)
    assert bool(caplog.records) == (damping == 0)
    assert np.isfinite(curve.loss).all()
    assert (np.diff(curve.loss) >= 0).all()
    scale = float(torch.einsum("oi,ij,oj->", problem.weight, gram, problem.weight))
    if site == "channels" and damping == 0:
        assert curve.loss[columns // 2 - 1] < 1e-6 * scale
    for steps in range(1, len(curve.removals) + 1):
        truth, _ = residual(
            problem.weight, damped(gram, damping), removed_columns(problem, curve, steps)
        )
        assert curve.loss[steps - 1] == pytest.approx(truth, rel=1e-4, abs=1e-6 * scale)


@pytest.mark.parametrize("rank_", [1, 3, 7])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_rank_deficient_input(rank_, damping):
    """Fewer tokens than columns: as many columns as are redundant go for next to nothing."""
    problem, gram = channels(30, minimum=2), gram_of(30, rank=rank_)
    curve = rank(problem, gram, damping=damping)
    scale = float(torch.einsum("oi,ij,oj->", problem.weight, gram, problem.weight))
    if damping == 0:
        free = 30 - max(rank_, 2)
        assert curve.loss[free - 1] < 1e-6 * scale
    for steps in (5, 20, 28):
        truth, _ = residual(
            problem.weight, damped(gram, damping), removed_columns(problem, curve, steps)
        )
        assert curve.loss[steps - 1] == pytest.approx(truth, rel=1e-4, abs=1e-6 * scale)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_input_does_not_matter(scale):
    problem, gram = SITES["heads"], gram_of(18)
    one, other = rank(problem, gram), rank(problem, gram * scale)
    assert one.removals == other.removals
    np.testing.assert_allclose(one.loss * scale, other.loss, rtol=1e-8)


def test_one_massive_column():
    problem, gram = channels(12), gram_of(12)
    size = torch.ones(12, dtype=torch.float64)
    size[5] = 1e6
    gram = gram * size[:, None] * size
    curve = rank(problem, gram, damping=0.0)
    truth, _ = residual(problem.weight, gram, removed_columns(problem, curve, 6))
    assert curve.loss[5] == pytest.approx(truth, rel=1e-6)
    assert curve.removals[-1].units != (5,)
    assert 5 not in removed_columns(problem, curve, 11)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1.0])
def test_a_gram_matrix_that_is_none(poison):
    gram = gram_of(12)
    gram[3, 3] = poison
    with pytest.raises(VerifyError, match="not finite and positive") as caught:
        rank(channels(12), gram)
    assert caught.value.where == "mlp.down"


def test_a_weight_that_is_not_finite():
    problem = channels(12)
    problem.weight[0, 0] = float("inf")
    with pytest.raises(VerifyError, match="weight is not finite"):
        rank(problem, gram_of(12))


def test_precision_lost_in_down_dates_is_noticed(caplog):
    """Nearly equal columns without damping: the inverse cancels, and is computed anew."""
    base = gram_of(6)
    noise = torch.full((6,), 1e-9, dtype=torch.float64) * base.diagonal()
    gram = torch.cat((torch.cat((base, base), 1), torch.cat((base, base + noise.diag()), 1)), 0)
    problem = channels(12)
    curve = rank(problem, gram, damping=0.0)
    for steps in (6, 8, 10):
        truth, _ = residual(problem.weight, gram, removed_columns(problem, curve, steps))
        assert curve.loss[steps - 1] == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_and_grams_in_any_dtype(dtype):
    problem = channels(12)
    low = SiteProblem(
        problem.name,
        problem.weight.to(dtype),
        problem.unit_sets,
        problem.parameters,
        problem.size,
    )
    curve = rank(low, gram_of(12).float())
    truth, _ = residual(
        low.weight, damped(gram_of(12).float().double(), 0.01), removed_columns(low, curve, 6)
    )
    assert curve.loss[5] == pytest.approx(truth, rel=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "best"},
        {"schedule": "fast"},
        {"damping": -1.0},
        {"damping": float("nan")},
        {"first_batch": 4, "last_batch": 8},
        {"last_batch": 0},
    ],
)
def test_options_that_are_not_possible(options):
    with pytest.raises(PlanError, match=r"^obs: "):
        Obs(**options)


def test_a_large_site_is_inverted_once_and_shrinks_in_batches(monkeypatch):
    """What makes 1536 channels take 0.4 s on two cores; counted, as other work disturbs a clock."""
    sizes, inversions = [], []
    eliminate, invert = Elimination.eliminate, torch.cholesky_inverse
    monkeypatch.setattr(
        Elimination,
        "eliminate",
        lambda state, columns: (sizes.append(len(state.columns)), eliminate(state, columns))[1],
    )
    monkeypatch.setattr(
        torch,
        "cholesky_inverse",
        lambda factor, **out: (inversions.append(1), invert(factor, **out))[1],
    )
    curve = rank(channels(768, out=8), gram_of(768), limit=384 * 11)
    assert len(curve.removals) == 384
    assert len(inversions) == 1
    assert len(sizes) < 30
    assert sizes[0] == 768
    assert all(a > b for a, b in pairwise(sizes))

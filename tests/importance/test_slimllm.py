"""SlimLLM's scores and searches against a transcription of METHODS 2.1 and 2.2 on raw tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sites import attention, channels, gram_of, removed_columns, residual, weight_of

from prunec.errors import PlanError
from prunec.importance.elimination import start
from prunec.importance.feature_space import FeatureSpace
from prunec.importance.obs import Obs
from prunec.importance.pearson import Pearson
from prunec.importance.problem import SiteProblem
from prunec.importance.slimllm import SlimLLM
from prunec.importance.statistics import collector, statistic_of
from prunec.registry import plugin


def tokens_of(columns: int, count: int = 60, *, seed: int = 0) -> np.ndarray:
    """Correlated inputs of a site with means of their own."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) * np.exp(rng.standard_normal(columns))
    return rng.standard_normal((count, columns)) @ mix + 2 * rng.standard_normal(columns)


def moments(x: np.ndarray) -> dict[str, torch.Tensor]:
    return {
        "input_gram": torch.from_numpy(x.T @ x / len(x)),
        "input_mean": torch.from_numpy(x.mean(axis=0)),
    }


def heads(count: int, dim: int, *, out: int = 6, seed: int = 0) -> SiteProblem:
    """Multi-head attention: one group."""
    site = attention(kv=count, per=1, dim=dim, out=out, seed=seed)
    return replace(
        site, unit_sets=site.unit_sets[:1], size=lambda counts: 10 * counts["attn/kv_group"]
    )


# Heads


def outputs(problem: SiteProblem, x: np.ndarray) -> list[np.ndarray]:
    """O_i = X_i W_O[:, i]^T of each head, [tokens, out]."""
    weight = problem.weight.numpy()
    return [x[:, c] @ weight[:, c].T for c in problem.unit_sets[0].columns[0]]


def similarity(kept: np.ndarray, whole: np.ndarray) -> float:
    return sum(abs(np.corrcoef(kept[:, c], whole[:, c])[0, 1]) for c in range(whole.shape[1]))


def papers_heads(parts: list[np.ndarray], prune: int, *, swap: bool) -> list[int]:
    """METHODS 2.2, on raw outputs: the pruned heads, in order of redundancy."""
    whole = sum(parts)
    alone = [similarity(whole - part, whole) for part in parts]
    order = np.argsort([-value for value in alone], kind="stable").tolist()
    pruned, kept = order[:prune], sorted(order[prune:])
    if not swap:
        return pruned
    best = similarity(sum(parts[i] for i in kept), whole)
    for position, head in enumerate(list(pruned)):
        trials = [
            similarity(sum(parts[i] for i in kept if i != other) + parts[head], whole)
            for other in kept
        ]
        chosen = int(np.argmax(trials))
        if trials[chosen] > best:
            best = trials[chosen]
            pruned[position] = kept[chosen]
            kept = sorted([i for i in kept if i != kept[chosen]] + [head])
    return pruned


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_heads_equal_the_papers_search(seed: int, swap: bool) -> None:
    problem, x = heads(7, 3, seed=seed), tokens_of(21, seed=seed)
    for prune in (2, 4):
        curve = Pearson(swap=swap).rank(problem, moments(x), limit=10 * prune)
        chosen = [removal.units[0] for removal in curve.removals[:prune]]
        parts = outputs(problem, x)
        assert chosen == papers_heads(parts, prune, swap=swap)
        whole = sum(parts)
        for step in range(1, prune + 1):
            kept = sum(part for i, part in enumerate(parts) if i not in chosen[:step])
            truth = whole.shape[1] - similarity(kept, whole)
            assert curve.loss[step - 1] == pytest.approx(truth, rel=1e-8, abs=1e-10)


def test_the_swap_search_does_swap() -> None:
    moved = 0
    for seed in range(6):
        problem, x = heads(7, 3, seed=seed), tokens_of(21, seed=seed)
        plain, swapped = (
            Pearson(swap=swap).rank(problem, moments(x), limit=40) for swap in (False, True)
        )
        assert swapped.loss[3] <= plain.loss[3] + 1e-12
        moved += swapped.removals[:4] != plain.removals[:4]
    assert moved >= 2


def test_grouped_queries_go_to_the_minimum_and_their_loss_is_exact() -> None:
    problem, x = attention(3, 3, 2), tokens_of(18)
    whole = x @ problem.weight.numpy().T
    curve = Pearson().rank(problem, moments(x))
    for steps in range(1, len(curve.removals) + 1):
        left = np.setdiff1d(np.arange(18), removed_columns(problem, curve, steps))
        kept = x[:, left] @ problem.weight.numpy()[:, left].T
        assert curve.loss[steps - 1] == pytest.approx(5 - similarity(kept, whole), abs=1e-9)
    assert len(curve.removals) == 4


def test_query_heads_of_every_group_are_swapped_inside_their_group() -> None:
    site = attention(2, 4, 2, seed=3)
    problem = replace(
        site, unit_sets=site.unit_sets[1:], size=lambda counts: counts["attn/query_head"]
    )
    curve = Pearson().rank(problem, moments(tokens_of(16, seed=3)), limit=2)
    assert len(curve.removals) == 2
    for row in range(2):
        assert len({removal.units[row] for removal in curve.removals}) == 2


def test_an_output_that_never_varies_counts_nothing() -> None:
    problem = heads(4, 2)
    curve = Pearson().rank(problem, moments(np.ones((9, 8)) * np.arange(8)))
    assert curve.loss.tolist() == [0.0, 0.0, 0.0]
    row = torch.from_numpy(tokens_of(8, 1)).float()
    gram, mean = collector("input_gram", site="it"), collector("input_mean", site="it")
    for taken in (gram, mean):
        taken.update(row.expand(50, -1))  # whose variance is what fp32 rounds
    same = {"input_gram": gram.finish(), "input_mean": mean.finish()}
    assert Pearson().rank(problem, same).loss.tolist() == [0.0, 0.0, 0.0]
    dead = moments(np.zeros((9, 8)))
    assert np.isfinite(Pearson().rank(problem, dead, limit=20).loss).all()


# Channels


def feed_forward(units: int = 12, *, seed: int = 0) -> SiteProblem:
    """A gate and an up, with 5 inputs, and a down with 4 outputs."""
    site = channels(units, out=4, seed=seed)
    (unit_set,) = site.unit_sets
    rows = np.arange(units).reshape(1, units, 1)
    return replace(
        site,
        unit_sets=(
            replace(unit_set, positions={("gate", 0): rows, ("up", 0): rows, **unit_set.positions}),
        ),
        parameters={
            "gate": weight_of(units, 5, seed=seed + 7),
            "up": weight_of(units, 5, seed=seed + 8),
            "down": site.weight,
        },
        producers=(("gate", 0), ("up", 0)),
        readers=(("down", 1),),
    )


def papers_channels(problem: SiteProblem, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """METHODS 2.1, line by line."""
    gate, up = problem.parameters["gate"].numpy(), problem.parameters["up"].numpy()
    down = problem.weight.numpy()
    norm = np.linalg.norm(x, axis=0)
    gates = np.linalg.norm(gate * norm, axis=1)
    ups = np.linalg.norm(up * norm, axis=1)
    y = h @ down.T
    centred = y - y.mean(axis=0)
    values, vectors = np.linalg.eig(centred.T @ centred)
    strength = 1 / (1 + np.exp(-np.abs(values) / np.abs(values).mean()))
    downs = [
        np.linalg.norm(h[:, j]) * np.linalg.norm(np.abs(down[:, j] @ vectors) * strength)
        for j in range(down.shape[1])
    ]
    return gates + ups + np.array(downs)


def channel_statistics(x: np.ndarray, h: np.ndarray) -> dict[str, torch.Tensor]:
    square = torch.from_numpy((x**2).mean(axis=0))
    return {
        **moments(h),
        statistic_of("producer_square", "gate"): square,
        statistic_of("producer_square", "up"): square,
    }


@pytest.mark.parametrize("seed", range(4))
def test_channels_equal_the_papers_score(seed: int) -> None:
    problem = feed_forward(seed=seed)
    x, h = tokens_of(5, seed=seed), tokens_of(12, seed=seed + 50)
    truth = papers_channels(problem, x, h)
    statistics = channel_statistics(x, h)
    curve = FeatureSpace().rank(problem, statistics)
    order = [removal.units[0] for removal in curve.removals]
    assert order == truth.argsort().tolist()[:-1]
    scores = np.diff(curve.loss, prepend=0) * np.sqrt(len(x))
    np.testing.assert_allclose(scores, truth[order], rtol=1e-9)
    same = SlimLLM().rank(problem, statistics)
    assert same.removals == curve.removals


def test_the_lowest_part_can_be_kept() -> None:
    problem = feed_forward(12)
    statistics = channel_statistics(tokens_of(5), tokens_of(12))
    plain = [r.units[0] for r in FeatureSpace().rank(problem, statistics).removals]
    kept = [r.units[0] for r in FeatureSpace(keep_bottom=0.2).rank(problem, statistics).removals]
    # Two of twelve; the last of the plain order is never removed.
    assert kept[:9] == plain[2:]
    assert set(kept[10:]) <= set(plain[:2])
    with pytest.raises(PlanError, match=r"keep_bottom 1\.5 is not possible"):
        FeatureSpace(keep_bottom=1.5)


def test_channels_without_any_input_rank_by_index() -> None:
    problem = feed_forward(6)
    curve = FeatureSpace().rank(problem, channel_statistics(np.zeros((4, 5)), np.zeros((4, 6))))
    assert [r.units[0] for r in curve.removals] == [0, 1, 2, 3, 4]


def test_slimllm_chooses_by_width() -> None:
    problem, x = heads(5, 2), tokens_of(10)
    assert SlimLLM().rank(problem, moments(x), limit=20).removals == (
        Pearson().rank(problem, moments(x), limit=20).removals
    )
    assert plugin("importance", "slimllm") is SlimLLM


# OSSCAR's swaps on the least-squares loss


def test_restoring_columns_undoes_their_elimination() -> None:
    weight, gram = weight_of(4, 9), gram_of(9)
    begin = start(weight, gram, 0.01, name="site")
    middle, _ = begin.eliminate(torch.tensor([7, 2]))
    end, losses = middle.eliminate(torch.tensor([4, 0, 5]))
    back, gain = end.restore(torch.tensor([5, 0, 4]))
    assert gain == pytest.approx(float(losses.sum()), rel=1e-9)
    assert back.columns.tolist() == middle.columns.tolist()
    torch.testing.assert_close(back.weight, middle.weight)
    every = torch.arange(len(back.columns))
    torch.testing.assert_close(back.inverse.rows(every), middle.inverse.rows(every))


@pytest.mark.parametrize("width", [1, 2])
def test_swaps_only_lower_the_least_squares_loss(width: int) -> None:
    lowered = 0
    for seed in range(8):
        columns = 8 * width
        problem = channels(8, width=width, seed=seed)
        statistics = {"input_gram": gram_of(columns, seed=seed)}
        limit = 4 * (3 + 5 * width)
        plain = Obs(damping=0.0).rank(problem, statistics, limit=limit)
        swapped = Obs(damping=0.0, swap=True).rank(problem, statistics, limit=limit)
        assert len(swapped.removals) == 4
        for steps in range(1, 5):
            gone = removed_columns(problem, swapped, steps)
            truth, _ = residual(problem.weight, statistics["input_gram"], gone)
            assert swapped.loss[steps - 1] == pytest.approx(truth, rel=1e-8)
        assert swapped.loss[3] <= plain.loss[3] * (1 + 1e-9)
        lowered += swapped.loss[3] < plain.loss[3] * (1 - 1e-6)
    assert lowered >= 1


def test_swaps_leave_groups_that_overlap_alone() -> None:
    problem, statistics = attention(), {"input_gram": gram_of(18)}
    limit = int(Obs().rank(problem, statistics).parameters[2])
    plain = Obs().rank(problem, statistics, limit=limit)
    groups = {removal.group for removal in plain.removals}
    swapped = Obs(swap=True).rank(problem, statistics, limit=limit)
    assert len(groups) == 1 or swapped.removals == plain.removals

"""Padding counts nowhere: statistics of padded batches equal those of each sample by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama
from tiny_readers import bert, t5
from torch import Tensor

from prunec.errors import VerifyError
from prunec.graph.coupling import couple
from prunec.graph.dropping import drop_branches
from prunec.graph.padding import Padding
from prunec.graph.trace import trace
from prunec.importance.blocks import plain_name
from prunec.importance.influence import BlockInfluence
from prunec.importance.obs import Obs
from prunec.importance.predictions import Predictions
from prunec.passes.compensation.closed_form import NoCompensation
from prunec.passes.setup import Setup
from prunec.passes.shallow import depth_units
from prunec.passes.sites import find_sites
from prunec.passes.slice import Weights
from prunec.passes.statistics.dense import dense_sites
from prunec.passes.statistics.prior import prior_statistics

LENGTHS = (9, 5, 12, 7)
NAMES = ("input_gram", "input_mean", "input_square", "input_var", "producer_square")


Measured = dict[str, dict[str, Tensor]]


def rows(seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(tokens: list[Tensor], prefix: str = "", length: int = 12) -> dict[str, Tensor]:
    ids = torch.full((len(tokens), length), 7)
    mask = torch.zeros(len(tokens), length, dtype=torch.int64)
    for i, row in enumerate(tokens):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def measured(model: Any, batches: list[dict[str, Tensor]]) -> Measured:
    """Statistics of every site, by site."""
    coupling = couple(trace(model, batches[0]))
    sites, _ = find_sites(coupling, {group.kind for group in coupling.groups})
    setup = Setup(coupling, sites, Obs(), NoCompensation(), batches, Weights(coupling))
    return {site.name: dict(found) for site, _, found in dense_sites(setup, NAMES)}


def mean(alone: list[Measured], weights: Sequence[int]) -> Measured:
    """The mean over tokens of what each sample has alone, without padding, in a graph of its own."""
    total: Measured = {}
    for found, weight in zip(alone, weights, strict=True):
        for site, statistics in found.items():
            for key, value in statistics.items():
                sums = total.setdefault(site, {})
                sums[key] = sums.get(key, torch.zeros(())) + value * weight / sum(weights)
    return total


LINEAR = ("input_gram", "input_mean", "input_square", "producer_square")


@pytest.mark.parametrize("make", [tiny_llama, bert])
def test_statistics_are_those_of_each_sample_alone(make: Any) -> None:
    model, tokens = make(), rows()
    whole = padded(tokens)
    batches = [{name: value[i : i + 2] for name, value in whole.items()} for i in (0, 2)]
    found = measured(model, batches)
    alone = mean([measured(model, [{"input_ids": row[None]}]) for row in tokens], LENGTHS)
    assert found.keys() == alone.keys()
    for site, statistics in found.items():
        keys = [key for key in statistics if key.split(" ")[0] in LINEAR]
        assert keys
        for key in keys:
            torch.testing.assert_close(statistics[key], alone[site][key], rtol=1e-4, atol=1e-5)
    # and the padding would have been seen: without a mask the figures are others
    blind = measured(model, [{"input_ids": b["input_ids"]} for b in batches])
    assert any(
        not torch.allclose(blind[site]["input_gram"], found[site]["input_gram"], rtol=1e-2)
        for site in found
    )


def test_source_and_target_have_masks_of_their_own() -> None:
    lengths = (9, 5), (4, 9)
    model, source, target = t5(), rows(1, lengths[0]), rows(2, lengths[1])
    found = measured(model, [padded(source, "", 9) | padded(target, "decoder_", 9)])
    alone = [
        measured(model, [{"input_ids": a[None], "decoder_input_ids": b[None]}])
        for a, b in zip(source, target, strict=True)
    ]
    by_source, by_target = mean(alone, lengths[0]), mean(alone, lengths[1])
    decoded = {site for site in found if site.startswith("decoder")}
    assert decoded
    assert decoded != set(found)
    for site, statistics in found.items():
        wanted = (by_target if site in decoded else by_source)[site]
        grams = [key for key in statistics if plain_name(key) == "input_gram"]
        assert grams
        for key in grams:
            torch.testing.assert_close(statistics[key], wanted[key], rtol=1e-4, atol=1e-5)


def depth_scores(model: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """Of each branch: its influence, and the divergence without it."""
    program = trace(model, batch)
    units = depth_units(couple(program), ("attention", "mlp"))
    scores = {
        f"{name} influence": s for name, s in BlockInfluence().removals(program, units, [batch])
    }
    dense = Predictions(program, [batch], [program.run(None, **batch)])
    for name, branches in units.items():
        scores[name] = dense.divergence([drop_branches(program, branches).run(None, **batch)])
    return scores


def test_depth_is_judged_without_padding() -> None:
    model, tokens = tiny_llama(), rows()
    scores = depth_scores(model, padded(tokens))
    alone = [depth_scores(model, {"input_ids": row[None]}) for row in tokens]
    assert len(scores) == 8
    for name, score in scores.items():
        mean = sum(s[name] * n for s, n in zip(alone, LENGTHS, strict=True)) / sum(LENGTHS)
        assert score == pytest.approx(mean, rel=1e-3)


def test_gradients_of_a_padded_sample_are_its_own() -> None:
    model, tokens = tiny_llama(), rows(1, (9, 5))
    coupling = couple(trace(model, padded(tokens)))
    sites, _ = find_sites(coupling, {"ffn_channel"})
    alone: dict[str, Tensor] = {}
    for row in tokens:
        one = prior_statistics(model, sites, {"weight_grad"}, [{"input_ids": row[None]}])
        for key, value in one.items():
            alone[key] = alone.get(key, torch.zeros(())) + value / len(tokens)
    whole = prior_statistics(model, sites, {"weight_grad"}, [padded(tokens)])
    assert whole
    for key, value in whole.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-3, atol=1e-6)


def test_where_the_padding_of_a_value_is() -> None:
    whole = padded(rows(1, (2, 3)), length=3)
    program = trace(tiny_llama(), whole)
    node = next(iter(program.graph.nodes))
    real = whole["attention_mask"].bool()
    padding = Padding(program, [whole])

    def found(*shape: int) -> Tensor | None:
        return padding.real_tokens(0, node, torch.zeros(*shape, 5))

    assert torch.equal(found(2, 3), real)  # type: ignore[arg-type]
    assert torch.equal(found(3, 2), real.T)  # type: ignore[arg-type]
    assert torch.equal(found(6), real.flatten())  # type: ignore[arg-type]
    assert torch.equal(found(4, 6), real.flatten().expand(4, 6))  # type: ignore[arg-type]
    assert torch.equal(found(2, 3, 4), real[..., None].expand(2, 3, 4))  # type: ignore[arg-type]
    assert torch.equal(found(2, 4, 3), real[:, None].expand(2, 4, 3))  # type: ignore[arg-type]
    assert found(2) is None
    for shape in ((12,), (4, 3), (5, 18)):
        with pytest.raises(VerifyError, match="padding is not known"):
            found(*shape)
    whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
    assert Padding(program, [whole]).real_tokens(0, node, torch.zeros(12, 5)) is None

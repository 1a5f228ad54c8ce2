"""Allocations that look at the dense model, against numpy and by hand."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, OPTConfig, OPTForCausalLM

from prunec.errors import PlanError
from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.importance.curves import Removal, RemovalCurve
from prunec.passes.allocation.context import Context
from prunec.passes.allocation.dense import Global, SimilaritySoftmax
from prunec.passes.allocation.survey import DenseSurvey
from prunec.passes.allocation.uniform import LayerRange
from prunec.passes.setup import Setup
from prunec.passes.slice import Weights
from prunec.passes.targets.room import Room
from prunec.registry import plugin


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (2, 12), generator=generator)} for _ in range(3)
    ]


@cache
def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    return BertForMaskedLM(config).eval().requires_grad_(False)


@cache
def opt() -> OPTForCausalLM:
    """Its layers add up samples and tokens as one axis."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=32,
        init_std=0.2,
    )
    return OPTForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["pre-norm", "post-norm", "flat"])
def test_similarity_is_that_of_the_hidden_states(family: str) -> None:
    """Block boundaries come from the graph; the model's own hidden states are the reference."""
    model = {"pre-norm": tiny_llama, "post-norm": bert, "flat": opt}[family]()
    coupling = couple(trace(model, batches()[0]))
    setup = Setup(coupling, [], None, None, batches(), Weights(coupling))
    found = list(DenseSurvey(setup).similarities.values())
    sums, tokens = np.zeros(len(found)), 0
    for batch in batches():
        states = list(model(**batch, output_hidden_states=True).hidden_states)
        if family != "post-norm":
            # Its last hidden state is behind the final norm: take the block's own.
            inner = model.model
            block = (inner.decoder if family == "flat" else inner).layers[-1]
            hook = block.register_forward_hook(lambda m, a, out: m.__dict__.update(seen=out))
            model(**batch)
            hook.remove()
            states[-1] = block.__dict__.pop("seen")
        for i in range(len(found)):
            sums[i] += float(F.cosine_similarity(states[i], states[i + 1], dim=-1).sum())
        tokens += batch["input_ids"].numel()
    if family == "post-norm":
        # What leaves the last block is its last sum: nothing of the stream reads the norm behind.
        found, sums = found[:-1], sums[:-1]
    np.testing.assert_allclose(found, sums / tokens, rtol=1e-5)


@settings(deadline=None)
@given(
    similarities=st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    target=st.floats(0, 0.85),
    alpha=st.floats(0, 20),
)
def test_the_mean_is_the_target_and_the_order_that_of_similarity(
    similarities: list[float], target: float, alpha: float
) -> None:
    sizes = [100 + i for i in range(len(similarities))]
    ratios = SimilaritySoftmax(alpha).ratios(similarities, target, sizes)
    assert np.average(ratios, weights=sizes) == pytest.approx(target, abs=1e-9)
    assert all(-1e-12 <= ratio <= 0.9 + 1e-12 for ratio in ratios)
    order = np.argsort(similarities, kind="stable")
    assert (np.diff(np.array(ratios)[order]) >= -1e-9).all()


def test_the_softmax_is_slimllms() -> None:
    """METHODS 2.4: ``r N softmax(alpha s)`` over the N most similar, no cap where none is met."""
    similarity = np.linspace(0.8, 0.99, 32)
    ratios = SimilaritySoftmax(10.0, blocks=26 / 32).ratios(similarity, 0.25 * 26 / 32, [1] * 32)
    heat = np.exp(10 * similarity[6:])
    np.testing.assert_allclose(ratios[6:], 0.25 * 26 * heat / heat.sum(), rtol=1e-12)
    assert ratios[:6] == [0.0] * 6


def test_too_much_is_said() -> None:
    with pytest.raises(PlanError, match=r"cannot remove 60.0%") as raised:
        SimilaritySoftmax(blocks=0.5).ratios([0.1, 0.2], 0.6, [1, 1])
    assert raised.value.so == "the largest ratio it can reach is 45.0%"


class Seen:
    """A survey with given curves."""

    def __init__(self, **curves: tuple[list[float], int]):
        self.curves = {
            name: RemovalCurve(
                tuple(Removal(name, (i,)) for i in range(len(losses))),
                np.cumsum(losses),
                np.arange(1, len(losses) + 1) * each,
            )
            for name, (losses, each) in curves.items()
        }
        self.similarities: dict[str, float] = {}


def test_global_removes_what_lies_below_one_standardised_threshold() -> None:
    generator = np.random.default_rng(0)
    narrow, wide = np.sort(generator.exponential(1, 20)), np.sort(generator.exponential(50, 60))
    survey = Seen(a=(narrow.tolist(), 10), b=(wide.tolist(), 5))
    rooms = [Room("a", "0", 210, 200), Room("b", "1", 305, 300)]
    context = Context(0.4, {"0": 250, "1": 350}, rooms, survey)
    shares = Global(maximum=1.0).shares(context)
    scores = [((x - x.mean()) / x.std(), cost) for x, cost in ((narrow, 10), (wide, 5))]
    pooled = sorted((z, cost, i) for i, (zs, cost) in enumerate(scores) for z in zs)
    expected = [0.0, 0.0]
    left = 0.4 * 600
    for _, cost, i in pooled:
        expected[i] += min(cost, max(left, 0))
        left -= cost
    assert [shares["a"], shares["b"]] == pytest.approx(expected)


def test_a_dear_unit_must_be_worth_its_price() -> None:
    """Heads that free ten times as much for twice the loss go first where price counts."""
    survey = Seen(heads=([2.0, 2.2, 9.0, 9.1], 10), channels=([1.0, 1.1, 1.2, 5.0], 1))
    rooms = [Room("heads", "0", 50, 40), Room("channels", "0", 5, 4)]
    context = Context(20 / 55, {"0": 55}, rooms, survey)
    assert sum(Global(per_parameter=True).shares(context).values()) == pytest.approx(20)
    with pytest.raises(PlanError, match="global cannot remove"):
        Global(maximum=0.2).shares(context)


def test_a_sharp_softmax_still_comes_to_the_target() -> None:
    """The heat of the colder blocks is zero in floating point; they give the rest all the same."""
    ratios = SimilaritySoftmax(alpha=1e5).ratios([0.1, 0.5, 0.9], 0.5, [1, 1, 1])
    assert ratios == pytest.approx([0.3, 0.3, 0.9])


@pytest.mark.parametrize(("first", "last"), [(0, 5), (2, 3), (4, 0), (1, 2)])
def test_layer_range_that_leaves_no_block_is_refused(first: int, last: int) -> None:
    with pytest.raises(PlanError, match=r"layer-range cannot(.|\n)*the 0 blocks between"):
        LayerRange(first=first, last=last).ratios(3, 0.2)


def test_layer_range_is_llm_pruners() -> None:
    """METHODS 3.3: 4 and 2 of 32 blocks stay, 25 % of the 26 between is 20.3 % of all."""
    ratios = LayerRange().ratios(32, 0.25 * 26 / 32)
    assert ratios == pytest.approx([0.0] * 4 + [0.25] * 26 + [0.0] * 2)
    with pytest.raises(PlanError, match=r"cannot remove 90.0%"):
        LayerRange().ratios(32, 0.9)


@pytest.mark.parametrize("name", ["similarity-softmax", "global"])
def test_without_data_they_say_what_they_need(name: str) -> None:
    with pytest.raises(PlanError, match="looks at the dense model"):
        plugin("allocation", name)().shares(Context(0.2, {"0": 10}, [Room("a", "0", 10, 9)]))

"""Statistics of a site's producers equal those of forward hooks, also where branches run abreast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import prunec
from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.importance.magnitude import Magnitude
from prunec.importance.obs import Obs
from prunec.importance.statistics import collector, statistic_of
from prunec.passes.compensation.closed_form import NoCompensation
from prunec.passes.setup import Setup
from prunec.passes.sites import find_sites
from prunec.passes.slice import Weights
from prunec.passes.statistics import measure
from prunec.passes.statistics.dense import dense_sites, loss_shares, score_groups
from prunec.registry import plugin


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (2, 12), generator=generator)}
        for _ in range(count)
    ]


def parallel_model() -> nn.Module:
    """Attention beside the feed-forward: its first product runs before attention's last."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        use_parallel_residual=True,
    )
    return GPTNeoXForCausalLM(config).eval()


def hooked_squares(model: nn.Module) -> dict[str, Tensor]:
    """E[x^2] of every linear layer's input."""
    sums: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: sums.setdefault(f"{name}.weight", []).append(
                inputs[0].detach().double().flatten(0, -2).square().mean(0)
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches():
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(found).mean(0) for name, found in sums.items()}


@pytest.mark.parametrize("make", [tiny_llama, parallel_model])
def test_statistics_of_sites_and_producers_equal_hooks(make) -> None:
    model = make()
    coupling = couple(trace(model, batches()[0]))
    sites, _ = find_sites(coupling, {group.kind for group in coupling.groups})
    truth = hooked_squares(model)
    made = 0
    setup = Setup(coupling, sites, Magnitude(), NoCompensation(), batches(), Weights(coupling))
    names = {"input_square", "producer_square"}
    for site, _, statistics in dense_sites(setup, names):
        torch.testing.assert_close(
            statistics["input_square"], truth[site.readings[0].parameter], rtol=1e-5, atol=1e-8
        )
        for producer in site.producers:
            found = statistics[statistic_of("producer_square", producer.parameter)]
            torch.testing.assert_close(found, truth[producer.parameter], rtol=1e-5, atol=1e-8)
            made += 1
    assert made >= 4


@pytest.mark.parametrize("name", ["obs", "magnitude", "slimllm"])
def test_every_group_is_scored_down_to_its_minimum(name: str) -> None:
    model = tiny_llama()
    coupling = couple(trace(model, batches()[0]))
    sites, _ = find_sites(coupling, {"ffn_channel", "query_head", "kv_group"})
    criterion = plugin("importance", name)()
    setup = Setup(coupling, sites, criterion, NoCompensation(), batches(), Weights(coupling))
    found = [
        group
        for site, problem, statistics in dense_sites(setup, criterion.statistics)
        for group in score_groups(site, problem, criterion, statistics)
    ]
    assert [group.group for group in found if "mlp" in group.group] == [
        f"model.layers.{i}.mlp/ffn_channel" for i in range(2)
    ]
    assert sum(loss_shares(found)) == pytest.approx(1.0)
    for group in found:
        whole = coupling[group.group]
        stay = int(group.scores.shape[0]) * whole.minimum
        assert int(group.scores.size - (group.scores == group.scores).sum()) == stay
        assert float(group.scores[group.scores == group.scores].sum()) == pytest.approx(group.loss)


def test_a_wide_site_is_pruned_on_its_tokens_as_on_its_gram(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 channels and 21 tokens: no matrix of 64 x 64, and the same result."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 64), nn.Linear(64, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    model, batches = Wide().eval(), [{"x": torch.randn(7, 6)} for _ in range(3)]
    taken: list[str] = []
    monkeypatch.setattr(
        measure,
        "collector",
        lambda name, *, site: (taken.append(name), collector(name, site=site))[1],
    )
    few = prunec.prune(model, ratio=0.4, calibration=batches)
    monkeypatch.setattr(Obs, "takes_tokens", False)
    full = prunec.prune(model, ratio=0.4, calibration=batches)
    assert taken == ["input_tokens", "input_gram"]
    assert few.plan.to_json() == full.plan.to_json()
    for name, tensor in full.program.state.items():
        torch.testing.assert_close(few.program.state[name], tensor, rtol=1e-5, atol=1e-6)
    ours, theirs = few.report.sites[0], full.report.sites[0]
    assert ours.error == pytest.approx(theirs.error, rel=1e-4)
    np.testing.assert_allclose(ours.curve, theirs.curve, rtol=1e-4)

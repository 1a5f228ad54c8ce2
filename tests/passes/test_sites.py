"""Sites beyond linear layers that are neither convolutions nor experts."""

from __future__ import annotations

import torch
from refitted import Batches, kept, pruned, refit
from tiny_model import tiny_llama
from torch import Tensor, nn

from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.passes.compensation.closed_form import NoCompensation
from prunec.passes.oracles.mask import slicing_difference
from prunec.passes.sites import find_sites
from prunec.registry import plugin


class Readers(nn.Module):
    """Two layers read the same rows, and a third what another function makes of the units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 9)
        self.one, self.two, self.three = nn.Linear(9, 4), nn.Linear(9, 3), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x)
        positive = h.relu()
        return self.one(positive) + self.three(h.tanh()), self.two(positive)


def test_several_readers_are_one_site() -> None:
    data: Batches = [{"x": torch.randn(50, 6, dtype=torch.float64)} for _ in range(2)]
    coupling = couple(trace(Readers().double().eval(), data[0]))
    (site,), _ = find_sites(coupling, {"ffn_channel"})
    assert [[r.parameter for r in given.readings] for given in site.inputs] == [
        ["one.weight", "two.weight"],
        ["three.weight"],
    ]
    model = Readers().double()
    result = pruned(coupling, data, {"ffn_channel"}, 0.4)
    keep = kept(result, coupling, "up.weight", 0)
    h = model.up(torch.cat([batch["x"] for batch in data])).detach()
    losses = torch.zeros(9, dtype=torch.float64)
    for layer, x in (("one", h.relu()), ("two", h.relu()), ("three", h.tanh())):
        y = (x @ getattr(model, layer).weight.T).detach()
        torch.testing.assert_close(
            result.weights[f"{layer}.weight"], refit(x, y, keep), rtol=1e-8, atol=1e-8
        )
        for unit in range(9):
            stay = torch.arange(9) != unit
            losses[unit] += (x[:, stay] @ refit(x, y, stay).T - y).square().sum()
    assert not keep[losses.argmin()]


def test_what_no_weight_reads_is_ranked_by_weights_or_said() -> None:
    example = {"input_ids": torch.zeros(1, 5, dtype=torch.int64)}
    coupling = couple(trace(tiny_llama(), example))
    kinds = {group.kind for group in coupling.groups}
    _, skipped = find_sites(coupling, kinds)
    reasons = {item.group.rpartition("/")[2]: item.reason for item in skipped}
    assert reasons.keys() == {"hidden", "rope_pair"}
    assert reasons["rope_pair"].startswith("scaled_dot_product_attention sums over it")
    assert "units=hidden" in reasons["hidden"]
    sites, skipped = find_sites(coupling, kinds, by_weight=True)
    assert not skipped
    assert {group.name for site in sites for group in site.groups} == {
        group.name for group in coupling.groups
    }
    for name in ("magnitude", "random"):
        criterion = plugin("importance", name)()
        result = pruned(
            coupling,
            [],
            kinds - {"hidden"},
            criterion=criterion,
            compensation=NoCompensation(),
        )
        gone = {coupling.by_dim[dim].kind for dim in result.selection.counts}
        assert "rope_pair" in gone
        assert slicing_difference(coupling, result.selection, result.weights, example) < 1e-4

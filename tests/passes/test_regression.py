"""Targets of the dense model: found in the graph, measured beside the pruned one."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor, fx, nn

import prunec
from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.interpreter import Stream
from prunec.graph.selection import Keep, Selection
from prunec.graph.trace import trace
from prunec.passes.compensation.regression import Regression, residual_offsets
from prunec.passes.sites import Site, find_sites
from prunec.passes.slice import Weights, slice_program, slice_state
from prunec.passes.statistics.measure import Measurement

UNITS = ("ffn_channel", "head", "query_head", "kv_group")


def batches(count: int = 4, rows: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(2, VOCABULARY, (rows, 12), generator=generator)}
        for _ in range(count)
    ]


def coupled(model: nn.Module) -> CouplingGraph:
    return couple(trace(model.eval().requires_grad_(False), batches()[0]))


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if kind == "llama":
        return tiny_llama()
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4
        )
        return transformers.GPT2LMHeadModel(config)
    if kind == "parallel":
        config = transformers.GPTNeoXConfig(**sizes, use_parallel_residual=True)
        return transformers.GPTNeoXForCausalLM(config)
    if kind == "scaled":
        config = transformers.GraniteConfig(
            **sizes, num_key_value_heads=2, residual_multiplier=0.25
        )
        return transformers.GraniteForCausalLM(config)
    assert kind == "post-norm"
    config = transformers.Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8
    )
    return transformers.Gemma2ForCausalLM(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "parallel", "scaled"])
def test_what_a_site_is_added_to(kind: str) -> None:
    """Moving a site's output and what it meets against each other leaves the logits alone."""
    coupling = coupled(tiny(kind).double())
    program = coupling.program
    sites, _ = find_sites(coupling, UNITS)
    for site in sites:
        (node,) = site.nodes
        (*_, last) = residual_offsets(coupling.layout, node)
        generator = torch.Generator().manual_seed(0)
        shift = torch.randn(node.meta["val"].shape, generator=generator).double()
        result = _Shifted(program.graph_module, {node: shift})
        shifted = result.run(*program.arguments(None, program.example))[0]
        plain = program.run(**program.example)
        assert (shifted - plain).abs().max() > 1e-4
        # The stream itself also feeds the branch, so shift it only where the sum reads it.
        (total,) = _sums(node, last.node)
        moved = _Shifted(program.graph_module, {node: shift}, {total: (last, shift)})
        again = moved.run(*program.arguments(None, program.example))[0]
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-9)


def _sums(node: fx.Node, other: fx.Node) -> list[fx.Node]:
    """The addition below the product that reads the other value."""
    value = node
    while True:
        (value,) = [user for user in value.users if user.op == "call_function"]
        if other in value.all_input_nodes:
            return [value]


class _Shifted(fx.Interpreter):
    """Adds to some values, and takes from some sums what an offset says belongs there."""

    def __init__(self, module, shifts, sums=None):
        super().__init__(module)
        self._shifts, self._sums = shifts, sums or {}

    def run_node(self, n):
        result = super().run_node(n)
        if n in self._shifts:
            result = result + self._shifts[n]
        if n in self._sums:
            offset, shift = self._sums[n]
            result = result - offset.scale * shift.reshape(result.shape)
        return result


def test_a_norm_behind_the_site_is_said() -> None:
    coupling = coupled(tiny("post-norm"))
    sites, _ = find_sites(coupling, UNITS)
    with pytest.raises(PlanError, match="does not reach a sum") as caught:
        list(residual_offsets(coupling.layout, sites[0].nodes[0]))
    assert "layers.0.self_attn.o_proj" in str(caught.value.where)
    with pytest.raises(PlanError, match="does not reach"):
        run("post-norm", target="residual")


def run(kind: str, **options) -> prunec.Result:
    settings = {f"compensation.{key}": value for key, value in options.items()}
    return prunec.prune(
        tiny(kind),
        recipe="slimgpt",
        ratio=0.3,
        calibration=batches(8),
        settings={"compensation": "least-squares", **settings},
    )


class _Values(fx.Interpreter):
    def __init__(self, module, wanted):
        super().__init__(module)
        self.wanted, self.found = wanted, {}

    def run_node(self, n):
        result = super().run_node(n)
        if n.name in self.wanted:
            self.found[n.name] = result.flatten(0, -2)
        return result


def values(program, batch, *nodes) -> list[Tensor]:
    interpreter = _Values(program.graph_module, {node.name for node in nodes})
    interpreter.run(*program.arguments(None, batch))
    return [interpreter.found[node.name] for node in nodes]


def _first_block_pruned(coupling: CouplingGraph) -> tuple[Selection, Site]:
    keeps = {}
    for group in coupling.groups:
        if group.kind == "ffn_channel" and ".0." in f"{group.name}.":
            mask = torch.arange(group.size).numpy() % 3 != 0
            keeps[group.dim] = Keep(mask)
    sites, _ = find_sites(coupling, UNITS)
    return Selection(keeps), sites[-1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "parallel", "scaled"])
@pytest.mark.parametrize("target", ["own", "dense", "residual"])
@pytest.mark.parametrize("tokens", ["alike", "capped"])
def test_moments_are_those_of_both_programs(kind: str, target: str, tokens: str) -> None:
    coupling = coupled(tiny(kind).double())
    selection, site = _first_block_pruned(coupling)
    dense = coupling.program
    state = slice_state(coupling, selection, dense.state)
    pruned = slice_program(coupling, selection, state)
    ((node, rows),) = site.inputs[0].calls
    operand = rows.operand
    data = batches()

    def stream(chosen: Selection) -> Stream:
        weights = Weights(coupling, dense.state, selection=chosen)
        return Stream(dense, coupling.layout, data, weights.__getitem__, selection=chosen)

    regression = Regression(target, tokens, holdout=0.25)
    measurement = Measurement(
        stream(selection), [site], [], regression=regression, dense=stream(Selection())
    )
    if target == "own":
        measurement = Measurement(stream(selection), [site], [], regression=regression)
    got = measurement.take(site)

    (reading,) = site.readings
    (weight,) = reading.matrix.split(dense.state[reading.parameter])
    offsets = list(residual_offsets(coupling.layout, node)) if target == "residual" else []
    nodes = [operand, *(offset.node for offset in offsets)]
    fit, held = [], []
    for number, batch in enumerate(data):
        x, *met = values(pruned, batch, *nodes)
        x_dense, *met_dense = values(dense, batch, *nodes)
        t = (x if target == "own" else x_dense) @ weight.T
        for offset, here, there in zip(offsets, met, met_dense, strict=True):
            t = t + (there - here) / offset.scale
        norm = t.square().sum(1)
        cap = (norm.median() / norm).clamp(max=1) if tokens == "capped" else torch.ones(len(t))
        z = torch.cat([x, torch.ones(len(x), 1).double(), *([] if target == "own" else [t])], 1)
        for row in range(2):
            window, part = number * 2 + row, slice(row * 12, row * 12 + 12)
            (held if window % 4 == 3 else fit).append((z[part], cap[part]))
    for name, parts in (("fit_gram", fit), ("held_gram", held)):
        total = sum((z * c[:, None]).T @ z for z, c in parts)
        expected = total / sum(c.sum() for _, c in parts)
        torch.testing.assert_close(got[name], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("target", ["own", "dense", "residual"])
def test_a_whole_run_brings_the_outputs_nearer(target: str) -> None:
    model = tiny("llama")
    gaps = []
    for compensation in ("none", "least-squares"):
        settings = {"compensation": compensation}
        if compensation != "none":
            settings |= {"compensation.target": target, "compensation.bias": True}
        result = prunec.prune(
            model, recipe="slimgpt", ratio=0.3, calibration=batches(24), settings=settings
        )
        pairs = ((result.model(**b).logits, model(**b).logits) for b in batches(30)[24:])
        gaps.append(sum(float((a - b).square().sum()) for a, b in pairs))
    assert gaps[1] < 0.9 * gaps[0]


def test_a_window_is_needed_to_hold_one_out() -> None:
    with pytest.raises(PlanError, match="2 calibration windows leave none to hold out"):
        prunec.prune(
            tiny("llama"),
            recipe="slimgpt",
            ratio=0.3,
            calibration=batches(1),
            settings={"compensation": "least-squares"},
        )


def test_the_search_mends_towards_the_dense_model_too() -> None:
    settings = {
        "compensation": "least-squares",
        "compensation.target": "dense",
        "compensation.bias": True,
        "allocation.effort": "fast",
    }
    result = prunec.prune(
        tiny("llama"), recipe="auto", ratio=0.3, calibration=batches(16), settings=settings
    )
    assert result.report.realised_ratio == pytest.approx(0.3, abs=0.03)
    assert all(site.bias for site in result.report.sites)

"""Shrunk modules equal masking, on every architecture, or are refused with the reason."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from slicing import (
    ARCHITECTURES,
    DECODER,
    UNITS,
    build,
    by_plan,
    coupling_of,
    example_for,
    masked_logits,
    prepared,
    random_plan,
    shrunk,
)
from torch import nn

import prunec.codegen.shrink
from prunec.codegen.attributes import are_places, candidates
from prunec.codegen.battery import checks, difference, outputs
from prunec.codegen.fit import first_failure, usable
from prunec.codegen.reduce import representative_layers
from prunec.codegen.shrink import shrink
from prunec.codegen.twin import LazyTwin, assemble, padded, redraw, scatter
from prunec.errors import ExportError, VerifyError
from prunec.graph.selection import Extent, Sliced
from prunec.passes.plan import GroupKeep, Plan
from prunec.passes.slice import slice_program, slice_state

# ALiBi slopes are computed from the number of heads; experts' kernels want multiples of 16 bytes
PLANS = {
    "bloom": {"kinds": ("ffn_channel", "head_dim")},
    "mixtral": {"kinds": UNITS, "count": {"ffn_channel": 32}},
}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_equals_the_masked_graph(name: str) -> None:
    model, coupling, plan, result = shrunk(name, **PLANS.get(name, {"kinds": UNITS}))
    assert len(plan.groups) >= 6
    with torch.no_grad():
        logits = result.model(**example_for(model))[0]
    assert difference([logits], [masked_logits(coupling, plan)]) < 1e-5
    sizes = {name: tuple(p.shape) for name, p in result.model.named_parameters()}
    assert {n: sizes[n] for n in result.sizes if n in sizes} == {
        n: after for n, (_, after) in result.sizes.items() if n in sizes
    }


def test_the_given_model_is_not_changed() -> None:
    model = build("llama")
    before = copy.deepcopy(model)
    coupling = coupling_of(model)
    sliced = by_plan(model, coupling, random_plan(coupling, UNITS))
    result = shrink(model, sliced, example=example_for(model))
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert type(model) is T.LlamaForCausalLM
    assert model.config.to_dict() == before.config.to_dict()
    layer = "model.layers.0.self_attn"
    assert vars(model.get_submodule(layer))["num_key_value_groups"] == 2
    assert result.model.get_submodule(layer).num_key_value_groups == 1


def test_tensors_are_used_as_they_are() -> None:
    model, coupling = prepared("llama")
    sliced = by_plan(model, coupling, random_plan(coupling, UNITS))
    result = shrink(model, sliced, example=example_for(model))
    for name, parameter in result.model.named_parameters():
        assert parameter.data_ptr() == sliced.weights[name].data_ptr()
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight


def test_dense_weights_are_not_needed() -> None:
    model = build("llama")
    coupling = coupling_of(model)
    sliced = by_plan(model, coupling, random_plan(coupling, UNITS))
    wanted = shrink(model, sliced, example=example_for(model))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    result = shrink(model, sliced, example=example_for(model))
    assert result.attributes == wanted.attributes


def test_tells_query_heads_from_kv_groups_by_trying() -> None:
    """As many of one as of the other: the value 3 says nothing."""
    result = shrunk("llama_square", count={"kv_group": 2, "query_head": 1})[-1]
    groups = {
        values["num_key_value_groups"]
        for values in result.attributes.values()
        if "num_key_value_groups" in values
    }
    assert groups == {1}
    assert result.trials >= 3


def test_one_kv_head_broadcasts_under_any_count() -> None:
    """Equal numbers either way: the class itself says which count is meant."""
    result = shrunk("llama_square", count={"kv_group": 1, "query_head": 2})[-1]
    assert result.attributes["model.layers.0.self_attn"]["num_key_value_groups"] == 2


def test_a_repeat_count_is_told_where_head_dim_is_worked_out() -> None:
    """More heads of the same hidden size are smaller ones: no parameter grows with the count."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 9, "hidden_size": 72}
    model = T.Qwen2ForCausalLM(T.Qwen2Config(**{**DECODER, **sizes})).eval().requires_grad_(False)
    coupling = coupling_of(model)
    plan = random_plan(coupling, UNITS, count={"kv_group": 1, "query_head": 2})
    result = shrink(model, by_plan(model, coupling, plan), example=example_for(model))
    for layer in range(3):
        own = result.attributes[f"model.layers.{layer}.self_attn"]
        assert own["num_key_value_groups"] == 2


def test_where_the_class_does_not_say_every_reading_is_as_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prunec.codegen.fit.grown_together", lambda *_: set())
    model, coupling, plan, result = shrunk("llama_square", count={"kv_group": 1, "query_head": 2})
    logits = result.model(**example_for(model)).logits
    assert difference([logits], [masked_logits(coupling, plan)]) < 1e-5


def test_config_fields_are_seen_by_one_module_only() -> None:
    model, *_, result = shrunk("phi3")
    assert "config" in result.attributes["model.layers.0.self_attn"]
    attention = result.model.model.layers[0].self_attn
    assert attention.config.num_attention_heads == 2
    assert result.model.config.num_attention_heads == model.config.num_attention_heads
    result.model.set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"


def test_descriptions_stay_true() -> None:
    model = shrunk("llama")[-1].model
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
    assert model.model.layers[0].mlp.intermediate_size == len(
        model.model.layers[0].mlp.up_proj.weight
    )
    assert model.model.layers[0].hidden_size == 48


def test_a_window_as_wide_as_the_queries_stays() -> None:
    """Gemma 2 9B: sliding_window 4096, and 4096 query features of hidden size 3584."""
    torch.manual_seed(0)
    config = T.Gemma2Config(
        **{**DECODER, "hidden_size": 42}, head_dim=4, query_pre_attn_scalar=4, sliding_window=24
    )
    model = T.Gemma2ForCausalLM(config).eval().requires_grad_(False)
    coupling = coupling_of(model)
    sliced = by_plan(model, coupling, random_plan(coupling, ["kv_group"], count={"kv_group": 2}))
    assert Extent(24, 16, frozenset()) in {
        replace(e, parameters=frozenset()) for e in sliced.extents
    }
    result = shrink(model, sliced, example=example_for(model))
    assert all("sliding_window" not in values for values in result.attributes.values())


def test_an_index_of_layers_is_no_size() -> None:
    """Where the first attention is gone, 1 and 2 are left: numbers of KV groups elsewhere."""
    paths = ("model.layers.1.self_attn", "model.layers.2.self_attn")
    assert are_places(paths, (1, 2))
    assert not are_places(paths, (2, 2))
    assert not are_places(paths, (1, 3))
    assert not are_places(paths[1:], (2,))


def test_opt_heads_are_right_or_refused() -> None:
    """Its `view(batch, -1, heads, size)` lets the sequence absorb missing heads in silence."""
    model, coupling, plan, result = shrunk("opt", ("head",))
    heads = [v["num_heads"] for path, v in result.attributes.items() if path.endswith("self_attn")]
    assert len(heads) == 3
    assert max(heads) < 6
    sliced = by_plan(model, coupling, plan)
    stale = assemble(model, sliced.weights)
    twin = assemble(model, padded(model, sliced, sliced.weights))
    assert first_failure(stale, usable(twin, checks(twin, example_for(model)))) is not None


@pytest.mark.parametrize(
    ("name", "kinds", "said"),
    [
        ("bloom", ["head"], "num_heads: 6 -> "),  # slopes depend on the number of heads
        ("llama", ["rope_pair"], "head_dim: 8 -> "),  # frequencies are no parameter
        ("qwen2", ["value_dim"], "head_dim: 8 -> "),  # one number for q, k and v
    ],
)
def test_refuses_what_the_class_cannot_be(name: str, kinds: list[str], said: str) -> None:
    with pytest.raises(ExportError, match="no setting of the module's numbers") as caught:
        shrunk(name, kinds, alike=True)
    assert said in str(caught.value.where)
    assert caught.value.so is not None


def test_a_wrong_slice_is_found() -> None:
    """Kept indices that are not those of the weights: shapes agree, numbers do not."""
    model, coupling = prepared("llama")
    sliced = by_plan(model, coupling, random_plan(coupling, ["ffn_channel"]))
    name = "model.layers.1.mlp.up_proj.weight"
    rolled = tuple(None if axis is None else np.roll(axis, 1) for axis in sliced.keep[name])
    wrong = replace(sliced, keep={**sliced.keep, name: rolled})
    with pytest.raises(ExportError, match="no setting") as caught:
        shrink(model, wrong, example=example_for(model))
    assert "off by" in str(caught.value.so)


def test_the_whole_model_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search runs on a part and on other weights; what it cannot see is seen here."""
    model, coupling = prepared("llama")
    sliced = by_plan(model, coupling, random_plan(coupling, ["ffn_channel"]))
    put = prunec.codegen.shrink.assemble

    def forgets(*given: Any) -> nn.Module:
        made = put(*given)
        parameter = made.get_parameter("model.layers.2.mlp.up_proj.weight")
        parameter.data = parameter.data * 0.9
        return made

    monkeypatch.setattr("prunec.codegen.shrink.assemble", forgets)
    with pytest.raises(VerifyError, match="differs") as caught:
        shrink(model, sliced, example=example_for(model))
    assert "off by" in str(caught.value.where)


def test_reference_in_place_of_masking() -> None:
    """A smaller hidden size changes what norms see: zeroes are no reference, the graph is."""
    model, coupling = prepared("llama")
    hidden = next(g for g in coupling.groups if g.kind == "hidden")
    plan = Plan({hidden.name: GroupKeep(48, {(): tuple(range(0, 48, 2))})})
    selection = plan.selection(coupling)
    program = slice_program(
        coupling, selection, slice_state(coupling, selection, coupling.program.state)
    )

    def reference(weights, inputs):
        return program.run({**program.state, **weights}, **inputs)

    sliced = by_plan(model, coupling, plan)
    with pytest.raises(ExportError):
        shrink(model, sliced, example=example_for(model))
    result = shrink(model, sliced, example=example_for(model), reference=reference)
    assert any("2 x 7 as in 3 x 12" in check for check in result.checks)
    assert result.config.uniform == {"hidden_size": 24}
    with torch.no_grad():
        logits = result.model(**example_for(model)).logits
    assert difference([logits], [program.run(None, **coupling.program.example)]) < 1e-5


def test_added_biases() -> None:
    model, coupling = prepared("llama")
    sliced = by_plan(model, coupling, random_plan(coupling, ["ffn_channel"]))
    name = "model.layers.1.mlp.down_proj.bias"
    result = shrink(
        model, replace(sliced, added={name: torch.ones(48)}), example=example_for(model)
    )
    assert result.added == (name,)
    assert torch.equal(result.model.get_parameter(name), torch.ones(48))
    bare = shrink(model, sliced, example=example_for(model)).model
    found = [m(**example_for(model)).logits for m in (result.model, bare)]
    assert difference(found[:1], found[1:]) > 1e-2
    nowhere = replace(sliced, added={"model.layers.1.input_layernorm.bias": torch.ones(48)})
    with pytest.raises(ExportError, match="no empty place"):
        shrink(model, nowhere, example=example_for(model))


def test_a_weight_that_the_model_lacks() -> None:
    model = build("llama")
    with pytest.raises(ExportError, match="no parameter model"):
        shrink(model, Sliced({"model.nowhere": torch.ones(1)}, {}, ()), example=example_for(model))


def test_few_layers_stand_for_many() -> None:
    torch.manual_seed(0)
    config = T.LlamaConfig(**{**DECODER, "num_hidden_layers": 9})
    model = T.LlamaForCausalLM(config).eval().requires_grad_(False)
    coupling = coupling_of(model)
    plan = random_plan(coupling, UNITS)
    sliced = by_plan(model, coupling, plan)
    layers = representative_layers(model, candidates(model, sliced)).kept["model.layers"]
    assert layers[0] == 0
    assert len(layers) < 5
    result = shrink(model, sliced, example=example_for(model))
    logits = result.model(**example_for(model)).logits
    assert difference([logits], [masked_logits(coupling, plan)]) < 1e-5


def test_lazy_twin_equals_the_padded_one_and_holds_less() -> None:
    model, coupling = prepared("gpt2")
    sliced = by_plan(model, coupling, random_plan(coupling, UNITS))
    lazy = LazyTwin(model, sliced).module
    whole = assemble(model, padded(model, sliced, sliced.weights))
    check = checks(model, example_for(model))[0]
    assert torch.equal(outputs(lazy, check)[0], outputs(whole, check)[0])
    held = {name: p.numel() for name, p in lazy.named_parameters()}
    assert all(held[name] == 0 for name in sliced.keep if name in held)


def test_scatter() -> None:
    full = scatter(torch.tensor([[1.0, 2.0]]), (np.array([1]), np.array([0, 2])), (2, 3))
    assert full.tolist() == [[0, 0, 0], [1, 0, 2]]


def test_redrawing_is_the_same_in_every_order() -> None:
    model, coupling = prepared("llama")
    sliced = by_plan(model, coupling, random_plan(coupling, UNITS))
    turned = replace(sliced, weights=dict(reversed(list(sliced.weights.items()))))
    one, other = redraw(model, sliced).weights, redraw(model, turned).weights
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["lm_head.weight"] is one["model.embed_tokens.weight"]


class Sorted(nn.Module):
    """Its outputs are no numbers that could be off by little."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"order": self.down(self.up(x).relu()).argsort(-1)}


def test_without_numbers_to_compare_nothing_is_delivered() -> None:
    model, example = Sorted().eval().requires_grad_(False), {"x": torch.randn(2, 6)}
    coupling = coupling_of(model, example)
    sliced = by_plan(model, coupling, random_plan(coupling, ("ffn_channel",)))
    with pytest.raises(ExportError, match="no finite numbers"):
        shrink(model, sliced, example=example)


def test_feature_maps_in_a_tuple_are_compared() -> None:
    config = T.VitDetConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, image_size=16, patch_size=4
    )
    model = T.VitDetBackbone(config).eval().requires_grad_(False)
    example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    (check, wanted), *_ = usable(model, checks(model, example))
    assert [list(tensor.shape) for tensor in wanted] == [[2, 48, 4, 4]]
    with torch.no_grad():
        model.encoder.layer[1].mlp.fc2.weight.add_(0.1)
    assert first_failure(model, [(check, wanted)]) is not None

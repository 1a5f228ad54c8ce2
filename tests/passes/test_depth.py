"""Depth and the width of the stream end to end: recipes, plans, delivery and the way back."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from tiny_readers import t5
from torch import Tensor, nn

import prunec
from prunec.api import outline
from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.dropping import drop_branches
from prunec.graph.trace import trace
from prunec.importance.influence import BlockInfluence, Divergence
from prunec.passes.plan import GroupKeep, Plan
from prunec.passes.recipe import load_recipe
from prunec.passes.shallow import depth_units
from prunec.passes.targets.target import chosen_target

SIZES = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 28,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(**more: object) -> T.LlamaForCausalLM:
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**{**SIZES, **more}))
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


def data(count: int = 2) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, 61, (2, 9))} for _ in range(count)]


def coupling_of(model: nn.Module) -> CouplingGraph:
    return couple(trace(model, data(1)[0]))


def test_plans_with_dropped_branches_round_trip() -> None:
    plan = Plan({"g": GroupKeep(4, {(): (0, 2)})}, ("model.layers.1/mlp",))
    assert Plan.from_json(plan.to_json()) == plan
    assert "dropped" not in Plan().to_json()
    for wrong in ("mlp", [1], {"mlp": 1}):
        with pytest.raises(PlanError, match="list of names of branches"):
            Plan.from_json({"format": 1, "groups": {}, "dropped": wrong})


def test_block_influence_is_the_definition() -> None:
    model, batches = tiny(), data()
    coupling = coupling_of(model)
    units = depth_units(coupling, ["block"])
    found = dict(BlockInfluence().removals(coupling.program, units, batches))
    streams = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
    for i, name in enumerate(units):
        hooked = []
        if i == 3:  # hidden_states ends behind the final norm
            handle = model.model.layers[3].register_forward_hook(
                lambda module, args, out, found=hooked: found.append(out)
            )
            for batch in batches:
                model(**batch)
            handle.remove()
        after = hooked or [stream[i + 1] for stream in streams]
        cosines = [
            torch.cosine_similarity(stream[i], behind, dim=-1)
            for stream, behind in zip(streams, after, strict=True)
        ]
        assert found[name] == pytest.approx(1 - float(torch.stack(cosines).mean()), abs=1e-6)
    assert list(found.values()) == sorted(found.values())


def test_divergence_is_greedy() -> None:
    model, batches = tiny(num_hidden_layers=3), data(1)
    coupling = coupling_of(model)
    program, units = coupling.program, depth_units(coupling, ["mlp", "attention"])
    dense = program.run(None, **batches[0]).log_softmax(-1)

    def lost(names: tuple[str, ...]) -> float:
        branches = [branch for name in names for branch in units[name]]
        logits = drop_branches(program, branches).run(None, **batches[0]).log_softmax(-1)
        return float((dense.exp() * (dense - logits)).sum(-1).mean())

    (first, a), (second, b) = itertools.islice(Divergence().removals(program, units, batches), 2)
    assert a == pytest.approx(min(lost((name,)) for name in units), rel=1e-4)
    assert a == pytest.approx(lost((first,)), rel=1e-4)
    best = min(lost((first, name)) for name in units if name != first)
    assert b == pytest.approx(lost((first, second)), rel=1e-4) == pytest.approx(best, rel=1e-4)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def reopened(result: prunec.Result, folder: Path) -> T.PreTrainedModel:
    """Written, proven in a fresh process, and opened by us."""
    result.save(folder)
    return prunec.load(folder)


def test_short_gpt_delivers_a_stock_model_with_fewer_layers(tmp_path: Path) -> None:
    model, batches = tiny(), data()
    result = prunec.prune(model, recipe="short-gpt", ratio=0.3, calibration=batches)
    assert len(result.report.dropped) == 1
    assert result.report.realised_ratio == pytest.approx(0.25)
    assert type(result.model) is T.LlamaForCausalLM
    again = T.AutoModelForCausalLM.from_pretrained(_saved(result, tmp_path / "m"))
    assert again.config.num_hidden_layers == 3
    gone = result.report.dropped[0].unit
    kept = [layer for i, layer in enumerate(model.model.layers) if f"model.layers.{i}" != gone]
    model.model.layers = nn.ModuleList(kept)
    assert torch.equal(logits(again, batches[0]), logits(model, batches[0]))


def _saved(result: prunec.Result, folder: Path) -> Path:
    result.save(folder)
    assert not (folder / "modeling_prunec.py").exists()
    return folder


def test_llm_pruner_layer_keeps_the_first() -> None:
    result = prunec.prune(
        tiny(), recipe="llm-pruner", ratio=0.5, calibration=data(), settings={"mode": "layer"}
    )
    assert [dropped.unit for dropped in result.report.dropped] == [
        "model.layers.3",
        "model.layers.2",
    ]
    assert result.model.config.num_hidden_layers == 2


@pytest.mark.parametrize("tied", [True, False])
def test_llm_pruner_channel_delivers_a_smaller_hidden_size(tmp_path: Path, tied: bool) -> None:
    model, batches = tiny(num_hidden_layers=2, tie_word_embeddings=tied), data()
    result = prunec.prune(
        model, recipe="llm-pruner", ratio=0.25, calibration=batches, settings={"mode": "channel"}
    )
    assert result.report.realised_ratio == pytest.approx(0.222, abs=0.001)
    config = result.model.config
    assert (config.hidden_size, config.head_dim) == (28, 10)
    again = T.AutoModelForCausalLM.from_pretrained(_saved(result, tmp_path / "m"))
    assert torch.equal(logits(again, batches[0]), logits(result.model, batches[0]))
    shared = again.lm_head.weight is again.model.embed_tokens.weight
    assert shared is tied
    (group,) = [g for g in result.plan.groups if g.endswith("hidden")]
    index = torch.tensor(result.plan.groups[group].rows[()])
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight[:, index])


def test_llm_pruner_channel_of_an_encoder_decoder() -> None:
    """Its graph tells the logits alone, at source and target lengths that differ."""
    model, ids = t5(), torch.arange(2, 34).reshape(2, 16)
    batch = {"input_ids": ids[:, :9], "decoder_input_ids": ids[:, 9:], "labels": ids[:, 9:]}
    result = prunec.prune(
        model, recipe="llm-pruner", ratio=0.25, calibration=[batch], settings={"mode": "channel"}
    )
    assert result.model.shared.embedding_dim < model.shared.embedding_dim
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    again = result.model(**inputs).logits
    torch.testing.assert_close(result.program.run(**inputs), again, rtol=1e-4, atol=1e-4)


def test_the_stream_is_not_searched_beside_biases_that_the_model_lacks() -> None:
    settings = {"allocation.hidden": True, "compensation": "bias"}
    with pytest.raises(PlanError, match="narrowed beside biases that the model lacks"):
        prunec.prune(tiny(), recipe="auto", ratio=0.3, calibration=data(), settings=settings)


def test_single_branches_and_width_together_and_once_more(tmp_path: Path) -> None:
    """Skips in the generated class: reopened, generating, pruned again."""
    model, batches = tiny(), data()
    coupling = coupling_of(model)
    ffn = [group for group in coupling.groups if group.kind == "ffn_channel"]
    keep = {
        group.name: GroupKeep(group.size, {(): tuple(range(20 - i))}) for i, group in enumerate(ffn)
    }
    del keep[ffn[2].name]
    plan = Plan(keep, ("model.layers.0/attention", "model.layers.2/mlp"))
    result = prunec.apply_plan(model, plan, example=batches[0])
    again = reopened(result, tmp_path / "m")
    assert torch.equal(logits(again, batches[0]), logits(result.model, batches[0]))
    assert not [n for n, _ in again.named_parameters() if n.startswith("model.layers.2.mlp")]
    _generates(again, model)
    once_more = Plan(dropped=("model.layers.3/attention",))
    second = prunec.apply_plan(again, once_more, example=batches[0])
    third = reopened(second, tmp_path / "n")
    assert set(third.config.prunec["skip"]) > set(again.config.prunec["skip"])
    _generates(third, model)


def _generates(model: T.PreTrainedModel, dense: T.PreTrainedModel) -> None:
    """Cached decoding equals uncached, with left padding, in dynamic and static caches."""
    inputs = data(1)[0]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :4] = 0
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(model.generate(**inputs, **settings), plain)
    static = model.generate(
        **inputs, **settings, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, plain)


def test_counting_is_what_keeps_caches_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without it a model that lost its first attention is refused."""
    from prunec.codegen.modeling_skipped import Skipped
    from prunec.errors import VerifyError

    monkeypatch.setattr(Skipped, "_count", lambda self, cache, value: None)
    with pytest.raises(VerifyError, match="differs from the masked model"):
        prunec.apply_plan(tiny(), Plan(dropped=("model.layers.0/attention",)), example=data(1)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance": "obs"}, "ranks units of width"),
        ({"units": "block,mlp"}, "cannot be units of one run"),
        ({"units": "mixer"}, "no residual branches of kind mixer"),
        ({"units": "block,ffn_channel"}, "cannot go in one run"),
        ({"units": "hidden", "importance": "wanda"}, "read by many weights"),
        ({"mode": "block"}, "no setting 'mode'"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        prunec.prune(tiny(), recipe="short-gpt", calibration=data(1), settings=settings)


@pytest.mark.parametrize(("recipe", "mode"), [("llm-pruner", "layer"), ("llm-pruner", "channel")])
def test_a_target_that_whole_units_miss_names_the_nearest(recipe: str, mode: str) -> None:
    model, settings = tiny(), {"mode": mode}
    method = load_recipe(recipe).override(settings)
    with pytest.raises(PlanError, match="were to be left") as caught:
        prunec.prune(
            model, recipe=recipe, target="params=61%", calibration=data(1), settings=settings
        )
    nearest = re.findall(r"[\d,]+ parameters", str(caught.value.so))[0].split()[0]
    target = f"params={nearest.replace(',', '')}"
    result = prunec.prune(
        model, recipe=recipe, target=target, calibration=data(1), settings=settings
    )
    assert f"params={result.report.parameters[1]}" == target
    found = outline(model, recipe=method, target=chosen_target(None, target), example=data(1)[0])
    assert (found.goal, found.wanted) == (target, {})


def test_modes_of_a_recipe() -> None:
    recipe = load_recipe("llm-pruner")
    assert recipe.override({"mode": "channel"}).units == ("hidden",)
    assert recipe.override({"mode": "block"}).units == recipe.units
    with pytest.raises(PlanError, match="no mode 'chanel'"):
        recipe.override({"mode": "chanel"})


class Plain(nn.Module):
    """Residual blocks of a module that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_plain_module_loses_a_block() -> None:
    torch.manual_seed(0)
    model, x = Plain().eval(), torch.randn(4, 6)
    result = prunec.prune(model, recipe="short-gpt", ratio=0.3, calibration=[{"x": x}])
    (gone,) = (dropped.unit for dropped in result.report.dropped)
    wanted = x
    for i, block in enumerate(model.blocks):
        wanted = wanted if gone == f"blocks.{i}" else wanted + block(wanted)
    assert torch.allclose(result.model(x), wanted, atol=1e-6)
    assert result.report.parameters == (369, 246)

"""The pass of examples/plugin_pass: a package decides what goes, of a model that is no LLaMA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plugins import installed
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import prunec
from prunec.errors import PlanError, PluginError
from prunec.passes.recipe import Recipe, load_recipe
from prunec.passes.targets.constraints import Constraints

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin_pass"
BATCH = {"input_ids": torch.arange(24).reshape(2, 12)}


@pytest.fixture
def _installed(tmp_path: Path) -> Iterator[None]:
    with installed(EXAMPLE, tmp_path):
        yield


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40,
        n_embd=18,
        n_inner=27,
        n_layer=4,
        n_head=3,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.usefixtures("_installed")
def test_a_pass_of_a_package_prunes_gpt2() -> None:
    model, recipe = gpt2(), load_recipe(str(EXAMPLE / "every-other.yaml"))
    result = prunec.prune(model, recipe=recipe, ratio=0.5, settings={"pass.place": 0})
    gone = {name.rpartition("/")[0] for name in result.plan.dropped}
    assert gone == {"transformer.h.0", "transformer.h.2"}
    assert result.model.config.n_layer == 2
    model.transformer.h = nn.ModuleList(model.transformer.h[i] for i in (1, 3))
    with torch.no_grad():
        found, wanted = (m(**BATCH, use_cache=False).logits for m in (result.model, model))
    assert torch.equal(found, wanted)
    assert result.report.aim["reached"] == result.report.block_parameters[1]
    assert result.report.aim["rounding"] == 0
    assert result.report.recipe is not None
    assert Recipe.from_dict(result.report.recipe.to_dict(), where="") == result.report.recipe


@pytest.mark.usefixtures("_installed")
def test_what_a_recipe_with_a_pass_does_not_take() -> None:
    recipe = load_recipe(str(EXAMPLE / "every-other.yaml"))
    with pytest.raises(PlanError, match="no setting 'importance'"):
        recipe.override({"importance": "wanda"})
    with pytest.raises(PlanError, match="passes every-other has no option 'plac'"):
        recipe.override({"pass.plac": 1}).build()
    with pytest.raises(PlanError, match="place='far' is not possible"):
        recipe.override({"pass.place": "far"}).build()
    with pytest.raises(PluginError, match="no passes named 'every-othr'"):
        recipe.override({"pass": "every-othr"}).build()
    with pytest.raises(PlanError, match="a recipe with a pass has no units"):
        Recipe.from_dict({"name": "x", "pass": "every-other", "units": ["head"]}, where="x")
    with pytest.raises(PlanError, match="has no use for the constraint protect"):
        prunec.prune(gpt2(), recipe=replace(recipe, constraints=Constraints(protect=("0",))))

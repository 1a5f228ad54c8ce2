"""Kinds of units that a model's class cannot be without are refused before anything is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from slicing import ARCHITECTURES, build, coupling_of, example_for

import prunec
from prunec.api import outline
from prunec.errors import ExportError
from prunec.passes.recipe import load_recipe
from prunec.passes.sites import find_sites
from prunec.passes.targets.constraints import Constraints
from prunec.pipeline.foresight import check_class, without_weights


def test_heads_whose_slopes_are_counted_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bloom")
    monkeypatch.setattr("prunec.pipeline.width._measured", lambda *_: pytest.fail("it computes"))
    with pytest.raises(ExportError, match="take no other number of head units") as caught:
        prunec.prune(model, recipe="slimgpt", ratio=0.3, calibration=[example_for(model)])
    assert caught.value.fix == "leave them whole: `--set units=ffn_channel`"
    assert caught.value.so is not None
    assert "nothing was computed" in caught.value.so


def test_what_is_advised_then_passes() -> None:
    model = build("bloom")
    settings = {"units": "ffn_channel"}
    prunec.prune(model, ratio=0.2, calibration=[example_for(model)], settings=settings)


def test_heads_that_stay_whole_are_not_asked_about() -> None:
    model = build("bloom")
    whole = {"protect": [f"transformer.h.{layer}.self_attention" for layer in range(3)]}
    recipe = replace(load_recipe("slimgpt"), constraints=Constraints.from_dict(whole))
    assert outline(model, recipe=recipe, target=0.2, example=example_for(model)).wanted


def test_the_outline_says_it_too() -> None:
    model, recipe = build("bloom"), load_recipe("slimgpt")
    with pytest.raises(ExportError, match="take no other number of head units"):
        outline(model, recipe=recipe, target=0.3, example=example_for(model))


def test_weights_and_place_of_the_model_do_not_matter() -> None:
    """A model on a GPU is asked as a copy without weights."""
    model = build("bloom")
    coupling, copy = coupling_of(model), without_weights(model)
    sites, _ = find_sites(coupling, load_recipe("slimgpt").units)
    assert all(parameter.is_meta for parameter in copy.parameters())
    assert not any(buffer.is_meta for buffer in copy.buffers())
    assert not any(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(ExportError, match="take no other number of head units"):
        check_class(copy, coupling, sites, Constraints())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_on_a_gpu_too(name: str) -> None:
    model = build(name).to("cuda")
    if name == "bloom":
        with pytest.raises(ExportError, match="nothing was computed"):
            prunec.prune(model, ratio=0.3, calibration=[example_for(model)])
    else:
        prunec.prune(model, ratio=0.3, calibration=[example_for(model)])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bloom"])
def test_nothing_else_is_refused(name: str) -> None:
    model = build(name)
    coupling = coupling_of(model)
    sites, _ = find_sites(coupling, load_recipe("slimgpt").units)
    assert sites
    for constraints in (Constraints(), Constraints({"ffn_channel": 8})):
        check_class(model, coupling, sites, constraints)
    check_class(without_weights(model), coupling, sites, Constraints())

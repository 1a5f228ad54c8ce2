"""Every shipped recipe: what it says, and that it runs; settings that a recipe does not take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor

import prunec
from prunec.cli.opening import parse_settings
from prunec.errors import PlanError
from prunec.passes.recipe import PARTS, Part, Recipe, load_recipe, recipe_names
from prunec.passes.shallow import DEPTH_KINDS
from prunec.settings import read_settings

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
RATIO = 0.3


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(2, VOCABULARY, (4, 16), generator=generator)} for _ in range(4)
    ]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_cites_its_paper_and_reads_back(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert "arXiv" in recipe.paper
    assert recipe.summary.endswith(".")
    for part in PARTS:
        getattr(recipe, part).build(part)
    assert Recipe.from_dict(recipe.to_dict(), where=name) == recipe
    section = DOCS.read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert recipe.summary in section
    assert recipe.paper in section
    for deviation in recipe.deviations:
        assert f"- {deviation}\n" in section
    for part in PARTS:
        assert f"`{getattr(recipe, part)}`" in section


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_runs_and_removes_what_was_asked(name: str) -> None:
    model = tiny_llama()
    searches = load_recipe(name).allocation.name == "search"
    settings = {"allocation.effort": "fast"} if searches else {}
    result = prunec.prune(model, recipe=name, ratio=RATIO, calibration=batches(), settings=settings)
    before = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in result.model.parameters()) < before
    whole = result.report.block_parameters[0]
    depth = not DEPTH_KINDS.isdisjoint(load_recipe(name).units)
    largest = whole / 2 if depth else 3 * model.config.hidden_size
    unit = largest / whole
    added = {n for n, _ in result.model.named_parameters()} - {
        n for n, _ in model.named_parameters()
    }
    assert bool(added) == (result.report.recipe.compensation.build("compensation").bias)
    places = sum(result.model.get_parameter(name).numel() for name in added)
    room = unit + places / result.report.block_parameters[0]
    assert abs(result.report.realised_ratio - RATIO) <= room
    batch = batches()[0]
    assert result.model(**batch).logits.isfinite().all()


@pytest.mark.parametrize(
    ("part", "options", "message", "fix"),
    [
        (("compensation", "least-squares"), {"bias": "maybe"}, "bias='maybe'", "true or false"),
        (("compensation", "least-squares"), {"target": "dens"}, "target='dens'", "'dense'"),
        (("compensation", "least-squares"), {"hold_out": 0.1}, "no option 'hold_out'", "'holdout'"),
        (("importance", "obs"), {"damping": "high"}, "damping='high'", "a number"),
        (("importance", "obs"), {"damping": math.inf}, "damping=inf", "a finite number"),
        (("allocation", "similarity-softmax"), {"alpha": math.nan}, "alpha=nan", "a finite number"),
        (("allocation", "search"), {"seed": -1}, "seed -1", "0 or more"),
        (("importance", "fisher"), {"of": "masks", "aggregation": "max"}, "'max'", "use sum"),
        (("importance", "obs"), {"last_batch": 1.5}, "last_batch=1.5", "a whole number"),
        (("importance", "obs"), {"damping": True}, "damping=True", "a number"),
        (("allocation", "log-increase"), {"first": "x"}, "first='x'", "a number or null"),
        (("importance", "taylor"), {"term": "element"}, "term='element'", "element1"),
    ],
)
def test_an_option_of_another_kind_says_what_it_takes(part, options, message, fix) -> None:
    group, name = part
    with pytest.raises(PlanError, match=message) as caught:
        Part(name, options).build(group)
    assert fix in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"first": None}, {"first": 0}, {"first": 0.1}, {"maximum": 0.5}],
)
def test_options_that_are_of_their_kind(options) -> None:
    Part("log-increase", options).build("allocation")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-2E+4", -2e4), ("1.5e3", 1.5e3), ("e3", "e3"), ("1e", "1e"), ("7", 7)],
)
def test_a_number_with_an_exponent_is_one(text: str, value: float | str) -> None:
    assert parse_settings([f"importance.damping={text}"]) == {"importance.damping": value}
    assert type(read_settings(text, "it")) is type(value)


@pytest.mark.parametrize("text", ["{", "*x", "@x", "2026-02-31"])
def test_a_setting_that_is_not_yaml_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"--set units=.* is not YAML"):
        parse_settings([f"units={text}"])


@pytest.mark.parametrize("units", ["ffn_chanel,head", 3, None, [], "", ["head", 1]])
def test_units_of_no_kind_are_refused(units: Any) -> None:
    """Else a slip of the pen would silently leave them whole."""
    with pytest.raises(PlanError, match=r"units=|no kind of unit"):
        load_recipe("slimgpt").override({"units": units})


def test_units_are_a_list_or_a_text_with_commas() -> None:
    for units in ("head,ffn_channel", ["head", "ffn_channel"]):
        assert load_recipe("slimgpt").override({"units": units}).units == ("head", "ffn_channel")

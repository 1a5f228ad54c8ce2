"""A package that prunec has never heard of adds a criterion, and prunes with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from plugins import installed
from tiny_model import VOCABULARY, tiny_llama

import prunec
from prunec import registry
from prunec.errors import PlanError

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture
def _installed(tmp_path: Path) -> Iterator[None]:
    with installed(PLUGIN, tmp_path):
        yield


@pytest.mark.usefixtures("_installed")
def test_an_installed_criterion_is_used_by_name_with_its_options() -> None:
    assert "last-units" in registry.names("importance")
    batch = {"input_ids": torch.arange(32).reshape(2, 16) % VOCABULARY}
    settings = {"importance": "last-units", "importance.scale": 2.0, "units": "ffn_channel"}
    result = prunec.prune(
        tiny_llama(), recipe="magnitude", ratio=0.2, calibration=[batch], settings=settings
    )
    for keep in result.plan.groups.values():
        assert keep.rows[()] == tuple(range(keep.count))
        assert keep.count < keep.size
    assert str(result.report.recipe.importance) == "last-units{scale=2.0}"


@pytest.mark.usefixtures("_installed")
def test_an_option_it_does_not_have_names_the_nearest() -> None:
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}
    settings = {"importance": "last-units", "importance.scal": 2.0}
    with pytest.raises(PlanError, match="no option 'scal'") as caught:
        prunec.prune(tiny_llama(), recipe="magnitude", calibration=[batch], settings=settings)
    assert "did you mean 'scale'" in str(caught.value)

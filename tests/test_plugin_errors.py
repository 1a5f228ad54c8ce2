"""Plug-ins that fail: one message each, which says whose it is and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from expecttest import assert_expected_inline as expect
from test_plugin_example import Net

import prunec
from prunec import registry
from prunec.codegen.exporters.exporter import _exporter
from prunec.errors import PlanError, PluginError
from prunec.importance.random import Random
from prunec.passes.recipe import Part


@dataclass(frozen=True)
class Good:
    scale: float = 1.0

    statistics: ClassVar[frozenset[str]] = frozenset()

    def rank(self, problem: Any, statistics: Any, *, limit: int | None = None) -> Any:
        return Random().rank(problem, statistics, limit=limit)


class Raises(Good):
    def rank(self, problem: Any, statistics: Any, *, limit: int | None = None) -> Any:
        return {}["nothing"]


class Lists(Good):
    def rank(self, problem: Any, statistics: Any, *, limit: int | None = None) -> Any:
        return [1, 2]


class Short(Good):
    def rank(self, problem: Any) -> Any:  # type: ignore[override]
        return None


@dataclass(frozen=True)
class Bare:
    def rank(self, problem: Any, statistics: Any, *, limit: int | None = None) -> Any:
        return None


@dataclass(frozen=True)
class Elsewhere:
    share: Any = 3.0
    site: str = "nowhere"

    needs_data: ClassVar[bool] = False

    def shares(self, context: Any) -> Mapping[str, float]:
        return {self.site or context.rooms[0].site: self.share}


class Plain:
    file = "model.npz"
    alone = True


@dataclass(frozen=True)
class Half:
    compress: bool = False

    file: ClassVar[str] = "model.npz"
    alone: ClassVar[bool] = True

    def can_express(self, source: Any) -> list[str]:
        return []


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand a class in for whatever plug-in is asked for by the name `mine`."""

    def installed(made: type) -> None:
        found = registry.plugin
        monkeypatch.setattr(
            registry, "plugin", lambda group, name: made if name == "mine" else found(group, name)
        )

    return installed


def prune(**settings: Any) -> Any:
    batches = [{"x": torch.ones(2, 3, 4)}]
    return prunec.prune(
        Net(), recipe="magnitude", ratio=0.25, calibration=batches, settings=settings
    )


def test_one_that_works_is_itself(install: Any) -> None:
    install(Good)
    built = Part("mine", {"scale": 2.0}).build("importance")
    assert isinstance(built, Good)
    assert repr(built) == "Good(scale=2.0)"
    assert prune(importance="mine").report.realised_ratio == pytest.approx(0.25, abs=0.03)


def test_one_that_raises_says_where(install: Any) -> None:
    install(Raises)
    with pytest.raises(
        PluginError, match="the importance plug-in 'mine' fails: KeyError"
    ) as raised:
        prune(importance="mine")
    assert "test_plugin_errors.py" in str(raised.value.where)
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Short, "has no method rank that can be called as it has to be"),
        (Bare, "has no attribute 'statistics'"),
        (Lists, "rank returns a list"),
    ],
)
def test_one_that_is_no_criterion(install: Any, made: type, message: str) -> None:
    install(made)
    with pytest.raises(PluginError, match=message):
        prune(importance="mine")


def test_the_message_has_the_definition(install: Any) -> None:
    install(Short)
    with pytest.raises(PluginError) as raised:
        Part("mine", {}).build("importance")
    expect(str(raised.value.fix), "def rank(self, problem, statistics, *, limit=None)")


def test_shares_of_what_is_no_site_or_no_number(install: Any) -> None:
    install(Elsewhere)
    with pytest.raises(PlanError, match="'nowhere', which is no site"):
        prune(allocation="mine")
    for share in (float("nan"), "half"):
        with pytest.raises(PlanError, match=r"a share of (nan|'half')"):
            prune(**{"allocation": "mine", "allocation.site": "", "allocation.share": share})


def test_exporters(install: Any) -> None:
    install(Plain)
    with pytest.raises(PluginError, match="'mine' is no dataclass"):
        _exporter("mine", {})
    install(Half)
    with pytest.raises(PluginError, match="no method needed_bytes") as raised:
        _exporter("mine", {})
    assert raised.value.fix == "def needed_bytes(self, source)"
    with pytest.raises(PlanError, match="compress='maybe' is not possible"):
        _exporter("mine", {"compress": "maybe"})

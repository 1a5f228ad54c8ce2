"""The examples run, and what they measure is what they are about."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, float]]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: importlib.import_module(name).main()


@pytest.mark.slow
def test_custom_operator(run: Callable[[str], dict[str, float]]) -> None:
    measured = run("custom_operator")
    assert measured["before"] < 5.5  # it has learnt something: seven bits is chance
    assert measured["after"] < measured["before"] + 0.3
    assert measured["parameters"] < 0.9


@pytest.mark.slow
def test_moe_upcycling(run: Callable[[str], dict[str, float]]) -> None:
    measured = run("moe_upcycling")
    assert measured["before"] < 5.5
    assert measured["after"] < measured["before"] + 1
    assert measured["parameters"] < 0.85


@pytest.mark.slow
@pytest.mark.skipif(find_spec("rxnmapper") is None, reason="its weights are a package of their own")
def test_albert_reactions(run: Callable[[str], dict[str, float]]) -> None:
    measured = run("albert_reactions")
    assert measured["before"] > 0.5
    assert measured["after"] > 0.5 * measured["before"]
    assert measured["parameters"] < 0.96  # each group gives 4 % of its channels


@pytest.mark.slow
@pytest.mark.skipif(find_spec("antiberty") is None, reason="its weights are a package of their own")
def test_bert_antibodies(run: Callable[[str], dict[str, float]]) -> None:
    measured = run("bert_antibodies")
    assert measured["before"] > 0.5
    assert measured["after"] > 0.5 * measured["before"]
    assert measured["parameters"] < 0.96  # each group gives 4 % of its channels


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("efficientnet_lite_pytorch") is None or find_spec("skimage") is None,
    reason="its weights and pictures are packages of their own",
)
def test_cnn_photographs(run: Callable[[str], dict[str, float]]) -> None:
    measured = run("cnn_photographs")
    assert measured["before"] == 1
    assert measured["after"] > 0.4
    assert measured["parameters"] < 0.96  # each group gives 4 % of its channels

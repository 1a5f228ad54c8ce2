"""The benchmark of latency: what it says of its turns, and that it goes on where it stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import latency

    yield latency
    for name in ("latency", "engines", "common"):
        del sys.modules[name]


def test_a_speed_up_is_the_median_within_turns(latency: ModuleType) -> None:
    """One that is faster in every turn is so when the machine slows; llama.cpp has its own ideal."""
    rows = {
        "dense": {"prefill_ms": [10.0, 100.0, 12.0], "decode_ms": [4.0] * 3, "memory_bytes": 2e8},
        "-50%": {"prefill_ms": [5.0, 60.0, 6.0], "decode_ms": [5.0] * 3, "memory_bytes": 1e8},
    }
    ideal = {"dense": {}, "-50%": {"all logits": 0.5, "last logits": 0.4, "weights": 0.8}}
    table = {"ideal": ideal, "eager": rows, "llama.cpp": rows}
    assert latency.markdown(table).splitlines()[2:] == [
        "| torch eager | dense | 12.0 ms |  | 4.0 ms |  | 200 MB |",
        "| torch eager | -50% | 6.0 ms | 2.00 of 2.00: 100% | 5.0 ms | 0.80 of 1.25: 64% | 100 MB |",
        "| llama.cpp | dense | 12.0 ms |  | 4.0 ms |  | 200 MB |",
        "| llama.cpp | -50% | 6.0 ms | 2.00 of 2.50: 80% | 5.0 ms | 0.80 of 1.25: 64% | 100 MB |",
    ]


def test_models_take_turns_and_the_first_warms_up(latency: ModuleType) -> None:
    engines, seen, ticks = sys.modules["engines"], [], count()
    runs = {
        name: engines.Runs(
            lambda name=name: seen.append(name), None if name == "a" else lambda: [9.0, 2.0, 4.0]
        )
        for name in "ab"
    }
    found = engines.speed(runs, 2, lambda: next(ticks))
    assert seen == ["a", "b"] * 3
    assert found["a"] == {"prefill_ms": [1000, 1000]}
    assert found["b"] == {"prefill_ms": [1000, 1000], "decode_ms": [3000, 3000]}


def test_what_stands_is_not_measured_again(
    latency: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["common"], "RESULTS", tmp_path)
    measured: list[str] = []

    def run(*arguments: str) -> list[str]:
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["latency.py", *arguments])
        latency.main()
        return list(measured)

    def measure(name: str) -> dict[str, object]:
        measured.append(name)
        return {}

    def cells(_: object) -> dict[str, object]:
        return {name: partial(measure, name) for name in ("ideal", "profile")}

    monkeypatch.setattr(latency, "cells", cells)
    assert run("--markdown") == []
    assert run() == ["ideal", "profile"]
    assert run() == []
    assert run("--again", "profile") == ["profile"]
    assert run("--threads", "2") == ["ideal", "profile"]


def test_the_docs_show_what_was_measured(latency: ModuleType) -> None:
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    tables = latency.read("latency")
    assert tables
    for table in tables.values():
        assert latency.markdown(table) in text
        assert latency.parts(table) in text

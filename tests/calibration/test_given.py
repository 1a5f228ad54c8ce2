"""Batches from Python: any iterable of inputs, and package.module:loader."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import tiny_llama
from torch import Tensor, nn

from prunec.calibration import Calibration, calibrate, collect
from prunec.calibration.given import forward_inputs
from prunec.errors import CalibrationError, ModelError, TraceError
from prunec.graph.trace import trace


class TwoIn(nn.Module):
    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return left + scale * right


class OneIn(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


def test_batches_of_one_shape_stay_as_they_are() -> None:
    batches = [{"x": torch.randn(3, 4), "flag": torch.tensor(1)} for _ in range(2)]
    got = collect(batches, OneIn())
    assert all(
        torch.equal(a[n], b[n]) for a, b in zip(got.batches, batches, strict=True) for n in a
    )
    (source,) = got.sources
    assert (source.kind, source.samples, source.tokens) == ("given", 6, 0)
    assert collect(got, OneIn()) is got


def test_an_iterable_that_can_be_read_once() -> None:
    def stream() -> Iterator[Tensor]:
        for _ in range(3):
            yield torch.ones(2, 4)

    got = collect(stream(), OneIn())
    assert [list(batch) for batch in got.batches] == [["x"]] * 3


@pytest.mark.parametrize(
    ("model", "item", "names"),
    [
        (OneIn(), torch.ones(2, 3), ["x"]),
        (OneIn(), (torch.ones(2, 3),), ["x"]),
        (OneIn(), (torch.ones(2, 3), torch.ones(2)), ["x", "labels"]),
        (OneIn(), [torch.ones(2, 3), torch.ones(2)], ["x", "labels"]),
        (OneIn(), ({"x": torch.ones(2, 3)}, torch.ones(2)), ["x", "labels"]),
        (OneIn(), {"x": np.ones((2, 3), np.float32)}, ["x"]),
        (TwoIn(), (torch.ones(2, 3), torch.ones(2, 3)), ["left", "right"]),
        (TwoIn(), (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), ["left", "right", "labels"]),
        (TwoIn(), ((torch.ones(2, 3), torch.ones(2, 3)), torch.ones(2)), ["left", "right", "labels"]),
        (tiny_llama(), torch.ones(2, 3, dtype=torch.int64), ["input_ids"]),
    ],
)  # fmt: skip
def test_forms_of_a_batch(model: nn.Module, item: Any, names: list[str]) -> None:
    (batch,) = collect([item], model).batches
    assert list(batch) == names
    assert all(isinstance(value, Tensor) for value in batch.values())


def test_a_last_batch_that_is_smaller() -> None:
    whole = torch.arange(30.0).reshape(10, 3)
    got = collect(torch.split(whole, 4), OneIn())
    assert [tuple(batch["x"].shape) for batch in got.batches] == [(2, 3)] * 5
    assert torch.equal(torch.cat([batch["x"] for batch in got.batches]), whole)
    assert got.digest == collect(torch.split(whole, 5), OneIn()).digest


def test_tokens_of_different_lengths_are_padded() -> None:
    rows = [torch.full((2, 3), 5), torch.full((1, 6), 7)]
    got = collect([{"input_ids": row} for row in rows], tiny_llama())
    ids = torch.cat([b["input_ids"] for b in got.batches])
    mask = torch.cat([b["attention_mask"] for b in got.batches])
    assert ids.shape == (3, 6)
    assert mask.sum(dim=1).tolist() == [3, 3, 6]
    assert got.tokens == 12


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([], "gives no batches"),
        (["text"], "x is of type str, not a tensor"),
        ("text.txt", "is a str, not batches"),
        ({"x": torch.ones(2)}, "is a dict, not batches"),
        (3, "is a int, not batches"),
        ([{}], "without a sample"),
        ([{"x": torch.ones(0, 3)}], "without a sample"),
        ([(torch.ones(2), torch.ones(2), torch.ones(2))], "has 3 values, and forward takes x"),
        ([{"x": torch.ones(2, 3)}, {"x": torch.ones(2, 4)}], "different shapes"),
        ([{"x": torch.ones(2, 3)}, {"y": torch.ones(2, 3)}], "different inputs"),
        ([{"x": torch.ones(2, 3), "k": torch.ones(5)}, {"x": torch.ones(1, 3)}], "has not the 2"),
    ],
)
def test_what_is_no_batch(batches: Any, reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason) as caught:
        collect(batches, OneIn())
    assert "\n" not in caught.value.message


def test_labels_and_what_only_the_loss_reads() -> None:
    batch = {"x": torch.ones(2, 3), "labels": torch.ones(2), "weight": torch.ones(2)}
    assert list(forward_inputs(OneIn(), batch, loss=True)) == ["x"]
    with pytest.raises(CalibrationError, match="unexpected keyword argument 'weight'") as caught:
        forward_inputs(OneIn(), batch, loss=False)
    assert "forward takes x, mask" in str(caught.value)
    with pytest.raises(CalibrationError, match="missing a required argument: 'right'"):
        forward_inputs(TwoIn(), {"left": torch.ones(2)}, loss=True)


class AllOptional(nn.Module):
    def forward(self, x: Any = None, mask: Any = None, **rest: Any) -> Any:
        return x


def test_a_batch_of_labels_alone() -> None:
    with pytest.raises(CalibrationError, match="a batch holds labels, and no input of AllOpt"):
        forward_inputs(AllOptional(), {"labels": torch.ones(2)}, loss=False)


def test_an_input_that_the_model_makes_nothing_of() -> None:
    with pytest.raises(TraceError, match="AllOptional makes nothing of the input masks") as caught:
        trace(AllOptional(), {"x": torch.ones(2, 3), "masks": torch.ones(2)})
    assert "forward takes x, mask, rest" in str(caught.value)
    trace(AllOptional(), {"x": torch.ones(2, 3), "mask": torch.ones(2)})


LOADER = """
import torch

def batches():
    return [{"input_ids": torch.full((4, 8), i)} for i in range(3)]

def endless():
    while True:
        yield {"input_ids": torch.ones(4, 8, dtype=torch.int64)}

def empty(): return []
def number(): return 3
def one(): return {"input_ids": torch.ones(4, 8)}
def failing(): raise RuntimeError("no such bucket")
def late():
    yield {"input_ids": torch.ones(4, 8, dtype=torch.int64)}
    raise RuntimeError("connection lost")
constant = 3
"""


@pytest.fixture
def loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_loaders", raising=False)
    (tmp_path / "my_loaders.py").write_text(LOADER)


def drawn(*specs: str, samples: int = 100, **options: Any) -> Calibration:
    settings = {"model": tiny_llama(), "samples": samples, "seq_len": 8, **options}
    return calibrate([*specs], options.pop("tokenizer", None), **settings)


@pytest.mark.usefixtures("loaders")
def test_a_loader_by_name() -> None:
    got = drawn("my_loaders:batches")
    assert [tuple(b["input_ids"].shape) for b in got.batches] == [(4, 8)] * 3
    (source,) = got.sources
    assert (source.name, source.kind) == ("my_loaders:batches", "loader")
    assert (source.samples, source.tokens, source.digest) == (12, 96, got.digest)
    assert drawn("my_loaders:endless", samples=10).sources[0].samples == 10
    assert drawn("my_loaders:endless", samples=10, batch_size=5).batches[0]["input_ids"].shape == (5, 8)  # fmt: skip


@pytest.mark.usefixtures("loaders")
def test_a_loader_beside_a_text(text_file: Path, tokenizer: Any) -> None:
    model, sources = tiny_llama(), ["my_loaders:batches=3", str(text_file)]
    got = calibrate(sources, tokenizer, model=model, samples=8, seq_len=8, batch_size=2)
    assert [(s.kind, s.samples) for s in got.sources] == [("loader", 6), ("text", 2)]
    assert got.batches[0]["input_ids"].tolist() == [[0] * 8] * 2


@pytest.mark.usefixtures("loaders")
@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("empty", CalibrationError, "my_loaders:empty gives no batches"),
        ("number", CalibrationError, "gave int, not batches"),
        ("one", CalibrationError, "gave dict, not batches"),
        ("failing", ModelError, "RuntimeError: no such bucket"),
        ("late", ModelError, "RuntimeError: connection lost"),
        ("absent", ModelError, "cannot import"),
        ("constant", ModelError, "is no function"),
    ],
)
def test_a_loader_that_fails(name: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        drawn(f"my_loaders:{name}")

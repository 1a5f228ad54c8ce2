from __future__ import annotations

import json
from dataclasses import asdict, replace
from math import isnan

import pytest
from tiny_model import tiny_llama

from prunec.errors import CalibrationError, ModelError, PlanError
from prunec.evaluation import Comparison, Evaluation, Metric, measure, named_protocol
from prunec.evaluation.comparison import shown, task_metric
from prunec.evaluation.tasks import TaskScore


def test_retention_is_the_better_way_up() -> None:
    base, worse = (
        Metric("p", 20.0, higher_is_better=False),
        Metric("p", 25.0, higher_is_better=False),
    )
    assert worse.retention(base) == pytest.approx(0.8)
    assert Metric("a", 0.6).retention(Metric("a", 0.8)) == pytest.approx(0.75)
    assert Metric("t", 15.0, unit="ms").retention(Metric("t", 30.0, unit="ms")) == pytest.approx(
        0.5
    )
    assert Metric("kl", 0.6, unit="nats").retention(Metric("kl", 0.1, unit="nats")) is None


def test_one_table_for_several_models() -> None:
    dense = Evaluation("dense", (Metric("perplexity", 18.5, 0.3, "", False, "t: 4 windows"),))
    small = Evaluation(
        "small",
        (
            Metric("perplexity", 37.0, 1.2, "", False, "t: 4 windows"),
            Metric("piqa acc", 0.5, 0.05, "part", True, "lm-eval, 0-shot"),
        ),
    )
    table = Comparison((dense, small))
    assert table.head == ["", "dense", "small", "kept"]
    assert table.rows() == [
        ["perplexity", "18.50 ± 0.30", "37.00 ± 1.20", "50.0%"],
        ["piqa acc", "", "50.00 ± 5.00 %", ""],
    ]
    text = table.to_markdown()
    assert "| perplexity | 18.50 ± 0.30 | 37.00 ± 1.20 | 50.0% |" in text
    assert "- t: 4 windows" in text
    assert Comparison((dense, small, small)).head == ["", "dense", "small", "kept", "small", "kept"]
    assert [len(row) for row in Comparison((dense, small, small)).rows()] == [6, 6]
    assert Evaluation.from_json(small.to_json()) == small


def test_samples_that_are_the_same_for_both_are_paired() -> None:
    def accuracy(*outcomes: float, how: str = "piqa") -> Metric:
        value = sum(outcomes) / len(outcomes)
        return Metric("piqa acc", value, 0.25, "part", True, how, outcomes)

    dense, small = accuracy(1, 1, 0, 1), accuracy(1, 0, 0, 1)
    difference = small.difference(dense)
    assert difference is not None
    assert (difference.value, difference.stderr) == (-0.25, pytest.approx(0.25))
    assert dense.difference(replace(small, how="of another length")) is None
    assert dense.difference(replace(small, outcomes=())) is None
    table = Comparison((Evaluation("dense", (dense,)), Evaluation("small", (small,))))
    assert table.rows()[0][-1] == "66.7% (-25.00 ± 25.00 %)"
    assert "paired samples" in table.notes()[-1]
    read = Evaluation.from_json(json.loads(json.dumps(table.evaluations[1].to_json())))
    assert read.metrics == (small,)


def test_a_figure_that_is_not_finite_comes_back_from_json() -> None:
    entry = asdict(Metric("perplexity", 1.0)) | {"value": None}
    (metric,) = Evaluation.from_json({"model": "broken", "metrics": [entry]}).metrics
    assert isnan(metric.value)
    assert shown(metric) == "nan"


def test_units_that_a_person_reads() -> None:
    assert shown(Metric("m", 538e6, unit="bytes")) == "538.0 MB"
    assert shown(Metric("m", 2.5e9, unit="bytes")) == "2.50 GB"
    assert shown(Metric("m", 12_300, unit="bytes")) == "12.3 kB"
    assert shown(Metric("m", 0, unit="bytes")) == "0 B"
    assert shown(Metric("n", 134515008, unit="count")) == "134,515,008"


def test_a_task_says_of_how_many_samples_it_is() -> None:
    part = TaskScore("piqa", "acc", 0.5, 0.05, True, samples=200, shots=0, version="1")
    assert task_metric(part).how == "piqa: lm-eval, 0-shot, 200 samples"
    whole = replace(part, samples=1838)
    assert task_metric(whole).how != task_metric(part).how


def test_protocols_have_names() -> None:
    assert [named_protocol(name).window for name in ("A", "b", "C")] == [128, 2048, 4096]
    with pytest.raises(CalibrationError, match="no perplexity protocol 'Q'"):
        named_protocol("Q")


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(PlanError, match="cannot time 3 runs of 0 sequences"):
        measure(tiny_llama(), batch=0)
    with pytest.raises(PlanError, match="reads at most 128"):
        measure(tiny_llama(), prompt=128)
    with pytest.raises(ModelError, match="no weights"):
        measure(tiny_llama().to("meta"))

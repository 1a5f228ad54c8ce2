"""Figures of several models in one table, with what each keeps of the first one's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from math import nan, sqrt
from statistics import fmean, stdev
from typing import Any, Literal

from prunec.evaluation.accuracy import Accuracy
from prunec.evaluation.divergence import Divergence
from prunec.evaluation.latency import Speed
from prunec.evaluation.perplexity import Perplexity
from prunec.evaluation.tasks import TaskScore

Unit = Literal["", "part", "ms", "bytes", "count", "nats"]


@dataclass(frozen=True)
class Metric:
    """One figure of one model.

    Attributes:
        name: what was measured, such as ``perplexity`` or ``piqa acc_norm``.
        value, stderr: in `unit`; None where there is no standard error.
        unit: "part" is 0 to 1 and shown in per cent, "count" a whole number, "" a bare number.
        higher_is_better: which way is up.
        how: the protocol, such as ``valid.txt, 40 windows of 1024``; figures compare where it is
            the same.
        outcomes: what each sample gave, where the value is their mean.
    """

    name: str
    value: float
    stderr: float | None = None
    unit: Unit = ""
    higher_is_better: bool = True
    how: str = ""
    outcomes: tuple[float, ...] = field(default=(), repr=False)

    def retention(self, base: Metric) -> float | None:
        """The part of the base's figure, 1 for all of it; None where that says nothing.

        Quality is the better way up: twice the perplexity is half. A cost (parameters, bytes,
        milliseconds) is the part that is left.
        """
        if self.unit in ("count", "bytes", "ms"):
            return self.value / base.value if base.value > 0 else None
        good, bad = (self, base) if self.higher_is_better else (base, self)
        return good.value / bad.value if bad.value > 0 and self.unit != "nats" else None

    def difference(self, base: Metric) -> Metric | None:
        """How much more than the base's, its standard error that of paired samples.

        Which samples are hard is the same for both models, so it is less than the two errors say.
        None where the samples are not known, or not the same number.
        """
        if self.how != base.how or len(self.outcomes) != len(base.outcomes) or not self.outcomes:
            return None
        each = [mine - other for mine, other in zip(self.outcomes, base.outcomes, strict=True)]
        stderr = stdev(each) / sqrt(len(each)) if len(each) > 1 else None
        return replace(self, value=fmean(each), stderr=stderr, outcomes=tuple(each))


@dataclass(frozen=True)
class Evaluation:
    """All figures of one model."""

    model: str
    metrics: tuple[Metric, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"model": self.model, "metrics": [asdict(metric) for metric in self.metrics]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Evaluation:
        """Reads what `to_json` wrote; a figure that is not finite may have become None."""
        return cls(str(data["model"]), tuple(map(_read, data["metrics"])))


@dataclass(frozen=True)
class Comparison:
    """Several models on the same metrics; the first is the base."""

    evaluations: tuple[Evaluation, ...]

    @property
    def head(self) -> list[str]:
        """Column titles: the metric, the base, then each model and what it keeps."""
        base, *others = (evaluation.model for evaluation in self.evaluations)
        return ["", base, *(title for name in others for title in (name, "kept"))]

    def rows(self) -> list[list[str]]:
        """A row a metric, as text; empty where a model has no such figure."""
        keys = list(dict.fromkeys((m.name, m.how) for e in self.evaluations for m in e.metrics))
        return [self._row(name, how) for name, how in keys]

    def notes(self) -> list[str]:
        """How the figures were taken, a line a protocol."""
        lines = {m.how: None for e in self.evaluations for m in e.metrics if m.how}
        kept = "kept: per cent of the first model's figure; of a perplexity, the inverse"
        paired = "in brackets: the difference, with the standard error of paired samples"
        rows = [cell for row in self.rows() for cell in row[2:]]
        return [
            *lines,
            *([kept] if len(self.evaluations) > 1 else []),
            *([paired] if any("(" in cell for cell in rows) else []),
        ]

    def to_markdown(self) -> str:
        """The table and its notes."""
        aligned = [":--", *("--:" for _ in self.head[1:])]
        lines = [self.head, aligned, *self.rows()]
        table = "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)
        notes = "\n".join(f"- {note}" for note in self.notes())
        return f"{table}\n\n{notes}\n"

    def _row(self, name: str, how: str) -> list[str]:
        base, *others = (_find(evaluation, name, how) for evaluation in self.evaluations)
        cells = [cell for metric in others for cell in (_shown(metric), _kept(metric, base))]
        same_name = {m.how for e in self.evaluations for m in e.metrics if m.name == name}
        return [name if len(same_name) == 1 else f"{name} ({how})", _shown(base), *cells]


def _read(entry: dict[str, Any]) -> Metric:
    value = nan if entry["value"] is None else entry["value"]
    return Metric(**{**entry, "value": value, "outcomes": tuple(entry.get("outcomes", ()))})


def shown(metric: Metric, sign: Literal["", "+"] = "") -> str:
    """A figure with its standard error, in units that a person reads; of a difference "+" as well.

    >>> shown(Metric("piqa acc", 0.6812, 0.0109, "part"))
    '68.12 ± 1.09 %'
    """
    scale, digits, unit = _form(metric)
    text = f"{metric.value * scale:{sign},.{digits}f}"
    if metric.stderr is not None:
        text += f" ± {metric.stderr * scale:,.{digits}f}"
    return f"{text} {unit}".rstrip()


def _form(metric: Metric) -> tuple[float, int, str]:
    if metric.unit == "part":
        return 100.0, 2, "%"
    if metric.unit == "count":
        return 1.0, 0, ""
    if metric.unit == "bytes":
        sizes = ((1e9, 2, "GB"), (1e6, 1, "MB"), (1e3, 1, "kB"))
        size, digits, unit = next((s for s in sizes if metric.value >= s[0]), (1.0, 0, "B"))
        return 1 / size, digits, unit
    if metric.unit == "nats":
        return 1.0, 4, ""
    return 1.0, 2 if metric.value < 1000 else 0, metric.unit


def _shown(metric: Metric | None) -> str:
    return "" if metric is None else shown(metric)


def _kept(metric: Metric | None, base: Metric | None) -> str:
    if metric is None or base is None or (retention := metric.retention(base)) is None:
        return ""
    difference = metric.difference(base)
    return f"{retention:.1%}" + (f" ({shown(difference, '+')})" if difference else "")


def _find(evaluation: Evaluation, name: str, how: str) -> Metric | None:
    return next((m for m in evaluation.metrics if (m.name, m.how) == (name, how)), None)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def perplexity_metric(found: Perplexity, data: str, protocol: str | None = None) -> Metric:
    """Perplexity on `data`, named by the protocol where it has a name."""
    name = f"perplexity {protocol}" if protocol else "perplexity"
    how = f"{data}: {found.windows} windows of {found.window} tokens, stride {found.stride}"
    return Metric(name, found.value, found.stderr, higher_is_better=False, how=how)


def divergence_metrics(found: Divergence, data: str) -> list[Metric]:
    """KL and agreement."""
    how = f"against the base on {data}: {found.windows} windows of {found.window} tokens"
    return [
        Metric("KL from the base", found.kl, found.kl_stderr, "nats", False, how),
        Metric("top-1 agreement", found.agreement, found.agreement_stderr, "part", True, how),
    ]


def task_metric(score: TaskScore) -> Metric:
    """One metric of one task; accuracies are shown in per cent."""
    part = score.metric.startswith(("acc", "average", "exact_match", "f1", "mcc"))
    how = f"{score.task}: lm-eval, {score.shots}-shot, {score.samples:,} samples"
    return Metric(
        f"{score.task} {score.metric}",
        score.value,
        score.stderr,
        "part" if part else "",
        score.higher_is_better,
        how,
        score.outcomes,
    )


def accuracy_metrics(found: Accuracy, name: str) -> list[Metric]:
    """Accuracy and the loss of the right answers."""
    how = f"{found.data}: {found.samples:,} predictions"
    return [
        Metric(name, found.value, found.stderr, "part", True, how),
        Metric(f"{name}: loss", found.nll, None, "nats", False, how),
    ]


def speed_metrics(speed: Speed) -> list[Metric]:
    """Latency and memory."""
    what = "one pass of the example inputs" if speed.prompt is None else f"prompt {speed.prompt}"
    threads = "1 thread" if speed.threads == 1 else f"{speed.threads} threads"
    how = f"medians, batch {speed.batch}, {what}, {threads}"
    found = [Metric("prefill", speed.prefill_ms, None, "ms", False, how)]
    if speed.decode_ms_per_token is not None:
        found.append(Metric("a new token", speed.decode_ms_per_token, None, "ms", False, how))
    return [*found, Metric("peak memory", speed.peak_memory_bytes, None, "bytes", False, how)]

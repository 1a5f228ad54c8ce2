from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunec.cli import options
from prunec.errors import CalibrationError

if TYPE_CHECKING:
    from prunec.cli.console import Screen
    from prunec.evaluation import Evaluation, Metric, Perplexity
    from prunec.models import Source


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL_OR_DIR...", help="Models; the first is the base.")
    ],
    ppl: Annotated[
        Path | None, typer.Option("--ppl", metavar="FILE", help="Text to measure perplexity on.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="The papers' perplexity: WikiText-2 test in windows of 128 (A), 2048 (B), "
            "4096 (C). --ppl replaces the text.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens a window.  [default: 1024, of --masked 128, or what the model reads]",
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from window to window.  [default: a window]")
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N windows.")
    ] = None,
    divergence: Annotated[
        bool,
        typer.Option("--kl", help="KL from the base and top-1 agreement with it, on the text."),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="lm-eval tasks by name, or commonsense7."),
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder of lm-eval task files.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Samples a task; below 1, a part of them.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt of a task.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows, or requests of a task, at once.")
    ] = 1,
    masked: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to measure a masked language model's accuracy on."),
    ] = None,
    loader: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME", help="A function that returns (inputs, labels) batches."
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Latency of prefill and decoding, and peak memory.")
    ] = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown too.")
    ] = None,
    json: options.Json = None,
    device: options.Device = "cpu",
    dtype: options.DType = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure models and compare them with the first.

    All models see the same text, windows and tasks. Standard errors follow a ±.

    Example: prunec eval smollm2 smaller --ppl valid.txt --kl --tasks piqa,arc_easy --json -
    """
    from prunec.calibration import read_text
    from prunec.cli.console import Screen, check_file_target, write_text
    from prunec.cli.opening import open_measured
    from prunec.evaluation import Comparison
    from prunec.evaluation.tasks import find_tasks
    from prunec.models import find_model

    screen = Screen(quiet=quiet, json=json)
    check_file_target(markdown, "--markdown")
    for path in (ppl, masked):
        if path is not None:
            read_text(path)  # its errors come before the models open
    plan = Wanted(
        texts=_texts(screen, ppl, protocol, window, stride),
        window=window,
        stride=stride,
        max_windows=max_windows,
        divergence=divergence,
        tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
        include_path=tuple(include_path or ()),
        limit=limit if limit is None or limit < 1 else int(limit),
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        masked=masked,
        loader=loader,
        speed=speed,
    )
    plan.check()
    if plan.tasks:
        with screen.task("find the tasks"):
            find_tasks(plan.tasks, plan.include_path)
    for spec in models[1:]:  # the first is opened before anything is measured
        find_model(spec, trust_remote_code=trust_remote_code, progress=screen)
    entries: list[dict[str, Any]] = []
    found: list[Evaluation] = []
    base: Source | None = None
    for spec in models:
        source = open_measured(
            spec, screen, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        evaluation, entry = measure_model(screen, spec, source, plan, base)
        found.append(evaluation)
        entries.append(entry)
        if divergence and base is None:
            base = source
    comparison = Comparison(tuple(found))
    show_comparison(screen, comparison)
    if markdown is not None:
        write_text(markdown, comparison.to_markdown())
    screen.write_json(entries)


@dataclass(frozen=True)
class Text:
    """A text and the window asked for, if any; `protocol` is the papers' name of the two."""

    content: Path | str
    name: str
    window: int | None
    protocol: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    texts: tuple[Text, ...] = ()
    window: int | None = None
    stride: int | None = None
    max_windows: int | None = None
    divergence: bool = False
    tasks: tuple[str, ...] = ()
    include_path: tuple[Path, ...] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    masked: Path | None = None
    loader: str | None = None
    speed: bool = False

    def check(self) -> None:
        """Raises CalibrationError if there is nothing to measure, or no text for it."""
        if self.divergence and not self.texts:
            raise CalibrationError("--kl needs a text", fix="--ppl FILE, or --protocol A")
        if not (self.texts or self.tasks or self.masked or self.loader or self.speed):
            raise CalibrationError(
                "nothing to measure",
                fix="--ppl FILE, --protocol A, --tasks NAME, --masked FILE, --loader M:F, --speed",
            )
        if self.limit is not None and not self.limit > 0:
            raise CalibrationError(
                f"--limit {self.limit:g} leaves no sample", fix="a number above 0"
            )


def measure_model(
    screen: Screen, spec: str, source: Source, plan: Wanted, base: Source | None
) -> tuple[Evaluation, dict[str, Any]]:
    """Every figure that was asked for, for the table and as plain data."""
    from prunec.evaluation import Evaluation, Metric, parameter_count

    parameters = parameter_count(source.model)
    metrics = [Metric("parameters", parameters, unit="count", higher_is_better=False)]
    entry: dict[str, Any] = {"model": spec, "parameters": parameters}
    for name, found in (
        ("perplexities", _perplexities(screen, source, plan)),
        ("divergences", _divergences(screen, source, plan, base)),
        ("tasks", _tasks(screen, source, plan)),
        ("accuracies", _accuracies(screen, source, plan)),
        ("speed", _speed(screen, source, plan)),
    ):
        if found:
            entry[name] = [figures for figures, _ in found]
            metrics += [metric for _, made in found for metric in made]
    if entry.get("perplexities"):  # the first is also at hand without a list
        measured = dict(entry["perplexities"][0])
        entry |= {"perplexity": measured.pop("value"), **measured}
    evaluation = Evaluation(spec, tuple(metrics))
    return evaluation, entry | {"metrics": evaluation.to_json()["metrics"]}


Found = list[tuple[dict[str, Any], "list[Metric]"]]


def _perplexities(screen: Screen, source: Source, plan: Wanted) -> Found:
    from prunec.evaluation import perplexity
    from prunec.evaluation.comparison import perplexity_metric

    found: Found = []
    for text in plan.texts:
        measured: Perplexity = perplexity(
            source.model,
            source.tokenizer,
            text.content,
            window=text.window,
            stride=plan.stride,
            max_windows=plan.max_windows,
            batch_size=plan.batch_size,
            progress=screen,
        )
        figures = {**vars(measured), "data": text.name, "protocol": text.protocol}
        metric = perplexity_metric(measured, text.name, text.protocol)
        found.append((figures, [metric]))
    return found


def _divergences(screen: Screen, source: Source, plan: Wanted, base: Source | None) -> Found:
    from prunec.evaluation import divergence
    from prunec.evaluation.comparison import divergence_metrics

    if base is None or not plan.divergence:
        return []
    text = plan.texts[0]
    measured = divergence(
        source.model,
        base.model,
        source.tokenizer,
        text.content,
        window=text.window,
        max_windows=plan.max_windows,
        progress=screen,
    )
    return [({**vars(measured), "data": text.name}, divergence_metrics(measured, text.name))]


def _tasks(screen: Screen, source: Source, plan: Wanted) -> Found:
    from prunec.evaluation import task_scores
    from prunec.evaluation.comparison import task_metric

    if not plan.tasks:
        return []
    scores = task_scores(
        source.model,
        source.tokenizer,
        plan.tasks,
        include_path=plan.include_path,
        limit=plan.limit,
        num_fewshot=plan.num_fewshot,
        batch_size=plan.batch_size,
        progress=screen,
    )
    found: Found = []
    for score in scores:  # its outcomes stand in its metric
        figures = {name: value for name, value in vars(score).items() if name != "outcomes"}
        found.append((figures, [task_metric(score)]))
    return found


def _accuracies(screen: Screen, source: Source, plan: Wanted) -> Found:
    from prunec.evaluation import loaded_accuracy, masked_accuracy
    from prunec.evaluation.comparison import accuracy_metrics

    found: Found = []
    if plan.masked:
        hidden = masked_accuracy(
            source.model,
            source.tokenizer,
            plan.masked,
            window=plan.window,
            max_windows=plan.max_windows,
            progress=screen,
        )
        found.append((vars(hidden), accuracy_metrics(hidden, "masked accuracy")))
    if plan.loader:
        classes = loaded_accuracy(source.model, plan.loader, progress=screen)
        found.append((vars(classes), accuracy_metrics(classes, "accuracy")))
    return found


def _speed(screen: Screen, source: Source, plan: Wanted) -> Found:
    from prunec.evaluation import measure
    from prunec.evaluation.comparison import speed_metrics

    if not plan.speed:
        return []
    with screen.task(f"time {source.spec}"):
        measured = measure(source.model, example=source.example)
    return [(vars(measured), speed_metrics(measured))]


def show_comparison(screen: Screen, comparison: Any) -> None:
    """The table on the terminal, and how its figures were taken."""
    screen.table("Evaluation", comparison.head, comparison.rows())
    for note in comparison.notes():
        screen.say(note)


def _texts(
    screen: Screen,
    ppl: Path | None,
    protocol: str | None,
    window: int | None,
    stride: int | None,
) -> tuple[Text, ...]:
    from prunec.evaluation import named_protocol, wikitext2_test
    from prunec.evaluation.protocols import TEXT

    if protocol is None:
        return () if ppl is None else (Text(ppl, ppl.name, window),)
    named = [named_protocol(name.strip()) for name in protocol.split(",")]
    if window or stride:
        raise CalibrationError(
            "a protocol says the window itself, and windows do not overlap",
            where=f"--protocol {protocol}",
            fix="leave out --window and --stride, or --protocol",
        )
    content, name = (ppl, ppl.name) if ppl else (wikitext2_test(screen), TEXT)
    return tuple(Text(content, name, found.window, found.name) for found in named)

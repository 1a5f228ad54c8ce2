"""lm-eval tasks by their upstream names, through lm-eval's own API."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from prunec.errors import CalibrationError, PluginError
from prunec.events import Progress, silent
from prunec.models.generation import generates
from prunec.models.quiet import quiet

COMMONSENSE7 = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""The seven tasks of the papers' zero-shot average, and the metric of each that goes into it."""

GROUPS = {"commonsense7": tuple(COMMONSENSE7)}


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task as lm-eval gives it; `stderr` is None where it gives none.

    `samples` were scored, with `shots` examples in the prompt, by `version` of the task; `outcomes`
    is what each gave, where `value` is their mean.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    samples: int
    shots: int
    version: str
    outcomes: tuple[float, ...] = field(default=(), repr=False)


def task_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: Sequence[Path] = (),
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> list[TaskScore]:
    """Every metric of these tasks; numbers are lm-eval's own, at its own defaults.

    `tasks` are names of lm-eval (tasks, groups or tags) or ``commonsense7``, whose mean follows
    as the metric `average`: over the metrics of `COMMONSENSE7`, its standard error that of a mean
    of independent figures. `include_path` adds folders of task files; `limit` is a number of
    samples a task, or a part of them below 1.

    Raises:
        PluginError: lm-eval is not installed.
        CalibrationError: no such task, a data set that cannot be had, or a model that does not
            continue text.
    """
    if not generates(model) or tokenizer is None:
        raise CalibrationError(f"{type(model).__name__} does not continue text: it has no tasks")
    wanted, manager = find_tasks(tasks, include_path)
    lm_eval = _lm_eval()
    with quiet(), _bars(progress, f"tasks {', '.join(tasks)}"):
        harness = import_module("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size
        )
        try:
            found = lm_eval.simple_evaluate(
                model=harness,
                tasks=wanted,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                limit=limit,
                log_samples=True,
                task_manager=manager,
            )
        except (OSError, ValueError) as error:  # a data set that is absent, or a file that is bad
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CalibrationError(
                f"lm-eval cannot run {', '.join(tasks)}: {reason}",
                fix="data sets come from the Hub: check the network, or add --include-path",
            ) from error
    scores = _scores(found)
    if "commonsense7" in tasks:
        scores.append(_average("commonsense7", scores))
    return scores


def find_tasks(tasks: Sequence[str], include_path: Sequence[Path] = ()) -> tuple[list[str], Any]:
    """The names of lm-eval that these stand for, and the manager that knows them.

    Raises:
        PluginError: lm-eval is not installed.
        CalibrationError: no such task, or no such folder.
    """
    for folder in include_path:
        if not folder.is_dir():
            raise CalibrationError(f"no such folder of tasks: {folder}", fix="--include-path DIR")
    wanted = [name for task in tasks for name in GROUPS.get(task, (task,))]
    with quiet(), _silenced():
        manager = _manager(wanted, tuple(map(str, include_path)))
    for name in wanted:
        if name not in manager.task_index:
            near = get_close_matches(name, [*manager.all_tasks, *GROUPS], n=3)
            raise CalibrationError(
                f"lm-eval has no task {name!r}",
                fix=f"near: {', '.join(near)}" if near else "lm-eval ls tasks lists them",
            )
    return wanted, manager


def _manager(wanted: Sequence[str], folders: tuple[str, ...]) -> Any:
    """Knows these tasks; lm-eval's own 14,000 files are read only if the folders lack a name."""
    if not folders:
        return _built_in()
    make = _lm_eval().tasks.TaskManager
    manager = make(include_path=list(folders), include_defaults=False)
    found = set(wanted) <= set(manager.all_subtasks)
    return manager if found else make(include_path=list(folders))


@cache
def _built_in() -> Any:
    return _lm_eval().tasks.TaskManager()


def _lm_eval() -> Any:
    try:
        module = import_module("lm_eval")
        import_module("lm_eval.tasks")
    except ImportError as error:
        raise PluginError("lm-eval is not installed", fix="pip install 'prunec[eval]'") from error
    return module


def _scores(found: Any) -> list[TaskScore]:
    """The rows of lm-eval's result, in its order; metrics are keyed "name,filter"."""
    scores = []
    for task, figures in found["results"].items():
        samples = found.get("samples", {}).get(task, ())
        counted = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{chosen}")
            higher = found.get("higher_is_better", {}).get(task, {}).get(metric)
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if chosen == "none" else f"{metric},{chosen}",
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    higher_is_better=higher is not False,
                    samples=int(counted or figures.get("sample_len") or 0),
                    shots=int(found.get("n-shot", {}).get(task) or 0),
                    version=str(found.get("versions", {}).get(task, "")),
                    outcomes=_outcomes(samples, metric, chosen, mean=value),
                )
            )
    return scores


def _outcomes(
    samples: Sequence[Mapping[str, Any]], metric: str, chosen: str, *, mean: float
) -> tuple[float, ...]:
    """What each sample gave, in the order of the task; nothing for a metric that is no mean."""
    mine = [sample for sample in samples if sample.get("filter", chosen) == chosen]
    given = [s.get(metric) for s in sorted(mine, key=lambda sample: int(sample["doc_id"]))]
    numbers = [float(value) for value in given if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(given) or not math.isclose(fmean(numbers), mean):
        return ()
    return tuple(numbers)


def _average(name: str, scores: Sequence[TaskScore]) -> TaskScore:
    """The papers' mean of seven accuracies; the tasks' errors are independent."""
    parts = [score for score in scores if COMMONSENSE7.get(score.task) == score.metric]
    errors = [part.stderr for part in parts]
    known = [error for error in errors if error is not None]
    stderr = math.hypot(*known) / len(parts) if len(known) == len(parts) else None
    return TaskScore(
        task=name,
        metric="average",
        value=sum(part.value for part in parts) / len(parts),
        stderr=stderr,
        higher_is_better=True,
        samples=sum(part.samples for part in parts),
        shots=parts[0].shots,
        version="",
    )


@contextmanager
def _bars(progress: Progress, description: str) -> Iterator[None]:
    """lm-eval draws its own bars; inside they go to `progress`, and its log lines nowhere."""
    names = ("models.huggingface", "api.task", "api.model")
    modules: list[Any] = [import_module(f"lm_eval.{name}") for name in names]
    bars = [module.tqdm for module in modules]
    try:
        with progress.task(description), _silenced():
            for module in modules:
                module.tqdm = _bar(progress)
            yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


@contextmanager
def _silenced() -> Iterator[None]:
    """Inside, of lm-eval's log only errors."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _bar(progress: Progress) -> Any:
    class Bar:
        """What lm-eval asks of tqdm: to iterate, or to be updated and closed."""

        def __init__(self, rows: Any = None, *, total: Any = None, desc: str = "", **_: Any):
            self._rows = rows
            length = total if total is not None else len(rows) if hasattr(rows, "__len__") else None
            self._open = progress.task(desc or "lm-eval", length)
            self._task = self._open.__enter__()

        def __iter__(self) -> Iterator[Any]:
            try:
                for row in self._rows:
                    yield row
                    self._task.advance()
            finally:
                self.close()

        def update(self, n: int = 1) -> None:
            self._task.advance(n)

        def close(self) -> None:
            self._open.__exit__(None, None, None)

    return Bar

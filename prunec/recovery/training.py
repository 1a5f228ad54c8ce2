"""transformers' Trainer with a clock, a held-out loss, distillation and prunec's progress."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from prunec.errors import PlanError
from prunec.events import Task
from prunec.recovery.packing import Row, collate
from prunec.recovery.settings import Recovery
from prunec.recovery.teacher import Teacher, distillation_loss, hidden_loss, learnt_positions

_EVERY, _SHARE = 0.05, 0.1  # of the minutes: between measurements, and spent on them


@dataclass(frozen=True)
class Point:
    """A loss in nats a token, after so many steps and seconds of training."""

    step: int
    seconds: float
    loss: float


class Watch(TrainerCallback, ExportableState):
    """Keeps the time and the curves, stops when the minutes are over, and tells the user.

    Seconds count training and its measurements; those of an interrupted run are carried on.
    In a run of minutes the held-out loss is measured every twentieth of the time, or as much less
    often as keeps the measurements to a tenth of it.
    """

    def __init__(self, settings: Recovery, task: Task | None, total: int) -> None:
        self.settings = settings
        self.task = task
        self.total = total
        self.spent = 0.0
        self.started: float | None = None
        self.measured = 0.0
        self.cost = 0.0
        self.shown = 0
        self.training: list[Point] = []
        self.held_out: list[Point] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        curves = {"training": self.training, "held_out": self.held_out}
        kept = {name: [vars(point) for point in points] for name, points in curves.items()}
        return {"args": {}, "attributes": {"spent": self.seconds, "kept": kept}}

    @property
    def seconds(self) -> float:
        return self.spent + (0.0 if self.started is None else time.perf_counter() - self.started)

    @property
    def part(self) -> float:
        """How much of the run is over, by the clock; 0 where only steps count."""
        minutes = self.settings.minutes
        return 0.0 if minutes is None else min(1.0, self.seconds / (60 * minutes))

    @property
    def every(self) -> float:
        """Parts of a run of minutes between two measurements."""
        minutes = self.settings.minutes
        assert minutes is not None
        return max(_EVERY, self.cost / (_SHARE * 60 * minutes))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint ended."""
        self.spent = float(state["spent"])
        self.training = [Point(**point) for point in state["kept"]["training"]]
        self.held_out = [Point(**point) for point in state["kept"]["held_out"]]
        self.measured = self.part

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()
        self._advance(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(state)
        if self.settings.minutes is not None:
            due = self.settings.evaluate_every is None and self.part >= self.measured + self.every
            if due or self.part >= 1:
                self.measured = self.part
                control.should_evaluate = control.should_save = True
            control.should_training_stop |= self.part >= 1
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.training.append(Point(state.global_step, self.seconds, float(logs["loss"])))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        if not metrics or "eval_loss" not in metrics:
            return
        self.cost = float(metrics["eval_runtime"])
        if self.started is not None:
            loss = float(metrics["eval_loss"])
            self.held_out.append(Point(state.global_step, self.seconds, loss))
            if self.task is not None:
                self.task.update(f"training, held-out loss {loss:.4f}")

    def _advance(self, state: Any) -> None:
        done = state.global_step if self.settings.minutes is None else round(self.part * self.total)
        if self.task is not None and done > self.shown:
            self.task.advance(done - self.shown)
            self.shown = done


class Training(Trainer):
    """Trainer whose schedule may follow the clock and whose loss may be the teacher's.

    The held-out loss is always the cross-entropy, so that methods compare.
    """

    def __init__(
        self, *, settings: Recovery, watch: Watch, teacher: Teacher | None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.settings = settings
        self.watch = watch
        self.teacher = teacher
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if teacher is not None:
            self.loss_is_scaled_for_ga = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A factor on the learning rate, by steps or by the clock, whichever is further."""
        if self.lr_scheduler is None:
            settings, watch = self.settings, self.watch

            def factor(step: int) -> float:
                warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
                part = min(1.0, max(step / max(1, num_training_steps), watch.part))
                return warm * schedule_factor(settings.schedule, part)

            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(chosen, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The teacher's loss while training, the cross-entropy otherwise."""
        if self.teacher is None or not model.training:
            # with a cache transformers would no longer tell the samples of a packed row apart
            return super().compute_loss(
                model,
                {**inputs, "use_cache": False},
                return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
        loss = self._follow(model, inputs, num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def _follow(self, model: Any, inputs: dict[str, Any], items: Any) -> Tensor:
        assert self.teacher is not None
        settings = self.settings
        given = {name: value for name, value in inputs.items() if name != "labels"}
        deep = settings.hidden > 0
        output = model(**given, use_cache=False, output_hidden_states=deep)
        learnt = learnt_positions(inputs["labels"])
        logits = output.logits[learnt]
        loss = torch.zeros((), device=logits.device)
        if settings.hard < 1:
            targets = self.teacher.targets(inputs)
            soft = distillation_loss(logits, targets, settings.temperature).sum()
            loss = loss + (1 - settings.hard) * soft
        if settings.hard > 0:
            wanted = inputs["labels"][:, 1:][learnt[:, :-1]]
            loss = loss + settings.hard * F.cross_entropy(logits.float(), wanted, reduction="sum")
        if deep:
            states = self.teacher.hidden(inputs)
            loss = loss + settings.hidden * hidden_loss(output.hidden_states, states, learnt)
        return loss / (len(logits) if items is None else items)


def planned_steps(settings: Recovery, rows: int) -> int | None:
    """Steps until the limit of steps or epochs that is reached first; None if there is neither."""
    at_once = settings.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    limits = [settings.steps] if settings.steps else []
    if settings.epochs:
        limits.append(math.ceil(settings.epochs * math.ceil(rows / at_once)))
    return min(limits, default=None)


def schedule_factor(schedule: str, part: float) -> float:
    """The learning rate's factor after `part` of the run, 0 to 1.

    >>> schedule_factor("cosine", 0.5)
    0.5
    """
    if schedule == "constant":
        return 1.0
    return 1 - part if schedule == "linear" else round((1 + math.cos(math.pi * part)) / 2, 12)


def trainer(
    model: Any,
    rows: list[Row],
    held_out: list[Row],
    settings: Recovery,
    work: Path,
    *,
    packed: bool,
    teacher: Teacher | None,
    task: Task | None,
    total: int,
    options: Mapping[str, Any],
) -> Training:
    """A Trainer for these rows that keeps its checkpoints in `work`.

    `options` are TrainingArguments by name, such as ``report_to`` or ``fsdp``, and come last.

    Raises:
        PlanError: Trainer knows no such option, or lacks what it asks for.
    """
    device = next(model.parameters()).device
    micro = settings.micro_batch or _micro_batch(settings, device)
    every = settings.evaluate_every or max(1, total // 20)
    by_clock = settings.minutes is not None and settings.evaluate_every is None
    every = 10**9 if by_clock else every  # the watch says when
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = _computes_in_bf16(device)
    arguments: dict[str, Any] = {
        "output_dir": str(work),
        "max_steps": planned_steps(settings, len(rows)) or -1,
        "num_train_epochs": 10_000,  # where minutes are the only limit
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // micro,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": 1 if by_clock else max(1, min(every, 10)),
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cache": getattr(model.config, "use_cache", False),  # Trainer writes it to the config
        "bf16": bf16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    watch = Watch(settings, task, total)
    try:
        return Training(
            settings=settings,
            watch=watch,
            teacher=teacher,
            model=model,
            args=TrainingArguments(**(arguments | dict(options))),
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=partial(collate, packed=packed),
            callbacks=[watch, EarlyStoppingCallback(settings.patience)],
        )
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        if not options:
            raise
        raise PlanError(
            f"transformers' Trainer refuses its arguments: {error}",
            where=", ".join(f"--trainer {name}={value}" for name, value in options.items()),
        ) from error


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster there than float32: emulated on a CPU, it is slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":
        return False
    # older versions of torch cannot say
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _micro_batch(settings: Recovery, device: torch.device) -> int:
    """Rows at a time: 4096 tokens on a CPU, 16384 on a GPU, a divisor of the batch."""
    limit = 4096 if device.type == "cpu" else 16384
    sizes = [n for n in range(1, settings.batch_size + 1) if settings.batch_size % n == 0]
    return max((n for n in sizes if n * settings.row_tokens <= limit), default=1)

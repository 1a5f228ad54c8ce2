"""What a run is given, common to all ways to prune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunec.calibration import Calibration
from prunec.calibration.given import Batch
from prunec.errors import ModelError, PlanError
from prunec.events import Progress
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.retarget import on_device
from prunec.graph.trace import Loss, trace
from prunec.graph.waiting import Place, place_named
from prunec.models import example_inputs
from prunec.passes.allocation.uniform import Allocation
from prunec.passes.compensation.closed_form import Compensation
from prunec.passes.decision import Pass
from prunec.passes.distributed import processes
from prunec.passes.recipe import Recipe
from prunec.passes.statistics.scores import Scores, Shelf
from prunec.passes.targets.target import Target
from prunec.pipeline.clock import Clock
from prunec.pipeline.deliver import Outcome, deliver, sizes
from prunec.pipeline.result import Report, Result
from prunec.pipeline.scoring import model_inputs


@dataclass(frozen=True, eq=False)
class Run:
    """One call of `prunec.prune`; the attributes are its arguments.

    The recipe's parts are built when the run is made, so that a wrong setting is said first.
    """

    model: nn.Module
    recipe: Recipe
    aim: Target
    seed: int
    calibration: Calibration | None
    loss: Loss | None
    weights: Mapping[str, Tensor] | None
    device: str | None
    shelf: Shelf | None
    checkpoint: Path | None
    resume: bool
    activations: str
    progress: Progress
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        _ = self.criterion, self.allocation, self.compensation, self.place, self.decision

    @cached_property
    def decision(self) -> Pass | None:
        """The pass of a plug-in, where the recipe names one."""
        part = self.recipe.decision
        return None if part is None else cast(Pass, part.build("passes"))

    @cached_property
    def criterion(self) -> Any:
        part = self.recipe.importance
        if part.name == "random" and "seed" not in part.options:
            part = self.recipe.override({"importance.seed": self.seed}).importance
        return part.build("importance")

    @cached_property
    def allocation(self) -> Allocation:
        built: Allocation = self.recipe.allocation.build("allocation")
        return built

    @cached_property
    def compensation(self) -> Compensation:
        built: Compensation = self.recipe.compensation.build("compensation")
        return built

    @cached_property
    def place(self) -> Place:
        """Where activations wait; on disk, beside the progress that is kept."""
        return place_named(self.activations, self.checkpoint if processes().first else None)

    @cached_property
    def saved(self) -> Scores | None:
        """The scores that an earlier run left on the shelf."""
        return self.shelf.saved if self.shelf else None

    @cached_property
    def batches(self) -> list[Batch]:
        """The model's inputs on the calibration; none are needed where scores are saved.

        Raises:
            PlanError: there are none.
        """
        if self.calibration is None:
            if self.saved:
                return []
            return [self._example()]
        return model_inputs(self.model, self.calibration, self.loss)

    def _example(self) -> Batch:
        """Inputs to trace with, where no data is looked at.

        Raises:
            PlanError: it is looked at, or the model is not one whose inputs are known.
        """
        fix = "calibration=prunec.calibration.calibrate([...], tokenizer, model=model), or batches"
        if self.recipe.needs_data or self.aim.kind == "latency":
            raise PlanError(f"{self.recipe.name} needs calibration data", fix=fix)
        try:
            return example_inputs(self.model)
        except ModelError as error:
            raise PlanError(
                f"there is nothing to trace {type(self.model).__name__} with",
                fix="calibration=[inputs], one batch of them by name",
            ) from error

    @cached_property
    def samples(self) -> tuple[Batch, ...]:
        """The batches as the loss reads them: with labels, where there are any."""
        return self.calibration.batches if self.calibration else ()

    def couple(self, device: str | None = None) -> CouplingGraph:
        """The model's coupling graph, on the run's device or another one."""
        device = device or self.device
        example = self.saved.example if self.saved and not self.batches else self.batches[0]
        with self.progress.task("trace the model"), self.clock("trace"):
            program = trace(self.model, example)
            if device is not None:
                program = on_device(program, torch.device(device))
            return couple(program)

    def deliver(self, outcome: Outcome, **reported: Any) -> Result:
        """The result and its report, of which `reported` holds what not every way to prune has."""
        report = Report(
            recipe=self.recipe,
            ratio=self.aim.value if self.aim.kind == "ratio" else None,
            seed=self.seed,
            **{"calibration": described(self.calibration)} | reported,
            **sizes(outcome),
        )
        return deliver(self.model, outcome, report, self.clock, self.progress)


def described(calibration: Calibration | None) -> dict[str, Any]:
    """Digest and size of the calibration, as a report holds them."""
    return calibration.to_json() if calibration else {}

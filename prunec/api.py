"""The public functions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunec.calibration import collect
from prunec.codegen.check import check
from prunec.codegen.exporters.exporter import export
from prunec.codegen.load import load, register
from prunec.errors import PlanError
from prunec.events import Progress, silent
from prunec.graph.coupling import couple
from prunec.graph.trace import Example, Loss, trace
from prunec.passes.channels import HIDDEN
from prunec.passes.depth import drop, loaded
from prunec.passes.oracles.mask import reduced_over
from prunec.passes.plan import Plan
from prunec.passes.recipe import Recipe, load_recipe
from prunec.passes.shallow import DEPTH_KINDS
from prunec.passes.slice import weights_of
from prunec.passes.statistics.scores import Shelf
from prunec.passes.targets.target import Target, chosen_target
from prunec.pipeline.clock import Clock
from prunec.pipeline.deliver import Outcome, deliver, sizes
from prunec.pipeline.intake import taken_in
from prunec.pipeline.outline import Outline, outline
from prunec.pipeline.result import Report, Result
from prunec.pipeline.run import Run
from prunec.pipeline.scoring import Batches, Scored, score
from prunec.pipeline.whole import decided, narrow, shorten
from prunec.pipeline.width import thin

__all__ = [
    "Batches",
    "Outline",
    "Report",
    "Result",
    "Scored",
    "apply_plan",
    "check",
    "couple",
    "export",
    "load",
    "outline",
    "prune",
    "register",
    "score",
    "trace",
]


def prune(
    model: nn.Module,
    *,
    recipe: str | Recipe = "slimgpt",
    ratio: float | None = None,
    target: str | Target | None = None,
    calibration: Batches | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    weights: Mapping[str, Tensor] | None = None,
    device: str | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    scores: str | Path | None = None,
    activations: str = "auto",
    progress: Progress = silent,
) -> Result:
    """Remove a part of a model's repeated blocks and mend what is left.

    Args:
        model: any nn.Module, not changed; of one in torch.compile or DataParallel what is inside.
        recipe: the name of a shipped recipe, a YAML file, or a Recipe.
        ratio: the fraction of the repeated blocks' parameters to remove, 0 to 1; 0.2 where no
            target is given either.
        target: in place of a ratio what is to be left: "params=100M", "flops=70%", "kv-cache=50%",
            "memory=250MB", "latency=0.8x".
        calibration: of `prunec.calibration.calibrate`, or any iterable of inputs by name (dicts,
            tuples, tensors); may be left out with saved scores, and of a transformers model where
            the recipe looks at weights alone.
        seed: for recipes that draw numbers.
        settings: overrides of the recipe, such as ``{"allocation": "uniform"}``.
        loss: for criteria that need gradients: ``loss(model, inputs)``, a scalar for the inputs of
            one sample, all that a batch holds; by default the model's own, of ``labels`` or the
            tokens.
        weights: the parameters of a model on meta, each read when it is needed (`Source.weights`):
            then no more of them is in memory than two sites lie apart.
        device: where a model on meta is computed, the CPU by default.
        checkpoint: a directory in which progress is kept, site by site; who calls removes it.
        resume: go on from what `checkpoint` holds, to the same bytes.
        scores: a directory for what is measured of the dense model. The first run writes it,
            later ones, at any target, read it and no data. Runs with scores are one-shot: sites
            are ranked and mended from the dense model's inputs, not from the pruned prefix's.
        activations: where those of all batches wait between two sites: "memory", "disk" (in
            `checkpoint`, else where temporary files are), or "auto", which is disk where they would
            take a quarter of the free memory.

    Raises:
        PlanError: a target that cannot be reached (it says what can), an unknown recipe or setting.
        CalibrationError: batches that are none, or that do not fit the model.
        ModelError: an adapter lies over its layers.
        TraceError, VerifyError: the model cannot be traced, or a check failed.
        CheckpointError: what `checkpoint` or `scores` holds is of another run, damaged, or cannot
            be written.
    """
    if device is not None and weights is None:
        raise PlanError(
            "a device was given for a model that holds its weights",
            fix="move the model itself: model.to(device)",
        )
    model = taken_in(model, progress)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run = Run(
        model=model,
        recipe=chosen.override(settings or {}),
        aim=chosen_target(ratio, target),
        seed=seed,
        calibration=None if calibration is None else collect(calibration, model),
        loss=loss,
        weights=weights,
        device=device,
        shelf=None if scores is None else Shelf(Path(scores)),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        resume=resume,
        activations=activations,
        progress=progress,
    )
    if run.decision is not None:
        return decided(run, run.decision)
    if HIDDEN in run.recipe.units:
        return narrow(run)
    if not DEPTH_KINDS.isdisjoint(run.recipe.units):
        return shorten(run)
    return thin(run)


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    example: Example,
    weights: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> Result:
    """Slice a model to an explicit plan, without data and without correction.

    Args:
        weights: the parameters of a model on meta, as in `prune`.

    Raises:
        PlanError: the plan does not fit the model.
    """
    clock, model = Clock(), taken_in(model, progress)
    with progress.task("trace the model"), clock("trace"):
        dense = couple(trace(model, example))
        if plan.dropped or reduced_over(dense, plan.selection(dense)):  # proven on the whole model
            dense, weights = loaded(dense, weights), None
        coupling = drop(dense, plan.dropped)
    selection = plan.selection(coupling)
    present = weights_of(coupling, weights, selection=selection)
    outcome = Outcome(dense, coupling, present, plan)
    report = Report(recipe=None, ratio=None, seed=0, **sizes(outcome))
    return deliver(model, outcome, report, clock, progress)

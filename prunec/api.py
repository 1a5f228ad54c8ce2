"""The public functions: the one place that joins the rooms."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prunec
from prunec.calibration import Calibration
from prunec.codegen.check import check
from prunec.codegen.exporters.exporter import export
from prunec.codegen.fit import Reference
from prunec.codegen.hf import save
from prunec.codegen.hub import push
from prunec.codegen.load import load, register
from prunec.codegen.shrink import Shrunk, shrink
from prunec.errors import ExportError, ModelError, PlanError
from prunec.events import Progress, silent
from prunec.graph.cost import flops, parameter_count
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.program import Program
from prunec.graph.retarget import on_device
from prunec.graph.selection import Selection
from prunec.graph.trace import Example, Loss, trace
from prunec.models import example_inputs, state_digest
from prunec.models.digest import tensor_digest
from prunec.passes.allocation import Allocation, Uniform
from prunec.passes.biases import with_biases
from prunec.passes.budget import Budget, block_budget
from prunec.passes.channels import HIDDEN, prune_channels, stream_sites
from prunec.passes.checkpoint import opened_journal
from prunec.passes.dense import dense_sites
from prunec.passes.depth import choose_branches, drop, loaded, verify_dropped
from prunec.passes.distributed import processes
from prunec.passes.goal import Goal, block_parameters
from prunec.passes.latency import paired_ratio
from prunec.passes.measure import Statistics
from prunec.passes.plan import Plan
from prunec.passes.prior import prior_statistics
from prunec.passes.prune import SiteReport, prune_sites
from prunec.passes.recipe import Recipe, load_recipe
from prunec.passes.scores import Origin, Scores, Shelf
from prunec.passes.shallow import DEPTH_KINDS, Dropped, prune_depth
from prunec.passes.sites import Skipped, find_sites, site_parameters
from prunec.passes.slice import (
    Weights,
    added_parameters,
    bound_module,
    slice_program,
    sliced_parameters,
    weights_of,
)
from prunec.passes.survey import DenseSurvey
from prunec.passes.target import Target, chosen_target
from prunec.passes.verify import reduced_over, verify_sliced
from prunec.scoring import Batches, Scored, batches_of, score

__all__ = [
    "Batches",
    "Report",
    "Result",
    "Scored",
    "apply_plan",
    "check",
    "couple",
    "export",
    "load",
    "prune",
    "register",
    "score",
    "trace",
]


@dataclass(frozen=True)
class Report:
    """What was asked, what was done and what it comes to.

    Attributes:
        recipe: the settings that ran, None for an explicit plan.
        ratio: asked for, of the repeated blocks' parameters (None for an explicit plan).
        block_parameters, parameters, flops: (before, after); FLOPs of one pass at the traced shape.
        sites: one entry a site, in the order they were pruned.
        skipped: groups of the wanted kinds that have no site, and why.
        dropped: branches or blocks that were left out, in the order in which they went.
        checks: how the result was proven.
        calibration: digest and size of the calibration tokens.
        seconds: of each step.
        aim: the target in its own unit: what was asked, what was reached, and what whole units and
            multiples took beyond it (below it, where negative).
    """

    recipe: Recipe | None
    ratio: float | None
    seed: int
    block_parameters: tuple[int, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    sites: tuple[SiteReport, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    checks: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    aim: Mapping[str, Any] = field(default_factory=dict)

    @property
    def realised_ratio(self) -> float:
        """The part of the repeated blocks' parameters that went."""
        before, after = self.block_parameters
        return 1 - after / before if before else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, as prunec.json holds it."""
        return {
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "ratio": self.ratio,
            "realised_ratio": self.realised_ratio,
            "seed": self.seed,
            "block_parameters": list(self.block_parameters),
            "parameters": list(self.parameters),
            "flops": list(self.flops),
            "sites": [{**vars(site), "kept": dict(site.kept)} for site in self.sites],
            "skipped": [vars(item) for item in self.skipped],
            "dropped": [vars(item) for item in self.dropped],
            "checks": list(self.checks),
            "calibration": dict(self.calibration),
            "seconds": dict(self.seconds),
            "aim": dict(self.aim),
        }


@dataclass(frozen=True, eq=False)
class Result:
    """A smaller model, the plan it follows and the report of the run.

    Attributes:
        model: a module of the source's class with smaller weights; where its own forward cannot
            take them, of a module that is no transformers model, the sliced graph.
        plan: which units were kept.
        report: what was asked and done.
        program: the sliced graph.
    """

    model: nn.Module
    plan: Plan
    report: Report
    program: Program
    shrunk: Shrunk | None = None

    def save(
        self,
        directory: str | Path,
        *,
        tokenizer: Any = None,
        base_model: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        max_shard_size: str = "1GB",
        progress: Progress = silent,
    ) -> None:
        """Write a directory that ``from_pretrained`` opens without prunec.

        It is written beside its place, reopened in a fresh process and compared, then renamed.

        Raises:
            ExportError: the directory exists, cannot be written, or the model is no transformers
                model.
            VerifyError: the reopened model differs; nothing is left behind.
        """
        if self.shrunk is None:
            raise ExportError(
                "only models of transformers can be saved as a directory",
                fix="save result.model's state_dict, or use result.program",
            )
        metadata = {
            "prunec": prunec.__version__,
            "base_model": base_model,
            "plan": self.plan.to_json(),
            "report": {k: v for k, v in self.report.to_json().items() if k != "seconds"},
            "recipe": None if self.report.recipe is None else self.report.recipe.to_dict(),
            "metrics": dict(metrics or {}),
        }
        save(
            self.shrunk,
            Path(directory),
            tokenizer=tokenizer,
            metadata=metadata,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            progress=progress,
        )

    def push_to_hub(
        self, repo: str, *, private: bool = False, token: str | None = None, **options: Any
    ) -> str:
        """Write the directory as `save` does, upload it to the Hugging Face Hub; its address.

        Args:
            repo: such as "someone/smaller"; created if absent.
            token: None for that of `hf auth login`.
            options: as `save` takes them.

        Raises:
            ExportError: the Hub does not take it.
        """
        with tempfile.TemporaryDirectory(prefix="prunec-hub-") as folder:
            directory = Path(folder) / "model"
            self.save(directory, **options)
            return push(directory, repo, private=private, token=token)


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
    progress: Progress = silent,
) -> Result:
    """Remove a part of a model's repeated blocks and mend what is left.

    Args:
        model: any nn.Module; not changed.
        recipe: the name of a shipped recipe, a YAML file, or a Recipe.
        ratio: the fraction of the repeated blocks' parameters to remove, 0 to 1; 0.2 where no
            target is given either.
        target: in place of a ratio what is to be left: "params=100M", "flops=70%", "kv-cache=50%",
            "memory=250MB", "latency=0.8x".
        calibration: inputs by name, all batches of one shape; may be left out with saved scores.
        seed: for recipes that draw numbers.
        settings: overrides of the recipe, such as ``{"allocation": "uniform"}``.
        loss: for criteria that need gradients: ``loss(model, inputs)``, a scalar for the inputs of
            one sample; by default the model's own, of the inputs' ``labels`` or tokens.
        weights: the parameters of a model on meta, each read when it is needed (`Source.weights`):
            then no more of them is in memory than two sites lie apart.
        device: where a model on meta is computed, the CPU by default.
        checkpoint: a directory in which progress is kept, site by site; who calls removes it.
        resume: go on from what `checkpoint` holds, to the same bytes.
        scores: a directory for what is measured of the dense model. The first run writes it,
            later ones, at any target, read it and no data. Runs with scores are one-shot: sites
            are ranked and mended from the dense model's inputs, not from the pruned prefix's.

    Raises:
        PlanError: a target that cannot be reached (it says what can), an unknown recipe or setting.
        TraceError, VerifyError: the model cannot be traced, or a check failed.
        CheckpointError: what `checkpoint` or `scores` holds is of another run, damaged, or cannot
            be written.
    """
    if device is not None and weights is None:
        raise PlanError(
            "a device was given for a model that holds its weights",
            fix="move the model itself: model.to(device)",
        )
    clock = _Clock()
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.override(settings or {})
    aim = chosen_target(ratio, target)
    criterion, allocation, compensation = _build(chosen, seed)
    shelf = None if scores is None else Shelf(Path(scores))
    saved = shelf.saved if shelf else None
    batches = [] if saved and calibration is None else batches_of(calibration)
    example = saved.example if saved and not batches else batches[0]
    with progress.task("trace the model"), clock("trace"):
        program = trace(model, example)
        if device is not None:
            program = on_device(program, torch.device(device))
        coupling = couple(program)
    if not (DEPTH_KINDS | {HIDDEN}).isdisjoint(chosen.units):
        coupling = loaded(coupling, weights)
        start = _Run(model, coupling, chosen, aim, seed, calibration, loss, clock, progress)
        if HIDDEN in chosen.units:
            return _prune_channels(start, criterion, compensation)
        return _prune_depth(start, criterion)
    with clock("trace"):
        sites, skipped = find_sites(coupling, chosen.units)
        if compensation.bias:
            coupling = couple(with_biases(coupling.program, sites))
            sites, skipped = find_sites(coupling, chosen.units)
    present = weights_of(coupling, weights, device)
    names = criterion.statistics | compensation.statistics
    prior: Statistics = {}
    with clock("score"):
        if saved is None:
            prior = prior_statistics(
                model,
                sites,
                names,
                batches,
                loss=loss,
                weights=present.read,
                device=present.device,
                progress=progress,
            )
        if shelf:
            origin = Origin.of(model, criterion, compensation, loss, batches, weights)
            measured = dense_sites(
                coupling,
                sites,
                names,
                batches,
                prior=prior,
                regression=compensation.regression,
                weights=present,
                progress=progress,
            )
            described = _describe(calibration)
            saved = shelf.scores(origin, described, measured, criterion, coupling.program.example)
            saved.check(origin, sites, names)
    goal = Goal.on(coupling, aim)
    sites = goal.concerned(sites)
    with clock("allocate"):
        survey = DenseSurvey(
            coupling,
            sites,
            criterion,
            compensation,
            batches,
            prior=prior,
            weights=present,
            scores=saved,
            progress=progress,
        )
        budget = block_budget(
            coupling, sites, allocation, goal, survey=survey, constraints=chosen.constraints
        )
    run = {"recipe": chosen.to_dict(), "target": str(aim), "seed": seed, "data": _digest(batches)}
    run |= {} if saved is None else {"scores": vars(saved.origin)}
    if checkpoint is not None:
        run |= {"model": state_digest(model, weights), "device": str(present.device)}
    together = processes()
    kept = checkpoint if together.first else None
    with clock("prune"), opened_journal(kept, run, resume=resume) as journal:
        pruned = prune_sites(
            coupling,
            sites,
            budget,
            criterion,
            compensation,
            together.share(batches),
            prior=prior,
            weights=present,
            journal=journal,
            scores=saved,
            progress=progress,
        )
    plan = Plan.of(coupling, pruned.selection)
    report = Report(
        recipe=chosen,
        ratio=aim.value if aim.kind == "ratio" else None,
        seed=seed,
        sites=pruned.sites,
        skipped=tuple(skipped),
        calibration=_describe(calibration) if saved is None else _reported(saved),
        aim=_aim(budget),
        **_sizes(coupling, coupling, pruned.weights),
    )
    result = _deliver(model, coupling, coupling, pruned.weights, plan, report, clock, progress)
    if aim.kind != "latency":
        return result
    with progress.task("measure the latency reached"), clock("measure latency"):
        factor, spread = paired_ratio(coupling.program, result.program)
    aimed = {**report.aim, "measured_factor": factor, "measured_spread": spread}
    return replace(result, report=replace(result.report, aim=aimed))


@dataclass(frozen=True)
class _Run:
    """What a run was given, up to where width and depth part."""

    model: nn.Module
    coupling: CouplingGraph
    recipe: Recipe
    aim: Target
    seed: int
    calibration: Batches | None
    loss: Loss | None
    clock: _Clock
    progress: Progress

    def report(self, coupling: CouplingGraph, weights: Weights, **more: Any) -> Report:
        return Report(
            recipe=self.recipe,
            ratio=self.aim.value if self.aim.kind == "ratio" else None,
            seed=self.seed,
            calibration=_describe(self.calibration),
            **_sizes(self.coupling, coupling, weights),
            **more,
        )


def _prune_depth(run: _Run, criterion: Any) -> Result:
    """Whole branches or blocks go."""
    _only(run.recipe, DEPTH_KINDS)
    dense, batches = run.coupling, batches_of(run.calibration)
    with run.clock("prune"):
        goal = Goal.on(dense, run.aim)
        units = run.recipe.units
        names, dropped = prune_depth(dense, units, goal, criterion, batches, progress=run.progress)
        coupling = drop(dense, names)
    weights = Weights(coupling, coupling.program.state)
    report = run.report(coupling, weights, dropped=dropped)
    plan = Plan(dropped=names)
    return _deliver(run.model, dense, coupling, weights, plan, report, run.clock, run.progress)


def _prune_channels(run: _Run, criterion: Any, compensation: Any) -> Result:
    """Features of the residual stream go."""
    _only(run.recipe, {HIDDEN})
    coupling, batches = run.coupling, batches_of(run.calibration)
    with run.clock("prune"):
        sites, names = stream_sites(coupling), criterion.statistics
        prior = prior_statistics(
            run.model, sites, names, batches, loss=run.loss, progress=run.progress
        )
        selection = prune_channels(
            coupling,
            sites,
            Goal.on(coupling, run.aim),
            criterion,
            compensation,
            coupling.program.state,
            prior,
            constraints=run.recipe.constraints,
        )
    weights = Weights(coupling, coupling.program.state, selection=selection)
    report, plan = run.report(coupling, weights), Plan.of(coupling, selection)
    return _deliver(run.model, coupling, coupling, weights, plan, report, run.clock, run.progress)


def _only(recipe: Recipe, kinds: Collection[str]) -> None:
    """Depth, the width of the stream and units inside blocks are runs of their own."""
    others = [unit for unit in recipe.units if unit not in kinds]
    if others:
        raise PlanError(
            f"units {', '.join(recipe.units)} cannot go in one run",
            fix="prune one, then prune the result: prunec opens what it wrote",
        )


@dataclass(frozen=True)
class Outline:
    """What a run would be asked to do: the part of a report that needs no weights and no data.

    Attributes:
        block_parameters: of all repeated blocks, before.
        goal: the target as it was asked for.
        target: what is to go, in the goal's unit.
        wanted: per site, (parameters it holds, parameters it is asked for); empty for an allocation
            that looks at data first.
        skipped: groups of the wanted kinds that have no site, and why.
    """

    block_parameters: int
    goal: str
    target: float
    wanted: Mapping[str, tuple[int, int]]
    skipped: tuple[Skipped, ...]


def outline(
    model: nn.Module, *, recipe: Recipe, target: float | Target, example: Example
) -> Outline:
    """How a run would split its target over the sites; weights may be on meta.

    `target` is one, or a ratio of the repeated blocks' parameters.

    Raises:
        PlanError: the target cannot be reached.
    """
    coupling = couple(trace(model, example))
    sites, skipped = find_sites(coupling, recipe.units)
    goal = Goal.on(coupling, target)
    sites = goal.concerned(sites)
    allocation: Allocation = recipe.allocation.build("allocation")
    looks = allocation.needs_data
    budget = block_budget(
        coupling, sites, Uniform() if looks else allocation, goal, constraints=recipe.constraints
    )
    return Outline(
        block_parameters=sum(block_parameters(coupling).values()),
        goal=str(goal.target),
        target=goal.remove,
        wanted={}
        if looks
        else {
            site.name: (parameter_count(coupling, names=site_parameters(site)), budget.share(site))
            for site in sites
        },
        skipped=tuple(skipped),
    )


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
    clock = _Clock()
    with progress.task("trace the model"), clock("trace"):
        dense = couple(trace(model, example))
        if plan.dropped or reduced_over(dense, plan.selection(dense)):  # proven on the whole model
            dense, weights = loaded(dense, weights), None
        coupling = drop(dense, plan.dropped)
    selection = plan.selection(coupling)
    present = weights_of(coupling, weights, selection=selection)
    report = Report(recipe=None, ratio=None, seed=0, **_sizes(dense, coupling, present))
    return _deliver(model, dense, coupling, present, plan, report, clock, progress)


def _build(recipe: Recipe, seed: int) -> tuple[Any, Any, Any]:
    importance = recipe.importance
    if importance.name == "random" and "seed" not in importance.options:
        recipe = recipe.override({"importance.seed": seed})
    return (
        recipe.importance.build("importance"),
        recipe.allocation.build("allocation"),
        recipe.compensation.build("compensation"),
    )


def _aim(budget: Budget) -> dict[str, Any]:
    goal = budget.goal
    return {
        "target": str(goal.target),
        "before": goal.of,
        "asked": goal.of - goal.remove,
        "reached": goal.of - budget.removed,
        "rounding": budget.rounding,
    }


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """One digest of all calibration inputs."""
    return tensor_digest(batch[name] for batch in batches for name in sorted(batch))


def _reported(scores: Scores) -> dict[str, Any]:
    return {**scores.calibration, "scores": str(scores.directory), "one_shot": True}


def _describe(calibration: Batches | None) -> dict[str, Any]:
    if not isinstance(calibration, Calibration):
        return {"batches": len(calibration or ())}
    return {
        "tokens": calibration.tokens,
        "digest": calibration.digest,
        "sources": list(calibration.sources),
    }


def _sizes(dense: CouplingGraph, coupling: CouplingGraph, weights: Weights) -> dict[str, Any]:
    """Before and after; biases that were fitted where there was none count as the result's."""
    counts = weights.selection.counts
    added = added_parameters(coupling.program, weights)
    fitted = sum(bias.numel() for bias in added.values())
    before, after = block_parameters(dense), block_parameters(coupling, counts)
    return {
        "block_parameters": (sum(before.values()), sum(after.values()) + fitted),
        "parameters": (parameter_count(dense), parameter_count(coupling, counts) + fitted),
        "flops": (flops(dense), flops(coupling, counts)),
    }


def _deliver(
    model: nn.Module,
    dense: CouplingGraph,
    coupling: CouplingGraph,
    weights: Weights,
    plan: Plan,
    report: Report,
    clock: _Clock,
    progress: Progress,
) -> Result:
    """Prove the rewriting, and put the weights into a smaller module of the same class.

    Args:
        dense: of the whole model.
        coupling: of what is left without the plan's dropped branches.
        weights: of the latter, sliced.
    """
    shown = weights.shapes() if weights.stored else weights
    added, checks = coupling.program.added, tuple[str, ...]()
    tensors = {n: (weights if n in added else shown).read(n) for n in shown}
    program = slice_program(coupling, weights.selection, tensors)
    if plan.dropped:
        with progress.task("compare with silenced branches"), clock("verify"):
            difference = verify_dropped(dense, plan.dropped)
        checks = (f"dropping equals silencing within {difference:.1e}",)
    if not _is_transformers(model):
        with progress.task("compare with the masked model"), clock("verify"):
            difference = verify_sliced(coupling, weights.selection, tensors)
        checks = (*checks, f"sliced equals masked within {difference:.1e}")
    stored = weights if weights.stored else None
    sliced = sliced_parameters(coupling, weights.selection, tensors, stored)
    sliced = replace(sliced, skip={b.name: b.modules for b in choose_branches(dense, plan.dropped)})
    reference = _reference(coupling, weights.selection, tensors, plan)
    if reference is not None and not weights.stored and _is_transformers(model):
        with progress.task("compare with norms that know what is gone"), clock("verify"):
            difference = verify_sliced(coupling, weights.selection, tensors)
        checks = (*checks, f"sliced equals masked within {difference:.1e}")
    example = program.example if reference else _shrink_example(model, program.example)
    try:
        with clock("shrink and verify"):
            shrunk = shrink(model, sliced, example=example, reference=reference, progress=progress)
    except ExportError as error:
        if _is_transformers(model):
            raise
        checks = (*checks, f"delivered as a graph: {error.message}")
        report = replace(report, checks=checks, seconds=clock.seconds)
        return Result(bound_module(program), plan, report, program)
    report = replace(report, checks=(*checks, *shrunk.checks), seconds=clock.seconds)
    return Result(shrunk.model, plan, report, program, shrunk)


def _reference(
    coupling: CouplingGraph, selection: Selection, tensors: Mapping[str, Tensor], plan: Plan
) -> Reference | None:
    """The sliced graph, where a norm or a router runs over removed units: zeroed ones then count.

    None where the masked model is the truth, which holds at every shape.
    """
    if not any(coupling[name].normalised for name in plan.groups):
        return None

    def run(given: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        state = {name: given.get(name, tensor) for name, tensor in tensors.items()}
        return slice_program(coupling, selection, state).run(None, **inputs)

    return run


def _shrink_example(model: nn.Module, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Minimal inputs by keyword; the caller's own where they hold more, such as an image."""
    own = {name: tensor for name, tensor in given.items() if name != "attention_mask"}
    if not _is_transformers(model):
        return own
    try:
        made = example_inputs(model)
    except ModelError:
        return own
    return made if made.keys() >= {n for n, t in own.items() if t.is_floating_point()} else own


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = time.perf_counter() - start

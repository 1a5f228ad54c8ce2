"""The last step of a run: prove the rewriting, and shrink the user's own module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from prunec.codegen.fit import Reference
from prunec.codegen.shrink import is_transformers, shrink
from prunec.errors import ExportError, ModelError
from prunec.events import Progress
from prunec.graph.cost import flops, parameter_count
from prunec.graph.coupling import CouplingGraph
from prunec.graph.retarget import on_device
from prunec.graph.selection import Selection
from prunec.models import example_inputs
from prunec.passes.any_batch import as_graph
from prunec.passes.depth import choose_branches, verify_dropped
from prunec.passes.oracles.mask import in_single, like_state, verify_sliced
from prunec.passes.plan import Plan
from prunec.passes.slice import (
    Weights,
    added_parameters,
    slice_program,
    sliced_parameters,
)
from prunec.passes.targets.goal import block_parameters
from prunec.pipeline.clock import Clock
from prunec.pipeline.result import Report, Result


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a way to prune hands on.

    Attributes:
        dense: of the whole model.
        coupling: of what is left without the plan's dropped branches.
        weights: of the latter, sliced.
    """

    dense: CouplingGraph
    coupling: CouplingGraph
    weights: Weights
    plan: Plan


def sizes(outcome: Outcome) -> dict[str, Any]:
    """Before and after; biases that were fitted where there was none count as the result's."""
    dense, coupling, weights = outcome.dense, outcome.coupling, outcome.weights
    counts = weights.selection.counts
    added = added_parameters(coupling.program, weights)
    fitted = sum(bias.numel() for bias in added.values())
    before, after = block_parameters(dense), block_parameters(coupling, counts)
    return {
        "block_parameters": (sum(before.values()), sum(after.values()) + fitted),
        "parameters": (parameter_count(dense), parameter_count(coupling, counts) + fitted),
        "flops": (flops(dense), flops(coupling, counts)),
    }


def deliver(
    model: nn.Module, outcome: Outcome, report: Report, clock: Clock, progress: Progress
) -> Result:
    """Prove the rewriting, and put the weights into a smaller module of the same class."""
    dense, coupling = outcome.dense, outcome.coupling
    weights, plan = outcome.weights, outcome.plan
    shown = weights.shapes() if weights.stored else weights
    added, checks = coupling.program.added, tuple[str, ...]()
    place = None if weights.stored else weights.device  # a resumed run's tensors lie on disk
    tensors = {n: (weights if n in added else shown).read(n).to(place) for n in shown}
    program = slice_program(coupling, weights.selection, tensors)
    if plan.dropped:
        with progress.task("compare with silenced branches"), clock("verify"):
            difference = verify_dropped(dense, plan.dropped)
        checks = (f"dropping equals silencing within {difference:.1e}",)
    if not is_transformers(model):
        with progress.task("compare with the masked model"), clock("verify"):
            difference = verify_sliced(coupling, weights.selection, tensors)
        checks = (*checks, f"sliced equals masked within {difference:.1e}")
    stored = weights if weights.stored else None
    sliced = sliced_parameters(coupling, weights.selection, tensors, stored)
    sliced = replace(sliced, skip={b.name: b.modules for b in choose_branches(dense, plan.dropped)})
    reference = _reference(coupling, weights.selection, tensors, plan)
    if reference is not None and not weights.stored and is_transformers(model):
        with progress.task("compare with norms that know what is gone"), clock("verify"):
            difference = verify_sliced(coupling, weights.selection, tensors)
        checks = (*checks, f"sliced equals masked within {difference:.1e}")
    example = program.example if reference else shrink_example(model, program.example)
    try:
        with clock("shrink and verify"):
            shrunk = shrink(model, sliced, example=example, reference=reference, progress=progress)
    except ExportError as error:
        if is_transformers(model):
            raise
        graph, free = as_graph(model, plan, program)
        size = "any batch size" if free else "the batch size of the calibration alone"
        said = f"delivered as a graph, for {size}: {error.message}"
        progress.message(said[0].upper() + said[1:])
        report = replace(report, checks=(*checks, said), seconds=clock.seconds)
        return Result(graph, plan, report, program)
    report = replace(report, checks=(*checks, *shrunk.checks), seconds=clock.seconds)
    return Result(shrunk.model, plan, report, program, shrunk)


def _reference(
    coupling: CouplingGraph, selection: Selection, tensors: Mapping[str, Tensor], plan: Plan
) -> Reference | None:
    """The sliced graph, where a norm or a router runs over removed units: zeroed ones then count.

    None where the masked model is the truth, which holds at every shape. It computes in fp32 or
    better, whatever the type of the weights.
    """
    if not any(coupling[name].normalised for name in plan.groups):
        return None

    coupling = in_single(coupling)

    def run(given: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        state = {name: given.get(name, tensor) for name, tensor in tensors.items()}
        place = next(tensor.device for tensor in state.values() if not tensor.is_meta)
        state = like_state(coupling, state)
        program = on_device(slice_program(coupling, selection, state), place)
        like = coupling.program.example
        return program.run(None, **{n: value.to(like[n].dtype) for n, value in inputs.items()})

    return run


def shrink_example(model: nn.Module, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Minimal inputs by keyword; the caller's own where they hold more, such as an image."""
    own = {name: tensor for name, tensor in given.items() if name != "attention_mask"}
    if not is_transformers(model):
        return own
    try:
        made = example_inputs(model)
    except ModelError:
        return own
    return made if made.keys() >= {n for n, t in own.items() if t.is_floating_point()} else own

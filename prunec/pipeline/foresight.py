"""What the model's class cannot express, found before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from prunec.codegen.fit import misfit
from prunec.codegen.shrink import is_transformers
from prunec.codegen.twin import assemble, tensors_of
from prunec.errors import ExportError
from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.selection import Keep, Selection
from prunec.models.quiet import quiet
from prunec.passes.sites import Site
from prunec.passes.slice import Weights, sliced_parameters
from prunec.passes.targets.constraints import Constraints
from prunec.pipeline.deliver import shrink_example


def check_class(
    model: nn.Module, coupling: CouplingGraph, sites: Sequence[Site], constraints: Constraints
) -> None:
    """Refuse kinds of units of which the model's class can take no other number.

    Such as heads whose slopes are worked out from how many they are: no attribute says the slopes
    of those that are left. Tried on redrawn weights, with the first units of every group gone: as
    few as may, then half. Models of transformers are asked; others may come out as a graph.

    Raises:
        ExportError: naming the kinds, and those that may go.
    """
    groups = [group for site in sites for group in site.groups if not group.normalised]
    if not is_transformers(model):
        return
    if any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters()):
        model = without_weights(model)
    fewest = {group: _kept(group, constraints, group.size - 1) for group in groups}
    if _reason(model, coupling, fewest) is None:
        return
    half = {group: _kept(group, constraints, group.size // 2) for group in groups}
    kinds, refused = dict.fromkeys(group.kind for group in groups), {}
    for kind in kinds:
        tries = [{g: n for g, n in kept.items() if g.kind == kind} for kept in (fewest, half)]
        reasons = [_reason(model, coupling, kept) for kept in tries]
        if all(reasons):
            refused[kind] = reasons[0]
    if refused:
        others = ",".join(kind for kind in kinds if kind not in refused)
        raise ExportError(
            f"{type(model).__name__} can take no other number of {', '.join(refused)} units",
            where=", ".join([group.name for group in groups if group.kind in refused][:3]),
            so=f"nothing was computed; {next(iter(refused.values()))}",
            fix=f"leave them whole: `--set units={others}`" if others else None,
        )


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model with its parameters on meta and its buffers on the CPU."""
    tensors = tensors_of(model)
    places = {n: _outline(t, isinstance(t, nn.Parameter)) for n, t in tensors.items()}
    return assemble(model, places)


def _outline(tensor: Tensor, is_parameter: bool) -> Tensor:
    """Of a parameter its sizes are enough; a buffer comes to the CPU, if it has a content."""
    return tensor.to("meta" if is_parameter or tensor.is_meta else "cpu")


def _kept(group: Group, constraints: Constraints, most: int) -> int:
    """The largest number of units up to `most` that may stay; all where there is none."""
    step = constraints.step(group)
    kept = most // step * step
    return kept if kept >= constraints.least(group) else group.size


def _reason(model: nn.Module, coupling: CouplingGraph, kept: Mapping[Group, int]) -> str | None:
    """Why the class cannot do with so many units of these groups; None where it may."""
    keeps = {g.dim: Keep(np.arange(g.size) >= g.size - n) for g, n in kept.items() if n < g.size}
    if not keeps:
        return None
    program, selection = coupling.program, Selection(keeps)
    dense = {n: _outline(t, n in program.parameters) for n, t in program.state.items()}
    weights = Weights(coupling, dense, selection=selection)
    tensors = {name: weights.read(name) for name in weights}
    sliced = sliced_parameters(coupling, selection, tensors)
    example = {name: value.cpu() for name, value in shrink_example(model, program.example).items()}
    with quiet():
        return misfit(model, sliced, example)

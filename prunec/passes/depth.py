"""Depth: a program without some of its residual branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from prunec.errors import PlanError, VerifyError
from prunec.graph.branches import Branch
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.dropping import drop_branches, silence
from prunec.passes.oracles.mask import relative_difference


def choose_branches(coupling: CouplingGraph, names: Sequence[str]) -> tuple[Branch, ...]:
    """Branches by name, in the order of the graph.

    Raises:
        PlanError: an unknown name (the nearest are given), a repeated one, or every branch.
    """
    for name in names:
        coupling.branch(name)
    if len(set(names)) < len(names):
        raise PlanError("the plan drops a branch twice", where=", ".join(names))
    if names and len(names) == len(coupling.branches):
        raise PlanError("every branch would go", fix="keep at least one")
    return tuple(branch for branch in coupling.branches if branch.name in names)


def loaded(
    coupling: CouplingGraph, weights: Mapping[str, Tensor] | None, device: str | None = None
) -> CouplingGraph:
    """The coupling around these parameters in memory, where its own are on meta.

    Args:
        device: where everything is put; by default it stays where it is.
    """
    if weights is None:
        return coupling
    program = coupling.program
    present = {**program.state, **{name: weights[name] for name in program.parameters}}
    state = {name: tensor.to(device) for name, tensor in present.items()}
    return CouplingGraph(replace(program, state=state), coupling.layout)


def drop(coupling: CouplingGraph, names: Sequence[str]) -> CouplingGraph:
    """The coupling of what is left of a program without the branches of these names.

    Names of groups and parameters stay, so that a plan can go on from here.

    Raises:
        PlanError: as `choose_branches`.
    """
    branches = choose_branches(coupling, names)
    return couple(drop_branches(coupling.program, branches)) if branches else coupling


def verify_dropped(
    coupling: CouplingGraph, names: Sequence[str], *, tolerance: float = 1e-4
) -> float:
    """How far dropping is from multiplying by zero on the traced inputs; VerifyError if too far."""
    program, branches = coupling.program, choose_branches(coupling, names)
    reference = silence(program, branches).run(None, **dict(program.example))
    result = drop_branches(program, branches).run(None, **dict(program.example))
    difference = relative_difference(result, reference)
    if not difference <= tolerance:
        raise VerifyError(
            f"the model without {', '.join(names)} differs from the masked one by "
            f"{difference:.2g} (relative)",
            so="nothing was written",
            fix="please report the model: a branch was found that is none",
        )
    return difference

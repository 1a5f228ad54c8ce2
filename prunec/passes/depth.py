"""Depth: a program without some of its residual branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx

from prunec.errors import PlanError, VerifyError
from prunec.graph.branches import Branch
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.dropping import drop_branches, silence
from prunec.graph.sums import operator_name, unscaled
from prunec.passes.oracles.mask import in_single, relative_difference
from prunec.passes.sites import Site


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


def own_branches(coupling: CouplingGraph, sites: Sequence[Site]) -> dict[str, Branch]:
    """By site, the residual branch that adds nothing once the site's weight and bias are zero.

    Its other sites, if it has any, then compute for nothing, so a branch of several has none; nor
    has one with a norm behind its site, which may add a bias of its own.
    """
    inside: dict[str, list[Site]] = {}
    branches = {name: branch for branch in coupling.branches for name in branch.parameters}
    for site in sites:
        held = {branches[name].name for name in site.parameters if name in branches}
        for name in held:
            inside.setdefault(name, []).append(site)
    by_name = {branch.name: branch for branch in coupling.branches}
    return {
        site.name: by_name[name]
        for name, (site, *others) in inside.items()
        if not others
        and _end(coupling, by_name[name]) in site.nodes
        and _can_be_silent(coupling, site)
    }


_VIEWS = ("view", "reshape", "_unsafe_view")


def _end(coupling: CouplingGraph, branch: Branch) -> fx.Node:
    """The call that a branch's term is computed by, but for casts, views and numbers."""
    node = branch.exit
    while True:
        before = unscaled(node, coupling.layout)
        if before is None and operator_name(node) in _VIEWS:
            before = node.all_input_nodes[0]
        if before is None:
            return node
        node = before


def _can_be_silent(coupling: CouplingGraph, site: Site) -> bool:
    """Whether the product is called once, and adds no bias that is not the site's own."""
    (node, *others) = site.nodes
    own = {reading.parameter for reading in site.readings} | {r.bias for r in site.readings}
    names = {coupling.program.bindings.get(source.name) for source in node.all_input_nodes}
    return not others and names - {None} <= own


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
    coupling = in_single(coupling)
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

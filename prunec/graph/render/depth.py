"""Units of depth in figures: what leaving out a residual branch takes away."""

from __future__ import annotations

from dataclasses import dataclass

from prunec.graph.branches import Branch
from prunec.graph.cost import node_flops
from prunec.graph.coupling import CouplingGraph


@dataclass(frozen=True)
class BranchFigures:
    """One residual branch in figures.

    Attributes:
        parameters: parameters that only this branch needs.
        flops: FLOPs that only it needs, of one pass at the traced shapes.
    """

    branch: Branch
    parameters: int
    flops: int


def branch_figures(coupling: CouplingGraph) -> list[BranchFigures]:
    """Every residual branch, in the order of the graph."""
    layout, state = coupling.layout, coupling.program.state
    return [
        BranchFigures(
            branch=branch,
            parameters=sum(state[name].numel() for name in branch.parameters),
            flops=sum(node_flops(node, layout, {}) for node in branch.nodes),
        )
        for branch in coupling.branches
    ]

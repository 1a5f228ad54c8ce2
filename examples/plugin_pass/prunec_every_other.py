"""A new pass: whole blocks go, spread evenly over the depth of every stack of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunec import Plan
from prunec.errors import PlanError
from prunec.graph.branches import blocks
from prunec.graph.coupling import CouplingGraph
from prunec.passes.targets.goal import Goal


@dataclass(frozen=True)
class EveryOther:
    """The "every other" of LayerDrop (arXiv 1909.11556): an encoder and a decoder give alike."""

    place: float = 0.5  # an option, --set pass.place=0: which of a stretch goes, 0 is its first

    needs_data: ClassVar[bool] = False

    def plan(
        self, coupling: CouplingGraph, goal: Goal, batches: Sequence[Mapping[str, Tensor]]
    ) -> Plan:
        stacks: dict[str, list[tuple[str, ...]]] = {}
        for block, branches in blocks(coupling.branches).items():
            names = tuple(branch.name for branch in branches)
            stacks.setdefault(block.rpartition(".")[0], []).append(names)
        gone: list[str] = []
        for stack in stacks.values():
            count = round(len(stack) * goal.remove / goal.of)
            for i in range(count):
                gone += stack[int((i + self.place) * len(stack) / count)]
        if not gone:
            raise PlanError(f"{goal.target} is less than one block", fix="ask for more")
        return Plan(dropped=tuple(gone))

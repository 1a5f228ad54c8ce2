"""A pass of a plug-in: one decision about the whole model, written down as a Plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from prunec.graph.coupling import CouplingGraph
from prunec.passes.plan import Plan
from prunec.passes.targets.goal import Goal


class Pass(Protocol):
    """What says which units and branches go; a plug-in of the group ``passes``.

    A frozen dataclass, whose fields are its options. What it says is carried out as any plan is:
    weights are sliced and branches left out, without correction, and the result is proven.

    Attributes:
        needs_data: whether `plan` looks at the calibration.
    """

    needs_data: ClassVar[bool]

    def plan(
        self, coupling: CouplingGraph, goal: Goal, batches: Sequence[Mapping[str, Tensor]]
    ) -> Plan:
        """What goes.

        Args:
            coupling: of the dense model: its groups, its branches, and ``coupling.program``, whose
                ``state`` has the weights.
            goal: the target: ``goal.remove`` of ``goal.of``.
            batches: inputs of the model by name; without a calibration one example.

        Raises:
            PlanError: the target cannot be reached; it says what can.
        """

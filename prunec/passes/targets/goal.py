"""A target on one model: what is measured there, how much of it is to go, how near is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prunec.errors import PlanError
from prunec.graph.cost import Counts, parameter_count
from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.paths import blocks_of
from prunec.passes.sites import Site
from prunec.passes.targets.costs import Measure, Parameters, measure_for
from prunec.passes.targets.latency import LatencyMeasure
from prunec.passes.targets.target import Target

TOLERANCE = 0.005
"""How far from the target a result may be, as a part of it."""


@dataclass(frozen=True)
class Goal:
    """How much of what is to go.

    Attributes:
        target: as the user said it.
        measure: of what.
        of: the dense cost that the target is a part of.
        remove: in the measure's unit.
        tolerance: how far from `remove` the result may be, in the same unit.
    """

    target: Target
    measure: Measure
    of: float
    remove: float
    tolerance: float

    @classmethod
    def on(cls, coupling: CouplingGraph, target: Target | float) -> Goal:
        """What a target, or a ratio of the repeated blocks' parameters, means for this model.

        Raises:
            PlanError: the ratio is not between 0 and 1, or the model is below the target already.
        """
        if not isinstance(target, Target):
            target = Target.of_ratio(target)
        if target.kind == "ratio":
            names = {name for inside in _blocks(coupling).values() for name in inside}
            measure: Measure = Parameters(coupling, names=names)
            total = measure.whole()
            remove = target.value * total
            return cls(target, measure, total, remove, TOLERANCE * remove)
        measure = measure_for(target.kind, coupling)
        whole = measure.whole()
        left = target.value * (whole if target.relative else 1.0)
        if left >= whole:
            raise PlanError(
                f"{target}: the model has {amount(target.kind, whole)}, which is no more",
                fix="lower the target",
            )
        return cls(target, measure, whole, whole - left, TOLERANCE * left)

    @property
    def takes_nearest(self) -> bool:
        """Whether the nearest whole unit will do where units are coarser than the tolerance."""
        return self.target.kind in ("ratio", "latency")

    def check_left(self, left: float) -> None:
        """Raises PlanError where the nearest that whole units leave is too far from the target."""
        if self.takes_nearest or abs(left - self.of + self.remove) <= self.tolerance * (1 + 1e-9):
            return
        kind = self.target.kind
        raise PlanError(
            f"{self.target}: {amount(kind, self.of - self.remove)} were to be left",
            so=f"whole units come nearest with {amount(kind, left)} ({left / self.of:.2%})",
            fix="ask for that, or for a --ratio, which takes the nearest",
        )

    def narrowed(self, coupling: CouplingGraph, counts: Counts) -> Goal:
        """What is left to be removed once leaves of no site keep these many units.

        Raises:
            PlanError: nothing is, or the measure does not count them.
        """
        ratio = self.target.kind == "ratio"
        names = {name for inside in _blocks(coupling).values() for name in inside}
        measure = (
            Parameters(coupling, counts, names)
            if ratio
            else measure_for(self.target.kind, coupling, counts)
        )
        of = sum(block_parameters(coupling, counts).values()) if ratio else measure.whole()
        remove = self.remove - (self.of - of)
        if remove <= self.tolerance:
            raise PlanError(f"{self.target}: a narrower residual stream is beyond it by itself")
        return replace(self, measure=measure, of=of, remove=remove)

    def concerned(self, sites: Sequence[Site]) -> list[Site]:
        """The sites, with those of their groups alone, whose units count towards the target.

        Raises:
            PlanError: there are none.
        """
        reduced = [replace(site, groups=self._groups(site)) for site in sites]
        found = [site for site in reduced if site.groups]
        if sites and not found:
            raise PlanError(
                f"{self.target}: none of the units to prune counts towards it",
                fix="choose another target, or other units with --set units=...",
            )
        return found

    def _groups(self, site: Site) -> tuple[Group, ...]:
        if isinstance(self.measure, LatencyMeasure):
            return site.groups
        whole = self.measure.at(site, {})
        return tuple(
            group
            for group in site.groups
            if self.measure.at(site, {group.name: group.size - 1}) < whole
        )


def block_parameters(coupling: CouplingGraph, counts: Counts | None = None) -> dict[str, int]:
    """Parameters of each repeated block, in model order; the whole model where there is none.

    ``counts`` are the units kept by leaf; others whole.
    """
    blocks = _blocks(coupling).items()
    return {block: parameter_count(coupling, counts, names) for block, names in blocks}


def _blocks(coupling: CouplingGraph) -> dict[str, list[str]]:
    """Names of the parameters by block; of a list, only where whole groups lie in its modules.

    The norms of several layers, or the layers of a perceptron, are lists but no blocks.
    """
    names = [name for name in coupling.layout.parameters if name in coupling.program.parameters]
    lists = {_list_of(group.block) for group in coupling.groups if group.block}
    found = blocks_of(names).items()
    return {block: inside for block, inside in found if _list_of(block) in lists} or {"": names}


def _list_of(block: str) -> str:
    """The module that a repeated block is an item of."""
    return block.rpartition(".")[0]


def amount(kind: str, value: float) -> str:
    """A cost in words.

    >>> amount("memory", 250e6), amount("latency", 0.0123), amount("params", 1000)
    ('250.00 MB', '12.30 ms', '1,000 parameters')
    """
    if kind == "latency":
        return f"{value * 1e3:.2f} ms"
    if kind == "memory":
        return f"{value / 1e6:.2f} MB"
    unit = {"flops": "FLOPs a pass", "kv-cache": "bytes a token"}.get(kind, "parameters")
    return f"{round(value):,} {unit}"

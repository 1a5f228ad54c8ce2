"""The budget of a run: what each site is asked to give, and what is carried on to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunec.errors import PlanError
from prunec.graph.cost import Counts, parameter_count
from prunec.graph.coupling import CouplingGraph, blocks_of
from prunec.passes.allocation import Allocation
from prunec.passes.context import Context, Room, Survey
from prunec.passes.sites import Site, site_parameters

TOLERANCE = 0.005
"""How far from the target a result may be, as a part of it."""


class Budget:
    """Parameters to remove, split over sites; what whole units cannot express is carried on.

    Args:
        wants: parameters to remove at each site, by site name.
        capacity: parameters that each site can give.
        finest: parameters of the smallest unit anywhere.
    """

    def __init__(self, wants: Mapping[str, float], capacity: Mapping[str, int], finest: int):
        self._wants = dict(wants)
        self._capacity = dict(capacity)
        self._allowed = max(TOLERANCE * sum(wants.values()), finest)
        self.target = round(sum(wants.values()))
        self.removed = 0
        self._carry = 0.0

    def share(self, site: Site) -> int:
        """Parameters that this site is to give, whatever the others do."""
        return round(self._wants.get(site.name, 0.0))

    def want(self, site: Site) -> int:
        """Parameters that this site is asked for now: its share and what earlier ones left over."""
        self._carry += self._wants.get(site.name, 0.0)
        return round(min(self._carry, self._capacity.get(site.name, 0)))

    def spend(self, removed: int) -> None:
        """This site gave that many."""
        self.removed += removed
        self._carry -= removed

    def close(self) -> None:
        """Raises PlanError if the total misses the target by TOLERANCE and by a whole unit."""
        miss = abs(self.removed - self.target)
        if miss > self._allowed:
            raise PlanError(
                f"{self.target:,} parameters were to go, whole units come to {self.removed:,}",
                so=f"the result would be {miss / self.target:.1%} off the target",
                fix="choose a ratio that whole units can express, or let finer units be pruned",
            )


def block_budget(
    coupling: CouplingGraph,
    sites: Sequence[Site],
    allocation: Allocation,
    ratio: float,
    *,
    survey: Survey | None = None,
) -> Budget:
    """The budget that removes ``ratio`` of the parameters of all repeated blocks.

    A model without repeated blocks counts as one block. `survey` is for allocations that look at
    the dense model.

    Raises:
        PlanError: for a ratio that is not between 0 and 1 or cannot be reached, with the largest
            that can.
    """
    if not 0 < ratio < 1:
        raise PlanError(
            f"a ratio of {ratio:g} is not possible", fix="use a ratio between 0 and 1, such as 0.2"
        )
    blocks = block_parameters(coupling)
    total = sum(blocks.values())
    held = {site.name: _held(coupling, site) for site in sites}
    capacity = {site.name: held[site.name] - _least(coupling, site) for site in sites}
    _check_reachable(ratio, total, capacity)
    rooms = [
        Room(site.name, _home(site, blocks), held[site.name], capacity[site.name]) for site in sites
    ]
    homes = {room.block for room in rooms}
    prunable = {block: size for block, size in blocks.items() if block in homes}
    # Blocks in which nothing can be pruned give their part through the others.
    target = ratio * total / sum(prunable.values())
    wants = allocation.shares(Context(target, prunable, rooms, survey))
    units = {site.name: _smallest_unit(coupling, site) for site in sites}
    wants = _within_capacity({site.name: wants[site.name] for site in sites}, capacity)
    wants = _settle_tail(wants, units, TOLERANCE * ratio * total)
    return Budget(wants, capacity, min(units.values()))


def block_parameters(coupling: CouplingGraph, counts: Counts | None = None) -> dict[str, int]:
    """Parameters of each repeated block, in model order; the whole model where there is none.

    ``counts`` are the units kept by leaf; others whole.
    """
    names = [name for name in coupling.layout.parameters if name in coupling.program.parameters]
    blocks = blocks_of(names)
    if not blocks:
        return {"": parameter_count(coupling, counts)}
    return {block: parameter_count(coupling, counts, names) for block, names in blocks.items()}


def _home(site: Site, blocks: Mapping[str, int]) -> str:
    """The block that a site counts to: its own, else the first that holds its weight."""
    if site.block in blocks:
        return str(site.block)
    inside = [block for block in blocks if site.parameter.startswith(f"{block}.")]
    return inside[0] if inside else next(iter(blocks))


def _held(coupling: CouplingGraph, site: Site) -> int:
    return parameter_count(coupling, names=site_parameters(site))


def _least(coupling: CouplingGraph, site: Site) -> int:
    counts = {group.dim: group.minimum for group in site.groups}
    return parameter_count(coupling, counts, site_parameters(site))


def _smallest_unit(coupling: CouplingGraph, site: Site) -> int:
    names = site_parameters(site)
    whole = parameter_count(coupling, names=names)
    return min(
        whole - parameter_count(coupling, {group.dim: group.size - 1}, names)
        for group in site.groups
    )


def _settle_tail(
    wants: Mapping[str, float], units: Mapping[str, int], fine: float
) -> dict[str, float]:
    """Behind the last fine site nothing can take up a remainder: ask for whole units there."""
    names = list(wants)
    anchor = next((i for i in reversed(range(len(names))) if units[names[i]] <= fine), None)
    result = dict(wants)
    if anchor is not None:
        for name in names[anchor + 1 :]:
            whole = round(wants[name] / units[name]) * units[name]
            result[names[anchor]] += wants[name] - whole
            result[name] = whole
    return result


def _check_reachable(ratio: float, total: int, capacity: Mapping[str, int]) -> None:
    if not capacity:
        raise PlanError("nothing can be pruned in this model", fix="see `prunec analyze --why`")
    largest = sum(capacity.values()) / total
    if ratio * (1 - TOLERANCE) > largest:
        raise PlanError(
            f"{ratio:.1%} of the blocks' {total:,} parameters cannot be removed",
            so=f"the largest ratio that leaves one unit everywhere is {largest:.3f}",
            fix="lower the ratio",
        )


def _within_capacity(wants: Mapping[str, float], capacity: Mapping[str, int]) -> dict[str, float]:
    """What one site cannot give is asked of the others, in proportion to what they have left."""
    result = dict(wants)
    for _ in range(len(result)):
        excess = sum(max(0.0, want - capacity[name]) for name, want in result.items())
        result = {name: min(want, capacity[name]) for name, want in result.items()}
        room = {name: capacity[name] - want for name, want in result.items()}
        if excess < 1 or not any(room.values()):
            break
        scale = min(1.0, excess / sum(room.values()))
        result = {name: want + scale * room[name] for name, want in result.items()}
    return result

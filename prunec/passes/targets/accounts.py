"""What each site holds and can give, and how a total is split within that."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from prunec.errors import PlanError
from prunec.graph.branches import Branch
from prunec.importance.problem import FloatArray
from prunec.passes.sites import Site
from prunec.passes.targets.constraints import Constraints
from prunec.passes.targets.costs import Measure, Parameters, UnitCounts
from prunec.passes.targets.goal import Goal, amount
from prunec.passes.targets.room import Room


@dataclass(frozen=True)
class Account:
    """What one site holds and can give, in the goal's measure.

    Attributes:
        parameters: held by the site's groups.
        cost: of the dense site.
        least, most: what the constraints force it, and allow it, to give.
        step: what the smallest step that the constraints allow gives.
        unit: what the smallest unit gives, whatever they allow.
        added: what the biases cost that are fitted once it gives anything; `least` and `most` are
            without it.
        branch: the residual branch that the site can leave out whole, if it can.
        branch_cost: what that gives.
    """

    site: Site
    parameters: int
    cost: float
    least: float
    most: float
    step: float
    unit: float
    branch: Branch | None = None
    branch_cost: float = 0.0
    added: float = 0.0

    @classmethod
    def of(
        cls, site: Site, measure: Measure, sizes: Parameters, constraints: Constraints
    ) -> Account:
        """Raises PlanError where no whole number of units lies within the constraints' bounds."""
        cost, held = measure.at(site, {}), round(sizes.at(site, {}))
        floor = {group.name: constraints.least(group) for group in site.groups}
        steps = {group.name: constraints.step(group) for group in site.groups}
        added = measure.added(site)
        bounds = [
            _net(cost - measure.at(site, kept), added) for kept in _ends(site, sizes, constraints)
        ]
        least, most = min(bounds), max(bounds)
        gives = [
            cost - measure.at(site, {group.name: group.size - steps[group.name]})
            for group in site.groups
            if group.size - steps[group.name] >= floor[group.name]
        ]
        unit = min(cost - measure.at(site, {g.name: g.size - 1}) for g in site.groups)
        step = min(gives, default=0.0)
        return cls(site, held, cost, least, most, step, unit, added=added)

    @classmethod
    def protected(cls, site: Site, measure: Measure, sizes: Parameters) -> Account:
        """Of a site that stays whole."""
        open_ = cls.of(site, measure, sizes, Constraints())
        return replace(open_, least=0.0, most=0.0, step=0.0)

    def with_branch(self, branch: Branch | None, measure: Measure) -> Account:
        """Of a site whose branch can be left out."""
        if branch is None or self.most <= 0:
            return self
        return replace(self, branch=branch, branch_cost=measure.branch(self.site, branch))

    def room(self, blocks: Mapping[str, int], sizes: Parameters) -> Room:
        """The site as an allocation sees it; ``blocks``: the parameters that each block holds."""
        return Room(
            site=self.site.name,
            block=_home(self.site, blocks),
            parameters=self.parameters,
            most=round(self.most / self.cost * self.parameters) if self.cost else 0,
            kinds=tuple(group.kind for group in self.site.groups),
            branch=0 if self.branch is None else round(sizes.branch(self.site, self.branch)),
        )


def _net(given: float, added: float) -> float:
    """What is gained by units, less the biases that are then fitted."""
    return given - added if given else 0.0


def _ends(site: Site, sizes: Parameters, constraints: Constraints) -> list[UnitCounts]:
    """The most and the fewest units that a site may keep; of several groups every such pair.

    Raises:
        PlanError: no whole number of units lies within the constraints' bounds.
    """
    counts = {group.name: constraints.counts(group) for group in site.groups}
    if not all(counts.values()):
        raise PlanError(
            f"{site.name}: no numbers of units obey the constraints",
            fix="loosen multiple_of or tensor_parallel, or protect this layer",
        )
    low, high = constraints.minimum, constraints.maximum
    if (low, high) == (0, 1):
        return [{name: allowed[end] for name, allowed in counts.items()} for end in (0, -1)]
    *others, widest = sorted(counts, key=lambda name: len(counts[name]))
    held, wide = sizes.at(site, {}), counts[widest]
    least, most = constraints.bounds(held)
    found: list[UnitCounts] = []
    missed: list[float] = []
    for beside in itertools.product(*(counts[name] for name in others)):
        kept = dict(zip(others, beside, strict=True))
        removed = partial(_removed, sizes, site, kept, widest)
        first = bisect_left(wide, least, key=removed)
        last = bisect_right(wide, most, key=removed) - 1
        if first <= last:
            found += [{**kept, widest: wide[first]}, {**kept, widest: wide[last]}]
        missed += [removed(count) / held for count in wide[max(last, 0) : first + 1]]
    if not found:
        near = [max((part for part in missed if part < low), default=None)]
        near += [min((part for part in missed if part > high), default=None)]
        raise PlanError(
            f"{site.name}: no whole units are between {low:.1%} and {high:.1%} of its parameters",
            so=f"it can give {' or '.join(f'{part:.1%}' for part in near if part is not None)}",
            fix="loosen the minimum or the maximum, or protect this layer",
        )
    return found


def _removed(sizes: Parameters, site: Site, beside: UnitCounts, name: str, count: int) -> float:
    return sizes.at(site, {}) - sizes.at(site, {**beside, name: count})


def _home(site: Site, blocks: Mapping[str, int]) -> str:
    """The block that a site counts to: its own, else the first that holds its weight."""
    if site.block in blocks:
        return str(site.block)
    last = site.readings[-1].parameter if site.readings else site.parameters[-1]
    inside = [block for block in blocks if last.startswith(f"{block}.")]
    return inside[0] if inside else next(iter(blocks))


def check_reachable(goal: Goal, accounts: Collection[Account]) -> None:
    """Raises PlanError where all that can go is too little, or what must go too much."""
    if not accounts:
        raise PlanError("nothing can be pruned in this model", fix="see `prunec analyze --why`")
    kind = goal.target.kind
    most = sum(account.most for account in accounts)
    least = sum(account.least for account in accounts)
    slack = max(goal.tolerance, max(account.step for account in accounts))
    if goal.remove - goal.tolerance > most:
        what = (
            f"{goal.target.value:.1%} of the blocks' {round(goal.of):,} parameters"
            if kind == "ratio"
            else f"{amount(kind, goal.remove)} of {amount(kind, goal.of)}"
        )
        reach = (
            f"the largest ratio that leaves one unit everywhere is {most / goal.of:.3f}"
            if kind == "ratio"
            else f"at least {amount(kind, goal.of - most)} ({1 - most / goal.of:.2%}) are left"
        )
        raise PlanError(
            f"{what} cannot be removed", so=reach, fix="ask for less, or loosen the constraints"
        )
    if least > goal.remove + slack:
        raise PlanError(
            f"the constraints remove {amount(kind, least)}, more than the target",
            so=f"at most {amount(kind, goal.of - least)} are left",
            fix="ask for more, or loosen the constraints",
        )


def within(
    wants: Mapping[str, float], accounts: Mapping[str, Account], total: float
) -> dict[str, float]:
    """The wants scaled to a total, each within what its site must and can give.

    What one site cannot give is asked of the others, in proportion to what they have left; what
    one gives more, in proportion to what the others can save.
    """
    scale = total / sum(wants.values()) if any(wants.values()) else 0.0
    if abs(scale - 1) > 1e-6:
        wants = {name: scale * want for name, want in wants.items()}
    result = {
        name: min(max(want, accounts[name].least), accounts[name].most)
        for name, want in wants.items()
    }
    missing = total - sum(result.values())
    bound = {name: (a.most if missing > 0 else a.least) for name, a in accounts.items()}
    room = {name: bound[name] - want for name, want in result.items()}
    if abs(missing) < 1e-9 * total or not any(room.values()):
        return result
    part = min(1.0, missing / sum(room.values()))
    return {name: want + part * room[name] for name, want in result.items()}


def whole_units(account: Account, measure: Measure, constraints: Constraints) -> FloatArray:
    """What a site can give in whole units as the constraints allow, ascending.

    Of several groups every combination is counted, whatever a removal curve goes through.
    """
    if account.most <= 0:
        return np.zeros(1)
    groups = account.site.groups
    left = (
        measure.at(account.site, {g.name: n for g, n in zip(groups, counts, strict=True)})
        for counts in itertools.product(*(constraints.counts(group) for group in groups))
    )
    given = np.array([_net(account.cost - cost, account.added) for cost in left])
    slack = 1e-9 * account.cost
    return np.unique(given[(given >= account.least - slack) & (given <= account.most + slack)])


def totals_after(
    accounts: Mapping[str, Account],
    goal: Goal,
    constraints: Constraints,
    left_out: Collection[str] = (),
) -> dict[str, FloatArray]:
    """The totals that the sites after one another can come to, where all of those are coarse.

    Args:
        accounts: in the order in which the sites are pruned.
        left_out: sites whose branches go, which is all that these give.

    Returns:
        By site; those before a site with units finer than the goal's tolerance are not in it: that
        one can take up any remainder.
    """
    totals = np.zeros(1)
    found: dict[str, FloatArray] = {}
    for name, account in reversed(list(accounts.items())):
        found[name] = totals
        if name in left_out:
            totals = totals + account.branch_cost
            continue
        if 0 < account.step <= goal.tolerance:
            break
        given = whole_units(account, goal.measure, constraints)
        sums = np.unique(totals[:, None] + given)
        # Of totals beyond the goal none but the first can be the nearest.
        sums = sums[: np.searchsorted(sums, goal.remove + goal.tolerance, "right") + 1]
        # Of totals that nobody can tell apart one is enough.
        _, first = np.unique(np.floor(sums / goal.tolerance * 64), return_index=True)
        totals = sums[first]
    return found

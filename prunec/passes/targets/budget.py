"""The budget of a run: what each site is asked to give, and what is carried on to the next."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph
from prunec.importance.curves import RemovalCurve
from prunec.importance.problem import FloatArray
from prunec.passes.allocation.context import Context, Room, Survey
from prunec.passes.allocation.uniform import Allocation
from prunec.passes.sites import Site
from prunec.passes.targets.constraints import Constraints, counts_along
from prunec.passes.targets.costs import Measure, Parameters
from prunec.passes.targets.goal import TOLERANCE, Goal, amount, block_parameters

__all__ = ["TOLERANCE", "Budget", "block_budget", "block_parameters"]


@dataclass(frozen=True)
class Account:
    """What one site holds and can give, in the goal's measure.

    Attributes:
        parameters: held by the site's groups.
        cost: of the dense site.
        least, most: what the constraints force it, and allow it, to give.
        step: what the smallest step that the constraints allow gives.
        unit: what the smallest unit gives, whatever they allow.
    """

    site: Site
    parameters: int
    cost: float
    least: float
    most: float
    step: float
    unit: float

    @classmethod
    def of(
        cls, site: Site, measure: Measure, sizes: Parameters, constraints: Constraints
    ) -> Account:
        cost, held = measure.at(site, {}), round(sizes.at(site, {}))
        floor = {group.name: constraints.least(group) for group in site.groups}
        steps = {group.name: constraints.step(group) for group in site.groups}
        # Of a group whose size is no multiple, the odd units must go.
        forced = {g.name: g.size // steps[g.name] * steps[g.name] for g in site.groups}
        most = min(cost - measure.at(site, floor), constraints.maximum * cost)
        least = max(cost - measure.at(site, forced), constraints.minimum * cost)
        gives = [
            cost - measure.at(site, {group.name: group.size - steps[group.name]})
            for group in site.groups
            if group.size - steps[group.name] >= floor[group.name]
        ]
        unit = min(cost - measure.at(site, {g.name: g.size - 1}) for g in site.groups)
        return cls(site, held, cost, min(least, most), most, min(gives, default=0.0), unit)

    @classmethod
    def protected(cls, site: Site, measure: Measure, sizes: Parameters) -> Account:
        """Of a site that stays whole."""
        open_ = cls.of(site, measure, sizes, Constraints())
        return replace(open_, least=0.0, most=0.0, step=0.0)


class Budget:
    """Cost to remove, split over sites; what whole units cannot express is carried on.

    Args:
        wants: cost to remove at each site, by site name.
    """

    def __init__(
        self,
        goal: Goal,
        sizes: Parameters,
        wants: Mapping[str, float],
        accounts: Mapping[str, Account],
        constraints: Constraints,
    ):
        self.goal = goal
        self._sizes = sizes
        self.constraints = constraints
        self._wants = dict(wants)
        self._accounts = dict(accounts)
        self.removed = 0.0
        self._carry = 0.0

    @property
    def rounding(self) -> float:
        """What went beyond the target (below it, where negative), in the measure's unit."""
        return self.removed - self.goal.remove

    def account(self, site: Site) -> Account:
        """What a site holds and can give."""
        return self._accounts[site.name]

    def share(self, site: Site) -> int:
        """Parameters that this site is to give, whatever the others do."""
        return self._parameters(site, self._wants.get(site.name, 0.0))

    def want(self, site: Site) -> int:
        """Parameters that this site is asked for now: its share and what earlier ones left over."""
        return self._parameters(site, self._asked(site))

    def stays_whole(self, site: Site) -> bool:
        """Whether nothing is asked of this site, so that no curve is needed."""
        account = self._accounts[site.name]
        return account.most <= 0 or (account.least <= 0 and self.want(site) <= 0)

    def limit(self, site: Site) -> int | None:
        """Parameters at which a curve has every point that could be chosen; None: at its end."""
        account = self._accounts[site.name]
        asked = self._asked(site)
        if self._counts_parameters and not self.constraints.rounds and account.least <= 0:
            wished = {g.name: g.size - self.constraints.wish(g) + 1 for g in site.groups}
            return round(asked + account.parameters - self._sizes.at(site, wished))
        if len(site.groups) > 1:
            return None
        (group,) = site.groups
        measure, step = self.goal.measure, self.constraints.wish(group)
        removed = bisect.bisect_left(
            range(group.size - group.minimum),
            asked,
            key=lambda units: account.cost - measure.at(site, {group.name: group.size - units}),
        )
        kept = (group.size - removed) // step * step
        if kept < group.minimum:
            return None
        return account.parameters - round(self._sizes.at(site, {group.name: kept}))

    def choose(self, site: Site, curve: RemovalCurve) -> int:
        """The number of steps along a curve that comes nearest to what is asked; spends it.

        Among the numbers of units that the constraints wish for, if that is near enough.

        Raises:
            PlanError: no point of the curve obeys the constraints.
        """
        account = self._accounts[site.name]
        asked = self._asked(site)
        allowed = self.constraints.allowed(site, curve, account.parameters)
        if not allowed.any():
            raise PlanError(
                f"{site.name}: no numbers of units obey the constraints",
                fix="loosen multiple_of or tensor_parallel, or protect this layer",
            )
        removed = self._removed(account, curve)
        away = np.where(allowed, np.abs(removed - asked), np.inf)
        wished = np.where(self.constraints.wished(site, curve), away, np.inf)
        steps = int(np.argmin(wished if wished.min() <= self.goal.tolerance else away))
        self._carry = self._carry + self._wants.get(site.name, 0.0) - float(removed[steps])
        self.removed += float(removed[steps])
        return steps

    @property
    def spent(self) -> tuple[float, float]:
        """What is left over for later sites, and the cost removed: all that changes on the way."""
        return self._carry, self.removed

    def restore(self, spent: tuple[float, float]) -> None:
        """Go on behind a site whose choice was made before (see `spent`)."""
        self._carry, self.removed = spent

    def skip(self, site: Site) -> None:
        """This site gives nothing; what it was asked for goes on to the next."""
        self._carry += self._wants.get(site.name, 0.0)

    def close(self) -> None:
        """Raises PlanError if the total misses the target by more than the goal's tolerance."""
        kind, of = self.goal.target.kind, self.goal.of
        slack = self.goal.tolerance
        if kind in ("ratio", "latency"):
            slack = max(slack, min(account.unit for account in self._accounts.values()))
        if abs(self.removed - self.goal.remove) > slack * (1 + 1e-9):
            reached = (
                f"ratio {self.removed / of:.4f}"
                if kind == "ratio"
                else f"{amount(kind, of - self.removed)} left ({1 - self.removed / of:.2%})"
            )
            raise PlanError(
                f"{amount(kind, self.goal.remove)} were to go, "
                f"whole units come to {amount(kind, self.removed)}",
                so=f"what these units and constraints came to is {reached}",
                fix="ask for that or near it, let finer units be pruned, or loosen the constraints",
            )

    @property
    def _counts_parameters(self) -> bool:
        return isinstance(self.goal.measure, Parameters)

    def _asked(self, site: Site) -> float:
        """Cost that a site is asked for now, within what it must and can give."""
        account = self._accounts[site.name]
        share = self._wants.get(site.name, 0.0)
        return min(max(self._carry + share, account.least), account.most)

    def _parameters(self, site: Site, cost: float) -> int:
        """A cost as that part of the parameters that a site holds."""
        account = self._accounts[site.name]
        return round(cost / account.cost * account.parameters)

    def _removed(self, account: Account, curve: RemovalCurve) -> FloatArray:
        """Cost removed at every point of a curve, its beginning included."""
        if self._counts_parameters:
            return np.concatenate(([0.0], curve.parameters))
        along = counts_along(account.site, curve)
        points = np.stack([along[group.name] for group in account.site.groups], axis=1)
        costs = [
            self.goal.measure.at(
                account.site,
                {group.name: int(n) for group, n in zip(account.site.groups, point, strict=True)},
            )
            for point in points
        ]
        return account.cost - np.asarray(costs)


def block_budget(
    coupling: CouplingGraph,
    sites: Sequence[Site],
    allocation: Allocation,
    goal: Goal | float,
    *,
    survey: Survey | None = None,
    constraints: Constraints | None = None,
) -> Budget:
    """The budget that reaches a goal, or removes a ratio of the parameters of all repeated blocks.

    A model without repeated blocks counts as one block. `survey` is for allocations that look at
    the dense model. An allocation speaks of parameters; for another measure each site's share is
    taken as the same part of what it can give, and all are scaled to the goal.

    Raises:
        PlanError: for a ratio that is not between 0 and 1, a goal that cannot be reached (with the
            nearest that can), or constraints that contradict each other.
    """
    if not isinstance(goal, Goal):
        goal = Goal.on(coupling, goal)
    constraints = constraints or Constraints()
    blocks = block_parameters(coupling)
    sizes = Parameters(coupling)
    accounts = {
        site.name: Account.of(site, goal.measure, sizes, constraints)
        if not constraints.protects(site, list(blocks))
        else Account.protected(site, goal.measure, sizes)
        for site in sites
    }
    _check_reachable(goal, accounts.values())
    rooms = [
        Room(
            site.name,
            _home(site, blocks),
            accounts[site.name].parameters,
            round(_part(accounts[site.name]) * accounts[site.name].parameters),
            tuple(group.kind for group in site.groups),
        )
        for site in sites
    ]
    open_rooms = [room for room in rooms if room.most > 0]
    homes = {room.block for room in open_rooms}
    prunable = {block: size for block, size in blocks.items() if block in homes}
    # Blocks in which nothing can be pruned give their part through the others.
    total = sum(accounts[room.site].cost for room in open_rooms)
    if isinstance(goal.measure, Parameters):
        total = sum(prunable.values())

    def budget(shares: Mapping[str, float]) -> Budget:
        wants = {
            name: shares.get(name, 0.0) / account.parameters * account.cost
            for name, account in accounts.items()
        }
        wants = _settle_tail(_within(wants, accounts, goal.remove), accounts, goal.tolerance)
        return Budget(goal, sizes, wants, accounts, constraints)

    context = Context(goal.remove / total, prunable, open_rooms, survey, budget)
    return budget(allocation.shares(context))


def _home(site: Site, blocks: Mapping[str, int]) -> str:
    """The block that a site counts to: its own, else the first that holds its weight."""
    if site.block in blocks:
        return str(site.block)
    inside = [block for block in blocks if site.parameter.startswith(f"{block}.")]
    return inside[0] if inside else next(iter(blocks))


def _part(account: Account) -> float:
    return account.most / account.cost


def _check_reachable(goal: Goal, accounts: Collection[Account]) -> None:
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


def _within(
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


def _settle_tail(
    wants: Mapping[str, float], accounts: Mapping[str, Account], fine: float
) -> dict[str, float]:
    """Behind the last fine site nothing can take up a remainder: ask for whole units there."""
    names = list(wants)
    anchors = [i for i, name in enumerate(names) if 0 < accounts[name].step <= fine]
    if not anchors:
        return dict(wants)
    result = dict(wants)
    anchor = names[anchors[-1]]
    for name in names[anchors[-1] + 1 :]:
        step = accounts[name].step
        whole = round(wants[name] / step) * step if step else 0.0
        result[anchor] += wants[name] - whole
        result[name] = whole
    return result

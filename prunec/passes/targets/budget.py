"""The budget of a run: what each site is asked to give, and what is carried on to the next."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping
from functools import cached_property

import numpy as np

from prunec.errors import PlanError
from prunec.graph.selection import Selection
from prunec.importance.curves import RemovalCurve
from prunec.importance.problem import BoolArray, FloatArray
from prunec.passes.sites import Site
from prunec.passes.targets.accounts import Account, totals_after
from prunec.passes.targets.constraints import Constraints, counts_along
from prunec.passes.targets.costs import Parameters
from prunec.passes.targets.goal import Goal, amount
from prunec.passes.targets.interplay import Interplay


class Budget:
    """Cost to remove, split over sites; what whole units cannot express is carried on.

    Args:
        wants: cost to remove at each site, by site name.
        left_out: names of the sites whose branches are left out.
        narrowed: features of the residual stream that go before the first site is reached.
    """

    def __init__(
        self,
        goal: Goal,
        sizes: Parameters,
        wants: Mapping[str, float],
        accounts: Mapping[str, Account],
        constraints: Constraints,
        *,
        left_out: Collection[str] = (),
        narrowed: Selection | None = None,
    ):
        self.narrowed = narrowed or Selection()
        self._left_out = frozenset(left_out)
        self.goal = goal
        self._sizes = sizes
        self.constraints = constraints
        self._wants = dict(wants)
        self._accounts = dict(accounts)
        self.removed = 0.0
        self._carry = 0.0
        self._kept: dict[str, int] = {}
        shared = {name: a for name, a in accounts.items() if a.site.is_shared}
        ordered = shared | dict(accounts)
        # Where sites hold parameters in common what the later ones give is not known beforehand.
        apart = not Interplay.of(goal.measure, accounts, constraints).exists
        self._totals_after = (
            totals_after(ordered, goal, constraints, self._left_out) if apart else {}
        )
        self._after = _bounds_after(ordered, self._left_out)
        # A curve goes through some of the numbers of two groups: which, is known when it is there.
        single = all(len(a.site.groups) == 1 or a.most <= 0 for a in accounts.values())
        self._looks_ahead = single and self._totals_after.keys() == accounts.keys()

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
        asked = self._asked(site) + account.added
        if len(self._totals_after.get(site.name, ())) > 1:
            return None  # which point it is depends on what the later ones can come to
        rounds = self.constraints.rounds(site.groups)
        if self._counts_parameters(site) and not rounds and account.least <= 0:
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
                f"{site.name}: as its units are ranked no numbers of them obey the constraints",
                fix="loosen multiple_of, tensor_parallel or the bounds, or protect this layer",
            )
        removed = self._removed(account, curve)
        near = self._can_be_met if site.name in self._totals_after else self._in_reach
        allowed[allowed] = near(site, removed[allowed])
        away = np.where(allowed, np.abs(removed - asked), np.inf)
        wished = np.where(self.constraints.wished(site, curve), away, np.inf)
        steps = int(np.argmin(wished if wished.min() <= self.goal.tolerance else away))
        self._carry = self._carry + self._wants.get(site.name, 0.0) - float(removed[steps])
        self.removed += float(removed[steps])
        return steps

    def _can_be_met(self, site: Site, removed: FloatArray) -> BoolArray:
        """Of what the site may remove, that with which the later ones can come to the target.

        Where nothing does: that with which they come nearest.
        """
        left = self.goal.remove - self.removed - removed
        totals = self._totals_after[site.name]
        after = np.searchsorted(totals, left)
        above = np.abs(totals[np.minimum(after, len(totals) - 1)] - left)
        below = np.abs(totals[np.maximum(after - 1, 0)] - left)
        miss = np.minimum(above, below)
        near: BoolArray = miss <= max(self._slack, float(miss.min()) * (1 + 1e-9))
        return near

    def _in_reach(self, site: Site, removed: FloatArray) -> BoolArray:
        """Of what the site may remove, that of which the later ones can make up the rest.

        None of them gives back what went beyond the target. Where nothing does: what comes nearest.
        """
        least, most = self._after[site.name]
        left = self.goal.remove - self.removed - removed
        miss = np.maximum(np.maximum(least - left, left - most), 0.0)
        near: BoolArray = miss <= max(self._slack, float(miss.min()) * (1 + 1e-9))
        return near

    @property
    def spent(self) -> tuple[float, float]:
        """What is left over for later sites, and the cost removed: all that changes on the way."""
        return self._carry, self.removed

    def restore(self, spent: tuple[float, float], kept: Mapping[str, int]) -> None:
        """Go on behind a site whose choice was made (see `spent`): its groups keep these many."""
        self._carry, self.removed = spent
        self._kept |= kept

    def leaves_out(self, site: Site) -> bool:
        """Whether the site's whole branch goes."""
        return site.name in self._left_out

    def leave_out(self, site: Site) -> None:
        """The site's whole branch goes; that is exactly what was asked of it."""
        self.removed += self._accounts[site.name].branch_cost

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the branches that are left out, in the order of the graph."""
        branches = {name: self._accounts[name].branch for name in self._accounts}
        return tuple(b.name for name, b in branches.items() if b and name in self._left_out)

    def skip(self, site: Site) -> None:
        """This site gives nothing; what it was asked for goes on to the next."""
        self._carry += self._wants.get(site.name, 0.0)

    def close(self) -> None:
        """Raises PlanError if the total misses the target by more than the goal's tolerance."""
        kind, of = self.goal.target.kind, self.goal.of
        if abs(self.removed - self.goal.remove) > self._slack * (1 + 1e-9):
            reached = (
                f"ratio {self.removed / of:.4f}"
                if kind == "ratio"
                else f"{amount(kind, of - self.removed)} left ({1 - self.removed / of:.2%})"
            )
            said = (
                "the nearest that these units and constraints come to is"
                if self._looks_ahead
                else "in the order in which they were ranked the units come to"
            )
            raise PlanError(
                f"{amount(kind, self.goal.remove)} were to go, "
                f"whole units come to {amount(kind, self.removed)}",
                so=f"{said} {reached}",
                fix="ask for that, let finer units be pruned, or loosen the constraints",
            )

    @cached_property
    def _slack(self) -> float:
        """How far from the goal the total may be."""
        if not self.goal.takes_nearest:
            return self.goal.tolerance
        units = [account.unit for account in self._accounts.values() if account.unit > 0]
        unit = min(units, default=0.0)
        return max(self.goal.tolerance, unit)

    def _counts_parameters(self, site: Site) -> bool:
        """Whether the goal counts what the curves of a site count."""
        measure = self.goal.measure
        return isinstance(measure, Parameters) and measure.counts_all(site)

    def _asked(self, site: Site) -> float:
        """Cost that a site is asked for now, within what it must and can give."""
        account = self._accounts[site.name]
        if self.leaves_out(site):
            return account.branch_cost
        share = self._wants.get(site.name, 0.0)
        return min(max(self._carry + share, account.least), account.most)

    def _parameters(self, site: Site, cost: float) -> int:
        """A cost as that part of the parameters that a site holds."""
        account = self._accounts[site.name]
        return round(cost / account.cost * account.parameters) if account.cost else 0

    def _removed(self, account: Account, curve: RemovalCurve) -> FloatArray:
        """Cost removed at every point of a curve, its beginning included, less fitted biases."""
        removed = self._given(account, curve).astype(np.float64)
        removed[1:] -= account.added
        return removed

    def _given(self, account: Account, curve: RemovalCurve) -> FloatArray:
        beside = self._beside(account.site)
        if self._counts_parameters(account.site) and not beside:
            return np.concatenate(([0.0], curve.parameters))
        along = counts_along(account.site, curve)
        names = [group.name for group in account.site.groups]
        costs = [
            self.goal.measure.at(
                account.site,
                beside | {name: int(n) for name, n in zip(names, point, strict=True)},
            )
            for point in np.stack([along[name] for name in names], axis=1)
        ]
        return costs[0] - np.asarray(costs)

    def _beside(self, site: Site) -> dict[str, int]:
        """Units kept of other sites' groups that share a parameter with this one."""
        own, held = {group.name for group in site.groups}, set(site.parameters)
        return {
            group.name: self._kept[group.name]
            for account in self._accounts.values()
            for group in account.site.groups
            if group.name in self._kept
            and group.name not in own
            and any(member.parameter in held for member in group.members)
        }


def _bounds_after(
    accounts: Mapping[str, Account], left_out: Collection[str]
) -> dict[str, tuple[float, float]]:
    """What the sites after each one give at least and at most; accounts in the order of pruning."""
    least = most = 0.0
    found: dict[str, tuple[float, float]] = {}
    for name, account in reversed(list(accounts.items())):
        found[name] = least, most
        least += account.branch_cost if name in left_out else account.least
        most += account.branch_cost if name in left_out else account.most
    return found

"""How a goal is split over the sites of a model: the question that an allocation answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any

from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph
from prunec.graph.selection import Selection
from prunec.passes.allocation.context import Context, Survey
from prunec.passes.allocation.uniform import Allocation
from prunec.passes.channels import HIDDEN, heaviest
from prunec.passes.depth import own_branches
from prunec.passes.sites import Site
from prunec.passes.targets.accounts import Account, check_reachable, within
from prunec.passes.targets.budget import Budget
from prunec.passes.targets.constraints import Constraints
from prunec.passes.targets.costs import Parameters
from prunec.passes.targets.goal import Goal, block_parameters
from prunec.passes.targets.interplay import Interplay
from prunec.passes.targets.room import Room


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
    question = Question(coupling, sites, goal, constraints or Constraints(), survey)
    context = question.context()
    return context.budget(allocation.shares(context))


def not_whole(
    coupling: CouplingGraph, sites: Sequence[Site], goal: Goal, constraints: Constraints
) -> list[Site]:
    """The sites that may lose units: those that no constraint keeps whole.

    Raises:
        PlanError: a goal that cannot be reached.
    """
    accounts = Question(coupling, sites, goal, constraints, None).accounts.values()
    return [account.site for account in accounts if account.most > 0]


@dataclass(frozen=True)
class Question:
    """How a goal is to be split over the sites of a model.

    Attributes:
        narrowed: features of the residual stream that go before; the goal is what is then left.
    """

    coupling: CouplingGraph
    sites: Sequence[Site]
    goal: Goal
    constraints: Constraints
    survey: Survey | None
    narrowed: Selection = field(default_factory=Selection)

    @cached_property
    def blocks(self) -> dict[str, int]:
        return block_parameters(self.coupling, self.narrowed.counts)

    @cached_property
    def sizes(self) -> Parameters:
        return Parameters(self.coupling, self.narrowed.counts)

    @cached_property
    def accounts(self) -> dict[str, Account]:
        measure, limits, program = self.goal.measure, self.constraints, self.coupling.program
        names = {**{name: name for name in program.state}, **program.tied}
        whole = limits.protected(list(self.blocks), names)
        found = {
            site.name: Account.protected(site, measure, self.sizes)
            if not whole.isdisjoint((site.name, *site.parameters))
            else Account.of(site, measure, self.sizes, limits)
            for site in self.sites
        }
        check_reachable(self.goal, found.values())
        branches = own_branches(self.coupling, self.sites) if limits.maximum >= 1 else {}
        return {
            name: account.with_branch(branches.get(name), measure)
            for name, account in found.items()
        }

    @cached_property
    def rooms(self) -> list[Room]:
        return [account.room(self.blocks, self.sizes) for account in self.accounts.values()]

    def context(self) -> Context:
        """The question as an allocation is asked it.

        Raises:
            PlanError: the goal cannot be reached.
        """
        rooms = [room for room in self.rooms if room.most > 0]
        held = {block: 0 for block in self.blocks if any(room.block == block for room in rooms)}
        if isinstance(self.goal.measure, Parameters):
            # Blocks in which nothing can be pruned give their part through the others.
            held = {block: self.blocks[block] for block in held}
            total: float = sum(held.values())
        else:  # a measure may not count all that a block holds: the cache is of attention alone
            for room in rooms:
                held[room.block] += room.parameters
            total = sum(self.accounts[room.site].cost for room in rooms)
        ratio = self.goal.remove / total
        if ratio >= 1:
            raise PlanError(
                f"{self.goal.target}: the blocks that hold what can be pruned hold less than that",
                so="what goes with it lies in other blocks, or in none",
                fix="lower the target, or ask for parameters of the whole model: params=80%",
            )
        fitted = bool(self.coupling.program.added)
        narrower = None if self.narrowed or fitted else self.narrower
        return Context(ratio, held, rooms, self.survey, self.budget, narrower)

    def narrower(self, part: float) -> Context:
        """The same question on a model that keeps this part of the features of its stream."""
        return self._narrower(part).context()

    def _narrower(self, part: float) -> Question:
        state = self.coupling.program.state
        narrowed = heaviest(self.coupling, part, self.constraints, state)
        return replace(
            self, goal=self.goal.narrowed(self.coupling, narrowed.counts), narrowed=narrowed
        )

    def _check(self, shares: Mapping[str, Any]) -> None:
        """Raises PlanError for shares that are none, or of sites that the model does not have."""
        for name, share in shares.items():
            if name not in self.accounts:
                raise PlanError(
                    f"the allocation gives a share to {name!r}, which is no site",
                    fix=f"give shares to those of context.rooms: {next(iter(self.accounts))}, ...",
                )
            if not (isinstance(share, Real) and math.isfinite(share)):
                raise PlanError(
                    f"the allocation gives {name} a share of {share!r}",
                    fix="a number of parameters",
                )

    def budget(self, shares: Mapping[str, float]) -> Budget:
        """The budget of shares, the part of the stream that is kept perhaps among them."""
        if HIDDEN in shares:
            others = {name: share for name, share in shares.items() if name != HIDDEN}
            return self._narrower(shares[HIDDEN]).budget(others)
        self._check(shares)
        left_out = {room.site for room in self.rooms if room.left_out(shares.get(room.site, 0.0))}
        gone = {name: self.accounts[name].branch_cost for name in left_out}
        wants = {
            name: shares.get(name, 0.0) / account.parameters * account.cost
            for name, account in self.accounts.items()
            if name not in left_out
        }
        rest = max(0.0, self.goal.remove - sum(gone.values()))
        wants = within(wants, self.accounts, rest)
        open_ = {name: a for name, a in self.accounts.items() if name not in left_out}
        together = Interplay.of(self.goal.measure, open_, self.constraints)
        if together.exists:
            wants = together.settled(wants, rest, self.goal.tolerance)
        return Budget(
            self.goal,
            self.sizes,
            {**wants, **gone},
            self.accounts,
            self.constraints,
            left_out=left_out,
            narrowed=self.narrowed,
        )

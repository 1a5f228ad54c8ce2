"""Sites that hold parameters in common, as convolutions in a row do: what they give together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from prunec.graph.coupling import Group
from prunec.passes.sites import Site
from prunec.passes.targets.accounts import Account
from prunec.passes.targets.constraints import Constraints
from prunec.passes.targets.costs import Measure

# Enough to ask any site for all that it has, and to tell single units of wide layers apart.
_MULTIPLES = 2.0**10
_HALVINGS = 24
# Sites of which two may change together; with more there are units fine enough.
_FEW = 16
_CHANGES = 64


@dataclass(frozen=True)
class Interplay:
    """What each site gives when those before it have given: a part of less.

    Attributes:
        measure: in which costs are.
        sites: in the order in which they give.
        most: what each can give by itself, by name.
        constraints: which numbers of units are possible.
    """

    measure: Measure
    sites: Sequence[Site]
    most: Mapping[str, float]
    constraints: Constraints

    @classmethod
    def of(
        cls, measure: Measure, accounts: Mapping[str, Account], constraints: Constraints
    ) -> Interplay:
        """Between the sites of these accounts."""
        sites = [account.site for account in accounts.values()]
        most = {name: account.most for name, account in accounts.items()}
        return cls(measure, sites, most, constraints)

    @property
    def exists(self) -> bool:
        """Whether any two sites hold a parameter in common."""
        held = [name for site in self.sites for name in site.parameters]
        return len(set(held)) < len(held)

    def settled(
        self, wants: Mapping[str, float], remove: float, tolerance: float
    ) -> dict[str, float]:
        """Wants that add up to what is to go.

        Every site is asked for the same multiple of its part. Where units are coarse, a few go
        here or stay there so that whole units come nearest.
        """
        low, high = 0.0, 1.0
        while self._total(self._counts(wants, high), wants, high) < remove and high < _MULTIPLES:
            low, high = high, 2 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = self._total(self._counts(wants, middle), wants, middle) >= remove
            low, high = (low, middle) if enough else (middle, high)
        counts = self._counts(wants, high)
        for _ in range(_CHANGES):
            gap = abs(self._total(counts, wants, high) - remove)
            near = {id(other): other for other in self._changed(counts)} if gap > tolerance else {}
            totals = {key: self._total(other, wants, high) for key, other in near.items()}
            best = min(totals, key=lambda key: abs(totals[key] - remove), default=None)
            if best is None or abs(totals[best] - remove) >= gap:
                break
            counts = near[best]
        given = self._given(counts, wants, high)
        total = sum(given.values())
        return {name: cost * remove / total for name, cost in given.items()} if total else given

    def _counts(self, wants: Mapping[str, float], multiple: float) -> dict[str, int]:
        """Units kept of each group that is its site's only one."""
        counts = {}
        for site, group in self._single():
            whole = self.measure.at(site, {})
            cost = min(multiple * wants[site.name], self.most[site.name])
            step = self.constraints.step(group)
            kept = round(group.size * (1 - cost / whole) / step) * step if whole else group.size
            counts[group.name] = min(max(kept, self.constraints.least(group)), group.size)
        return counts

    def _single(self) -> list[tuple[Site, Group]]:
        return [(site, site.groups[0]) for site in self.sites if len(site.groups) == 1]

    def _changed(self, counts: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """The same with a unit more or less of a group, or of two."""
        moves = []
        for site, group in self._single():
            step = self.constraints.step(group)
            least = self.constraints.least(group)
            moves.append(
                [
                    (group.name, count)
                    for count in (counts[group.name] - step, counts[group.name] + step)
                    if least <= count <= group.size and self.most[site.name] > 0
                ]
            )
        for move in (move for one in moves for move in one):
            yield dict(counts) | dict([move])
        for one, other in combinations(moves, 2) if len(moves) <= _FEW else ():
            for pair in product(one, other):
                yield dict(counts) | dict(pair)

    def _total(
        self, counts: Mapping[str, int], wants: Mapping[str, float], multiple: float
    ) -> float:
        return sum(self._given(counts, wants, multiple).values())

    def _given(
        self, counts: Mapping[str, int], wants: Mapping[str, float], multiple: float
    ) -> dict[str, float]:
        """What each site gives, those before it at these numbers of units."""
        before: dict[str, int] = {}
        given = {}
        for site in self.sites:
            given[site.name] = min(multiple * wants[site.name], self.most[site.name])
            own = {group.name: counts[group.name] for group in site.groups if group.name in counts}
            if own:
                whole = self.measure.at(site, before)
                before |= own
                given[site.name] = whole - self.measure.at(site, before)
        return given

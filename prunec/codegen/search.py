"""Choosing among the readings of a module's numbers: tried in order, accepted only when proven."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prunec.codegen.attributes import Candidate, Values
from prunec.errors import ExportError

Choice = dict[Candidate, Values]
Judge = Callable[[Choice], str | None]  # None: accepted; else what differed
LIMIT = 256


@dataclass(frozen=True)
class Accepted:
    """The first choice that passed, what else passes for each candidate alone, and the cost."""

    choice: Choice
    equivalents: dict[Candidate, tuple[Values, ...]]
    trials: int


def search(candidates: Sequence[Candidate], judge: Judge, limit: int = LIMIT) -> Accepted:
    """The choice that `judge` accepts, likelier readings first.

    Raises:
        ExportError: no choice is accepted within `limit` trials.
    """
    trials, first_reason = 0, ""
    for choice in _choices(candidates):
        if trials == limit:
            break
        trials += 1
        reason = judge(choice)
        if reason is None:
            equivalents, more = _equivalents(choice, judge)
            return Accepted(choice, equivalents, trials + more)
        first_reason = first_reason or reason
    raise ExportError(
        f"no setting of the module's numbers makes it equal to the masked model ({trials} tried)",
        where="; ".join(c.describe(c.options[0]) for c in candidates) or "no number to set",
        so=f"the likeliest setting fails: {first_reason}",
        fix="leave these groups unpruned: `--set units=ffn_channel` leaves all heads whole",
    )


def _choices(candidates: Sequence[Candidate]) -> Iterator[Choice]:
    """Every combination of options, by how many steps it is from the likeliest."""
    heap = [(0, (0,) * len(candidates))]
    seen = {heap[0][1]}
    while heap:
        steps, picks = heapq.heappop(heap)
        yield {c: c.options[i] for c, i in zip(candidates, picks, strict=True)}
        for at, candidate in enumerate(candidates):
            onward = (*picks[:at], picks[at] + 1, *picks[at + 1 :])
            if onward[at] < len(candidate.options) and onward not in seen:
                seen.add(onward)
                heapq.heappush(heap, (steps + 1, onward))


def _equivalents(choice: Choice, judge: Judge) -> tuple[dict[Candidate, tuple[Values, ...]], int]:
    found, trials = {}, 0
    for candidate, chosen in choice.items():
        others = [option for option in candidate.options if option != chosen]
        trials += len(others)
        found[candidate] = tuple(o for o in others if judge({**choice, candidate: o}) is None)
    return found, trials

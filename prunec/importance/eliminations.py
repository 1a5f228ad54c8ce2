"""Elimination from several least-squares problems at once, one a block of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunec.importance.blocks import moments_of, within
from prunec.importance.elimination import BlockScore, Elimination, start
from prunec.importance.problem import SiteProblem


@dataclass(frozen=True, eq=False)
class Eliminations:
    """What is left of the blocks of a site; answers as one `Elimination` does. Losses add up.

    Attributes:
        spans: the columns of each block.
        states: one a block, with columns counted from the block's first.
    """

    spans: tuple[slice, ...]
    states: tuple[Elimination, ...]

    @property
    def columns(self) -> Tensor:
        """The surviving columns, sorted."""
        return torch.cat(
            [
                state.columns + span.start
                for span, state in zip(self.spans, self.states, strict=True)
            ]
        )

    def locate(self, columns: Tensor) -> Tensor:
        """Index of each column among the survivors of its block, -1 where it is gone; any shape."""
        found = torch.full_like(columns, -1)
        for span, state in zip(self.spans, self.states, strict=True):
            inside = (columns >= span.start) & (columns < span.stop)
            found[inside] = state.locate(columns[inside] - span.start)
        return found

    def eliminate(self, columns: Tensor) -> tuple[Eliminations, Tensor]:
        """Remove surviving `columns` ``[k]``: the new state, and the loss ``[k]`` of each."""
        losses = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
        states = list(self.states)
        for block, span in enumerate(self.spans):
            inside = (columns >= span.start) & (columns < span.stop)
            if inside.any():
                states[block], lost = states[block].eliminate(columns[inside] - span.start)
                losses[inside] = lost
        return Eliminations(self.spans, tuple(states)), losses

    def restore(self, columns: Tensor) -> tuple[Eliminations, float]:
        """Put eliminated `columns` ``[k]`` back: the new state, and what it gains."""
        states, gained = list(self.states), 0.0
        for block, span in enumerate(self.spans):
            inside = (columns >= span.start) & (columns < span.stop)
            if inside.any():
                states[block], gain = states[block].restore(columns[inside] - span.start)
                gained += gain
        return Eliminations(self.spans, tuple(states)), gained

    def block_scores(self, columns: Tensor, score: BlockScore = "exact") -> Tensor:
        """Loss ``[N]`` of removing each unit alone; `columns` are ``[N, width]``."""
        total = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
        for span, state in zip(self.spans, self.states, strict=True):
            for units, local in within(columns, span):
                total[units] += state.block_scores(local, score)
        return total


def begin(
    problem: SiteProblem, statistics: Mapping[str, Tensor], damping: float
) -> Elimination | Eliminations:
    """A site before any elimination.

    Raises:
        VerifyError: NaN or Inf in the weight or a Gram matrix.
    """
    blocks = moments_of(problem, statistics)
    states = tuple(
        start(problem.weight[:, span], moment, damping, name=problem.name)
        for span, moment in blocks
    )
    return states[0] if len(states) == 1 else Eliminations(tuple(s for s, _ in blocks), states)

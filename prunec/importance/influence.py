"""Which branches or blocks of the residual stream go first: criteria of depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from prunec.events import Progress, silent
from prunec.graph.branches import Branch
from prunec.graph.dropping import drop_branches
from prunec.graph.padding import Padding
from prunec.graph.program import Program
from prunec.importance.predictions import Predictions

Units = Mapping[str, tuple[Branch, ...]]
"""What can be left out as one, in the order of the graph: single branches, or whole blocks."""

Batches = Sequence[Mapping[str, Tensor]]


@runtime_checkable
class DepthCriterion(Protocol):
    """What a criterion of depth implements: a frozen dataclass whose fields are its options."""

    def removals(
        self, program: Program, units: Units, batches: Batches, progress: Progress = silent
    ) -> Iterator[tuple[str, float]]:
        """Units in the order in which they go, each with its score; read as far as is needed."""


@dataclass(frozen=True)
class BlockInfluence:
    """``1 - mean over tokens of cos(x, x')``, x the stream before a unit and x' behind it.

    Block Influence of ShortGPT (arXiv 2403.03853 Eq 1), on the dense model; the unit that turns
    the stream least goes first. Equal scores: the later unit.
    """

    def removals(
        self, program: Program, units: Units, batches: Batches, progress: Progress = silent
    ) -> Iterator[tuple[str, float]]:
        """Units by rising influence."""
        ends = {name: (inside[0].stream, inside[-1].total) for name, inside in units.items()}
        sums, tokens = dict.fromkeys(units, 0.0), dict.fromkeys(units, 0)
        with progress.task("influence of blocks", len(batches)) as task:
            for batch in batches:
                for name, similarity in _Similarities(program, ends, batch).of_tokens().items():
                    sums[name] += float(similarity.sum(dtype=torch.float64))
                    tokens[name] += similarity.numel()
                task.advance()
        scores = {name: 1 - total / tokens[name] for name, total in sums.items()}
        place = {name: i for i, name in enumerate(units)}
        yield from sorted(scores.items(), key=lambda item: (item[1], -place[item[0]]))


@dataclass(frozen=True)
class Divergence:
    """The unit without which the output changes least goes first, then the least beside it, ...

    Measured as the mean KL divergence of the output's softmax from the dense model's: a greedy
    search over units, each step one pass of the data per unit that is left. Tokens are drawn where
    the dense predictions of all would take more than 1 GiB.
    """

    def removals(
        self, program: Program, units: Units, batches: Batches, progress: Progress = silent
    ) -> Iterator[tuple[str, float]]:
        """Units in greedy order, with the divergence that is reached."""
        dense = Predictions(program, batches, _outputs(program, batches))
        gone: list[str] = []
        while len(gone) < len(units):
            scores = {}
            left = [name for name in units if name not in gone]
            with progress.task(f"leave out unit {len(gone) + 1}", len(left)) as task:
                for name in left:
                    branches = [branch for unit in (*gone, name) for branch in units[unit]]
                    less = drop_branches(program, branches)
                    scores[name] = dense.divergence(_outputs(less, batches))
                    task.advance()
            least = min(reversed(left), key=scores.__getitem__)
            gone.append(least)
            yield least, scores[least]


@dataclass(frozen=True)
class LastFirst:
    """The last units go first: the first n stay (LLM-Pruner's layer mode, METHODS 3.3)."""

    def removals(
        self, program: Program, units: Units, batches: Batches, progress: Progress = silent
    ) -> Iterator[tuple[str, float]]:
        """Units from the last to the first, scored by their place."""
        yield from reversed([(name, float(place)) for place, name in enumerate(units)])


class _Similarities(fx.Interpreter):
    """Runs a program on one batch; cosines between the values at both ends of each unit."""

    def __init__(
        self,
        program: Program,
        ends: Mapping[str, tuple[fx.Node, fx.Node]],
        batch: Mapping[str, Tensor],
    ):
        super().__init__(program.graph_module)
        self._arguments = program.arguments(None, batch)
        self._padding = Padding(program, [batch])
        self._ends = ends
        self._starts = {start for start, _ in ends.values()}
        self._waiting: dict[fx.Node, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def of_tokens(self) -> dict[str, Tensor]:
        """Per unit, one cosine a token; padding left out."""
        with torch.no_grad():
            self.run(*self._arguments)
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._starts:
            self._waiting[n] = value
        for name, (start, end) in self._ends.items():
            if end is n:
                self._found[name] = self._cosines(self._waiting[start], value, n)
        return value

    def _cosines(self, before: Tensor, after: Tensor, node: fx.Node) -> Tensor:
        cosines = token_cosines(before, after)
        real = self._padding.real_tokens(0, node, after)
        return cosines.flatten() if real is None else cosines[real]


def token_cosines(before: Tensor, after: Tensor) -> Tensor:
    """Cosines between the features, the last axis, of the same tokens: over the axes of `after`.

    Samples and tokens may be two axes of the one and, as some layers have it, one of the other.
    """
    if before.ndim != after.ndim:
        before = before.reshape(after.shape)
    return F.cosine_similarity(before.float(), after.float(), dim=-1)


def _outputs(program: Program, batches: Batches) -> Iterator[Tensor]:
    return (program.run(None, **batch) for batch in batches)

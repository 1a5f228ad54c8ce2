"""What an allocation may look at: blocks, sites, the target, and the dense model's behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prunec.errors import PlanError
from prunec.events import Progress
from prunec.importance.curves import RemovalCurve
from prunec.passes.allocation.levels import Levels
from prunec.passes.targets.budget import Budget
from prunec.passes.targets.room import Room


class Trials(Protocol):
    """Pruning for trial: fitted on one part of the calibration batches, judged on another.

    The judge is the divergence of the pruned model's output from the dense model's, less is better.
    """

    @property
    def levels(self) -> Mapping[str, Levels]:
        """A few sizes of each site of the dense model, by site name."""

    @property
    def parts(self) -> int:
        """Number of batches that are held out to judge on."""

    @property
    def progress(self) -> Progress:
        """Where a search says how far it is."""

    def stitched(self, chosen: Mapping[str, int], parts: Sequence[int] | None = None) -> float:
        """Divergence with each site at a level, all fitted to the dense model; on some batches."""

    def repruned(self, budget: Budget) -> float:
        """Divergence after pruning to a budget, each site on what those before it give."""

    @property
    def final_seconds(self) -> float:
        """What pruning on all batches will take on this machine, by the last trial; at first 0."""


class Survey(Protocol):
    """What was seen of the dense model on the calibration batches, computed when first read."""

    @property
    def similarities(self) -> Mapping[str, float]:
        """Mean over tokens of the cosine between a block's input and its output, by block."""

    @property
    def curves(self) -> Mapping[str, RemovalCurve]:
        """The removal curve of each site on the dense model's inputs, by site name."""

    def trials(
        self,
        *,
        fit_tokens: int,
        held_tokens: int,
        levels: int = 9,
        branches: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> Trials:
        """Pruning for trial on about so many calibration tokens.

        Args:
            branches: by site, the parameters of a branch that a level of its own leaves out.
        """


@dataclass(frozen=True)
class Context:
    """One allocation's question.

    Attributes:
        target: ratio of the parameters of all `blocks` together.
        blocks: parameters of each block in which something can be pruned, in model order; for a
            measure that is not of parameters, those of its `rooms`.
        rooms: the sites, in graph order.
        survey: the dense model, None where there is no data to run it on.
        make_budget: what :meth:`budget` calls.
        narrower: this question on the model that keeps a part of the features of its residual
            stream, those of largest weights; PlanError where that cannot be. A share named
            ``hidden`` in :meth:`budget` is that part.
    """

    target: float
    blocks: Mapping[str, int]
    rooms: Sequence[Room]
    survey: Survey | None = None
    make_budget: Callable[[Mapping[str, float]], Budget] | None = None
    narrower: Callable[[float], Context] | None = None

    def budget(self, shares: Mapping[str, float]) -> Budget:
        """The budget of a run in which each site is asked for these parameters."""
        assert self.make_budget, "a context without a run"
        return self.make_budget(shares)

    def seen(self, asker: str) -> Survey:
        """The survey of the dense model.

        Raises:
            PlanError: there is no data.
        """
        if self.survey is None:
            raise PlanError(
                f"the allocation {asker} looks at the dense model on calibration data",
                fix="give batches, or use an allocation that needs none, such as log-increase",
            )
        return self.survey

    def by_block(self, ratios: Sequence[float]) -> dict[str, float]:
        """Parameters asked of each site when each block removes its ratio.

        A block's share is split over its sites by the parameters that they hold.
        """
        held = dict.fromkeys(self.blocks, 0)
        for room in self.rooms:
            held[room.block] += room.parameters
        share = {
            block: ratio * size / held[block]
            for (block, size), ratio in zip(self.blocks.items(), ratios, strict=True)
        }
        return {room.site: share[room.block] * room.parameters for room in self.rooms}

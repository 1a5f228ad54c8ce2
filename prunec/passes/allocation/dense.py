"""Allocations that look at the dense model: block similarity, and one threshold for all units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prunec.errors import PlanError
from prunec.importance.curves import RemovalCurve
from prunec.importance.problem import FloatArray
from prunec.passes.allocation.context import Context


@dataclass(frozen=True)
class SimilaritySoftmax:
    """Blocks that change the residual stream least give most.

    ``r_l = r N softmax_l(alpha s_l)`` over the ``N`` blocks of largest similarity ``s_l``, the mean
    over tokens of the cosine between a block's input and output on the dense model; the others
    stay whole. SlimLLM (arXiv 2505.22689, METHODS 2.4). Its code has no cap, so that one block can
    be asked for more than it has: at `maximum` we cap and give the excess to the others in
    proportion.

    Attributes:
        alpha: sharpness; SlimLLM's scripts take 10 at 20 % and 7 at 50 %.
        blocks: ``N``, as a part of all blocks; SlimLLM takes 26 of 32 at 20 %, 30 at 50 %.
        maximum: No block gives more.
    """

    alpha: float = 10.0
    blocks: float = 1.0
    maximum: float = 0.9

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.blocks <= 1 and 0 < self.maximum < 1 and self.alpha >= 0):
            raise PlanError(
                f"similarity-softmax: alpha {self.alpha:g}, blocks {self.blocks:g} and maximum"
                f" {self.maximum:g} are not possible",
                fix="use alpha >= 0, 0 < blocks <= 1, 0 < maximum < 1",
            )

    def shares(self, context: Context) -> dict[str, float]:
        """A block that adds nothing to a residual stream counts as the mean of those that do.

        Raises:
            PlanError: too much is asked, or there is no data.
        """
        known = context.seen("similarity-softmax").similarities
        mean = sum(known.values()) / len(known) if known else 1.0
        sizes = list(context.blocks.values())
        ratios = self.ratios(
            [known.get(block, mean) for block in context.blocks], context.target, sizes
        )
        return context.by_block(ratios)

    def ratios(
        self, similarities: Sequence[float], target: float, sizes: Sequence[int]
    ) -> list[float]:
        """One ratio per block; their mean, weighted by `sizes`, is the target.

        >>> [round(r, 3) for r in SimilaritySoftmax(7.0).ratios([0.8, 0.9, 1.0], 0.3, [1, 1, 1])]
        [0.127, 0.256, 0.516]
        """
        similarity = np.asarray(similarities, dtype=np.float64)
        weight = np.asarray(sizes, dtype=np.float64) / sum(sizes)
        count = max(1, round(self.blocks * len(similarity)))
        taken = np.zeros(len(similarity), dtype=bool)
        taken[np.argsort(-similarity, kind="stable")[:count]] = True
        largest = self.maximum * float(weight[taken].sum())
        if target > largest:
            raise PlanError(
                f"similarity-softmax cannot remove {target:.1%} of the blocks",
                so=f"the largest ratio it can reach is {largest:.1%}",
                fix="lower the ratio, or raise maximum or blocks",
            )
        heat = np.exp(np.maximum(self.alpha * (similarity - similarity.max()), _COLDEST))
        heat[~taken] = 0.0
        return [float(r) for r in _capped(heat, weight, target, self.maximum)]


# However sharp the softmax, a block that is taken can still give what the hotter ones cannot.
_COLDEST = -600.0


def _capped(heat: FloatArray, weight: FloatArray, target: float, maximum: float) -> FloatArray:
    """``min(maximum, c heat)`` with the c for which the weighted mean is the target."""
    ratios = np.zeros_like(heat)
    full = np.zeros(len(heat), dtype=bool)
    while True:
        rest = target - maximum * float(weight[full].sum())
        free = ~full & (heat > 0)
        if not free.any():
            return ratios
        ratios[free] = rest * heat[free] / float((weight * heat)[free].sum())
        over = free & (ratios > maximum)
        if not over.any():
            return ratios
        full |= over
        ratios[over] = maximum


@dataclass(frozen=True)
class Global:
    """One threshold for the units of all sites, on losses that are standardised site by site.

    FLAP (arXiv 2312.11983; METHODS 4.2): ``z = (loss - mean) / std`` within each site, all units
    pooled, the lowest removed until the target is met, each counted with the parameters that it
    frees. The losses are the steps of the removal curves on the dense model; where a greedy
    criterion's steps do not grow, their running maximum, as a step is never taken before those
    ahead of it.

    Attributes:
        per_parameter: divide a step's loss by the parameters that it frees before it is
            standardised, so that a dear unit must be worth its price; FLAP does not.
        maximum: No site gives more than this part of its parameters.
    """

    per_parameter: bool = False
    maximum: float = 0.9

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.maximum <= 1:
            raise PlanError(
                f"global: maximum {self.maximum:g} is not possible",
                fix="use a ratio above 0 and up to 1",
            )

    def shares(self, context: Context) -> dict[str, float]:
        """Parameters below the threshold, site by site.

        Raises:
            PlanError: `maximum` withholds too much, or there is no data.
        """
        curves = context.seen("global").curves
        steps: list[tuple[float, int, int, int]] = []  # score, room, step, parameters freed
        withheld = False
        for index, room in enumerate(context.rooms):
            curve = curves[room.site]
            freed = np.diff(curve.parameters, prepend=0)
            most = self.maximum * room.parameters
            for step, score in enumerate(self._scores(curve)):
                if curve.parameters[step] <= most:
                    steps.append((float(score), index, step, int(freed[step])))
                else:
                    withheld = True
        steps.sort()
        left = context.target * sum(context.blocks.values())
        shares = dict.fromkeys((room.site for room in context.rooms), 0.0)
        for _, index, _, freed_parameters in steps:
            if left <= 0:
                break
            shares[context.rooms[index].site] += min(left, freed_parameters)
            left -= freed_parameters
        if left > 0 and withheld:
            reached = context.target - left / sum(context.blocks.values())
            raise PlanError(
                f"global cannot remove {context.target:.1%} of the blocks",
                so=f"the largest ratio it can reach is {reached:.1%}",
                fix="lower the ratio, or raise maximum",
            )
        return shares

    def _scores(self, curve: RemovalCurve) -> FloatArray:
        loss = np.diff(curve.loss, prepend=0.0)
        if self.per_parameter:
            loss = loss / np.diff(curve.parameters, prepend=0)
        loss = np.maximum.accumulate(loss)
        spread = float(loss.std())
        return (loss - loss.mean()) / spread if spread > 0 else np.zeros_like(loss)

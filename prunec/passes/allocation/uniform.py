"""Allocation: how much each block gives towards a target ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from prunec.errors import PlanError
from prunec.passes.allocation.context import Context


class Allocation(Protocol):
    """What an allocation plug-in implements: a frozen dataclass whose fields are its options."""

    @property
    def needs_data(self) -> bool:
        """Whether :meth:`shares` reads the context's survey of the dense model."""

    def shares(self, context: Context) -> Mapping[str, float]:
        """Parameters that each site is asked to give, by site name.

        They add up to the target; what a site cannot give is asked of the others afterwards.

        Raises:
            PlanError: the target is not reachable; says the largest that is.
        """


class _ByBlock:
    """An allocation that knows blocks only: within one, each site gives in proportion."""

    needs_data: ClassVar[bool] = False

    def shares(self, context: Context) -> dict[str, float]:
        """The ratio of each block, split over its sites by the parameters that they hold."""
        sizes = list(context.blocks.values())
        return context.by_block(self.ratios(len(sizes), context.target, sizes=sizes))

    def ratios(
        self, blocks: int, target: float, *, sizes: Sequence[int] | None = None
    ) -> list[float]:
        """The ratio that each block removes, 0 to 1, in the order of the blocks.

        Args:
            blocks: Number of blocks.
            target: Ratio of all blocks' parameters together.
            sizes: Parameters of each block; None where all are equal. The mean of the ratios,
                weighted by them, is the target.

        Raises:
            PlanError: the target is not reachable; says the largest that is.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(_ByBlock):
    """The same ratio in every block."""

    def ratios(
        self, blocks: int, target: float, *, sizes: Sequence[int] | None = None
    ) -> list[float]:
        """The target, once per block.

        >>> Uniform().ratios(3, 0.2)
        [0.2, 0.2, 0.2]
        """
        _check(blocks, target, sizes)
        return [target] * blocks


@dataclass(frozen=True)
class LogIncrease(_ByBlock):
    """Ratios that grow with the logarithm of depth: errors of early blocks reach all that follow.

    ``r_i = r_0 + (r_{n-1} - r_0) log(i + 1) / log(n)``: SlimGPT's incremental pruning ratio
    (arXiv 2412.18110 Eq 6, METHODS 1.4). The paper does not say how ``r_0`` follows from the
    target: we take 0.3125 of it, up to 0.125, which is its recipe at 20 %, and solve for
    ``r_{n-1}``. Its code divides by log(32) whatever n is; we follow the paper.

    Attributes:
        first: ``r_0``, the ratio of the first block; None for the rule above.
        maximum: No block gives more; what it cannot give, the others do.
    """

    first: float | None = None
    maximum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.maximum < 1:
            raise PlanError(
                f"log-increase: maximum {self.maximum} is not possible",
                fix="use a ratio between 0 and 1, such as 0.9",
            )
        if self.first is not None and not 0 <= self.first <= self.maximum:
            raise PlanError(
                f"log-increase: first {self.first} is not possible",
                fix=f"use a ratio from 0 to the maximum, {self.maximum}",
            )

    def ratios(
        self, blocks: int, target: float, *, sizes: Sequence[int] | None = None
    ) -> list[float]:
        """One ratio per block, from the first to the last.

        >>> [round(r, 3) for r in LogIncrease().ratios(4, 0.2)]
        [0.062, 0.182, 0.253, 0.302]
        """
        shares = _check(blocks, target, sizes)
        largest = self.maximum
        if self.first is not None and blocks > 1:
            largest = shares[0] * self.first + (1 - shares[0]) * self.maximum
        if target > largest:
            raise PlanError(
                f"log-increase cannot remove {target:.1%} of the blocks",
                so=f"the largest ratio it can reach is {largest:.1%}",
                fix="lower the ratio, or raise maximum or first",
            )
        if blocks == 1:
            return [target]
        first = min(0.3125 * target, 0.125) if self.first is None else self.first
        if first > target:
            raise PlanError(
                f"log-increase cannot start at {first:.1%} to remove {target:.1%}",
                fix="lower first, or use uniform",
            )
        # Where all later blocks at their maximum are not enough, the first gives the rest.
        needed = (target - (1 - shares[0]) * self.maximum) / shares[0]
        first = min(max(first, needed), self.maximum)
        growth = [math.log(i + 1) / math.log(blocks) for i in range(blocks)]
        return _clamped_line(first, growth, shares, target, self.maximum)


@dataclass(frozen=True)
class LayerRange(_ByBlock):
    """The first and last blocks stay whole, all between give the same ratio.

    LLM-Pruner (arXiv 2305.11627, Appendix B and its scripts; METHODS 3.3): 4 of 32 blocks at the
    beginning and 2 at the end, 25 % of those between for 20 % of all. The ratio between follows
    from the target, and the numbers from the depth: an eighth and a sixteenth, rounded down.

    Attributes:
        first, last: Blocks that stay whole at the beginning and at the end; None for that part of
            the depth.
    """

    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("last", self.last)):
            if value is not None and value < 0:
                raise PlanError(f"layer-range: {name} {value} is not possible", fix="use 0 or more")

    def ratios(
        self, blocks: int, target: float, *, sizes: Sequence[int] | None = None
    ) -> list[float]:
        """Zero at both ends, one ratio between.

        >>> LayerRange(first=1, last=1).ratios(4, 0.2)
        [0.0, 0.4, 0.4, 0.0]
        """
        shares = _check(blocks, target, sizes)
        first = blocks // 8 if self.first is None else self.first
        last = blocks // 16 if self.last is None else self.last
        end = max(blocks - last, 0)
        between = sum(shares[first:end])
        if target > between:
            raise PlanError(
                f"layer-range cannot remove {target:.1%} of the blocks",
                so=f"the {max(end - first, 0)} blocks between the first {first} and the"
                f" last {last} hold {between:.1%}",
                fix="lower the ratio, first or last",
            )
        inside = target / between if between else 0.0
        return [inside if first <= i < end else 0.0 for i in range(blocks)]


def _clamped_line(
    first: float, growth: Sequence[float], shares: Sequence[float], target: float, maximum: float
) -> list[float]:
    """``min(maximum, first + slope growth_i)`` with the slope for which the mean is the target."""
    for unclamped in range(len(growth), 1, -1):
        clamped_share = sum(shares[unclamped:])
        held = clamped_share * maximum + (1 - clamped_share) * first
        lift = sum(s * g for s, g in zip(shares[:unclamped], growth[:unclamped], strict=True))
        slope = (target - held) / lift
        if first + slope * growth[unclamped - 1] <= maximum:
            line = [first + slope * g for g in growth[:unclamped]]
            return line + [maximum] * (len(growth) - unclamped)
    return [first] + [maximum] * (len(growth) - 1)


def _check(blocks: int, target: float, sizes: Sequence[int] | None) -> list[float]:
    """Each block's share of all parameters."""
    if blocks < 1:
        raise PlanError("there is no block to prune", fix="see `prunec analyze --why`")
    if not 0 <= target < 1:
        raise PlanError(
            f"a ratio of {target:g} is not possible", fix="use a ratio between 0 and 1, such as 0.2"
        )
    if sizes is None:
        return [1 / blocks] * blocks
    assert len(sizes) == blocks, f"{len(sizes)} sizes for {blocks} blocks"
    assert min(sizes) > 0, "a block without parameters"
    return [size / sum(sizes) for size in sizes]

"""The room that an allocation has at one site."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """A site as an allocation sees it.

    Attributes:
        site: its name.
        block: the block it counts to.
        kinds: what its units are; attention and FFN differ in it.
        parameters: held by its groups.
        most: how many of them it can give.
        branch: parameters of the residual branch that ends in it: a share of exactly as many leaves
            the branch out. 0 where it cannot be.
    """

    site: str
    block: str
    parameters: int
    most: int
    kinds: tuple[str, ...] = ()
    branch: int = 0

    def left_out(self, share: float) -> bool:
        """Whether such a share leaves the site's branch out."""
        return share == self.branch > 0

"""Compensation: closed-form new weights for the columns of a site that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from prunec.errors import PlanError
from prunec.importance.factorise import cholesky, damp


class Compensation(Protocol):
    """What a compensation plug-in implements: a frozen dataclass whose fields are its options."""

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the statistics of the site's input that :meth:`compensate` reads."""

    def compensate(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        keep: Tensor,
        *,
        name: str = "the site",
    ) -> Tensor:
        """New weights of the kept columns.

        Args:
            weight: ``[out, columns]``, not changed.
            statistics: of the site's input, all columns; those that :attr:`statistics` names.
            keep: bool ``[columns]``.
            name: The site, for messages.

        Returns:
            ``[out, kept]``, in the dtype and on the device of `weight`.
        """


@dataclass(frozen=True)
class NoCompensation:
    """The kept columns as they are."""

    statistics: ClassVar[frozenset[str]] = frozenset()

    def compensate(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        keep: Tensor,
        *,
        name: str = "the site",
    ) -> Tensor:
        """The kept columns of `weight`."""
        return weight[:, keep.to(weight.device)]


@dataclass(frozen=True)
class ObsCompensation:
    """Least squares on the site's own output: ``W_S <- W C_:S (C_SS)^-1`` with the damped C.

    Exactly what the optimal brain surgeon arrives at column by column (SlimGPT, arXiv 2412.18110
    Eq 4; METHODS 1.1), in one solve, whatever chose the columns. Computed as
    ``W_S + W_P C_PS (C_SS)^-1`` over the removed columns P, which leaves W_S exact where nothing
    leans on it; so a kept column whose input was always zero keeps its weight.

    Attributes:
        damping: Added to the diagonal of C, times its mean.
    """

    damping: float = 0.01

    statistics: ClassVar[frozenset[str]] = frozenset({"input_gram"})

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise PlanError(f"obs: damping {self.damping} is not possible", fix="use 0 or more")

    def compensate(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        keep: Tensor,
        *,
        name: str = "the site",
    ) -> Tensor:
        """The kept columns of `weight`, moved to make up for the others.

        Raises:
            VerifyError: NaN or Inf in the Gram matrix.
        """
        gram = statistics["input_gram"]
        keep = keep.to(gram.device)
        kept, lost = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
        dense = weight.detach().to(gram.device, torch.float64)
        damped = damp(gram, self.damping, name=name)
        factor = cholesky(damped.matrix(kept), name=name)
        cross = gram[kept[:, None], lost].double() @ dense[:, lost].T
        moved = dense[:, kept] + torch.cholesky_solve(cross, factor).T
        return moved.to(weight.device, weight.dtype)

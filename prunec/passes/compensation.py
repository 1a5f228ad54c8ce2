"""Compensation: closed-form new weights for the columns of a site that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from prunec.errors import PlanError
from prunec.importance.factorise import cholesky, damp


@dataclass(frozen=True, eq=False)
class Mended:
    """What a compensation makes of a site.

    Attributes:
        weight: ``[out, kept]``, in the dtype and on the device of the weight it came from.
        bias: fp64 ``[out]``, to be added to what the site computes; None for nothing.
    """

    weight: Tensor
    bias: Tensor | None = None


class Compensation(Protocol):
    """What a compensation plug-in implements: a frozen dataclass whose fields are its options."""

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the statistics of the site's input that :meth:`compensate` reads."""

    @property
    def bias(self) -> bool:
        """Whether it fits a bias where the model can carry one."""

    def compensate(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        keep: Tensor,
        *,
        bias: bool = False,
        name: str = "the site",
    ) -> Mended:
        """New weights of the kept columns, and a bias where one is fitted.

        Args:
            weight: ``[out, columns]``, not changed.
            statistics: of the site's input, all columns; those that :attr:`statistics` names.
            keep: bool ``[columns]``.
            bias: Whether the model can carry a bias here.
            name: The site, for messages.
        """


@dataclass(frozen=True)
class NoCompensation:
    """The kept columns as they are."""

    statistics: ClassVar[frozenset[str]] = frozenset()
    bias: ClassVar[bool] = False

    def compensate(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        keep: Tensor,
        *,
        bias: bool = False,
        name: str = "the site",
    ) -> Mended:
        """The kept columns of `weight`."""
        return Mended(weight[:, keep.to(weight.device)])


@dataclass(frozen=True)
class BiasCompensation:
    """The mean of what is removed, as a bias: ``b += W_P mean(x_P)`` over the removed columns P.

    FLAP (arXiv 2312.11983, METHODS 4.2). Where the model cannot carry a bias nothing is done.
    """

    statistics: ClassVar[frozenset[str]] = frozenset({"input_mean"})
    bias: ClassVar[bool] = True

    def compensate(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        keep: Tensor,
        *,
        bias: bool = False,
        name: str = "the site",
    ) -> Mended:
        """The kept columns of `weight` as they are, and the mean output of the others."""
        kept = keep.to(weight.device)
        if not bias:
            return Mended(weight[:, kept])
        mean = statistics["input_mean"]
        lost = ~keep.to(mean.device)
        dense = weight.detach().to(mean.device, torch.float64)
        return Mended(weight[:, kept], dense[:, lost] @ mean[lost].double())


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
    bias: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise PlanError(f"obs: damping {self.damping} is not possible", fix="use 0 or more")

    def compensate(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        keep: Tensor,
        *,
        bias: bool = False,
        name: str = "the site",
    ) -> Mended:
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
        return Mended(moved.to(weight.device, weight.dtype))

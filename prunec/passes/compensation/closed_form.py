"""Compensation: closed-form new weights for the columns of a site that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from prunec.errors import PlanError
from prunec.importance.gram import SecondMoment, Tokens, damp, least_variance, second_moment
from prunec.passes.compensation.regression import Regression


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

    @property
    def regression(self) -> Regression | None:
        """The moments of input and target that it reads too, if any."""

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
            statistics: of the site's input, all columns: those that :attr:`statistics` names, and
                those of the :attr:`regression`.
            keep: bool ``[columns]``.
            bias: Whether the model can carry a bias here.
            name: The site, for messages.
        """


@dataclass(frozen=True)
class NoCompensation:
    """The kept columns as they are."""

    statistics: ClassVar[frozenset[str]] = frozenset()
    bias: ClassVar[bool] = False
    regression: ClassVar[Regression | None] = None

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
    regression: ClassVar[Regression | None] = None

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
    takes_tokens: ClassVar[bool] = True
    bias: ClassVar[bool] = False
    regression: ClassVar[Regression | None] = None

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
        moment = second_moment(statistics)
        device = (moment.rows if isinstance(moment, Tokens) else moment).device
        dense = weight.detach().to(device, torch.float64)
        moved = onto_the_others(dense, moment, keep.to(device), self.damping, name)
        return Mended(moved.to(weight.device, weight.dtype))


@dataclass(frozen=True)
class ScaleBiasCompensation:
    """A scale and a bias per output channel: ``y_c ~ a_c y'_c + b_c`` by ordinary least squares.

    SlimLLM (arXiv 2505.22689, METHODS 2.3): y is the output of the full weight on the input that
    earlier sites have shaped, y' that of the kept columns as they are. The scales go into the rows
    of the weight. Computed from the moments of the input, so that no token is kept.

    Attributes:
        bias: Fit the bias too; without it the line goes through the origin. Where the model cannot
            carry one it is not fitted either.
    """

    bias: bool = True

    regression: ClassVar[Regression | None] = None

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset({"input_gram", "input_mean"} if self.bias else {"input_gram"})

    def compensate(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        keep: Tensor,
        *,
        bias: bool = False,
        name: str = "the site",
    ) -> Mended:
        """The kept columns of `weight`, every row scaled; a bias where the model can carry it.

        A channel that the kept columns leave constant keeps its row.
        """
        gram = statistics["input_gram"].double()
        keep = keep.to(gram.device)
        dense = weight.detach().to(gram.device, torch.float64)
        kept = dense * keep
        mean, mean_kept = torch.zeros(2, len(dense), dtype=torch.float64, device=gram.device)
        if self.bias and bias:
            mean, mean_kept = (w @ statistics["input_mean"].double() for w in (dense, kept))
        seen = kept @ gram
        power = (seen * kept).sum(dim=1)
        variance = power - mean_kept.square()
        covariance = (seen * dense).sum(dim=1) - mean_kept * mean
        known = variance > least_variance(kept, gram)
        scale = torch.where(known, covariance / torch.where(known, variance, 1.0), 1.0)
        mended = (scale[:, None] * dense[:, keep]).to(weight.device, weight.dtype)
        return Mended(mended, mean - scale * mean_kept if self.bias and bias else None)


def onto_the_others(
    dense: Tensor, moment: SecondMoment, keep: Tensor, damping: float, name: str
) -> Tensor:
    """``W_S + W_P C_PS (C_SS + lambda I)^-1``: the kept columns make up for the removed ones."""
    gram = damp(moment, damping, name=name)
    kept, lost = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
    missing = gram.product(kept, lost, dense[:, lost].T)
    return dense[:, kept] + gram.solve(kept, missing).T


def ridge(right: Tensor, gram: Tensor, keep: Tensor, damping: float, name: str) -> Tensor:
    """``R (C_SS + lambda I)^-1``, lambda being `damping` times the mean diagonal of C."""
    return damp(gram, damping, name=name).solve(keep.nonzero()[:, 0], right.T).T

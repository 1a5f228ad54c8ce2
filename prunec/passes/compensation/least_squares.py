"""Least squares: the kept columns regressed on a target, as far as held-out windows bear it out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from prunec.errors import PlanError
from prunec.importance.gram import ROUNDING
from prunec.passes.compensation.closed_form import Mended, onto_the_others, ridge
from prunec.passes.compensation.regression import Regression, Target, Tokens

logger = logging.getLogger(__name__)

_STRONGER = (10.0, 100.0, 1000.0, math.inf)


@dataclass(frozen=True)
class LeastSquares:
    """One joint ridge regression of a target on the kept columns (METHODS 4.2 and its stack, 3).

    ``W_S = A + (K_S - A C_SS) (C_SS + lambda I)^-1`` with the input's second moments C and its
    cross-moments K with the target. The ridge pulls towards an anchor A, not towards zero: the kept
    columns themselves for the target ``own`` (which makes this the `obs` compensation), and what
    `obs` makes of them for the targets of the dense model, of which GRAIL and OSSCAR regress the
    first and which can be memorised: with few tokens they fit noise that own output does not have.
    So windows are held out at every site, never fitted anywhere, and choose lambda: `damping`, 10,
    100 or 1000 times that, or infinity, which is the anchor.

    Attributes:
        target: ``own``, ``dense`` or ``residual``; see `Regression`.
        bias: Centre input and target, and fit a bias, where the model can carry one.
        damping: The smallest lambda, times the mean diagonal of C; the only one without a holdout.
        holdout: Part of the calibration windows that choose lambda, 0 to 1.
        tokens: ``capped`` keeps massive activations from being all that counts.
    """

    target: Target = "own"
    bias: bool = False
    damping: float = 0.01
    holdout: float = 0.25
    tokens: Tokens = "alike"

    statistics: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise PlanError(
                f"least-squares: damping {self.damping} is not possible", fix="use 0 or more"
            )
        _ = self.regression  # which checks the rest

    @cached_property
    def regression(self) -> Regression:
        return Regression(self.target, self.tokens, self.holdout)

    def compensate(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        keep: Tensor,
        *,
        bias: bool = False,
        name: str = "the site",
    ) -> Mended:
        """The ridge that does best on what was held out.

        Raises:
            VerifyError: NaN or Inf in the moments.
        """
        joint = statistics["fit_gram"]
        keep = keep.to(joint.device)
        dense = weight.detach().to(joint.device, torch.float64)
        fit = _Moments.of(joint, dense)
        centre = self.bias and bias
        gram, cross = fit.centred() if centre else (fit.gram, fit.cross)
        anchor, gap = dense[:, keep], dense[:, ~keep] @ gram[~keep][:, keep]
        if self.target != "own":
            anchor = onto_the_others(dense, gram, keep, self.damping, name)
            gap = cross[:, keep] - anchor @ gram[keep][:, keep]

        def candidate(step: float) -> tuple[Tensor, Tensor | None]:
            moved = anchor
            if step < math.inf:
                moved = anchor + ridge(gap, gram, keep, step, name)
            return moved, fit.mean_target - moved @ fit.mean[keep] if centre else None

        best = candidate(self.damping)
        if self.holdout:
            held = _Moments.of(statistics["held_gram"], dense)
            least = held.error(*best, keep)
            for stronger in _STRONGER:
                other = candidate(self.damping * stronger)
                error = held.error(*other, keep)
                logger.info("%s: %g times the damping, held-out error %g", name, stronger, error)
                if error < least:
                    best, least = other, error
        moved, offset = best
        return Mended(moved.to(weight.device, weight.dtype), offset)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Means over tokens, fp64: of x, x x^T, t x^T, t, and ``|t|^2``."""

    gram: Tensor
    mean: Tensor
    cross: Tensor
    mean_target: Tensor
    energy: float

    @classmethod
    def of(cls, joint: Tensor, weight: Tensor) -> _Moments:
        """From the joint Gram matrix of ``(x, 1, t)``, or of ``(x, 1)`` for ``t = weight x``."""
        columns = weight.shape[1]
        gram, mean = joint[:columns, :columns], joint[:columns, columns]
        if len(joint) == columns + 1:
            cross = weight @ gram
            return cls(gram, mean, cross, weight @ mean, float((cross * weight).sum()))
        after = joint[columns + 1 :]
        energy = float(after[:, columns + 1 :].trace())
        return cls(gram, mean, after[:, :columns], after[:, columns], energy)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Gram and cross-moments of ``x - E[x]`` and ``t - E[t]``; 0 where x does not vary."""
        gram = self.gram - torch.outer(self.mean, self.mean)
        varies = gram.diagonal() > ROUNDING * self.gram.diagonal()
        cross = self.cross - torch.outer(self.mean_target, self.mean)
        return gram * varies * varies[:, None], cross * varies

    def error(self, weight: Tensor, bias: Tensor | None, keep: Tensor) -> float:
        """``E |t - W x_S - b|^2``."""
        fitted = weight @ self.gram[keep][:, keep]
        error = self.energy + float((weight * (fitted - 2 * self.cross[:, keep])).sum())
        if bias is None:
            return error
        gap = weight @ self.mean[keep] - self.mean_target
        return error + float((bias * (bias + 2 * gap)).sum())

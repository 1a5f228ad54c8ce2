"""Damped Gram matrices and Cholesky factors that never crash and never regularise in silence."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from prunec.errors import VerifyError

logger = logging.getLogger(__name__)

# A pivot is 1 - R^2 of its column on those before it: below this the inverse has no digits left.
_SMALLEST_PIVOT = 1e-11
_JITTERS = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


@dataclass(frozen=True, eq=False)
class DampedGram:
    """The matrix ``C + diag(added)`` of a site's input, in fp64.

    Attributes:
        name: The site, for messages.
        gram: ``[n, n]`` input Gram matrix C, as collected.
        added: ``[n]`` fp64, what is added to its diagonal.
        dead: ``[n]`` bool, columns whose input was always zero.
    """

    name: str
    gram: Tensor
    added: Tensor
    dead: Tensor

    def matrix(self, columns: Tensor | None = None) -> Tensor:
        """A new fp64 matrix, of the given columns only, with the diagonal added."""
        if columns is None:
            matrix = self.gram.to(torch.float64, copy=True)
            matrix.diagonal().add_(self.added)
        else:
            matrix = self.gram[columns[:, None], columns].double()
            matrix.diagonal().add_(self.added[columns])
        return matrix


def damp(gram: Tensor, damping: float, *, name: str) -> DampedGram:
    """Add `damping` times the mean diagonal to the diagonal of a Gram matrix ``[n, n]``.

    Columns whose input was always zero do not count in the mean and get a diagonal of 1, as in
    SlimGPT's code (METHODS 1.2); no other column can lean on them.

    Raises:
        VerifyError: `gram` holds NaN, Inf or a negative diagonal.
    """
    diagonal = gram.diagonal().double()
    # A sum is cheap, and NaN or Inf anywhere shows in it.
    if not bool(gram.sum().isfinite()) or bool((diagonal < 0).any()):
        raise VerifyError(
            "the input Gram matrix is not finite and positive",
            where=name,
            fix="look for NaN, Inf or overflow in the activations that reach it",
        )
    dead = diagonal == 0
    live = int((~dead).sum())
    mean = diagonal.sum() / max(live, 1)
    added = torch.where(dead, torch.ones_like(diagonal), (damping * mean).expand_as(diagonal))
    if dead.any():
        logger.info("%s: %d of %d input columns are always zero", name, len(dead) - live, len(dead))
    return DampedGram(name, gram, added, dead)


def cholesky(matrix: Tensor, *, name: str) -> Tensor:
    """Lower Cholesky factors of positive semi-definite matrices ``[..., n, n]``.

    A matrix that is singular to working precision gets a small multiple of its own diagonal added,
    as little as works, and a log line says how much.

    Raises:
        VerifyError: `matrix` is not finite, or far from positive semi-definite.
    """
    return _jittered(matrix, name)[0]


def inverse(damped: DampedGram) -> tuple[Tensor, DampedGram]:
    """The inverse of a damped Gram matrix, and that matrix with any jitter it took added to it."""
    factor, jitter = _jittered(damped.matrix(), damped.name)
    if float(jitter):
        extra = float(jitter) * (damped.gram.diagonal().double() + damped.added)
        damped = DampedGram(damped.name, damped.gram, damped.added + extra, damped.dead)
    return torch.cholesky_inverse(factor), damped


def _jittered(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    jitter = torch.zeros(matrix.shape[:-2], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix)
    for next_jitter in _JITTERS:
        pivots = factor.diagonal(dim1=-2, dim2=-1).square() / diagonal
        # NaN pivots compare false, so ask for the good ones.
        good = (info == 0) & (pivots > _SMALLEST_PIVOT).all(dim=-1)
        if bool(good.all()):
            return factor, jitter
        jitter = torch.where(good, jitter, next_jitter)
        logger.warning(
            "%s: a %d x %d matrix is singular; adding %g of its diagonal",
            name,
            *matrix.shape[-2:],
            next_jitter,
        )
        factor, info = torch.linalg.cholesky_ex(
            matrix + torch.diag_embed(jitter[..., None] * diagonal)
        )
    if bool((info == 0).all()):
        return factor, jitter
    raise VerifyError(
        "a matrix that should be positive semi-definite is not",
        where=name,
        fix="raise the damping, or look for overflow in the activations that reach this site",
    )

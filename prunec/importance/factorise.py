"""Cholesky factors that never crash and never regularise in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from prunec.errors import VerifyError

logger = logging.getLogger(__name__)

# A pivot is 1 - R^2 of its column on those before it: below this the inverse has no digits left.
_SMALLEST_PIVOT = 1e-11
_JITTERS = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


def cholesky(matrix: Tensor, *, name: str) -> Tensor:
    """Lower Cholesky factors of positive semi-definite matrices ``[..., n, n]``.

    A matrix that is singular to working precision gets a small multiple of its own diagonal added,
    as little as works, and a log line says how much.

    Raises:
        VerifyError: `matrix` is not finite, or far from positive semi-definite.
    """
    return jittered(matrix, name=name)[0]


def cholesky_in_place(make: Callable[[], Tensor], *, name: str) -> tuple[Tensor, Tensor]:
    """As `jittered`, of a large matrix ``[n, n]``: the factor takes the place of what is made.

    Args:
        make: gives the matrix, new each time: asked again where it is singular.
    """
    matrix = make()
    diagonal = matrix.diagonal().clone()
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    if bool(_sound(matrix, info, diagonal)):
        return matrix, torch.zeros_like(diagonal[0])
    del matrix
    return jittered(make(), name=name)


def jittered(matrix: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    """As `cholesky`, and the multiple of its diagonal ``[...]`` that each matrix took."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    jitter = torch.zeros(matrix.shape[:-2], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix)
    for next_jitter in _JITTERS:
        good = _sound(factor, info, diagonal)
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


def _sound(factor: Tensor, info: Tensor, diagonal: Tensor) -> Tensor:
    """Bool ``[...]``: whether factors of matrices with this diagonal have digits left."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).square() / diagonal
    # NaN pivots compare false, so ask for the good ones.
    return (info == 0) & (pivots > _SMALLEST_PIVOT).all(dim=-1)

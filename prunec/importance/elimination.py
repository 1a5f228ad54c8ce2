"""Elimination of input columns from a least-squares problem: the optimal brain surgeon's step.

For ``min ||W X - V X||^2`` over weights V without the columns P, with ``C = X X^T`` and the inverse
``K = C^-1`` (METHODS 1.1, SlimGPT arXiv 2412.18110 Eq 2-4 in block form)::

    loss   tr(W_P (K_PP)^-1 W_P^T)
    W  <-  W - W_P (K_PP)^-1 K_P:
    K  <-  K - K_:P (K_PP)^-1 K_P:

The loss is exact: it is the residual of the least-squares problem, and losses of steps taken one
after the other add up to that of their union.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunec.errors import VerifyError
from prunec.importance.factorise import cholesky
from prunec.importance.gram import Gram, Inverse, SecondMoment, damp

logger = logging.getLogger(__name__)

BlockScore = Literal["exact", "slimgpt", "diagonal"]

# [C^-1]_ii >= 1 / C_ii holds for every positive definite C; a down-date that breaks it is spent.
_LOST_PRECISION = 1 - 1e-3


@dataclass(frozen=True, eq=False)
class Elimination:
    """What is left of a least-squares problem. Values are never changed in place.

    Attributes:
        gram: The damped Gram matrix of all columns.
        dense: ``[columns, out]`` fp64, the weight before any elimination, transposed.
        weight: ``[n, out]`` fp64, the compensated weight of the surviving columns, transposed.
        inverse: of the damped Gram matrix of the surviving columns.
        columns: ``[n]`` int64, the surviving columns, sorted.
    """

    gram: Gram
    dense: Tensor
    weight: Tensor
    inverse: Inverse
    columns: Tensor

    def locate(self, columns: Tensor) -> Tensor:
        """Index of each column among the survivors, -1 where it is gone; any shape."""
        where = torch.full((len(self.dense),), -1, device=columns.device)
        where[self.columns] = torch.arange(len(self.columns), device=columns.device)
        return where[columns]

    def eliminate(self, columns: Tensor) -> tuple[Elimination, Tensor]:
        """Remove surviving `columns` ``[k]`` in this order.

        Returns:
            The new state, and ``[k]`` the loss that each column adds to those before it: column i
            of ``W_P L^-T``, as the leading block of a Cholesky factor is that block's factor.
        """
        state = self
        block, factor = state._factor(columns)
        if factor is None:
            state = self.refreshed()
            block, factor = state._factor(columns)
        if factor is None:
            gone = state.locate(columns)
            factor = cholesky(block[:, gone], name=state.gram.name)
        gone = state.locate(columns)
        stay = torch.ones(len(state.columns), dtype=torch.bool, device=gone.device)
        stay[gone] = False
        rest = stay.nonzero()[:, 0]
        solved = torch.linalg.solve_triangular(
            factor, torch.cat((state.weight[gone], block[:, rest]), dim=1), upper=False
        )
        weight_part, inverse_part = solved.split([state.weight.shape[1], len(rest)], dim=1)
        weight = state.weight[rest].addmm_(inverse_part.T, weight_part, alpha=-1)
        kept = state.inverse.without(rest, inverse_part)
        after = Elimination(state.gram, state.dense, weight, kept, state.columns[rest])
        if after._lost_precision():
            after = after.refreshed()
        return after, weight_part.square().sum(dim=1)

    def restore(self, columns: Tensor) -> tuple[Elimination, float]:
        """Put eliminated `columns` ``[k]`` back, by bordering the inverse.

        Returns:
            The new state, and the loss that it is lower by.
        """
        gram = self.gram
        everything = torch.arange(len(self.dense), device=columns.device)
        cross = gram.block(self.columns, columns)
        block = gram.block(columns, columns)
        block.diagonal().add_(gram.added[columns])
        solved = self.inverse.apply(cross)
        factor = cholesky(block - cross.T @ solved, name=gram.name)
        # What the columns could still explain of the dense output.
        missing = gram.product(columns, everything, self.dense)
        missing += gram.added[columns, None] * self.dense[columns]
        missing -= cross.T @ self.weight
        new = torch.cholesky_solve(missing, factor)
        weight = torch.cat((self.weight - solved @ new, new))
        found, order = torch.cat((self.columns, columns)).sort()
        inner = torch.cholesky_inverse(factor)
        inverse = self.inverse.with_columns(solved, inner, order, found)
        restored = Elimination(gram, self.dense, weight[order], inverse, found)
        return restored, float((missing * new).sum())

    def block_scores(self, columns: Tensor, score: BlockScore = "exact") -> Tensor:
        """Loss of removing each unit alone.

        Args:
            columns: ``[N, width]`` columns of N units; columns that are gone do not count.
            score: ``exact`` is the loss, ``|| W_P L^-T ||^2`` with the Cholesky factor L of K_PP.
                ``slimgpt`` is the paper's approximation, ``|| W_P diag(L)^-1 ||^2`` (METHODS 1.2),
                ``diagonal`` its ablation, ``|| W_P diag(K_PP)^-1/2 ||^2``. With width 1 all agree.

        Returns:
            ``[N]`` fp64.
        """
        where = self.locate(columns)
        gone = where < 0
        where = where.clamp_min(0)
        weight = self.weight[where].masked_fill_(gone[..., None], 0.0)
        if columns.shape[1] == 1:
            scale = self.inverse.diagonal()[where].masked_fill_(gone, 1.0)
            return (weight.square().sum(dim=-1) / scale).squeeze(1)
        blocks = self.inverse.blocks(where)
        if gone.any():
            blocks.masked_fill_(gone[:, :, None] | gone[:, None, :], 0.0)
            blocks.diagonal(dim1=1, dim2=2).masked_fill_(gone, 1.0)
        if score == "diagonal":
            scale = blocks.diagonal(dim1=1, dim2=2)
            return (weight.square().sum(dim=-1) / scale).sum(dim=1)
        factor = cholesky(blocks, name=self.gram.name)
        if score == "slimgpt":
            scale = factor.diagonal(dim1=1, dim2=2).square()
            return (weight.square().sum(dim=-1) / scale).sum(dim=1)
        solved: Tensor = torch.linalg.solve_triangular(factor, weight, upper=False)
        return solved.square().sum(dim=(1, 2))

    def refreshed(self) -> Elimination:
        """The same state computed anew from the Gram matrix, free of accumulated rounding."""
        logger.info("%s: recomputing a spent inverse", self.gram.name)
        return _solve(self.gram, self.dense, self.columns)

    def _factor(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        gone = self.locate(columns)
        rows = self.inverse.rows(gone)
        factor, info = torch.linalg.cholesky_ex(rows[:, gone])
        return rows, None if int(info) else factor

    def _lost_precision(self) -> bool:
        diagonal = self.gram.diagonal()[self.columns]
        # Written so that NaN counts as lost.
        return not bool((self.inverse.diagonal() * diagonal >= _LOST_PRECISION).all())


def start(weight: Tensor, moment: SecondMoment, damping: float, *, name: str) -> Elimination:
    """Invert the damped input Gram matrix of a site, once.

    Args:
        weight: ``[out, columns]``; what reads columns that are always zero counts as zero.
        moment: ``[columns, columns]``, or the tokens that it is of.
        damping: Times the mean diagonal, added to the diagonal.
        name: The site, for messages.

    Raises:
        VerifyError: NaN or Inf in the weight or the Gram matrix.
    """
    if not bool(weight.isfinite().all()):
        raise VerifyError("the weight is not finite", where=name, fix="check the checkpoint")
    damped = damp(moment, damping, name=name)
    device = damped.added.device
    dense = weight.detach().to(device, torch.float64).T.contiguous()
    if bool(damped.dead.any()):
        dense = dense.masked_fill(damped.dead[:, None], 0.0)
    inverted, damped = damped.inverted()
    return Elimination(damped, dense, dense, inverted, torch.arange(len(dense), device=device))


def _solve(gram: Gram, dense: Tensor, columns: Tensor) -> Elimination:
    """The state after the elimination of all but `columns`, in closed form."""
    gone = torch.ones(len(dense), dtype=torch.bool, device=dense.device)
    gone[columns] = False
    lost = gone.nonzero()[:, 0]
    cross = gram.product(columns, lost, dense[lost])
    weight = dense[columns] + gram.solve(columns, cross)
    return Elimination(gram, dense, weight, gram.inverse(columns), columns)

"""Damped Gram matrices ``C + diag(added)`` of a site's input, and inverses of their parts.

A matrix of n columns is either there in full, or stands as the t tokens that it was made of. With
far fewer tokens than columns the second form costs ``t^2 n`` where the first costs ``n^3``, and
``t n`` of memory for ``n^2``: ``C = X^T X``, so by Woodbury's identity, for any columns S ::

    (X_S^T X_S + D)^-1 = D^-1 - Z^T Z,   Z = L^-1 X_S D^-1,   L L^T = I + X_S D^-1 X_S^T
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prunec.errors import VerifyError
from prunec.importance.factorise import cholesky, cholesky_in_place, logger

# D^-1 - Z^T Z loses as many digits as C_ii / D_ii has: beyond this the matrix itself is used.
_LARGEST_QUOTIENT = 1e8

ROUNDING = 1e-4
"""Below this part of a second moment a variance is rounding: products are taken in fp32."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The inputs ``[tokens, columns]`` fp64 whose Gram matrix is meant, scaled to give the mean."""

    rows: Tensor


SecondMoment = Tensor | Tokens
"""A Gram matrix ``[columns, columns]``, or the tokens that it is of."""


def second_moment(statistics: Mapping[str, Tensor]) -> SecondMoment:
    """What was taken of a site's input: ``input_gram``, or ``input_tokens`` in its place."""
    tokens = statistics.get("input_tokens")
    return statistics["input_gram"] if tokens is None else Tokens(tokens)


def energy(weight: Tensor, moment: SecondMoment) -> float:
    """``tr(W C W^T)`` of a weight ``[out, columns]``: its mean squared output."""
    if isinstance(moment, Tokens):
        return float((moment.rows @ weight.to(moment.rows).T).square().sum())
    dense = weight.to(moment)
    return float(((dense @ moment) * dense).sum())


def least_variance(weight: Tensor, gram: Tensor) -> Tensor:
    """``[out]``: a variance of ``weight x`` that is less is rounding; fp64 ``E[x x^T]`` and weight.

    What counts is the output's second moment and, as it may be a small sum of large terms, theirs.
    """
    power = ((weight @ gram) * weight).sum(dim=1)
    return ROUNDING * (power + weight.square() @ gram.diagonal())


class Inverse(Protocol):
    """The inverse K ``[n, n]`` of the part of a damped Gram matrix that n columns make.

    Indices count among these columns.
    """

    def diagonal(self) -> Tensor:
        """``[n]``."""

    def rows(self, index: Tensor) -> Tensor:
        """``[k, n]``."""

    def blocks(self, index: Tensor) -> Tensor:
        """``[N, w, w]`` for an index ``[N, w]``: new, and free to be changed."""

    def apply(self, right: Tensor) -> Tensor:
        """``K right``."""

    def without(self, rest: Tensor, part: Tensor) -> Inverse:
        """That of the columns `rest`: ``K_SS - part^T part``."""

    def with_columns(
        self, solved: Tensor, inner: Tensor, order: Tensor, columns: Tensor
    ) -> Inverse:
        """That of some columns more.

        Args:
            solved: ``K C_:Q`` of the new columns Q.
            inner: the inverse's block of Q.
            order: where each of ``columns`` stands among the old ones followed by Q.
            columns: all of them.
        """


class Gram(Protocol):
    """A damped Gram matrix of all columns of a site."""

    @property
    def name(self) -> str:
        """The site, for messages."""

    @property
    def added(self) -> Tensor:
        """``[n]`` fp64, what is added to the diagonal."""

    @property
    def dead(self) -> Tensor:
        """``[n]`` bool, columns whose input was always zero."""

    def diagonal(self) -> Tensor:
        """``[n]``, damped."""

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``C`` at these rows and columns, undamped: new, and free to be changed."""

    def product(self, rows: Tensor, columns: Tensor, right: Tensor) -> Tensor:
        """``C_{rows, columns} right``, undamped."""

    def solve(self, columns: Tensor, right: Tensor) -> Tensor:
        """``(C + diag(added))^-1 right`` of the part that these columns make."""

    def inverse(self, columns: Tensor) -> Inverse:
        """Of the part that these columns make."""

    def inverted(self) -> tuple[Inverse, Gram]:
        """The inverse of the whole, and this matrix with any jitter that it took added to it."""


@dataclass(frozen=True, eq=False)
class _FullInverse:
    matrix: Tensor

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def rows(self, index: Tensor) -> Tensor:
        return self.matrix[index]

    def blocks(self, index: Tensor) -> Tensor:
        return self.matrix[index[:, :, None], index[:, None, :]]

    def apply(self, right: Tensor) -> Tensor:
        return self.matrix @ right

    def without(self, rest: Tensor, part: Tensor) -> _FullInverse:
        return _FullInverse(self.matrix[rest[:, None], rest].addmm_(part.T, part, alpha=-1))

    def with_columns(
        self, solved: Tensor, inner: Tensor, order: Tensor, columns: Tensor
    ) -> _FullInverse:
        side = -solved @ inner
        top = torch.cat((self.matrix - side @ solved.T, side), dim=1)
        matrix = torch.cat((top, torch.cat((side.T, inner), dim=1)))
        return _FullInverse(matrix[order[:, None], order])


@dataclass(frozen=True, eq=False)
class FullGram:
    """A damped Gram matrix that is there in full (see `Gram`); `gram` is as it was collected."""

    name: str
    gram: Tensor
    added: Tensor
    dead: Tensor

    def diagonal(self) -> Tensor:
        return self.gram.diagonal().double() + self.added

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.gram[rows[:, None], columns].double()

    def product(self, rows: Tensor, columns: Tensor, right: Tensor) -> Tensor:
        return self.block(rows, columns) @ right

    def solve(self, columns: Tensor, right: Tensor) -> Tensor:
        return torch.cholesky_solve(right, self._factor(columns)[0])

    def inverse(self, columns: Tensor) -> _FullInverse:
        factor, _ = self._factor(columns)
        return _FullInverse(torch.cholesky_inverse(factor, out=factor))

    def inverted(self) -> tuple[Inverse, Gram]:
        factor, jitter = self._factor()
        damped = self
        if float(jitter):
            extra = float(jitter) * self.diagonal()
            damped = FullGram(self.name, self.gram, self.added + extra, self.dead)
        return _FullInverse(torch.cholesky_inverse(factor, out=factor)), damped

    def _factor(self, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of the part that some columns make, and the jitter that it took."""

        def part() -> Tensor:
            if columns is None:
                matrix, added = self.gram.to(torch.float64, copy=True), self.added
            else:
                matrix, added = self.block(columns, columns), self.added[columns]
            matrix.diagonal().add_(added)
            return matrix

        return cholesky_in_place(part, name=self.name)


@dataclass(frozen=True, eq=False)
class _TokenInverse:
    """``diag(1 / added) - Z^T Z`` of the columns of a `TokenGram`, Z being `factor` ``[t, n]``."""

    gram: TokenGram
    columns: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: TokenGram, columns: Tensor) -> _TokenInverse:
        rows = gram.rows[:, columns]
        scaled = rows / gram.added[columns]
        outer = scaled @ rows.T
        outer.diagonal().add_(1.0)
        lower = cholesky(outer, name=gram.name)
        return cls(gram, columns, torch.linalg.solve_triangular(lower, scaled, upper=False))

    @property
    def _scale(self) -> Tensor:
        return self.gram.added[self.columns].reciprocal()

    def diagonal(self) -> Tensor:
        return self._scale - self.factor.square().sum(dim=0)

    def rows(self, index: Tensor) -> Tensor:
        found = -(self.factor[:, index].T @ self.factor)
        found[torch.arange(len(index), device=index.device), index] += self._scale[index]
        return found

    def blocks(self, index: Tensor) -> Tensor:
        parts = self.factor[:, index].movedim(0, -1)
        found = -(parts @ parts.mT)
        found.diagonal(dim1=1, dim2=2).add_(self._scale[index])
        return found

    def apply(self, right: Tensor) -> Tensor:
        return self._scale[:, None] * right - self.factor.T @ (self.factor @ right)

    def without(self, rest: Tensor, part: Tensor) -> _TokenInverse:
        return self.of(self.gram, self.columns[rest])

    def with_columns(
        self, solved: Tensor, inner: Tensor, order: Tensor, columns: Tensor
    ) -> _TokenInverse:
        return self.of(self.gram, columns)


@dataclass(frozen=True, eq=False)
class TokenGram:
    """A damped Gram matrix that stands as tokens (see `Gram`): ``rows^T rows + diag(added)``."""

    name: str
    rows: Tensor
    added: Tensor
    dead: Tensor

    def diagonal(self) -> Tensor:
        return self.rows.square().sum(dim=0) + self.added

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.rows[:, rows].T @ self.rows[:, columns]

    def product(self, rows: Tensor, columns: Tensor, right: Tensor) -> Tensor:
        return self.rows[:, rows].T @ (self.rows[:, columns] @ right)

    def solve(self, columns: Tensor, right: Tensor) -> Tensor:
        return self.inverse(columns).apply(right)

    def inverse(self, columns: Tensor) -> _TokenInverse:
        return _TokenInverse.of(self, columns)

    def inverted(self) -> tuple[Inverse, Gram]:
        return self.inverse(torch.arange(len(self.added), device=self.added.device)), self


def damp(moment: SecondMoment, damping: float, *, name: str) -> Gram:
    """Add `damping` times the mean diagonal to the diagonal of a Gram matrix ``[n, n]``.

    Columns whose input was always zero do not count in the mean and get a diagonal of 1, as in
    SlimGPT's code (METHODS 1.2); no other column can lean on them. Tokens stay tokens where the
    damping leaves Woodbury's identity enough digits.

    Raises:
        VerifyError: the matrix holds NaN, Inf or a negative diagonal.
    """
    if isinstance(moment, Tokens):
        diagonal = moment.rows.square().sum(dim=0)
        total = diagonal.sum()
    else:
        diagonal = moment.diagonal().double()
        total = moment.sum()  # cheap, and NaN or Inf anywhere shows in it
    if not bool(total.isfinite()) or bool((diagonal < 0).any()):
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
    if isinstance(moment, Tensor):
        return FullGram(name, moment, added, dead)
    if bool((diagonal <= _LARGEST_QUOTIENT * added).all()):
        return TokenGram(name, moment.rows, added, dead)
    return FullGram(name, moment.rows.T @ moment.rows, added, dead)

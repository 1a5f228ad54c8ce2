"""Statistics of a site's input: streaming collectors, declared by name by the criteria.

A collector lives from its first batch to :meth:`Collector.finish`. Everything is an average per
token, so that curves of different sites and calibration sizes are in one unit, and is accumulated
in fp64 whatever the dtype of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from prunec.errors import PlanError, VerifyError

# fp32 sums over more tokens than this would lose digits that the fp64 total could keep.
_BLOCK_TOKENS = 4096
# Only the upper triangle of a Gram matrix is computed, in strips of about this many columns.
_STRIP_COLUMNS = 256


class Collector(Protocol):
    """One statistic of one site's input while the batches stream by."""

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: ``[tokens, columns]`` or ``[..., columns]``, the input of the site, not changed.
            weight: ``[tokens]`` or ``[...]``: a bool mask, or how much each token counts. What a
                token of weight 0 holds, NaN included, does not matter.

        Raises:
            VerifyError: NaN or Inf in a token that counts; names the site and the batch.
        """

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take in what the same collectors of other processes have seen.

        Args:
            total: the sum of a tensor over all processes.
        """

    def finish(self, *, idle: bool = False) -> Tensor:
        """The statistic, fp64.

        Args:
            idle: zeros where no token counted, as for an expert that is never asked.

        Raises:
            VerifyError: no token counted.
        """

    @property
    def tokens(self) -> float:
        """How many tokens counted, by their weight."""


class _Collector:
    """Counts batches and tokens, and hands each batch on as fp32 or fp64 blocks of tokens.

    Attributes:
        sums: fp64, over all tokens; None before the first batch.
    """

    def __init__(self, site: str) -> None:
        self.site = site
        self.batches = 0
        self.tokens = 0.0
        self.sums: Tensor | None = None

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        x = x.detach().flatten(0, -2)
        if weight is not None:
            weight = weight.detach().flatten()
            counts = weight > 0
            x = x[counts]
            weight = None if weight.dtype == torch.bool else weight[counts].double()
        self.batches += 1
        self.tokens += len(x) if weight is None else float(weight.sum())
        if self.sums is None:
            self.sums = self.zeros(x)
        for first in range(0, len(x), _BLOCK_TOKENS):
            block = x[first : first + _BLOCK_TOKENS]
            if block.dtype != torch.float64:
                block = block.float()
            self.add(
                self.sums, block, None if weight is None else weight[first : first + _BLOCK_TOKENS]
            )

    def zeros(self, x: Tensor) -> Tensor:
        """What to add to, for rows like these."""
        return torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)

    def add(self, sums: Tensor, x: Tensor, weight: Tensor | None) -> None:
        """Add some tokens to `sums`."""
        raise NotImplementedError

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        self.tokens = float(total(torch.tensor([self.tokens], dtype=torch.float64)))
        if self.sums is not None:
            self.sums = total(self.sums)

    def check(self, sums: Tensor) -> None:
        """Raise where a batch left NaN or Inf in `sums`, in which every column takes part."""
        if bool(sums.isfinite().all()):
            return
        column = int((~sums.isfinite()).nonzero()[0, -1])
        raise VerifyError(
            f"NaN or Inf in calibration batch {self.batches - 1}",
            where=f"the input of {self.site}, column {column}",
            fix="run the model in a wider dtype (--dtype float32), or drop that text",
        )

    def finish(self, *, idle: bool = False) -> Tensor:
        sums, self.sums = self.sums, None
        if sums is None or (self.tokens <= 0 and not idle):
            raise VerifyError(
                "no calibration token reached a site",
                where=self.site,
                fix="give more calibration text, or look at the token mask",
            )
        return sums.div_(self.tokens) if self.tokens > 0 else sums


class InputGram(_Collector):
    """``E[x x^T]``, ``[columns, columns]``: products in fp32, sums in fp64."""

    def zeros(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)

    def add(self, sums: Tensor, x: Tensor, weight: Tensor | None) -> None:
        if weight is not None:
            x = x * weight.sqrt().to(x.dtype)[:, None]
        if x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            x = x.double()
        if not bool((x * x).sum().isfinite()):
            # Squares of finite activations can overflow fp32; NaN and Inf are found below.
            x = x.double()
        for first in range(0, x.shape[1], _STRIP_COLUMNS):
            strip = x[:, first : first + _STRIP_COLUMNS]
            sums[first : first + _STRIP_COLUMNS, first:] += strip.T @ x[:, first:]
        self.check(sums.diagonal())

    def finish(self, *, idle: bool = False) -> Tensor:
        gram = super().finish(idle=idle)
        # Blocks on the diagonal are full; the rest of the lower half is mirrored in strips.
        for first in range(0, len(gram), _STRIP_COLUMNS):
            end = first + _STRIP_COLUMNS
            strip = gram[first:end, first:end]
            strip.copy_(strip.triu() + strip.triu(1).T)
            gram[end:, first:end] = gram[first:end, end:].T
        return gram


class InputTokens(_Collector):
    """The tokens themselves, ``[tokens, columns]``, scaled so that their Gram matrix is the mean.

    For sites with far more columns than tokens: see prunec.importance.gram.
    """

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self._blocks: list[Tensor] = []

    def add(self, sums: Tensor, x: Tensor, weight: Tensor | None) -> None:
        self.check(x.sum(dim=0, dtype=torch.float64))
        scaled = x if weight is None else x * weight.sqrt().to(x.dtype)[:, None]
        self._blocks.append(scaled.clone())

    def finish(self, *, idle: bool = False) -> Tensor:
        super().finish(idle=idle)  # which raises where there is none
        rows = torch.cat(self._blocks).double()
        self._blocks.clear()
        return rows.div_(math.sqrt(self.tokens))


class InputMean(_Collector):
    """``E[x]``, ``[columns]``."""

    def add(self, sums: Tensor, x: Tensor, weight: Tensor | None) -> None:
        x = self.of(x)
        sums += x.sum(dim=0, dtype=torch.float64) if weight is None else weight @ x.double()
        self.check(sums)

    def of(self, x: Tensor) -> Tensor:
        """What the mean is taken of."""
        return x


class InputSquare(InputMean):
    """``E[x^2]``, ``[columns]``, the diagonal of the Gram matrix without the matrix."""

    def of(self, x: Tensor) -> Tensor:
        return x.double().square()


class InputVariance(_Collector):
    """``E[(x - E[x])^2]``, ``[columns]``, by Chan's update, which does not cancel."""

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self._seen = 0.0
        self._mean: Tensor | None = None

    def add(self, sums: Tensor, x: Tensor, weight: Tensor | None) -> None:
        x = x.double()
        if weight is None:
            weight = torch.ones(len(x), dtype=torch.float64, device=x.device)
        here = float(weight.sum())
        mean = weight @ x / here
        sums += weight @ (x - mean).square()
        if self._mean is None:
            self._mean = mean
        else:
            step = mean - self._mean
            total = self._seen + here
            self._mean = self._mean + step * (here / total)
            sums += step.square() * (self._seen * here / total)
        self._seen += here
        self.check(sums)

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        own = self.sums
        if own is not None:
            mean = torch.zeros_like(own) if self._mean is None else self._mean
            everyone = max(float(total(torch.tensor([self._seen], dtype=torch.float64))), 1e-300)
            common = total(mean * self._seen) / everyone
            self.sums = own + (common - mean).square() * self._seen
        super().merge(total)


STATISTICS: Mapping[str, Callable[[str], Collector]] = {
    "input_gram": InputGram,
    "input_mean": InputMean,
    "input_square": InputSquare,
    "input_tokens": InputTokens,
    "input_var": InputVariance,
}


# A statistic of what each producer of a site's units multiplies -> its collector
_OF_PRODUCERS: Mapping[str, str] = {
    "producer_mean": "input_mean",
    "producer_square": "input_square",
    "producer_var": "input_var",
}


def producer_statistics(names: Collection[str]) -> dict[str, str]:
    """Those of some names that are taken at the producers -> the statistic of their input."""
    return {name: _OF_PRODUCERS[name] for name in sorted(names) if name in _OF_PRODUCERS}


def statistic_of(name: str, parameter: str, axis: int | None = None) -> str:
    """The key of a statistic that belongs to a parameter, or to one of its axes.

    >>> statistic_of("mask_grad", "mlp.down.weight", 1)
    'mask_grad mlp.down.weight 1'
    """
    return f"{name} {parameter}" if axis is None else f"{name} {parameter} {axis}"


def collector(name: str, *, site: str) -> Collector:
    """A new collector of the statistic `name` for a site.

    Raises:
        PlanError: no statistic has that name.
    """
    if name not in STATISTICS:
        raise PlanError(
            f"no statistic named {name!r}",
            fix=f"there are: {', '.join([*STATISTICS, *_OF_PRODUCERS])}, and those of gradients",
        )
    return STATISTICS[name](site)

"""Pearson: how well the site's output without a unit still correlates with its whole output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from prunec.importance.blocks import blocks_of, within
from prunec.importance.curves import Removal, RemovalCurve, Survivors
from prunec.importance.gram import least_variance
from prunec.importance.problem import FloatArray, IntArray, SiteProblem, UnitSet
from prunec.importance.scores import static_curve, to_array
from prunec.importance.swap import only_group, removed_columns, steps_to, swap_search


@dataclass(frozen=True)
class Pearson:
    """Score of a unit: the correlation that the site's output loses without it.

    SlimLLM's head importance (arXiv 2505.22689, METHODS 2.2). With ``O`` the output of the site
    and ``O_S`` that of the units S alone, the loss of keeping S is
    ``sum_c (1 - |corr(O_S, O)_c|)`` over the output channels c; units go in the order of the loss
    of each alone, then swaps improve the set that the target leaves. All correlations follow from
    the Gram matrix and the mean of the site's input, so no per-unit output is ever held.

    A channel of the output that never varies counts nothing. The accumulated loss is exact at
    every step; a correlation can rise when a unit goes, so it may fall.

    Attributes:
        swap: search for improving swaps, where one group of the site loses units.
    """

    swap: bool = True

    statistics: ClassVar[frozenset[str]] = frozenset({"input_gram", "input_mean"})
    depends_on_limit: ClassVar[bool] = True

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units by how little the output's correlation suffers."""
        whole = output_of(problem, statistics)

        def score(unit_set: UnitSet, survivors: Survivors) -> FloatArray:
            left = whole.drop(np.flatnonzero(~survivors.columns))
            flat = unit_set.columns.reshape(unit_set.rows * unit_set.units, -1)
            return (left.losses_without(flat) - left.loss).reshape(unit_set.columns.shape[:2])

        curve = static_curve(problem, score, limit=limit)
        steps = steps_to(curve, limit)
        unit_set = only_group(problem, curve.removals[:steps])
        if self.swap and unit_set is not None:
            head = curve.removals[:steps]
            gone = np.concatenate(removed_columns(unit_set, head))
            swapped = swap_search(unit_set, head, whole.drop(gone))
            curve = RemovalCurve(swapped, curve.loss[:steps], curve.parameters[:steps])
        return replace(curve, loss=_losses(problem, whole, curve.removals))


def _losses(
    problem: SiteProblem, whole: CorrelatedOutputs, removals: tuple[Removal, ...]
) -> FloatArray:
    """The loss after each removal, exact."""
    survivors, state, losses = Survivors(problem), whole, []
    for removal in removals:
        before = survivors.columns.copy()
        survivors.remove(removal)
        state = state.drop(np.flatnonzero(before & ~survivors.columns))
        losses.append(state.loss)
    return np.asarray(losses, dtype=np.float64)


def output_of(problem: SiteProblem, statistics: Mapping[str, Tensor]) -> CorrelatedOutputs:
    """The whole output of a site, from the second moments of its input."""
    means = blocks_of(problem, statistics, "input_mean")
    blocks = [
        _output(problem.weight[:, span], gram.double(), mean.double())
        for (span, gram), (_, mean) in zip(
            blocks_of(problem, statistics, "input_gram"), means, strict=True
        )
    ]
    return CorrelatedOutputs(tuple(span for span, _ in means), tuple(blocks))


def _output(weight: Tensor, gram: Tensor, mean: Tensor) -> CorrelatedOutput:
    mean = mean.to(gram.device)
    covariance = gram - mean[:, None] * mean
    weight = weight.detach().to(gram.device, torch.float64)
    crossed = weight @ covariance
    total = (crossed * weight).sum(dim=1)
    return CorrelatedOutput(
        weight=weight,
        covariance=covariance,
        whole=crossed,
        crossed=crossed,
        total=torch.where(total > least_variance(weight, gram), total, 0.0),
        kept=torch.ones(weight.shape[1], dtype=torch.bool, device=gram.device),
    )


@dataclass(frozen=True, eq=False)
class CorrelatedOutputs:
    """The outputs of the blocks of a site; their losses add up.

    Attributes:
        spans: the columns of each block.
        blocks: one a block, with columns counted from the block's first.
    """

    spans: tuple[slice, ...]
    blocks: tuple[CorrelatedOutput, ...]

    @property
    def loss(self) -> float:
        """``sum_c (1 - |corr|)`` of the kept columns' output with the whole output."""
        return sum(block.loss for block in self.blocks)

    def restore(self, columns: IntArray) -> CorrelatedOutputs:
        """With these columns back."""
        return self._with(columns, kept=True)

    def drop(self, columns: IntArray) -> CorrelatedOutputs:
        """Without these columns."""
        return self._with(columns, kept=False)

    def losses_without(self, columns: IntArray) -> FloatArray:
        """``[N]``: the loss without each unit's columns ``[N, width]`` (those that are left)."""
        given = torch.as_tensor(columns)
        total = np.full(len(given), self.loss)
        for span, block in zip(self.spans, self.blocks, strict=True):
            for units, local in within(given, span):
                total[units.numpy()] += block.losses_without(local) - block.loss
        return total

    def _with(self, columns: IntArray, *, kept: bool) -> CorrelatedOutputs:
        blocks = []
        for span, block in zip(self.spans, self.blocks, strict=True):
            inside = columns[(columns >= span.start) & (columns < span.stop)] - span.start
            blocks.append(block.changed(inside, kept=kept) if len(inside) else block)
        return CorrelatedOutputs(self.spans, tuple(blocks))


@dataclass(frozen=True, eq=False)
class CorrelatedOutput:
    """The output of some columns of a site, compared with the output of all.

    Attributes:
        weight: ``[out, columns]`` fp64.
        covariance: ``[columns, columns]`` fp64, of the site's input.
        whole: ``[out, columns]``, covariance of the whole output with each column of the input.
        crossed: ``[out, columns]``, the same for the output of the kept columns.
        total: ``[out]``, variance of the whole output, 0 where it does not vary.
        kept: bool ``[columns]``.
    """

    weight: Tensor
    covariance: Tensor
    whole: Tensor
    crossed: Tensor
    total: Tensor
    kept: Tensor

    @property
    def loss(self) -> float:
        """``sum_c (1 - |corr|)`` of the kept columns' output with the whole output."""
        return float(self._loss(*self._moments()).sum())

    def losses_without(self, columns: Tensor) -> FloatArray:
        """``[N]``: the loss without each unit's columns ``[N, width]`` (those that are left)."""
        variance, shared = self._moments()
        losses = []
        for unit in torch.split(columns.to(self.weight.device), _UNITS):
            weight = torch.where(self.kept, self.weight, 0.0)[:, unit]  # [out, n, width]
            block = self.covariance[unit[:, :, None], unit[:, None, :]]
            own = (torch.einsum("onw,nwv->onv", weight, block) * weight).sum(dim=2)
            with_kept = (weight * self.crossed[:, unit]).sum(dim=2)
            with_whole = (weight * self.whole[:, unit]).sum(dim=2)
            left = variance[:, None] - 2 * with_kept + own
            losses.append(self._loss(left, shared[:, None] - with_whole).sum(dim=0))
        return to_array(torch.cat(losses))

    def _moments(self) -> tuple[Tensor, Tensor]:
        """``[out]``: variance of the kept output, and its covariance with the whole."""
        weight = torch.where(self.kept, self.weight, 0.0)
        return (weight * self.crossed).sum(dim=1), (weight * self.whole).sum(dim=1)

    def _loss(self, variance: Tensor, shared: Tensor) -> Tensor:
        """Per channel; an output that no longer varies has no correlation left."""
        total = self.total if variance.ndim == 1 else self.total[:, None]
        varies = (variance > 1e-12 * total) & (total > 0)
        scale = torch.where(varies, variance * total, 1.0).sqrt()
        correlation = torch.where(varies, shared / scale, 0.0).abs().clamp_max(1.0)
        return torch.where(total > 0, 1 - correlation, 0.0)

    def changed(self, columns: IntArray, *, kept: bool) -> CorrelatedOutput:
        """With these columns back, or without them."""
        index = torch.as_tensor(columns, device=self.weight.device)
        index = index[self.kept[index] != kept]
        change = self.weight[:, index] @ self.covariance[index]
        mask = self.kept.clone()
        mask[index] = kept
        crossed = self.crossed + change if kept else self.crossed - change
        return replace(self, crossed=crossed, kept=mask)


# Units whose [out, units, width] products are held at once.
_UNITS = 256

"""Feature space: a unit's size, along the directions in which the site's output varies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from prunec.errors import PlanError
from prunec.importance.blocks import blocks_of
from prunec.importance.curves import RemovalCurve, Survivors
from prunec.importance.problem import Axis, BoolArray, FloatArray, SiteProblem, UnitSet
from prunec.importance.scores import static_curve, to_array
from prunec.importance.statistics import statistic_of


@dataclass(frozen=True)
class FeatureSpace:
    """Score of a unit: the size of what makes it, and of what it adds to the output.

    SlimLLM's channel importance (arXiv 2505.22689, METHODS 2.1). With x the input of a producer
    (gate, up) and W its weight, h_j a column of the site's input and w_j the weight that reads it,
    V and lambda the eigenvectors and eigenvalues of the covariance of the site's output::

        producer   || W_j ⊙ ||x|| ||_2                              of each weight that makes j
        reader     ||h_j|| || |w_j^T V| ⊙ sigmoid(lambda / mean lambda) ||_2

    summed; a unit of several columns has the sum of theirs. Norms are per token, which scales all
    terms alike.

    Attributes:
        keep_bottom: this part of the units, those with the lowest score, goes last instead of
            first. SlimLLM's code has 0.01 (from LoRAP); its paper does not mention it.
    """

    keep_bottom: float = 0.0

    statistics: ClassVar[frozenset[str]] = frozenset(
        {"input_gram", "input_mean", "producer_square"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.keep_bottom < 1:
            raise PlanError(
                f"feature-space: keep_bottom {self.keep_bottom} is not possible",
                fix="use a part of the units from 0 to 1, such as 0.01",
            )

    def rank(
        self, problem: SiteProblem, statistics: Mapping[str, Tensor], *, limit: int | None = None
    ) -> RemovalCurve:
        """Order a site's units by their size in feature space."""
        reads = _reader_salience(problem, statistics)
        makes = {axis: _producer_salience(problem, axis, statistics) for axis in problem.producers}
        lowest: dict[str, BoolArray] = {}

        def score(unit_set: UnitSet, survivors: Survivors) -> FloatArray:
            scores = np.where(survivors.columns, reads, 0.0)[unit_set.columns].sum(axis=2)
            for axis, salience in makes.items():
                if axis in unit_set.positions:
                    left = np.where(survivors.positions[axis], salience, 0.0)
                    scores = scores + left[unit_set.positions[axis]].sum(axis=2)
            if unit_set.group not in lowest:
                lowest[unit_set.group] = self._lowest(scores)
            return np.asarray(np.where(lowest[unit_set.group], scores + scores.max(), scores))

        return static_curve(problem, score, limit=limit)

    def _lowest(self, scores: FloatArray) -> BoolArray:
        order = scores.argsort(axis=1, kind="stable")
        mask = np.zeros(scores.shape, dtype=bool)
        count = int(self.keep_bottom * scores.shape[1])
        np.put_along_axis(mask, order[:, :count], True, axis=1)
        return mask


def _reader_salience(problem: SiteProblem, statistics: Mapping[str, Tensor]) -> FloatArray:
    """``[columns]``: the norm of a column, times that of its weight in the eigenbasis."""
    means = blocks_of(problem, statistics, "input_mean")
    grams = blocks_of(problem, statistics, "input_gram")
    return np.concatenate(
        [
            _block_salience(problem.weight[:, span], gram.double(), mean.double())
            for (span, gram), (_, mean) in zip(grams, means, strict=True)
        ]
    )


def _block_salience(weight: Tensor, gram: Tensor, mean: Tensor) -> FloatArray:
    mean = mean.to(gram.device)
    weight = weight.detach().to(gram.device, torch.float64)
    covariance = weight @ (gram - mean[:, None] * mean) @ weight.T
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    values = values.abs()  # rounding can leave a small one negative
    # Where the output never varies no direction counts more than another.
    strength = torch.sigmoid(values / values.mean().clamp_min(torch.finfo(values.dtype).tiny))
    size = (vectors.T @ weight).mul_(strength[:, None]).norm(dim=0)
    return to_array(gram.diagonal().clamp_min(0).sqrt() * size)


def _producer_salience(
    problem: SiteProblem, axis: Axis, statistics: Mapping[str, Tensor]
) -> FloatArray:
    """``[positions]``: the norm of each output row, its elements weighted by their input's norm."""
    square = statistics[statistic_of("producer_square", axis[0])].double()
    weight = problem.parameters[axis[0]].detach().to(square.device, torch.float64)
    weighted = weight.movedim(axis[1], 0).square() * square
    return to_array(weighted.flatten(1).sum(dim=1).sqrt())

"""The dense model on the calibration batches: what allocations that look at it are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from prunec.errors import PlanError
from prunec.events import Progress, silent
from prunec.graph.coupling import CouplingGraph
from prunec.graph.interpreter import Stream
from prunec.graph.residual import passages
from prunec.importance.curves import Criterion, RemovalCurve
from prunec.passes.allocation.trials import DenseTrials, split
from prunec.passes.compensation.closed_form import Compensation
from prunec.passes.sites import Site
from prunec.passes.slice import Weights
from prunec.passes.statistics.dense import dense_sites
from prunec.passes.statistics.measure import Statistics
from prunec.passes.statistics.scores import Scores


class DenseSurvey:
    """The dense model, run once for each thing that is asked; nothing is computed before.

    Args:
        sites: in graph order.
        criterion: ranks the sites' units for :attr:`curves` and trials.
        compensation: mends what is pruned for trial.
        batches: calibration inputs.
        prior: statistics that were taken before, such as those of gradients.
        weights: the dense tensors, by default those of the program.
        scores: saved before; the curves are read from them.
    """

    def __init__(
        self,
        coupling: CouplingGraph,
        sites: Sequence[Site],
        criterion: Criterion,
        compensation: Compensation,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        prior: Statistics | None = None,
        weights: Weights | None = None,
        scores: Scores | None = None,
        progress: Progress = silent,
    ):
        self._coupling = coupling
        self._prior = prior or {}
        self._scores = scores
        self._weights = weights or Weights(coupling, coupling.program.state)
        self._sites = sites
        self._criterion = criterion
        self._compensation = compensation
        self._batches = batches
        self._progress = progress

    @cached_property
    def curves(self) -> dict[str, RemovalCurve]:
        """The full removal curve of each site on the dense model's inputs, by site name."""
        if self._scores is not None:
            return {site.name: self._scores.curve(site) for site in self._sites}
        measured = dense_sites(
            self._coupling,
            self._sites,
            self._criterion.statistics,
            self._batches,
            prior=self._prior,
            weights=self._weights,
            progress=self._progress,
        )
        return {
            site.name: self._criterion.rank(problem, statistics)
            for site, problem, statistics in measured
        }

    @cached_property
    def similarities(self) -> dict[str, float]:
        """Mean over tokens of the cosine between a block's input and its output, by block.

        Raises:
            PlanError: the model has no residual stream, or there are no batches.
        """
        self._check_data()
        along = passages(self._coupling.program, self._coupling.layout)
        if not along:
            raise PlanError(
                "the model's blocks have no residual stream, so no input and output to compare",
                fix="use an allocation that does not compare them, such as log-increase",
            )
        position = {node: i for i, node in enumerate(self._coupling.program.graph.nodes)}
        ends = {node for passage in along.values() for node in (passage.enters, passage.leaves)}
        stream = self._stream()
        open_inputs: dict[str, list[Tensor]] = {block: [] for block in along}
        sums = dict.fromkeys(along, 0.0)
        tokens = dict.fromkeys(along, 0)
        with self._progress.task("similarity of blocks", len(ends)) as task:
            for value in sorted(ends, key=lambda node: min(position[user] for user in node.users)):
                stop = min(value.users, key=lambda user: position[user])

                def visit(batch: int, x: Tensor, value: fx.Node = value) -> None:
                    real = stream.real_tokens(batch, x)
                    for block, passage in along.items():
                        if passage.leaves is value:
                            cosine = F.cosine_similarity(
                                open_inputs[block][batch].float(), x.float(), dim=-1
                            )
                            cosine = cosine.flatten() if real is None else cosine[real]
                            sums[block] += float(cosine.sum(dtype=torch.float64))
                            tokens[block] += cosine.numel()
                        if passage.enters is value:
                            open_inputs[block].append(x)

                stream.advance(stop, value, visit)
                self._weights.release()
                for block, passage in along.items():
                    if passage.leaves is value:
                        open_inputs[block].clear()
                task.advance()
        return {block: sums[block] / max(tokens[block], 1) for block in along}

    def trials(
        self, *, fit_tokens: int, held_tokens: int, levels: int = 9, seed: int = 0
    ) -> DenseTrials:
        """Pruning for trial, on parts of the batches that are spread over all of them."""
        self._check_data()
        if self._weights.stored:
            raise PlanError(
                "an allocation that prunes for trial needs the weights in memory",
                fix="load the model (--in-memory), or use another allocation, such as log-increase",
            )
        fit, held = split(self._batches, fit_tokens=fit_tokens, held_tokens=held_tokens)
        return DenseTrials(
            self._coupling,
            self._sites,
            self._criterion,
            self._compensation,
            fit,
            held,
            prior=self._prior,
            count=levels,
            seed=seed,
            progress=self._progress,
        )

    def _stream(self) -> Stream:
        weights = self._weights
        return Stream(
            self._coupling.program,
            self._coupling.layout,
            self._batches,
            weights.__getitem__,
            device=weights.device,
        )

    def _check_data(self) -> None:
        if not self._batches:
            raise PlanError(
                "the allocation runs the model on calibration data, and there is none",
                so="saved scores hold what sites need, not what allocations do",
                fix="give the calibration that the scores were taken on too",
            )

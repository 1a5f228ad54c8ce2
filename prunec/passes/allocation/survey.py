"""The dense model on the calibration batches: what allocations that look at it are told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, fx

from prunec.errors import PlanError
from prunec.graph.residual import passages
from prunec.importance.blocks import joined
from prunec.importance.curves import RemovalCurve
from prunec.importance.influence import token_cosines
from prunec.passes.allocation.trials import DenseTrials, split
from prunec.passes.distributed import processes
from prunec.passes.setup import Setup
from prunec.passes.statistics.dense import dense_sites


class DenseSurvey:
    """The dense model, run once for each thing that is asked; nothing is computed before."""

    def __init__(self, setup: Setup):
        self._setup = setup

    @cached_property
    def curves(self) -> dict[str, RemovalCurve]:
        """The full removal curve of each site on the dense model's inputs, by site name."""
        setup = self._setup
        if setup.scores is not None:
            return {site.name: setup.scores.curve(site) for site in setup.sites}
        measured = dense_sites(setup, setup.criterion.statistics)
        return {
            site.name: setup.criterion.rank(problem, joined(problem, statistics))
            for site, problem, statistics in measured
        }

    @cached_property
    def similarities(self) -> dict[str, float]:
        """Mean over tokens of the cosine between a block's input and its output, by block.

        Blocks that add nothing to a residual stream have none.

        Raises:
            PlanError: there are no batches.
        """
        self._check_data()
        along = passages(self._setup.coupling.program, self._setup.coupling.layout)
        if not along:
            return {}
        position = {node: i for i, node in enumerate(self._setup.coupling.program.graph.nodes)}
        ends = {node for passage in along.values() for node in (passage.enters, passage.leaves)}
        stream = self._setup.weights.stream(processes().share(self._setup.batches))
        open_inputs: dict[str, list[Tensor]] = {block: [] for block in along}
        sums = dict.fromkeys(along, 0.0)
        tokens = dict.fromkeys(along, 0)
        with self._setup.progress.task("similarity of blocks", len(ends)) as task:
            for value in sorted(ends, key=lambda node: min(position[user] for user in node.users)):
                stop = min(value.users, key=lambda user: position[user])

                def visit(batch: int, x: Tensor, value: fx.Node = value) -> None:
                    real = stream.real_tokens(batch, value, x)
                    for block, passage in along.items():
                        if passage.leaves is value:
                            cosine = token_cosines(open_inputs[block][batch], x)
                            cosine = cosine.flatten() if real is None else cosine[real]
                            sums[block] += float(cosine.sum(dtype=torch.float64))
                            tokens[block] += cosine.numel()
                        if passage.enters is value:
                            open_inputs[block].append(x)

                stream.advance(stop, value, visit)
                self._setup.weights.release()
                for block, passage in along.items():
                    if passage.leaves is value:
                        open_inputs[block].clear()
                task.advance()
        counted = torch.tensor([[sums[b], tokens[b]] for b in along], dtype=torch.float64)
        total, count = processes().total(counted).T
        return dict(zip(along, (total / count.clamp_min(1)).tolist(), strict=True))

    def trials(
        self,
        *,
        fit_tokens: int,
        held_tokens: int,
        levels: int = 9,
        branches: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> DenseTrials:
        """Pruning for trial, on parts of the batches that are spread over all of them."""
        self._check_data()
        if self._setup.weights.stored:
            raise PlanError(
                "an allocation that prunes for trial needs the weights in memory",
                fix="load the model (--in-memory), or use another allocation, such as log-increase",
            )
        batches = self._setup.batches
        fit, held = split(batches, fit_tokens=fit_tokens, held_tokens=held_tokens)
        return DenseTrials(
            self._setup.afresh(fit),
            held,
            count=levels,
            branches=branches,
            seed=seed,
            whole=len(batches),
        )

    def _check_data(self) -> None:
        if not self._setup.batches:
            raise PlanError(
                "the allocation runs the model on calibration data, and there is none",
                so="saved scores hold what sites need, not what allocations do",
                fix="give the calibration that the scores were taken on too",
            )

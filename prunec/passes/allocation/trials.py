"""Trials: how far a pruned model's predictions are from the dense model's, on data held out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from prunec.errors import PlanError
from prunec.events import silent
from prunec.graph.selection import Selection
from prunec.importance.blocks import joined
from prunec.importance.gradients import GRADIENT_STATISTICS
from prunec.importance.predictions import Predictions
from prunec.passes.allocation.levels import LEFT_OUT, Cut, Levels, stitch
from prunec.passes.compensation.closed_form import ObsCompensation
from prunec.passes.problems import Mender, site_problem
from prunec.passes.prune import keeps_of, output_energy, prune_sites, silenced
from prunec.passes.setup import Setup
from prunec.passes.slice import Weights
from prunec.passes.statistics.measure import Measurement
from prunec.passes.targets.budget import Budget

Batches = Sequence[Mapping[str, Tensor]]

# Tokens that are compared, per batch.
_TOKENS = 256
# Where many batches do not fit, a stream computes some values twice.
_MANY_BATCHES = 1.5


class DenseTrials:
    """Prunes on one part of the calibration batches and compares on another.

    Args:
        fit: what to prune, with the batches that statistics are taken on.
        held: batches on which outputs are compared.
        count: levels per site.
        branches: by site, the parameters of a branch that one more level leaves out.
        seed: draws the tokens that are compared.
        whole: number of batches that the pruning after the search reads.
    """

    def __init__(
        self,
        fit: Setup,
        held: Batches,
        *,
        count: int = 9,
        branches: Mapping[str, int] | None = None,
        seed: int = 0,
        whole: int = 0,
    ):
        self.progress = fit.progress
        self._fit = replace(fit, progress=silent)
        self._held = held
        self._count = count
        self._branches = branches or {}
        self._seed = seed
        self._whole = whole
        self.final_seconds = 0.0

    @property
    def parts(self) -> int:
        """Number of held-out batches."""
        return len(self._held)

    def repruned(self, budget: Budget) -> float:
        """Divergence after pruning site by site, each on what the pruned part before it gives."""
        start = time.monotonic()
        pruned = prune_sites(self._fit.afresh(self._fit.batches), budget)
        seconds = time.monotonic() - start
        more = self._whole / len(self._fit.batches)
        more = more if more <= 1 else _MANY_BATCHES * more
        self.final_seconds = seconds + (more - 1) * pruned.streaming
        return self.divergence(pruned.weights)

    def stitched(self, chosen: Mapping[str, int], parts: Sequence[int] | None = None) -> float:
        """Divergence with each site at a level of the database, all fitted to the dense model.

        Args:
            chosen: level by site name; sites that are not named stay dense.
            parts: the held-out batches to compare on; None for all.
        """
        cuts = [self._cuts[name][level] for name, level in chosen.items() if level]
        return self.divergence(stitch(self._fit.coupling, cuts), parts)

    @property
    def levels(self) -> Mapping[str, Levels]:
        """The level database, by site name."""
        return self._database[0]

    @property
    def _cuts(self) -> Mapping[str, Sequence[Cut]]:
        return self._database[1]

    @cached_property
    def _database(self) -> tuple[dict[str, Levels], dict[str, list[Cut]]]:
        setup = self._fit
        weights = setup.weights.dense()
        # On the dense model's own inputs its output is the site's own: every regression is this.
        fitted = setup.compensation.regression is not None
        compensation = ObsCompensation() if fitted else setup.compensation
        names = setup.criterion.statistics | compensation.statistics
        measurement = Measurement(
            weights.stream(setup.batches), setup.sites, names - set(GRADIENT_STATISTICS)
        )
        levels: dict[str, Levels] = {}
        cuts: dict[str, list[Cut]] = {}
        with self.progress.task("level database", len(setup.sites)) as task:
            for site in setup.sites:
                problem = site_problem(site, setup.coupling, weights)
                statistics = {**setup.prior, **measurement.take(site)}
                curve = setup.criterion.rank(problem, joined(problem, statistics))
                held = problem.size({group.name: group.size for group in site.groups})
                levels[site.name] = found = Levels.of(curve, held, self._count)
                cuts[site.name] = []
                energy = output_energy(problem, statistics)
                if site.name in self._branches and energy is not None:
                    found = found.and_left_out(self._branches[site.name], energy)
                    levels[site.name] = found
                for step in found.steps:
                    if step == LEFT_OUT:
                        cuts[site.name].append(Cut({}, silenced(site, weights)))
                        continue
                    keeps = keeps_of(setup.coupling, curve.keep(problem, int(step)))
                    if not step:
                        cuts[site.name].append(Cut({}, {}))
                        continue
                    mender = Mender(setup.coupling, compensation, Selection(keeps), weights)
                    cuts[site.name].append(Cut(keeps, mender.mend(site, statistics)))
                weights.release()
                task.advance()
        return levels, cuts

    def divergence(self, weights: Weights, parts: Sequence[int] | None = None) -> float:
        """Mean over tokens of ``KL(dense || pruned)`` in nats, of the softmax of the last axis.

        Infinite where the pruned model's output is not finite.
        """
        batches = self._held if parts is None else [self._held[part] for part in parts]
        try:
            return self._dense.divergence(weights.stream(batches).finish(), parts)
        except PlanError:
            return math.inf

    @cached_property
    def _dense(self) -> Predictions:
        outputs = self._fit.weights.dense().stream(self._held).finish()
        program = self._fit.coupling.program
        return Predictions(program, self._held, outputs, most=_TOKENS, seed=self._seed)


def split(batches: Batches, *, fit_tokens: int, held_tokens: int) -> tuple[Batches, Batches]:
    """Batches to fit on and batches to compare on, both spread evenly over all of them.

    At least every fourth batch can be held out, so that each source of a mixed calibration is in
    both parts. A single batch is both.
    """
    size = max(value.shape[:2].numel() for value in batches[0].values() if value.dim())
    if len(batches) == 1:
        return batches, batches
    holdable = list(range(len(batches) // 8, len(batches), 4)) or [0]
    held = _spread(holdable, max(1, held_tokens // size))
    fit = _spread([i for i in range(len(batches)) if i not in holdable], max(1, fit_tokens // size))
    return [batches[i] for i in fit], [batches[i] for i in held]


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of some items, evenly spaced."""
    if count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]

"""What comes out of a run: the report, and the smaller model with its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import prunec
from prunec.codegen.hf import save
from prunec.codegen.hub import push
from prunec.codegen.plain import save_plain
from prunec.codegen.shrink import Shrunk, is_transformers
from prunec.events import Progress, silent
from prunec.graph.program import Program
from prunec.passes.plan import Plan
from prunec.passes.prune import SiteReport
from prunec.passes.recipe import Recipe
from prunec.passes.shallow import Dropped
from prunec.passes.sites import Skipped
from prunec.staging import temporary


@dataclass(frozen=True)
class Report:
    """What was asked, what was done and what it comes to.

    Attributes:
        recipe: the settings that ran, None for an explicit plan.
        ratio: asked for, of the repeated blocks' parameters (None for an explicit plan).
        block_parameters, parameters, flops: (before, after); FLOPs of one pass at the traced shape.
        sites: one entry a site, in the order they were pruned.
        skipped: groups of the wanted kinds that have no site, and why.
        dropped: branches or blocks that were left out, in the order in which they went.
        checks: how the result was proven.
        calibration: digest and size of the calibration tokens.
        seconds: of each step.
        run: what tells this run from all others, where its progress was kept.
        aim: the target in its own unit: what was asked, what was reached, and what whole units and
            multiples took beyond it (below it, where negative).
    """

    recipe: Recipe | None
    ratio: float | None
    seed: int
    block_parameters: tuple[int, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    sites: tuple[SiteReport, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    checks: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    aim: Mapping[str, Any] = field(default_factory=dict)
    run: str | None = None

    @property
    def realised_ratio(self) -> float:
        """The part of the repeated blocks' parameters that went."""
        before, after = self.block_parameters
        return 1 - after / before if before else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, as prunec.json holds it."""
        return {
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "ratio": self.ratio,
            "realised_ratio": self.realised_ratio,
            "seed": self.seed,
            "block_parameters": list(self.block_parameters),
            "parameters": list(self.parameters),
            "flops": list(self.flops),
            "sites": [{**vars(site), "kept": dict(site.kept)} for site in self.sites],
            "skipped": [vars(item) for item in self.skipped],
            "dropped": [vars(item) for item in self.dropped],
            "checks": list(self.checks),
            "calibration": dict(self.calibration),
            "seconds": dict(self.seconds),
            "aim": dict(self.aim),
            "run": self.run,
        }


@dataclass(frozen=True, eq=False)
class Result:
    """A smaller model, the plan it follows and the report of the run.

    Attributes:
        model: a module of the source's class with smaller weights; where its own forward cannot
            take them, of a module that is no transformers model, the sliced graph; the report's
            `checks` then say so, and whether it takes any batch size.
        plan: which units were kept.
        report: what was asked and done.
        program: the sliced graph.
    """

    model: nn.Module
    plan: Plan
    report: Report
    program: Program
    shrunk: Shrunk | None = None

    def save(
        self,
        directory: str | Path,
        *,
        tokenizer: Any = None,
        base_model: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        max_shard_size: str = "1GB",
        progress: Progress = silent,
    ) -> None:
        """Write a directory that ``from_pretrained`` opens without prunec.

        A module that is no transformers model gets a directory that ``torch.export.load`` opens
        without prunec and `prunec.load(directory, into=module)` with it (`prunec.codegen.plain`);
        a tokenizer and a shard size are for the others.
        It is written beside its place, reopened in a fresh process and compared, then renamed.

        Raises:
            ExportError: the directory exists or cannot be written.
            VerifyError: the reopened model differs; nothing is left behind.
        """
        metadata = {
            "prunec": prunec.__version__,
            "base_model": base_model,
            "plan": self.plan.to_json(),
            "report": {k: v for k, v in self.report.to_json().items() if k != "seconds"},
            "recipe": None if self.report.recipe is None else self.report.recipe.to_dict(),
            "metrics": dict(metrics or {}),
        }
        if self.shrunk is None or not is_transformers(self.model):
            save_plain(
                self.model,
                Path(directory),
                example=self.program.example,
                shrunk=self.shrunk,
                metadata=metadata,
                overwrite=overwrite,
                progress=progress,
            )
            return
        save(
            self.shrunk,
            Path(directory),
            tokenizer=tokenizer,
            metadata=metadata,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            progress=progress,
        )

    def push_to_hub(
        self, repo: str, *, private: bool = False, token: str | None = None, **options: Any
    ) -> str:
        """Write the directory as `save` does, upload it to the Hugging Face Hub; its address.

        Args:
            repo: such as "someone/smaller"; created if absent.
            token: None for that of `hf auth login`.
            options: as `save` takes them.

        Raises:
            ExportError: the Hub does not take it.
        """
        with temporary() as folder:
            directory = folder / "model"
            self.save(directory, **options)
            return push(directory, repo, private=private, token=token)

"""What `prunec prune` does once its options are read: a recipe's run, or a plan carried out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prunec.errors import ModelError

if TYPE_CHECKING:
    from prunec import Plan, Result
    from prunec.api import Batches, Outline
    from prunec.cli.console import Screen
    from prunec.graph.trace import Loss
    from prunec.models import Source
    from prunec.passes.recipe import Recipe
    from prunec.passes.targets.target import Target


_CHECKPOINTS = "checkpoint-*"  # as transformers' Trainer names them


@dataclass(frozen=True)
class RecipeRun:
    """A recipe and all that it is run with; the attributes are named as the options."""

    recipe: Recipe
    target: Target
    loss: Loss | None
    calibration: tuple[str, ...]
    samples: int
    seq_len: int | None
    seed: int
    scores: Path | None
    resume: bool
    activations: str

    def outline(self, screen: Screen, source: Source) -> Outline:
        """What the run would do; a target that cannot be reached fails here."""
        from prunec.api import outline

        with screen.task("outline"):
            return outline(
                source.model, recipe=self.recipe, target=self.target, example=source.example
            )

    def batches(self, screen: Screen, source: Source) -> Batches | None:
        """The calibration; None where saved scores stand for it."""
        from prunec.cli.opening import open_batches

        if not self.calibration and self.scores and self.scores.exists():
            return None
        if not (self.calibration or self.recipe.needs_data or self.target.kind == "latency"):
            return [source.example]
        # Sampling text takes minutes. A latency is of the shape that comes out of it.
        if self._samples_text(source) and self.target.kind != "latency":
            self.outline(screen, source)
        return open_batches(
            source, list(self.calibration), self.samples, self.seq_len, self.seed, screen
        )

    def result(
        self, screen: Screen, source: Source, batches: Batches | None, saved: Path
    ) -> Result | None:
        """Prune, with progress kept in `saved`; None in the further processes of a launcher."""
        import prunec
        from prunec.passes.distributed import launched

        with launched() as together:
            if not together.first:
                screen.hush()
            result = prunec.prune(
                source.model,
                recipe=self.recipe,
                target=self.target,
                calibration=batches,
                seed=self.seed,
                loss=self.loss,
                weights=source.weights,
                device=None if source.weights is None else source.device,
                checkpoint=saved,
                resume=self.resume,
                scores=self.scores,
                activations=self.activations,
                progress=screen,
            )
        return result if together.first else None

    def _samples_text(self, source: Source) -> bool:
        """Whether the model itself writes calibration text."""
        from prunec.calibration.sources import parse_source

        named = self.calibration or (("self",) if source.tokenizer is not None else ())
        return any(parse_source(name).kind == "self" for name in named)


def carried_out(plan: Plan, screen: Screen, source: Source) -> Result:
    """The model cut as a plan says."""
    import prunec

    return prunec.apply_plan(
        source.model, plan, example=source.example, weights=source.weights, progress=screen
    )


@contextmanager
def progress_kept(folder: Path, *, resume: bool) -> Iterator[None]:
    """Where a run's progress is while it lasts: no other run has the folder, which then goes.

    After an error or Ctrl-C it stays if the run is to be resumed. Further processes of a launcher
    have no part in it.
    """
    from prunec.passes.checkpoint import remove_progress, reserved
    from prunec.passes.distributed import writes

    if not writes():
        yield
        return
    with reserved(folder):
        done = False
        try:
            yield
            done = True
        finally:
            if done or not resume:
                remove_progress(folder)


@contextmanager
def checkpoints_kept(screen: Screen, folder: Path) -> Iterator[None]:
    """Where a training's checkpoints are while it lasts: no other has the folder, which then goes.

    After an error or Ctrl-C it stays if there are any to go on from.
    """
    from prunec.passes.checkpoint import remove_progress, reserved
    from prunec.passes.distributed import writes

    if not writes():
        yield
        return
    with reserved(folder, worth=(_CHECKPOINTS,)):
        try:
            yield
        except BaseException:
            if any(folder.glob(_CHECKPOINTS)):
                screen.message(
                    "prunec recover with the same options and --resume goes on from here."
                )
            raise
        remove_progress(folder)


def is_done(screen: Screen, out: Path, folder: Path, part: str, *, resume: bool) -> bool:
    """Whether the run to go on with has written `out` already: it may write the same again.

    Such progress a run leaves behind that is killed between naming its result and tidying up.
    Where it is not to be gone on with it goes.

    Args:
        part: of prunec.json, which says in ``run`` what run it is of.

    Raises:
        CheckpointError: that run has not ended.
    """
    from prunec.codegen.rewrite import read_record
    from prunec.passes.checkpoint import remove_progress, reserved, run_of
    from prunec.passes.distributed import writes

    if not (out.is_dir() and folder.is_dir()):
        return False
    try:
        said = read_record(out).get(part)
    except ModelError:  # no result of ours
        return False
    run, left = said.get("run") if isinstance(said, dict) else None, run_of(folder)
    if run is None or left not in (run, None):
        return False
    if resume and left == run:
        screen.message(f"The run that wrote {out} was killed while it tidied up.")
        screen.message("From its progress the same is written again.")
        return True
    if writes():
        with reserved(folder):
            remove_progress(folder)
        screen.message(f"Removed what a killed run had left: {folder}")
    return False


def check_weights(source: Source) -> None:
    """Raises ModelError for a model that has none."""
    meta = any(parameter.is_meta for parameter in source.model.parameters())
    if meta and source.weights is None:
        raise ModelError(
            f"{source.spec} has no weights", fix="add --random-weights to go on without"
        )


def check_class(source: Source) -> None:
    """Raises ExportError for a model of transformers that no directory could be opened as."""
    from prunec.codegen.hf import auto_class
    from prunec.codegen.shrink import is_transformers

    if is_transformers(source.model):
        auto_class(source.model)

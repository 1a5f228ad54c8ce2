from __future__ import annotations

import json as jsons
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunec.cli import options
from prunec.cli.report import show_outline, show_report
from prunec.errors import ExportError, ModelError, PlanError

if TYPE_CHECKING:
    from prunec import Plan, Result
    from prunec.api import Batches, Outline
    from prunec.cli.console import Screen
    from prunec.cli.opening import Weights
    from prunec.models import Source
    from prunec.passes.recipe import Recipe


def prune(
    model: options.Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="The directory to write.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="A name of `prunec recipes list`, or a YAML file.")
    ] = "slimgpt",
    ratio: Annotated[
        float, typer.Option(help="The part of the blocks' parameters to remove, 0 to 1.")
    ] = 0.2,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC[=WEIGHT]",
            help="A text file, or self: text that the model samples. Repeat to mix.  "
            "[default: self]",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens a sequence.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the recipe."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Cut as this plan.json says, without a recipe, data or correction.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what each site would give; prune nothing.")
    ] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    random_weights: options.RandomWeights = False,
    device: options.Device = "cpu",
    dtype: options.DType = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a smaller model.

    OUT opens with transformers' from_pretrained(OUT, trust_remote_code=True), without prunec.

    Example: prunec prune smollm2 -o smaller --ratio 0.2 --calibration notes.txt --samples 64
    """
    from prunec.cli.console import Screen
    from prunec.cli.opening import open_source, save_result

    screen = Screen(quiet=quiet, json=json)
    _check(out, ratio, dry_run=dry_run, overwrite=overwrite)
    cut = _read_plan(plan) if plan else None
    method = None if cut else _recipe(recipe, setting or [])
    weights: Weights = "random" if random_weights else "load"
    source = open_source(
        model,
        screen,
        weights="meta" if dry_run and method else weights,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if method:
        outlined = _outline(screen, source, method, ratio)
        if dry_run:
            show_outline(screen, outlined)
            screen.write_json({"model": model, "out": None, "ratio": ratio, **asdict(outlined)})
            return
    _check_weights(source)
    if method:
        batches = _batches(source, calibration or [], samples, seq_len, seed, screen)
        result = _prune(screen, source, method, ratio, batches, seed)
    else:
        assert cut
        result = _apply(screen, source, cut)
    if not dry_run and out:
        save_result(result, out, source, screen, overwrite=overwrite)
    show_report(screen, result.report)
    screen.timings()
    written = None if dry_run else str(out)
    screen.write_json(
        {"model": model, "out": written, **result.report.to_json(), "plan": result.plan.to_json()}
    )


def _outline(screen: Screen, source: Source, recipe: Recipe, ratio: float) -> Outline:
    """What the run would do; a ratio that cannot be reached fails here, before the calibration."""
    from prunec.api import outline

    with screen.task("outline"):
        return outline(source.model, recipe=recipe, ratio=ratio, example=source.example)


def _prune(
    screen: Screen, source: Source, recipe: Recipe, ratio: float, batches: Batches, seed: int
) -> Result:
    import prunec

    return prunec.prune(
        source.model, recipe=recipe, ratio=ratio, calibration=batches, seed=seed, progress=screen
    )


def _apply(screen: Screen, source: Source, plan: Plan) -> Result:
    import prunec

    return prunec.apply_plan(source.model, plan, example=source.example, progress=screen)


def _check_weights(source: Source) -> None:
    if any(parameter.is_meta for parameter in source.model.parameters()):
        raise ModelError(
            f"{source.spec} has no weights", fix="add --random-weights to go on without"
        )


def _check(out: Path | None, ratio: float, *, dry_run: bool, overwrite: bool) -> None:
    """Refuse before the work what would be refused after it."""
    from prunec.codegen.directory import check_target

    if not 0 < ratio < 1:
        raise PlanError(
            f"a ratio of {ratio:g} is not possible", fix="use a ratio between 0 and 1, such as 0.2"
        )
    if dry_run:
        return
    if out is None:
        raise ExportError("no output directory", fix="add -o OUT, or --dry-run")
    check_target(out, overwrite=overwrite)


def _recipe(name: str, settings: Sequence[str]) -> Recipe:
    """The recipe with its settings, proven to build before anything is loaded."""
    from prunec.passes.recipe import PARTS, load_recipe

    recipe = load_recipe(name).override(dict(map(_setting, settings)))
    for part in PARTS:
        getattr(recipe, part).build(part)
    return recipe


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise PlanError(f"not a setting: {text}", fix="--set key=value, such as allocation=uniform")
    return key, yaml.safe_load(value)


def _read_plan(path: Path) -> Plan:
    """A plan by itself, or the one inside a --json report."""
    from prunec import Plan

    try:
        data = jsons.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    return Plan.from_json(data.get("plan", data) if isinstance(data, dict) else data)


def _batches(
    source: Source, wanted: list[str], samples: int, seq_len: int, seed: int, screen: Screen
) -> Batches:
    from prunec.calibration import calibrate_text

    if source.tokenizer is None and not wanted:
        screen.message("No tokenizer: calibrating on the example inputs.")
        return [source.example]
    return calibrate_text(
        wanted or ["self"],
        source.tokenizer,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        model=source.model,
        progress=screen,
    )

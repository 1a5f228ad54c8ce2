from __future__ import annotations

import json as jsons
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunec.cli import options
from prunec.cli.recover import chosen, run, show
from prunec.cli.report import show_outline, show_report
from prunec.errors import CheckpointError, ExportError, ModelError, PlanError

if TYPE_CHECKING:
    from prunec import Plan, Result
    from prunec.api import Outline
    from prunec.cli.console import Screen
    from prunec.cli.opening import Weights
    from prunec.models import Source
    from prunec.passes.recipe import Recipe
    from prunec.passes.targets.constraints import Constraints
    from prunec.passes.targets.target import Target


def prune(
    model: options.Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="The directory to write.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="A name of `prunec recipes list`, or a YAML file.")
    ] = "slimgpt",
    ratio: Annotated[
        float | None,
        typer.Option(
            help="The part of the blocks' parameters to remove, 0 to 1.  [default: 0.2]",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="KIND=AMOUNT",
            help="What to leave instead: params=100M, flops=70%, kv-cache=50% (bytes a token), "
            "memory=250MB (weights), latency=0.8x (of a forward pass, measured here).",
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Widths for gpu (FFN multiples of 64), vllm (128), gguf-k (256), tp=N (heads, "
            "KV groups and FFN divisible by N); several with commas.",
        ),
    ] = None,
    multiple_of: Annotated[
        int, typer.Option(min=1, metavar="N", help="FFN widths are multiples of N.")
    ] = 1,
    min_ratio: Annotated[
        float, typer.Option(help="Every attention and FFN gives at least this part.")
    ] = 0.0,
    max_ratio: Annotated[
        float, typer.Option(help="No attention and no FFN gives more than this part.")
    ] = 1.0,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, metavar="N", help="The same as --hardware tp=N.")
    ] = 1,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER", help="Leave whole: a block's index (-1: the last) or a module path."
        ),
    ] = None,
    calibration: options.Calibration = None,
    samples: options.Samples = 128,
    seq_len: options.SeqLen = None,
    seed: options.Seed = 0,
    loss: options.Loss = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the recipe."),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(help="How far a recipe that searches goes: fast, normal or max."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Bound its search; the best found so far is used.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Cut as this plan.json says, without a recipe, data or correction.",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save what is measured of the dense model there, or use what is saved: another "
            "target then reads no data. One-shot: see docs/criteria.md.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of one file of weights in OUT, such as 500MB.")
    ] = "1GB",
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload OUT to the Hugging Face Hub, as someone/name."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what each site would give; prune nothing.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where a run to OUT was killed; keep progress on Ctrl-C."
        ),
    ] = False,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Then train what is left: lora, distill, scale, full, or as a paper did.",
        ),
    ] = None,
    recover_data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What to train on.  [default: the first --calibration]"),
    ] = None,
    recover_set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the training, such as minutes=10."),
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    random_weights: options.RandomWeights = False,
    out_of_core: options.OutOfCore = None,
    activations: options.Activations = "auto",
    dequantise: options.Dequantise = False,
    device: options.Device = "cpu",
    dtype: options.DType = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a smaller model.

    OUT opens with transformers' from_pretrained(OUT, trust_remote_code=True), without prunec.

    Example: prunec prune smollm2 -o smaller --ratio 0.2 --calibration notes.txt --samples 64

    Example: prunec prune smollm2 -o smaller --target params=110M --hardware gpu --protect 0
    """
    import prunec
    from prunec.calibration.sources import parse_source
    from prunec.cli.console import Screen
    from prunec.cli.opening import open_batches, open_loss, open_source, save_result
    from prunec.codegen.directory import check_shard_size
    from prunec.passes.checkpoint import progress_folder, remove_journal
    from prunec.passes.distributed import launched
    from prunec.passes.targets.constraints import Constraints
    from prunec.passes.targets.constraints import hardware as preset
    from prunec.passes.targets.target import chosen_target

    screen = Screen(quiet=quiet, json=json)
    save = partial(save_result, overwrite=overwrite, max_shard_size=max_shard_size)
    training = chosen(recover, [f"seed={seed}", *(recover_set or [])]) if recover else None
    aim = chosen_target(ratio, target)
    check_shard_size(max_shard_size)
    _check(out, dry_run=dry_run, overwrite=overwrite)
    given = {"--scores": scores, "--resume": resume, "--activations": activations != "auto"}
    if plan and (idle := [name for name, value in given.items() if value]):
        raise PlanError(f"--plan reads no data and has no use for {', '.join(idle)}")
    cut = _read_plan(plan) if plan else None
    limits = Constraints(
        {"ffn_channel": multiple_of}, min_ratio, max_ratio, tensor_parallel, tuple(protect or ())
    )
    if hardware:
        limits = limits.combined(preset(hardware))
    search = {"effort": effort, "minutes": minutes}
    changes = [*(setting or []), *(f"allocation.{k}={v}" for k, v in search.items() if v)]
    method = None if cut else _recipe(recipe, changes, limits)
    differentiated = open_loss(loss, method.importance if method else None)
    weights: Weights = "random" if random_weights else "load"
    source = open_source(
        model,
        screen,
        weights="meta" if dry_run and method else weights,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        out_of_core=out_of_core,
        dequantise=dequantise,
    )
    # A latency is of the calibration's shape, which is not known yet.
    if method and (dry_run or aim.kind != "latency"):
        outlined = _outline(screen, source, method, aim)
        if dry_run:
            show_outline(screen, outlined)
            asked = aim.value if aim.kind == "ratio" else None
            screen.write_json({"model": model, "out": None, "ratio": asked, **asdict(outlined)})
            return
    _check_weights(source)
    if method:
        batches = None
        if calibration or not (scores and scores.exists()):
            batches = open_batches(source, calibration or [], samples, seq_len, seed, screen)
        assert out
        saved = progress_folder(out)
        with _tidied(saved, keep=resume):
            with launched() as together:
                screen.quiet = quiet or not together.first
                result = prunec.prune(
                    source.model,
                    recipe=method,
                    target=aim,
                    calibration=batches,
                    seed=seed,
                    loss=differentiated,
                    weights=source.weights,
                    device=None if source.weights is None else source.device,
                    checkpoint=saved,
                    resume=resume,
                    scores=scores,
                    activations=activations,
                    progress=screen,
                )
            if not together.first:  # the first process writes
                return
            save(result, out, source, screen)
        remove_journal(saved)
    else:
        assert cut
        result = _apply(screen, source, cut)
        if not dry_run and out:
            save(result, out, source, screen)
    show_report(screen, result.report)
    written = None if dry_run else str(out)
    record = {"model": model, "out": written, **result.report.to_json()}
    if training and out and not dry_run:
        data = recover_data or parse_source((calibration or ["self"])[0]).name
        place = (device, device, dtype)
        mended = run(screen, out, out, training, data, place=place, overwrite=True)
        if mended is not None:
            show(screen, mended)
            record["recovery"] = mended.to_json()
    if push_to_hub and out and not dry_run:
        _push(out, push_to_hub, screen)
    screen.timings()
    screen.write_json({**record, "plan": result.plan.to_json()})


def _push(out: Path, repo: str, screen: Screen) -> None:
    from prunec.codegen.hub import push

    with screen.task(f"upload to {repo}"):
        address = push(out, repo)
    screen.message(f"Uploaded to {address}")


@contextmanager
def _tidied(folder: Path, *, keep: bool) -> Iterator[None]:
    """An error or Ctrl-C leaves no progress behind, unless it is to be kept or is another run's."""
    from prunec.passes.checkpoint import remove_journal

    try:
        yield
    except CheckpointError:
        raise
    except BaseException:
        if not keep:
            remove_journal(folder)
        raise


def _outline(screen: Screen, source: Source, recipe: Recipe, target: Target) -> Outline:
    """What the run would do; a target that cannot be reached fails here, before the calibration."""
    from prunec.api import outline

    with screen.task("outline"):
        return outline(source.model, recipe=recipe, target=target, example=source.example)


def _apply(screen: Screen, source: Source, plan: Plan) -> Result:
    import prunec

    return prunec.apply_plan(
        source.model, plan, example=source.example, weights=source.weights, progress=screen
    )


def _check_weights(source: Source) -> None:
    meta = any(parameter.is_meta for parameter in source.model.parameters())
    if meta and source.weights is None:
        raise ModelError(
            f"{source.spec} has no weights", fix="add --random-weights to go on without"
        )


def _check(out: Path | None, *, dry_run: bool, overwrite: bool) -> None:
    """Refuse before the work what would be refused after it."""
    from prunec.codegen.directory import check_target

    if dry_run:
        return
    if out is None:
        raise ExportError("no output directory", fix="add -o OUT, or --dry-run")
    check_target(out, overwrite=overwrite)


def _recipe(name: str, settings: Sequence[str], limits: Constraints) -> Recipe:
    """The recipe with its settings, proven to build before anything is loaded."""
    from prunec.cli.opening import parse_settings
    from prunec.passes.recipe import PARTS, load_recipe

    recipe = load_recipe(name).override(parse_settings(settings))
    for part in PARTS:
        getattr(recipe, part).build(part)
    return replace(recipe, constraints=recipe.constraints.combined(limits))


def _read_plan(path: Path) -> Plan:
    """A plan by itself, or the one inside a --json report."""
    from prunec import Plan

    try:
        data = jsons.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    return Plan.from_json(data.get("plan", data) if isinstance(data, dict) else data)

from __future__ import annotations

import json as jsons
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunec.cli import options
from prunec.cli.recover import chosen, run, show
from prunec.cli.report import show_outline, show_report
from prunec.cli.runs import (
    RecipeRun,
    carried_out,
    check_class,
    check_weights,
    is_done,
    progress_kept,
)
from prunec.errors import ExportError, PlanError

if TYPE_CHECKING:
    from prunec import Plan
    from prunec.cli.console import Screen
    from prunec.cli.opening import Weights
    from prunec.passes.recipe import Recipe
    from prunec.passes.targets.constraints import Constraints

# Options, by their names here, that say something of a recipe's run.
_OF_A_RECIPE = (
    *("recipe", "ratio", "target", "hardware", "multiple_of", "min_ratio", "max_ratio"),
    *("tensor_parallel", "protect", "samples", "seq_len", "loss", "setting", "effort", "minutes"),
    *("scores", "resume", "activations"),
)


def prune(
    context: typer.Context,
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
    from prunec.calibration.sources import parse_source
    from prunec.cli.console import Screen
    from prunec.cli.opening import open_loss, open_source, save_result
    from prunec.codegen.directory import check_shard_size
    from prunec.passes.checkpoint import progress_folder
    from prunec.passes.targets.constraints import Constraints
    from prunec.passes.targets.target import chosen_target

    screen = Screen(quiet=quiet, json=json)
    _check_idle(context, plan=plan is not None, recover=recover is not None)
    training = chosen(recover, [f"seed={seed}", *(recover_set or [])]) if recover else None
    check_shard_size(max_shard_size)
    if out and not dry_run:
        overwrite |= is_done(screen, out, progress_folder(out), "report", resume=resume)
    written = _checked(out, dry_run=dry_run, overwrite=overwrite)
    asked: Plan | RecipeRun
    if plan:
        asked = _read_plan(plan)
    else:
        aim = chosen_target(ratio, target)
        widths = {"ffn_channel": multiple_of}
        limits = Constraints(widths, min_ratio, max_ratio, tensor_parallel, tuple(protect or ()))
        search = {"effort": effort, "minutes": minutes}
        changes = [*(setting or []), *(f"allocation.{k}={v}" for k, v in search.items() if v)]
        method = _recipe(recipe, changes, limits, hardware)
        asked = RecipeRun(
            recipe=method,
            target=aim,
            loss=open_loss(loss, method.importance),
            calibration=tuple(calibration or ()),
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            scores=scores,
            resume=resume,
            activations=activations,
        )
    weights: Weights = "random" if random_weights else "load"
    source = open_source(
        model,
        screen,
        weights="meta" if dry_run and not plan else weights,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        out_of_core=out_of_core,
        dequantise=dequantise,
    )
    if dry_run and isinstance(asked, RecipeRun):
        outline = asked.outline(screen, source)
        show_outline(screen, outline)
        part = asked.target.value if asked.target.kind == "ratio" else None
        screen.write_json({"model": model, "out": None, "ratio": part, **asdict(outline)})
        return
    check_weights(source)
    if written:
        check_class(source)
    save = partial(save_result, overwrite=overwrite, max_shard_size=max_shard_size)
    if isinstance(asked, RecipeRun):
        assert written
        saved = progress_folder(written)
        with progress_kept(saved, resume=resume):
            batches = asked.batches(screen, source)
            found = asked.result(screen, source, batches, saved)
            if found is None:  # the first process writes
                return
            save(found, written, source, screen)
    else:
        found = carried_out(asked, screen, source)
        if written:
            save(found, written, source, screen)
    show_report(screen, found.report)
    record = {"model": model, "out": written and str(written), **found.report.to_json()}
    if written and training:
        data = recover_data or parse_source((calibration or ["self"])[0]).name
        place = (device, device, dtype)
        mended = run(
            screen, written, written, training, data,
            place=place, overwrite=True, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if mended is not None:
            show(screen, mended)
            record["recovery"] = mended.to_json()
    if written and push_to_hub:
        _push(written, push_to_hub, screen)
    screen.timings()
    screen.write_json({**record, "plan": found.plan.to_json()})


def _check_idle(context: typer.Context, *, plan: bool, recover: bool) -> None:
    """Refuse options that would be without effect."""
    spelt = {str(option.name): max(option.opts, key=len) for option in context.command.params}
    given = [name for name in spelt if _is_given(context, name)]
    of_a_recipe = _OF_A_RECIPE if recover else (*_OF_A_RECIPE, "calibration")
    if plan and (idle := [spelt[name] for name in given if name in of_a_recipe]):
        raise PlanError(f"--plan says all by itself and has no use for {', '.join(idle)}")
    of_training = ("recover_data", "recover_set")
    if not recover and (idle := [spelt[name] for name in given if name in of_training]):
        raise PlanError(f"without --recover there is no use for {', '.join(idle)}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _push(out: Path, repo: str, screen: Screen) -> None:
    from prunec.codegen.hub import push

    with screen.task(f"upload to {repo}"):
        address = push(out, repo)
    screen.message(f"Uploaded to {address}")


def _checked(out: Path | None, *, dry_run: bool, overwrite: bool) -> Path | None:
    """The directory to write, if any; what would be refused after the work is refused now."""
    from prunec.codegen.directory import check_target

    if dry_run:
        return None
    if out is None:
        raise ExportError("no output directory", fix="add -o OUT, or --dry-run")
    check_target(out, overwrite=overwrite)
    return out


def _recipe(
    name: str, settings: Sequence[str], limits: Constraints, hardware: str | None
) -> Recipe:
    """The recipe with its settings, proven to build before anything is loaded."""
    from prunec.cli.opening import parse_settings
    from prunec.passes.recipe import load_recipe
    from prunec.passes.targets.constraints import hardware as preset

    if hardware:
        limits = limits.combined(preset(hardware))
    recipe = load_recipe(name).override(parse_settings(settings))
    recipe.build()
    return replace(recipe, constraints=recipe.constraints.combined(limits))


def _read_plan(path: Path) -> Plan:
    """A plan by itself, or the one inside a --json report."""
    from prunec import Plan
    from prunec.models.checkpoint import NO_JSON

    try:
        data = jsons.loads(path.read_text(encoding="utf-8"))
    except (OSError, *NO_JSON) as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    return Plan.from_json(data.get("plan", data) if isinstance(data, dict) else data)

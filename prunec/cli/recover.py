from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunec.cli import options
from prunec.cli.runs import checkpoints_kept, is_done
from prunec.errors import ExportError, ModelError, PlanError

if TYPE_CHECKING:
    from prunec.cli.console import Screen
    from prunec.models import Source
    from prunec.recovery.recover import RecoveryReport
    from prunec.recovery.settings import Recovery


def recover(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory that prunec prune wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="The directory to write.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="lora|distill|full|scale", help="What trains.  [default: lora]"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A paper's settings: llm-pruner, slimgpt, slimllm, FILE.yaml"
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Text; rows.jsonl, of instructions or chats; hub:NAME[:SUBSET[:SPLIT]]; or self: "
            "text that the dense model samples.",
        ),
    ] = "self",
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Stop after so many epochs.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so many minutes.  [default: 30 on a CPU]")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model.  [default: the one DIR names]"),
    ] = None,
    teacher_device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Where it is.  [default: --device]")
    ] = None,
    changed: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as rank=16."),
    ] = None,
    trainer: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A TrainingArgument, such as report_to=wandb."),
    ] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Keep the LoRA adapter too, in OUT/adapter.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    device: options.Device = "cpu",
    dtype: options.DType = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Train what pruning left: LoRA, distillation, scales or everything.

    The adapter is merged: OUT is as DIR, with other weights. Held-out text decides which state of
    the training is kept; where none is better than DIR, OUT is DIR and the report says so.

    Example: prunec recover smaller -o mended --method lora --data notes.txt --minutes 30
    """
    from prunec.cli.console import Screen
    from prunec.cli.opening import parse_settings
    from prunec.codegen.directory import check_target

    screen = Screen(quiet=quiet, json=json)
    if out is None:
        raise ExportError("no output directory", fix="add -o OUT")
    in_place = out.resolve() == directory.resolve()  # then what was trained is no longer there
    going_on = resume and not in_place
    overwrite |= is_done(screen, out, _checkpoints(out), "recovery", resume=going_on)
    check_target(out, overwrite=overwrite)
    if recipe and method:
        raise PlanError("--recipe says what trains: leave out --method", where=f"--method {method}")
    settings = chosen(recipe or method or "lora", changed or [])
    limits = {"steps": steps, "epochs": epochs, "minutes": minutes}
    given = {name: value for name, value in limits.items() if value is not None}
    if given:
        settings = replace(settings, steps=None, epochs=None, minutes=None).override(given)
    settings = settings.override({"seed": seed})
    if keep_adapter and settings.train == "full":
        raise PlanError("there is no adapter where every weight trains", where="--keep-adapter")
    report = run(
        screen,
        directory,
        out,
        settings,
        data,
        teacher=teacher,
        place=(device, teacher_device or device, dtype),
        trainer=parse_settings(trainer or []),
        keep_adapter=keep_adapter,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    if report is not None:
        show(screen, report)
        screen.timings()
        screen.write_json({"directory": str(directory), "out": str(out), **report.to_json()})


def chosen(name: str, changed: list[str]) -> Recovery:
    """The settings of a method or a paper, with those that the options change."""
    from prunec.cli.opening import parse_settings
    from prunec.recovery.settings import load_recovery

    return load_recovery(name).override(parse_settings(changed))


def run(
    screen: Screen,
    directory: Path,
    out: Path,
    settings: Recovery,
    data: str,
    *,
    teacher: str | None = None,
    place: tuple[str, str, str] = ("cpu", "cpu", "float32"),
    trainer: Mapping[str, Any] | None = None,
    keep_adapter: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> RecoveryReport | None:
    """Recover `directory` into `out`; None in the further processes of a distributed run."""
    from prunec.cli.opening import open_source
    from prunec.codegen.load_plain import is_plain
    from prunec.codegen.rewrite import read_record, rewrite
    from prunec.models.quiet import quiet
    from prunec.recovery.recover import recover as train

    if is_plain(directory):
        raise ModelError(
            f"{directory} holds a plain PyTorch module",
            so="recovery trains causal language models of transformers",
            fix="train the module that prunec.load(directory, into=module) gives",
        )
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory} is not a model directory", fix="name the OUT of prunec prune"
        )
    device, teacher_device, dtype = place
    opened = partial(open_source, dtype=dtype, trust_remote_code=trust_remote_code)
    source = opened(str(directory), screen, device=device)
    dense: Source | None = None
    if settings.objective == "distill" or data == "self":
        name = teacher or read_record(directory).get("base_model")
        if not name:
            raise PlanError(f"{directory} does not name its dense model", fix="--teacher MODEL")
        dense = opened(str(name), screen, device=teacher_device)
    work = _checkpoints(out)
    with checkpoints_kept(screen, work):
        recovered = train(
            source.model,
            source.tokenizer,
            data,
            settings,
            work=work,
            base=str(directory),
            teacher=dense.model if dense else None,
            resume=resume,
            options=trainer,
            progress=screen,
        )
        if not recovered.is_main:
            return None

        def finish(folder: Path) -> None:
            if keep_adapter and recovered.adapter is not None:
                shutil.copytree(recovered.adapter, folder / "adapter")

        with quiet():
            rewrite(
                recovered.model,
                directory,
                out,
                changes={"recovery": recovered.report.to_json()},
                tokenizer=source.tokenizer,
                finish=finish,
                overwrite=overwrite,
                progress=screen,
            )
    return recovered.report


def _checkpoints(out: Path) -> Path:
    """Where a run that writes `out` keeps them: a hidden directory beside it."""
    return out.absolute().with_name(f".{out.absolute().name}.recovery")


def show(screen: Screen, report: RecoveryReport) -> None:
    """What was trained and what came of it."""
    settings = report.settings
    what = f"{settings.train}, {settings.objective}"
    screen.facts(
        "Recovery",
        [
            ["trained", f"{report.parameters:,} parameters ({what})"],
            ["data", f"{report.data}: {report.tokens:,} tokens, {report.held_out} rows held out"],
            ["steps", f"{report.steps:,}"],
            ["held-out loss", f"{report.before:.4f} before, {report.after:.4f} after"],
        ],
    )
    if not report.improved:
        screen.say("Training did not lower the held-out loss: the weights are unchanged.")

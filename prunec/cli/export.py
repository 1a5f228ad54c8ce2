from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunec.cli import options

if TYPE_CHECKING:
    from prunec.cli.console import Screen
    from prunec.codegen.exporters.exporter import Exported


def export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory that `prunec prune` wrote.")
    ],
    to: Annotated[
        str,
        typer.Option(metavar="FORM", help="pt2, python, onnx, gguf, padded, deci, or a plug-in."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="OUT", help="A file such as small.gguf, or a directory."
        ),
    ],
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the form: type=q8_0."),
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a model in another form and compare it in that form's engine.

    What a form cannot hold is refused, with the reason, before anything is written.

    Example: prunec export smaller --to gguf -o smaller.gguf
    """
    import prunec
    from prunec.cli.console import Screen
    from prunec.cli.opening import parse_settings

    screen = Screen(quiet=quiet, json=json)
    done = prunec.export(
        directory,
        to,
        out,
        settings=parse_settings(setting or []),
        overwrite=overwrite,
        progress=screen,
    )
    _show(screen, done)
    screen.write_json({"directory": str(directory), **done.to_json()})


def _show(screen: Screen, done: Exported) -> None:
    finding = done.finding
    rows = [[name, f"{size / 1e6:,.1f} MB"] for name, size in done.files.items()]
    screen.table(f"Written to {done.out}", ["file", "size"], rows)
    screen.facts("Check", [[finding.state, f"{finding.engine}: {finding.detail}"]])
    for note in done.notes:
        screen.say(f"Note: {note}.")

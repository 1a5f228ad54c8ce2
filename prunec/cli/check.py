from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunec.cli import options


def check(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory that `prunec prune` wrote.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not run it in the engines that are installed.")
    ] = False,
    json: options.Json = None,
    quiet: options.Quiet = False,
) -> None:
    """Test a directory, and list the engines that can open it.

    It is run in those that are installed, in the form that each reads. Exit code 1 if something
    in it is wrong.

    Example: prunec check smaller --json -
    """
    import prunec
    from prunec.cli.console import Screen

    screen = Screen(quiet=quiet, json=json)
    found = prunec.check(directory, measure=not quick, progress=screen)
    rows = [[t.name, f"WRONG: {t.problem}" if t.problem else "ok", t.detail] for t in found.tests]
    screen.table("Directory", ["test", "result", "what was seen"], rows, words=(0, 1, 2))
    table = [[e.name, e.opens, e.state, e.reason] for e in found.engines]
    if table:
        columns = ["engine", "opens it", "", "how, or why not"]
        screen.table("Engines", columns, table, words=(0, 1, 2, 3))
    screen.write_json({"directory": str(directory), **found.to_json()})
    if not found.whole:
        raise typer.Exit(1)

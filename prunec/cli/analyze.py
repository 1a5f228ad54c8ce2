from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunec.cli import options

if TYPE_CHECKING:
    import prunec
    from prunec.cli.console import Screen
    from prunec.graph.render.figures import Alike, GroupFigures


def analyze(
    model: options.Model,
    why: Annotated[bool, typer.Option("--why", help="List every pinned dim and why.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw the coupling.")
    ] = None,
    level: Annotated[
        Literal["blocks", "groups", "ops"],
        typer.Option(help="What --svg draws: the whole model, one block, or one group."),
    ] = "groups",
    json: options.Json = None,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """List what can be pruned, and what is pinned.

    A group is a set of weights that must be cut together; a unit is what one cut removes.

    Example: prunec analyze smollm2 --why --svg coupling.svg
    """
    from prunec.cli.console import Screen
    from prunec.cli.opening import open_coupled
    from prunec.graph.render import draw, write_picture
    from prunec.graph.render.figures import Figures

    screen = Screen(quiet=quiet, json=json)
    _, coupling = open_coupled(model, screen, trust_remote_code=trust_remote_code)
    if svg:
        with screen.task("draw"):
            write_picture(draw(coupling, level), svg)
    figures = Figures(coupling).all()
    _show_groups(screen, figures)
    _show_pinned(screen, coupling, why=why)
    screen.write_json(
        {
            "model": model,
            "groups": [_entry(found) for found in figures],
            "pinned": [vars(found) for found in coupling.pinned],
        }
    )


def _entry(figures: GroupFigures) -> dict[str, Any]:
    group = figures.group
    return {
        "name": group.name,
        "kind": group.kind,
        "units": group.size,
        "parameters_per_unit": figures.parameters_per_unit,
        "flops_per_unit": figures.flops_per_unit,
        "minimum": group.minimum,
        "companions": list(group.companions),
        "block": group.block,
        "members": [{"parameter": m.parameter, "axis": m.axis} for m in group.members],
    }


def _show_groups(screen: Screen, figures: list[GroupFigures]) -> None:
    """One row for the same group in every layer."""
    from prunec.graph.render.figures import fold_groups, span

    rows = [
        [
            alike.pattern,
            str(len(alike.figures)),
            span(found.group.size for found in alike.figures),
            span(found.parameters_per_unit for found in alike.figures),
            _places(alike),
        ]
        for alike in fold_groups(figures)
    ]
    columns = ["group", "times", "units", "parameters a unit", "sits in"]
    screen.table("Groups", columns, rows, words=(0, 4))


def _places(alike: Alike) -> str:
    """The parameter axes of the first of these groups, below the module that names it."""
    from prunec.graph.render.figures import pattern

    group = alike.first.group
    module = group.name.rpartition("/")[0] + "."
    names = (f"{pattern(m.parameter.removeprefix(module))}[{m.axis}]" for m in group.members)
    return "\n".join(dict.fromkeys(names))


def _show_pinned(screen: Screen, coupling: prunec.CouplingGraph, *, why: bool) -> None:
    from prunec.graph.render.figures import fold_pinned, span

    pinned = coupling.pinned
    if not why and pinned:
        screen.say(f"Pinned dims: {len(pinned)}. --why lists them with the reason.")
    if why:
        rows = [
            ["\n".join(row.places), str(row.times), span(row.sizes), row.reason, row.where]
            for row in fold_pinned(pinned)
        ]
        screen.table("Pinned", ["dim", "times", "size", "reason", "where"], rows, words=(0, 3, 4))

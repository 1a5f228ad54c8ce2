from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunec.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prunec.cli.console import Screen
    from prunec.graph.render.text import Section
    from prunec.passes.statistics.dense import GroupScores


def analyze(
    model: options.Model,
    why: Annotated[bool, typer.Option("--why", help="List every pinned dim and why.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw the coupling.")
    ] = None,
    dot: Annotated[
        Path | None, typer.Option("--dot", metavar="FILE", help="Write the picture's source.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write one page to explore every picture."),
    ] = None,
    level: Annotated[
        Literal["blocks", "groups", "ops"] | None,
        typer.Option(help="Draw the whole model, one block (the default), or one group."),
    ] = None,
    block: Annotated[
        str | None, typer.Option(metavar="MODULE", help="The block to draw, model.layers.0.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="The group to draw with every tensor.")
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Score every group on data and colour the pictures."),
    ] = None,
    calibration: options.Calibration = None,
    samples: options.Samples = 16,
    seq_len: options.SeqLen = None,
    seed: options.Seed = 0,
    loss: options.Loss = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the importance."),
    ] = None,
    json: options.Json = None,
    device: options.Device = "cpu",
    dtype: options.DType = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """List what can be pruned, and what is pinned.

    A group is a set of weights that must be cut together; a unit is what one cut removes. A branch
    is added to the residual stream, and can be left out whole; so can a block of them.

    With --importance the units of each group are ranked on calibration data, on the dense model.

    Example: prunec analyze smollm2 --why --svg coupling.svg

    Example: prunec analyze smollm2 --importance taylor --calibration notes.txt --set term=mixed
    """
    from prunec.cli.console import Screen
    from prunec.cli.opening import open_coupled
    from prunec.cli.scoring import (
        build_importance,
        colours,
        describe_scores,
        open_scored,
        show_scores,
    )
    from prunec.graph import render
    from prunec.graph.render.text import (
        describe_branches,
        describe_groups,
        describe_pinned,
        headline,
    )

    screen = Screen(quiet=quiet, json=json)
    for path in (svg, dot, html):
        if path:
            render.check_folder(path)
    if svg:
        render.check_target(svg)
    part = build_importance(importance, setting or [], calibration)
    groups: Sequence[GroupScores] = ()
    told: dict[str, Any] = {}
    if part:
        scored = open_scored(
            model,
            part,
            screen,
            calibration=calibration or [],
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            loss=loss,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        coupling, groups = scored.coupling, scored.groups
        told = {"importance": str(part), "calibration": scored.calibration}
    else:
        _, coupling = open_coupled(model, screen, trust_remote_code=trust_remote_code)
    values = colours(groups)
    if svg or dot:
        with screen.task("draw"):
            chosen = level or ("ops" if group else "groups")
            picture = render.draw(coupling, chosen, block=block, group=group, values=values)
            if dot:
                render.write_whole(dot, picture.source.encode())
            if svg:
                render.write_picture(picture, svg)
    if html:
        with screen.task("write the page"):
            render.write_page(coupling, html, title=model, values=values)
    screen.say(headline(coupling))
    for section in (*describe_groups(coupling), *describe_branches(coupling)):
        _show(screen, section)
    if part:
        show_scores(screen, part, groups)
    if why:
        _show(screen, describe_pinned(coupling))
    elif coupling.pinned:
        screen.say(f"Pinned dims: {len(coupling.pinned):,}. --why lists them with the reason.")
    if json is not None:
        link = render.to_node_link(coupling, describe_scores(groups))
        screen.write_json({"model": model, **told, **link})


def _show(screen: Screen, section: Section) -> None:
    """A table whose first and last columns, and what else is no figure, are words."""
    figures = {"times", "units", "size", "parameters", "FLOPs", "parameters a unit", "FLOPs a unit"}
    words = [i for i, column in enumerate(section.columns) if column not in figures]
    screen.table(section.title, section.columns, section.rows, words=words)

"""Pictures of a coupling graph: text, DOT, SVG, an interactive page, and node-link JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from prunec.errors import ExportError
from prunec.graph.coupling import CouplingGraph
from prunec.graph.render.blocks import draw_blocks
from prunec.graph.render.engine import render, write_whole
from prunec.graph.render.groups import draw_groups
from prunec.graph.render.ops import draw_ops
from prunec.graph.render.picture import Picture

Level = Literal["blocks", "groups", "ops"]
LEVELS: tuple[Level, ...] = get_args(Level)


def draw(
    coupling: CouplingGraph,
    level: Level = "groups",
    *,
    block: str | None = None,
    group: str | None = None,
    values: Mapping[str, float] | None = None,
) -> Picture:
    """Draw a coupling graph as DOT.

    Args:
        level: "blocks" shows the whole model with repeated blocks folded, "groups" one block with
            its groups in colour, "ops" one group with every tensor it touches.
        block: for "groups", the path of a module; by default the block that repeats most often.
        group: for "ops", a group's name; by default the largest inside a block.
        values: a figure per group name, such as its importance; groups are coloured by it.

    Raises:
        ExportError: if there is no such block, or it holds too much for one picture.
        PlanError: if there is no such group.
    """
    if level == "blocks":
        return draw_blocks(coupling, values)
    if level == "groups":
        return draw_groups(coupling, block, values)
    return draw_ops(coupling, group, values)


def write_picture(picture: Picture, path: Path | str) -> None:
    """Render a picture into a file, whole or not at all.

    Args:
        path: the suffix decides: .svg, .png, or .dot (.gv) for the source.

    Raises:
        ExportError: if the suffix is another, no graphviz is at hand, or the file cannot be
            written.
    """
    path = Path(path)
    form = path.suffix.lower().removeprefix(".")
    if form in ("dot", "gv"):
        write_whole(path, picture.source.encode())
    elif form in ("svg", "png"):
        write_whole(path, render(picture.source, form, style=picture.style))
    else:
        raise ExportError(f"cannot draw a {form or 'file without suffix'}", fix="use .svg or .png")

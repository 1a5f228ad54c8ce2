"""Pictures of a coupling graph: text, DOT, SVG, an interactive page, and node-link JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from prunec.errors import ExportError
from prunec.graph.coupling import CouplingGraph
from prunec.graph.render.blocks import draw_blocks
from prunec.graph.render.engine import check_folder, render, write_whole
from prunec.graph.render.groups import draw_groups
from prunec.graph.render.node_link import to_node_link
from prunec.graph.render.ops import draw_ops
from prunec.graph.render.page import build_page
from prunec.graph.render.picture import Picture
from prunec.graph.render.text import describe

__all__ = [
    "LEVELS",
    "Level",
    "Picture",
    "build_page",
    "check_folder",
    "check_target",
    "describe",
    "draw",
    "render",
    "to_node_link",
    "write_page",
    "write_picture",
    "write_whole",
]

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


def check_target(path: Path | str) -> None:
    """Raises ExportError if `write_picture` would refuse this path."""
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png", ".dot", ".gv"):
        raise ExportError(f"cannot draw into {path}", fix="name a file that ends in .svg or .png")
    check_folder(path)


def write_picture(picture: Picture, path: Path | str) -> None:
    """Render a picture into a file, whole or not at all.

    Args:
        path: the suffix decides: .svg, .png, or .dot (.gv) for the source.

    Raises:
        ExportError: if the suffix is another, no graphviz is at hand, or the file cannot be
            written.
    """
    check_target(path)
    path = Path(path)
    form = path.suffix.lower().removeprefix(".")
    source = form in ("dot", "gv")
    content = picture.source.encode() if source else render(picture.source, form, picture.style)
    write_whole(path, content)


def write_page(
    coupling: CouplingGraph,
    path: Path | str,
    *,
    title: str = "prunec",
    values: Mapping[str, float] | None = None,
) -> None:
    """Write the interactive page with every picture, whole or not at all.

    Args:
        title: what the model is called.
        values: a figure per group name, to colour by.

    Raises:
        ExportError: if no graphviz is at hand, or the file cannot be written.
    """
    check_folder(Path(path))
    write_whole(Path(path), build_page(coupling, title=title, values=values).encode())

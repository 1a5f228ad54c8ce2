"""One self-contained page with every picture of a model: pan, zoom, search, hover, click."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from typing import Any

from prunec.graph.coupling import CouplingGraph
from prunec.graph.render import palette
from prunec.graph.render.blocks import draw_blocks
from prunec.graph.render.engine import render
from prunec.graph.render.figures import Alike, Figures, fold_groups, short, span
from prunec.graph.render.flow import find_flow
from prunec.graph.render.fold import Block, fold
from prunec.graph.render.groups import draw_groups, name_block
from prunec.graph.render.labels import remarks
from prunec.graph.render.ops import MAX_NODES, draw_ops
from prunec.graph.render.picture import Picture
from prunec.graph.render.text import headline

MAX_BLOCKS = 24  # pictures of single blocks
MAX_OPS = 40  # pictures of single groups


def build_page(
    coupling: CouplingGraph,
    *,
    title: str = "prunec",
    values: Mapping[str, float] | None = None,
) -> str:
    """The page as HTML that needs no network.

    Args:
        title: what the model is called.
        values: a figure per group name, to colour by.

    Raises:
        ExportError: if there is no graphviz to lay the pictures out.
    """
    rows = fold_groups(Figures(coupling).all())
    views = [("blocks", "Whole model", draw_blocks(coupling, values))]
    views += _block_views(coupling, values)
    views += _ops_views(coupling, rows, values)
    data = {
        "title": title,
        "headline": headline(coupling),
        "rows": [_row(coupling, row, values) for row in rows],
        "views": [{"id": name, "title": words} for name, words, _ in views],
    }
    source = files("prunec.graph.render").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "@TITLE@": escape(title),
        "@DATA@": json.dumps(data).replace("<", "\\u003c"),
        "@VIEWS@": "\n".join(_template(name, picture) for name, _, picture in views),
    }
    for mark, content in parts.items():
        source = source.replace(mark, content)
    return source


def _template(name: str, picture: Picture) -> str:
    svg = render(picture.source, "svg", style=picture.style).decode()
    return f'<template id="view-{escape(name, quote=True)}">{svg}</template>'


def _block_views(
    coupling: CouplingGraph, values: Mapping[str, float] | None
) -> Iterable[tuple[str, str, Picture]]:
    """A picture a block, those that repeat most first, in the order of the model."""
    blocks = list(fold(coupling, find_flow(coupling)).blocks())
    chosen = sorted(blocks, key=lambda block: -block.times)[:MAX_BLOCKS]
    for block in [block for block in blocks if block in chosen]:
        yield (
            f"block-{block.module}",
            _block_title(block),
            draw_groups(coupling, block.module, values),
        )


def _block_title(block: Block) -> str:
    return name_block(block)


def _ops_views(
    coupling: CouplingGraph, rows: Iterable[Alike], values: Mapping[str, float] | None
) -> Iterable[tuple[str, str, Picture]]:
    """A picture a row of groups, of the first group in it."""
    for number, row in enumerate(list(rows)[:MAX_OPS]):
        group = row.first.group
        if len(group.members) <= MAX_NODES:
            yield (
                f"ops-{number}",
                f"Tensors of {group.name}",
                draw_ops(coupling, group.name, values),
            )


def _row(coupling: CouplingGraph, row: Alike, values: Mapping[str, float] | None) -> dict[str, Any]:
    index = {group.name: i for i, group in enumerate(coupling.groups)}
    figures = Figures(coupling)
    groups = [found.group for found in row.figures]
    notes = dict.fromkeys(note for group in groups for note in remarks(figures, group))
    known = [values[g.name] for g in groups if g.name in values] if values else []
    if known:
        notes[f"value {min(known):.3g} to {max(known):.3g}"] = None
    return {
        "name": row.pattern,
        "kind": row.first.group.kind,
        "colour": palette.paint(row.first.group.kind).fill,
        "groups": [{"token": f"g{index[g.name]}", "name": g.name, "units": g.size} for g in groups],
        "units": span(group.size for group in groups),
        "minimum": span(group.minimum for group in groups),
        "parameters": span(found.parameters_per_unit for found in row.figures),
        "flops": span((found.flops_per_unit for found in row.figures), brief=True),
        "total": short(sum(f.parameters_per_unit * f.group.size for f in row.figures), "kMBT"),
        "notes": list(notes),
        "members": [f"{m.parameter}[{m.axis}]" for m in row.first.group.members],
    }

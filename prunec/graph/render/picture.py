"""What the three levels of pictures share: the canvas, boxes, and edges in the groups' colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import graphviz
from torch import fx

from prunec.graph.program import source_line
from prunec.graph.render import palette
from prunec.graph.render.flow import groups_in, operator_name
from prunec.graph.render.labels import Key, cell, label, table, text

MAX_STRANDS = 4  # lines side by side in one edge


@dataclass(frozen=True)
class Picture:
    """A picture as DOT, and the style sheet that its SVG carries."""

    source: str
    style: str


class Canvas:
    """A picture being drawn."""

    def __init__(self, key: Key, title: str, subtitle: str = "", folded: bool = False):
        self.key = key
        self.coupling = key.coupling
        self._edges = 0
        font = palette.FONT.partition(",")[0]
        self.graph = graphviz.Digraph(
            "prunec",
            graph_attr={
                "label": key.legend(title, subtitle, folded),
                "labelloc": "t",
                "labeljust": "l",
                "fontname": font,
                "bgcolor": palette.PAGE,
                "pad": "0.25",
                "nodesep": "0.35",
                "ranksep": "0.4",
                "newrank": "true",
                "tooltip": " ",
            },
            node_attr={"shape": "plain", "fontname": font, "tooltip": " "},
            edge_attr={
                "color": palette.FRAME,
                "fontname": font,
                "fontsize": "9",
                "fontcolor": palette.MUTED,
                "arrowsize": "0.6",
                "penwidth": "1.4",
            },
        )

    def box(
        self,
        name: str,
        rows: Iterable[Sequence[str]],
        *,
        hint: str = "",
        dashed: bool = False,
        column: str = "",
        onto: graphviz.Digraph | None = None,
    ) -> None:
        """A framed table; boxes of one ``column`` are drawn above each other."""
        style = {"style": "rounded,dashed" if dashed else "rounded"}
        content = table(
            rows,
            border=1,
            color=palette.FRAME,
            bgcolor=palette.PANEL,
            cellpadding=2,
            cellspacing=1,
            **style,
        )
        (onto or self.graph).node(name, label(content), tooltip=hint or " ", id=name, group=column)

    def plus(self, name: str, hint: str = "", onto: graphviz.Digraph | None = None) -> None:
        """A sum."""
        (onto or self.graph).node(
            name,
            label(table([[cell(text("+", size=15, bold=True))]], cellpadding=0)),
            shape="circle",
            width="0.3",
            fixedsize="true",
            color=palette.INK,
            style="filled",
            fillcolor=palette.PANEL,
            tooltip=hint or "sum",
            id=name,
            group="stream",
        )

    def edge(
        self,
        source: str,
        target: str,
        values: Sequence[fx.Node],
        through: Sequence[str] = (),
        weight: int = 1,
    ) -> None:
        """An edge with a strand in the colour of every group that flows along it."""
        groups = [g for g in groups_in(self.coupling, values) if g in self.key.groups]
        strands = [self.key.paint(group).line for group in groups[:MAX_STRANDS]]
        attributes = {"color": ":".join(strands), "penwidth": "2.2"} if strands else {}
        self.graph.edge(
            source,
            target,
            label=_named(through),
            tooltip="\n".join(self.describe(value) for value in values[:3]) or " ",
            labeltooltip=" ",
            weight=str(weight),
            id=f"e{self._edges}",
            **{"class": " ".join(self.key.token(group) for group in groups)},
            **attributes,
        )
        self._edges += 1

    def describe(self, value: fx.Node) -> str:
        """A value in words: shape, operator, source line."""
        return "  ".join(part for part in (shape(self, value), source_line(value)) if part)

    def finish(self) -> Picture:
        return Picture(self.graph.source, palette.style_sheet(self.key.lines()))


def _named(through: Sequence[str]) -> str:
    """An edge's label; the space keeps it off the line."""
    names = list(dict.fromkeys(through))
    return "".join([" ", ", ".join(names[:3]), " ..." if len(names) > 3 else ""]) if names else ""


def shape(canvas: Canvas, value: fx.Node) -> str:
    """``scaled_dot_product_attention: 2 x 9 x 11 x 64``."""
    found = canvas.coupling.layout.values.get(value)
    sizes = " x ".join(str(dim.size) for dim in found[0].dims) if found else "?"
    name = value.name if value.op == "placeholder" else operator_name(value)
    return f"{name}: {sizes}"

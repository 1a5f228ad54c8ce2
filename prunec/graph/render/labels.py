"""Graphviz's HTML-like labels, and how a group looks in one picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.dims import Dim
from prunec.graph.render import palette
from prunec.graph.render.figures import Figures, alike, span

SMALL = 9


def text(words: object, *, size: float = 11, colour: str = palette.INK, bold: bool = False) -> str:
    """A run of text in a label; its lines are left-aligned where there are several."""
    inner = escape(str(words), quote=True).replace("\n", '<BR ALIGN="LEFT"/>')
    if not inner:
        return ""  # an empty FONT is a syntax error to graphviz
    inner = f"<B>{inner}</B>" if bold else inner
    return f'<FONT POINT-SIZE="{size:g}" COLOR="{colour}">{inner}</FONT>'


def cell(content: str, **attributes: object) -> str:
    """One table cell around a text or table."""
    return f"<TD{_attributes(attributes)}>{content}</TD>"


def table(rows: Iterable[Sequence[str]], **attributes: object) -> str:
    """A table of rows of cells; without a border unless asked for."""
    given = {"border": 0, "cellborder": 0, "cellspacing": 0, "cellpadding": 2, **attributes}
    body = "".join(f"<TR>{''.join(row)}</TR>" for row in rows)
    return f"<TABLE{_attributes(given)}>{body}</TABLE>"


def label(content: str) -> str:
    """Mark a table as a node's HTML-like label."""
    return f"<{content}>"


def _attributes(given: Mapping[str, object]) -> str:
    return "".join(
        f' {name.upper()}="{escape(str(value), quote=True)}"' for name, value in given.items()
    )


class Key:
    """How the groups of one picture look: colour, short name, and ids that a page can find.

    Args:
        groups: those that the picture shows, in order.
        values: a figure per group name; with it, colour shows the figure and not the kind.
        number: tell several groups of one kind in one block apart, by number and tint.
    """

    def __init__(
        self,
        coupling: CouplingGraph,
        groups: Sequence[Group],
        values: Mapping[str, float] | None = None,
        number: bool = True,
    ):
        self.coupling = coupling
        self.groups = tuple(dict.fromkeys(groups))
        self.values = dict(values or {})
        self.figures = Figures(coupling)
        self._index = {group.name: i for i, group in enumerate(coupling.groups)}
        self._cells: Counter[str] = Counter()
        shared = Counter(g.kind for g in self.groups if g.block is None)
        alone = Counter(g.kind for g in self.groups)
        seen: Counter[tuple[str, str | None]] = Counter()
        self._variant: dict[str, int] = {}
        self._suffix: dict[str, str] = {}
        for group in self.groups:
            place = (group.kind, group.block)
            variant = seen[place] + (0 if group.block is None else shared[group.kind])
            seen[place] += number or group.block is None
            self._variant[group.name] = variant
            several = number and alone[group.kind] > 1
            self._suffix[group.name] = f"#{variant + 1}" if several else ""

    def paint(self, group: Group) -> palette.Paint:
        if self.values:
            if group.name not in self.values:
                return palette.Paint(palette.PINNED, palette.INK, palette.FRAME)
            found = list(self.values.values())
            return palette.paint_value(self.values[group.name], min(found), max(found))
        return palette.paint(group.kind, self._variant.get(group.name, 0))

    def name(self, group: Group) -> str:
        """Its kind, numbered where the picture shows several."""
        return group.kind + self._suffix.get(group.name, "")

    def token(self, group: Group) -> str:
        """The class of everything in a picture that belongs to a group: ``g7``."""
        return f"g{self._index[group.name]}"

    def lines(self) -> dict[str, str]:
        """Line colours on light -> on dark."""
        return {} if self.values else {p.line: p.fill for p in map(self.paint, self.groups)}

    def cell(self, group: Group, words: str, hint: str = "", **attributes: object) -> str:
        """A coloured cell of a group."""
        colours = self.paint(group)
        token = self.token(group)
        self._cells[token] += 1
        given = {
            "bgcolor": colours.fill,
            "id": f"{token}-{self._cells[token]}",
            "href": f"#{token}",  # without a link, older graphviz drops id and tooltip of a cell
            "tooltip": hint or f"{group.name}: {group.size} units",
            **attributes,
        }
        return cell(text(words, size=10, colour=colours.text), **given)

    def axis(self, dim: Dim) -> list[list[str]]:
        """The cells of one axis: a line a segment, factors side by side, major to minor."""
        root = dim.root
        if root.form == "sum" and any(part.form != "leaf" for part in root.parts):
            lines = [line for part in root.parts for line in self.axis(part)]
            return [
                [*line, cell(text("+", colour=palette.MUTED))] if i < len(lines) - 1 else line
                for i, line in enumerate(lines)
            ]
        return [self._cells_of(root)]

    def _cells_of(self, dim: Dim) -> list[str]:
        root = dim.root
        if root.form == "leaf":
            return [self._leaf(root)]
        sign = cell(text("x" if root.form == "product" else "+", size=10, colour=palette.MUTED))
        cells: list[str] = []
        for i, part in enumerate(root.parts):
            again = part.form == "leaf" and any(part is other for other in root.parts[:i])
            inner = [self._leaf(part, again)] if again else self._cells_of(part)
            if len(inner) > 1 and root.form == "product":
                inner = [cell(text("(")), *inner, cell(text(")"))]
            cells += [sign, *inner] if cells else inner
        return cells

    def _leaf(self, leaf: Dim, again: bool = False) -> str:
        group = self.coupling.by_dim.get(leaf)
        if group is not None and group not in self.groups:
            words = text(f"{group.kind} {leaf.size:,}", size=10, colour=palette.MUTED)
            return cell(words, bgcolor=palette.PINNED, tooltip=group.name)
        if group is not None:
            return self.cell(group, f"{'' if again else self.name(group)} {leaf.size:,}".strip())
        reason = next((note.reason for note in leaf.notes if note.kind == "pinned"), "fixed")
        return cell(
            text(f"{leaf.size:,}", size=10, colour=palette.MUTED),
            bgcolor=palette.PINNED,
            tooltip=reason,
        )

    def legend(self, title: str, subtitle: str = "", folded: bool = False) -> str:
        """Title and a line a group (``folded``: a kind): units, cost of a unit, what ties it."""
        head = [[cell(text(title, size=15, bold=True), align="left")]]
        if subtitle:
            head.append([cell(text(subtitle, colour=palette.MUTED), align="left")])
        rows = [[cell(self._legend_table(folded), align="left")]] if self.groups else []
        scale = [[cell(self._scale(), align="left")]] if self.values else []
        return label(table([*head, *scale, *rows], cellpadding=3))

    def _legend_table(self, folded: bool) -> str:
        groups = self.coupling.groups if folded else self.groups
        lines = alike(groups, lambda g: (g.kind, g.block is None) if folded else g.name)
        heads = ("group", *(["times"] if folded else []), "units", "parameters a unit")
        titles = [text(words, size=SMALL, colour=palette.MUTED) for words in heads]
        titles.append(text("FLOPs a unit", size=SMALL, colour=palette.MUTED))
        rows = [[cell(title, align="right" if i else "left") for i, title in enumerate(titles)]]
        for line in lines:
            found = [self.figures[group] for group in line]
            words = [
                *([f"{len(line):,}"] if folded else []),
                span(group.size for group in line),
                span(f.parameters_per_unit for f in found),
                span((f.flops_per_unit for f in found), brief=True),
            ]
            name = line[0].kind if folded else self.name(line[0])
            remarks = self.remarks(line[0]) if len(line) == 1 or not folded else ""
            remarks = remarks or "; ".join(dict.fromkeys(map(self.remarks, line)))
            rows.append(
                [
                    self.cell(line[0], name, align="left"),
                    *(cell(text(figure, size=10), align="right") for figure in words),
                    cell(text(remarks, size=10, colour=palette.MUTED), align="left"),
                ]
            )
        return table(rows, cellspacing=3, cellpadding=3)

    def _scale(self) -> str:
        """The colour scale of the values, lowest to highest."""
        found = list(self.values.values())
        steps = [cell(text("   "), bgcolor=palette.scale(i / 8)) for i in range(9)]
        low, high = (cell(text(f"{value:.3g}", size=10)) for value in (min(found), max(found)))
        return table([[low, *steps, high]], cellpadding=3)

    def remarks(self, group: Group) -> str:
        """What else a reader must know of a group."""
        return "; ".join(remarks(self.figures, group, self.values.get(group.name)))


def remarks(figures: Figures, group: Group, value: float | None = None) -> list[str]:
    """What ties a group, beyond its axes."""
    coupling, found = figures.coupling, figures[group]
    words = []
    if value is not None:
        words.append(f"value {value:.3g}")
    if group.companions:
        kinds = [coupling[name].kind for name in group.companions]
        words.append(f"chosen within every {' and '.join(dict.fromkeys(kinds))}")
    if found.blocks > 1:
        words.append(f"couples {found.blocks} blocks")
    if group.minimum > 1:
        words.append(f"at least {group.minimum}")
    if group.normalised:
        words.append("removing is not zeroing")
    return words

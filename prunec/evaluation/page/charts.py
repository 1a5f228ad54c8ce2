"""Charts in HTML: bars are boxes, lines one SVG without text, so that words keep their size.

They take the page's width and its colours, light or dark, and print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Series = Mapping[str, Sequence[tuple[float, float]]]
COLOURS = ("var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)")


def layer_bars(title: str, kept: Mapping[str, tuple[int, int]], colour: str) -> str:
    """A column a layer: how much of its units stayed; the figures are in the tooltips."""
    columns = "".join(
        f'<i title="{escape(block, quote=True)}: {count} of {size}">'
        f'<b style="height:{100 * count / size:.1f}%"></b></i>'
        for block, (count, size) in kept.items()
    )
    names = list(kept)
    before = max(size for _, size in kept.values())
    least, most = min(c for c, _ in kept.values()), max(c for c, _ in kept.values())
    words = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}: {words} of {before:,} kept'
        f'</figcaption><div class="layers" style="--bar:{colour}">{columns}</div>'
        f'<div class="ends"><span>{escape(names[0])}</span><span>{escape(names[-1])}</span></div>'
        "</figure>"
    )


def bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """A horizontal bar a row (name, value, value in words), the longest takes the room."""
    longest = max((value for _, value, _ in rows), default=0) or 1
    lines = "".join(
        f'<dt>{escape(name)}</dt><dd><b style="width:{100 * value / longest:.1f}%;'
        f'background:{COLOURS[i % len(COLOURS)]}"></b><span>{escape(words)}</span></dd>'
        for i, (name, value, words) in enumerate(rows)
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<dl class="bars">{lines}</dl></figure>'
    )


def lines(
    title: str, series: Series, *, x: str, y: str, colours: Sequence[str] = COLOURS[1:]
) -> str:
    """Lines over a common pair of axes, whose ends are named; nothing where there is no point."""
    known = {
        name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()
    }
    known = {name: points for name, points in known.items() if points}
    every = [point for points in known.values() for point in points]
    if not every:
        return ""
    left, right = min(p[0] for p in every), max(p[0] for p in every)
    low, high = min(p[1] for p in every), max(p[1] for p in every)
    width, height = right - left or 1.0, high - low or 1.0

    def place(point: tuple[float, float]) -> str:
        return f"{100 * (point[0] - left) / width:.2f},{100 - 100 * (point[1] - low) / height:.2f}"

    drawn = "".join(
        f'<polyline points="{" ".join(map(place, points))}" style="stroke:{_pick(colours, i)}"/>'
        for i, points in enumerate(known.values())
    )
    key = "".join(
        f'<span><i style="background:{_pick(colours, i)}"></i>{escape(name)}</span>'
        for i, name in enumerate(known)
    )
    legend = f'<div class="key">{key}</div>' if len(known) > 1 or next(iter(known)) else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend}'
        f'<div class="plot"><div class="scale"><span>{figure(high)}</span><span>{escape(y)}</span>'
        f'<span>{figure(low)}</span></div><svg viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(title, quote=True)}">{drawn}</svg></div>'
        f'<div class="ends inset"><span>{figure(left)}</span><span>{escape(x)}</span>'
        f"<span>{figure(right)}</span></div></figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are figures."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what is to be said of them."""
    inner = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return f'<dl class="facts">{inner}</dl>'


def figure(value: float) -> str:
    """A number as short as it can be read.

    >>> figure(12345.6), figure(0.01234)
    ('12,346', '0.0123')
    """
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _pick(colours: Sequence[str], index: int) -> str:
    return colours[index % len(colours)]

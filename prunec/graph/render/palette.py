"""Colours of the kinds of groups: told apart by colour-blind readers, on light and on dark.

The fills are Paul Tol's "light" qualitative scheme (Colour Schemes, SRON/EPS/TN/09-002, 2021),
made for cells that carry dark text; lines are darker on a light page. A picture in SVG carries one
style sheet that exchanges the neutral colours and the lines where the reader prefers dark.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass

FILLS = {
    "hidden": "#77aadd",
    "ffn_channel": "#44bb99",
    "kv_group": "#ee8866",
    "head": "#ee8866",
    "query_head": "#eedd88",
    "rope_pair": "#ffaabb",
    "qk_dim": "#ffaabb",
    "head_dim": "#ffaabb",
    "value_dim": "#99ddff",
    "expert": "#bbcc33",
    "conv_channel": "#bbcc33",
    "branch": "#aaaa00",
}
OTHER = "#aaaa00"

PAGE, INK, MUTED, FRAME, PANEL, PINNED = (
    "#ffffff",
    "#1c2024",
    "#6a7178",
    "#a9b0b7",
    "#f4f6f8",
    "#e3e6e9",
)
ON_FILL = "#111417"  # text on a group's colour, in both modes
DARK = {
    PAGE: "#14171a",
    INK: "#e8ebee",
    MUTED: "#9aa2aa",
    FRAME: "#565e66",
    PANEL: "#1f2429",
    PINNED: "#363d44",
}
FONT = "Helvetica,Arial,Liberation Sans,sans-serif"

# cividis at 0, 1/8, ..., 1: the sequential scale, uniform to colour-blind readers
_SCALE = (
    "#00224e", "#1e3a6f", "#434e6c", "#61656f", "#7d7c78",
    "#9b9476", "#bcae6c", "#dec958", "#fee838",
)  # fmt: skip


@dataclass(frozen=True)
class Paint:
    """The colours of one group: of its cells, of the text on them, of its lines."""

    fill: str
    text: str
    line: str


def paint(kind: str, variant: int = 0) -> Paint:
    """The colours of a kind; several groups of one kind in a picture get tints of it."""
    hue, light, strength = _hls(FILLS.get(kind, OTHER))
    light = min(0.9, max(0.45, light + (0.0, 0.13, -0.07, 0.2, 0.06)[variant % 5]))
    return Paint(_hex(hue, light, strength), ON_FILL, _hex(hue, light * 0.72, strength * 0.85))


def paint_value(value: float, lowest: float, highest: float) -> Paint:
    """The colours of a figure on the sequential scale between two others."""
    span = highest - lowest
    position = 0.5 if span <= 0 else min(1.0, max(0.0, (value - lowest) / span))
    fill = scale(position)
    return Paint(fill, "#ffffff" if _hls(fill)[1] < 0.45 else ON_FILL, fill)


def scale(position: float) -> str:
    """A colour of the sequential scale, 0 to 1."""
    left = min(int(position * 8), 7)
    share = position * 8 - left
    low, high = (_rgb(_SCALE[i]) for i in (left, left + 1))
    mixed = [round(a + (b - a) * share) for a, b in zip(low, high, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def style_sheet(lines: Mapping[str, str]) -> str:
    """The CSS of a picture.

    Args:
        lines: line colour on light -> on dark.
    """
    swaps = {**DARK, **lines}
    rules = "".join(
        f'[fill="{light}"]{{fill:{dark}}}[stroke="{light}"]{{stroke:{dark}}}'
        for light, dark in swaps.items()
    )
    return f"text{{font-family:{FONT}}}@media (prefers-color-scheme:dark){{{rules}}}"


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _hls(colour: str) -> tuple[float, float, float]:
    red, green, blue = (part / 255 for part in _rgb(colour))
    return colorsys.rgb_to_hls(red, green, blue)


def _hex(hue: float, light: float, strength: float) -> str:
    parts = colorsys.hls_to_rgb(hue, light, strength)
    return "#" + "".join(f"{round(part * 255):02x}" for part in parts)

"""The tables of benchmarks/methods.py: their cells, what has been measured of each, Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from common import read, shared

from prunec.evaluation import Metric

TEXTS = ("c4", "wikipedia")  # to calibrate on, in equal parts
TASKS = {"local_piqa": "PIQA", "local_arc_easy": "ARC-easy", "local_lambada_openai": "LAMBADA"}
RECOVERED = "recovered "  # before what was measured after recovery


@dataclass(frozen=True)
class Protocol:
    """What all cells of one table share; another protocol is another table."""

    model: str
    samples: int
    seq_len: int
    window: int
    windows: int
    texts: tuple[str, ...] = TEXTS

    @property
    def calibrated(self) -> str:
        tokens = f"{self.model}, {self.samples} x {self.seq_len} calibration tokens"
        return tokens if self.texts == TEXTS else f"{tokens} of {' and '.join(self.texts)}"

    @property
    def name(self) -> str:
        return f"{self.calibrated}, {self.windows} x {self.window} scored"


@dataclass(frozen=True)
class Cell:
    """One method at one ratio with one seed; the dense model has ratio 0.

    `minutes` bound a method that searches; None: as its recipe says. `changed` are its settings.
    """

    method: str
    ratio: float
    seed: int
    minutes: float | None = None
    changed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        bound = "" if self.minutes is None else f" {self.minutes:g} minutes"
        return " ".join([f"{self.method} {self.ratio:g} seed {self.seed}{bound}", *self.changed])

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-").replace("=", "-")

    @property
    def settings(self) -> dict[str, Any]:
        """Of the recipe, as the command line reads them."""
        from prunec.cli.opening import parse_settings

        bound = {} if self.minutes is None else {"allocation.minutes": self.minutes}
        return bound | parse_settings(self.changed)


class Table:
    """results/methods.json: per protocol and cell what has been measured, written as it comes.

    Several runs may fill it at once, on a core each.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        return self._cells(read("methods") or {})

    def measured(self, cell: Cell, what: str, measure: Callable[[], Any]) -> None:
        """Measure what is not there yet."""
        if what in self.cells.get(cell.name, {}):
            return
        found = measure()
        with shared("methods") as tables:
            row = self._cells(tables).setdefault(cell.name, asdict(cell))
            row[what] = found

    def _cells(self, tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
        table = tables.setdefault(
            self.protocol.name, {"protocol": asdict(self.protocol), "cells": {}}
        )
        cells: dict[str, dict[str, Any]] = table["cells"]
        return cells


def markdown(table: Table) -> str:
    """The table as the README shows it, of seed 0 and recipes as they are.

    What was not run is blank, a column of blanks left out.
    """
    dense = table.cells.get(Cell("dense", 0.0, 0).name, {})
    unchanged = [row for row in table.cells.values() if not row["seed"] and not row.get("changed")]
    kinds = [(row, prefix) for row in unchanged for prefix in ("", RECOVERED)]
    measured = [(row, prefix) for row, prefix in kinds if f"{prefix}wikitext2" in row]
    rows = [_row(row, dense, prefix) for row, prefix in sorted(measured, key=_place)]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [columns, ["--:", ":--", *["--:"] * (len(columns) - 2)]]
    lines += [[row[name] for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _place(of: tuple[dict[str, Any], str]) -> tuple[float, float]:
    """By ratio, the best first."""
    row, prefix = of
    return row["ratio"], row[f"{prefix}wikitext2"]["value"]


def _row(row: dict[str, Any], dense: dict[str, Any], prefix: str) -> dict[str, str]:
    """What the table says of a cell, by column, before or after recovery."""
    pruning = {} if prefix else row.get("pruning", {})
    return {
        "": _ratio(row),
        "method": _method(row) + (", then LoRA" if prefix else ""),
        "WikiText-2": _times(row[f"{prefix}wikitext2"], dense.get("wikitext2")),
        "C4": _times(row.get(f"{prefix}c4"), dense.get("c4")),
        **{label: _accuracy(row, task, prefix) for task, label in TASKS.items()},
        "seconds": f"{pruning.get('processor_seconds', pruning['seconds']):,.0f}"
        if pruning
        else "",
        "forward passes": _forwards(pruning),
        "memory": f"{pruning['peak_bytes'] / 1e9:.1f} GB" if pruning else "",
    }


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.0%}" if row["ratio"] else ""


def _method(row: dict[str, Any]) -> str:
    bound = f", {row['minutes']:g} minutes" if row.get("minutes") else ""
    return f"`{row['method']}`{bound}" if row["ratio"] else "dense"


def _forwards(pruning: dict[str, Any]) -> str:
    """How many times the dense model's forward passes over the same tokens pruning took."""
    if "forward_seconds" not in pruning:
        return ""
    return f"{pruning['processor_seconds'] / pruning['forward_seconds']:.1f}"


def _times(found: dict[str, Any] | None, dense: dict[str, Any] | None) -> str:
    """A perplexity and how many times the dense one it is."""
    if not found or not dense:
        return ""
    values = found["value"], found["value"] / dense["value"]
    return "{} ({} x)".format(*(f"{value:,.{2 if value < 100 else 0}f}" for value in values))


def differences(table: Table, method: str) -> str:
    """How many points more of the items a method gets right than each other, at the same ratio.

    The standard error is that of paired items: which are hard is the same for both.
    """
    scored = [row for row in table.cells.values() if not row["seed"] and _entries(row, "")]
    pairs = [
        (mine, other)
        for mine in scored
        if mine["method"] == method
        for other in scored
        if other is not mine and other["ratio"] in (0.0, mine["ratio"])
    ]
    lines = [["", f"`{method}` against", *TASKS.values()], ["--:", ":--", *["--:"] * len(TASKS)]]
    for mine, other in pairs:
        cells = (_difference(mine, other, task) for task in TASKS)
        lines.append([_ratio(mine), _method(other), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _difference(mine: dict[str, Any], other: dict[str, Any], task: str) -> str:
    digits = [_entries(row, "").get(task, {}).get("outcomes", "") for row in (mine, other)]
    first, second = (Metric(task, 0.0, outcomes=tuple(map(float, each))) for each in digits)
    found = first.difference(second)
    return f"{100 * found.value:+.1f} ± {100 * (found.stderr or 0.0):.1f}" if found else ""


def _accuracy(row: dict[str, Any], task: str, prefix: str) -> str:
    """In per cent, with its standard error."""
    entry = _entries(row, prefix).get(task)
    return f"{100 * entry['value']:.1f} ± {100 * entry['stderr']:.1f}" if entry else ""


def _entries(row: dict[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    """By task the accuracy on the most items that were run."""
    runs = [row[what] for what in row if what.startswith(f"{prefix}tasks")]
    found = [entry for run in runs for entry in run if entry["metric"] == "acc"]
    return {entry["task"]: entry for entry in sorted(found, key=lambda e: int(e["samples"]))}

"""What training gives back: perplexity by the minute, for every method of recovery.

    python benchmarks/recovery.py --quick                 # 50 %, 3 minutes a method, little text
    python benchmarks/recovery.py                         # 5, 10, 20 and 40 minutes a method
    python benchmarks/recovery.py --recipes auto --ratios 0.2 0.3 --methods lora --items 500
    python benchmarks/recovery.py --set rank=16           # cells of their own: other settings
    python benchmarks/recovery.py --markdown              # the table of what has been run

Each cell is a pruned model, a method and its minutes: a run of its own, with the schedule of its
length, not a point of a longer one. All is done by the commands that a user has. What has been
measured stands in results/recovery.json and is not measured again; models stay in --work until they
are deleted. Calibrated and trained is on C4, of which recovery holds out the last rows; scored are
WikiText-2 validation and the tasks beside it, of which neither has seen anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import data_directory, read, write

WIKITEXT, C4 = "text/wikitext-2/valid.tokenised.txt", "text/calib/c4.utf8"
TASKS = ("local_piqa", "local_arc_easy")
CURVES = ("settings", "steps", "seconds", "tokens", "parameters", "before", "after", "improved")


@dataclass(frozen=True)
class Protocol:
    """What all cells of one table share; another protocol is another table."""

    model: str
    samples: int
    seq_len: int
    window: int
    windows: int
    threads: int

    @property
    def name(self) -> str:
        pruned = f"{self.model}, {self.samples} x {self.seq_len} calibration tokens"
        return f"{pruned}, {self.windows} x {self.window} scored, {self.threads} threads"


@dataclass(frozen=True)
class Cell:
    """A model: dense, pruned, or pruned and then trained, with settings `changed`."""

    recipe: str = ""
    ratio: float = 0.0
    method: str = ""
    minutes: float = 0.0
    changed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        if not self.recipe:
            return "dense"
        pruned = f"{self.recipe} {self.ratio:g}"
        trained = f" {self.method} {self.minutes:g} min" if self.method else ""
        return " ".join([pruned + trained, *self.changed])

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-").replace("=", "-")


def main() -> None:
    options = parse()
    protocol = Protocol(
        options.model,
        options.samples,
        options.seq_len,
        options.window,
        options.windows,
        torch.get_num_threads(),
    )
    if not options.markdown:
        table = Table(protocol, options.work / protocol.name.replace(" ", "-").replace(",", ""))
        for cell in cells(options):
            run(cell, table, options.items)
    print(markdown((read("recovery") or {}).get(protocol.name, {})))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipes", nargs="+", default=["slimgpt"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5])
    parser.add_argument("--methods", nargs="+", default=["lora", "distill", "full", "scale"])
    parser.add_argument("--minutes", nargs="+", type=float, default=[5, 10, 20, 40])
    parser.add_argument("--set", nargs="+", default=[], dest="changed", metavar="KEY=VALUE")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--items", type=int, default=0, help="of each task; 0: no tasks")
    parser.add_argument("--quick", action="store_true", help="3 minutes, 32 x 512 tokens")
    parser.add_argument("--markdown", action="store_true", help="only print the table")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="where models are kept")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.windows = [3], 10
        options.samples, options.seq_len = 32, 512
    return options


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The dense model, each pruned one, and all that becomes of it."""
    yield Cell()
    for ratio in options.ratios:
        for recipe in options.recipes:
            yield Cell(recipe, ratio)
            for minutes in options.minutes:
                for method in options.methods:
                    yield Cell(recipe, ratio, method, minutes, tuple(options.changed))


class Table:
    """results/recovery.json: per protocol and cell what has been measured, written as it comes."""

    def __init__(self, protocol: Protocol, work: Path) -> None:
        self.protocol = protocol
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self._tables: dict[str, Any] = read("recovery") or {}
        self._cells: dict[str, Any] = self._tables.setdefault(
            protocol.name, {"protocol": asdict(protocol), "cells": {}}
        )["cells"]

    def path(self, cell: Cell) -> Path:
        """The directory of a cell's model."""
        return self.work / cell.folder

    def measured(self, cell: Cell, what: str, measure: Callable[[], Any]) -> None:
        """Measure what is not there yet."""
        row = self._cells.setdefault(cell.name, asdict(cell))
        if what not in row:
            row[what] = measure()
            write("recovery", self._tables)


def run(cell: Cell, table: Table, items: int) -> None:
    """Prune or train, then score; each step only where it is missing."""
    spec = str(table.path(cell)) if cell.recipe else table.protocol.model
    if cell.method:
        table.measured(cell, "recovery", lambda: recover(cell, table))
    elif cell.recipe:
        table.measured(cell, "pruning", lambda: prune(cell, table))
    table.measured(cell, "perplexity", lambda: perplexity(spec, table))
    if items:
        table.measured(cell, f"tasks, {items} items", lambda: tasks(spec, items, table))
    print(cell.name, flush=True)


def prune(cell: Cell, table: Table) -> dict[str, Any]:
    """Prune into the cell's directory; what was asked and what it came to."""
    protocol = table.protocol
    found = prunec(
        table,
        *("prune", protocol.model, "-o", str(table.path(cell)), "--overwrite"),
        *("--recipe", cell.recipe, "--ratio", f"{cell.ratio}"),
        *("--calibration", str(data_directory() / C4)),
        *("--samples", f"{protocol.samples}", "--seq-len", f"{protocol.seq_len}"),
    )
    return {name: found[name] for name in ("recipe", "realised_ratio", "parameters", "seconds")}


def recover(cell: Cell, table: Table) -> dict[str, Any]:
    """Train what the pruned cell's directory holds; how its held-out loss went."""
    pruned = table.path(Cell(cell.recipe, cell.ratio))
    changed = [option for setting in cell.changed for option in ("--set", setting)]
    found = prunec(
        table,
        *("recover", str(pruned), "-o", str(table.path(cell)), "--overwrite"),
        *("--method", cell.method, "--minutes", f"{cell.minutes}", *changed),
        *("--data", str(data_directory() / C4)),
    )
    kept = {name: found[name] for name in CURVES}
    return kept | {"held_out": [[p["seconds"], p["loss"]] for p in found["held_out_losses"]]}


def perplexity(spec: str, table: Table) -> dict[str, Any]:
    """WikiText-2 validation in windows that do not overlap."""
    protocol = table.protocol
    (found,) = prunec(
        table,
        *("eval", spec, "--ppl", str(data_directory() / WIKITEXT)),
        *("--window", f"{protocol.window}", "--max-windows", f"{protocol.windows}"),
    )
    measured: dict[str, Any] = found["perplexities"][0]
    return measured


def tasks(spec: str, items: int, table: Table) -> list[dict[str, Any]]:
    """lm-eval's scores on the tasks that lie beside the texts."""
    (found,) = prunec(
        table,
        *("eval", spec, "--tasks", ",".join(TASKS), "--limit", f"{items}", "--batch-size", "16"),
        *("--include-path", str(data_directory() / "lm_eval_tasks")),
    )
    scores: list[dict[str, Any]] = found["tasks"]
    return scores


def prunec(table: Table, *arguments: str) -> Any:
    """Run a command in a process of its own; what it says as JSON."""
    said = table.work / "said.json"
    command = [sys.executable, "-m", "prunec", *arguments, "--json", str(said)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(said.read_text(encoding="utf-8"))


def markdown(table: dict[str, Any]) -> str:
    """What was run, a line a cell."""
    rows = list(table.get("cells", {}).values())
    head = ["", "minutes", "steps", "perplexity", "of what it was", *TASKS]
    lines = [head, [":--", *["--:"] * (len(head) - 1)]]
    lines += [_row(row, rows) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    cell = _cell(row)
    untrained = Cell(cell.recipe, cell.ratio)
    pruned = next((other for other in rows if _cell(other) == untrained), {})
    value = row.get("perplexity", {}).get("value")
    before = pruned.get("perplexity", {}).get("value")
    return [
        cell.name,
        f"{cell.minutes:g}" if cell.method else "",
        f"{row['recovery']['steps']:,}" if "recovery" in row else "",
        f"{value:,.2f}" if value else "",
        f"{value / before:.1%}" if cell.method and value and before else "",
        *[_accuracy(row, task) for task in TASKS],
    ]


def _cell(row: dict[str, Any]) -> Cell:
    fields = {name: row[name] for name in asdict(Cell())}
    return Cell(**fields | {"changed": tuple(row["changed"])})


def _accuracy(row: dict[str, Any], task: str) -> str:
    """In per cent with its standard error, of the most items that were run."""
    runs = [row[what] for what in row if what.startswith("tasks")]
    found = [e for run in runs for e in run if (e["task"], e["metric"]) == (task, "acc")]
    if not found:
        return ""
    best = max(found, key=lambda entry: int(entry["samples"]))
    return f"{100 * best['value']:.1f} ± {100 * best['stderr']:.1f}"


if __name__ == "__main__":
    main()

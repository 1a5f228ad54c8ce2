"""Every method at every ratio on one model and the same calibration tokens: the README's table.

    python benchmarks/methods.py --quick                 # 20 %, less text, 200 items a task
    python benchmarks/methods.py                         # 20, 30 and 50 %, 500 items a task
    python benchmarks/methods.py --items 0               # the whole task sets
    python benchmarks/methods.py --no-tasks              # perplexity only; tasks can follow later
    python benchmarks/methods.py --methods slimgpt auto --ratios 0.5 --seeds 0 1 2
    python benchmarks/methods.py --methods auto --ratios 0.5 --minutes 10 20 40  # of its search
    python benchmarks/methods.py --markdown              # the table of what has been run

Each cell is a method at a ratio and a seed. What has been measured stands in results/methods.json
and is not measured again; pruned models stay in --work until they are deleted. Calibration is half
C4 (its first four fifths) and half Wikipedia; scored are WikiText-2 validation and the last fifth
of C4, which no calibration window touches. Each cell is pruned in a process of its own, so that its
seconds and its memory are its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from common import data_directory, read, write
from torch import Tensor

METHODS = ("magnitude", "wanda-sp", "flap", "llm-pruner", "slimllm", "slimgpt", "auto")
TASKS = ("local_piqa", "local_arc_easy", "local_lambada_openai")
METRICS = {"local_piqa": "acc", "local_arc_easy": "acc", "local_lambada_openai": "acc"}
WIKITEXT = "text/wikitext-2/valid.tokenised.txt"
C4, WIKIPEDIA = "text/calib/c4.utf8", "text/calib/wiki.utf8"


@dataclass(frozen=True)
class Protocol:
    """What all cells of one table share; another protocol is another table."""

    model: str
    samples: int
    seq_len: int
    window: int
    windows: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.samples} x {self.seq_len} calibration tokens"


@dataclass(frozen=True)
class Cell:
    """One method at one ratio with one seed; the dense model has ratio 0.

    `minutes` bound a method that searches; None: as its recipe says.
    """

    method: str
    ratio: float
    seed: int
    minutes: float | None = None

    @property
    def name(self) -> str:
        bound = "" if self.minutes is None else f" {self.minutes:g} minutes"
        return f"{self.method} {self.ratio:g} seed {self.seed}{bound}"

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(prune(**json.loads(options.child))))
        return
    protocol = Protocol(
        options.model, options.samples, options.seq_len, options.window, options.windows
    )
    if not options.markdown:
        table = Table(protocol)
        for cell in cells(options):
            run(cell, table, options)
    print(markdown(Table(protocol)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="RECIPE")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--minutes", nargs="+", type=float, default=[None], help="bounds of a search, one cell each"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--items", type=int, default=500, help="items a task; 0: all of them")
    parser.add_argument("--no-tasks", action="store_true", help="perplexity only")
    parser.add_argument("--recover", nargs="*", default=[], metavar="RECIPE", help="and LoRA these")
    parser.add_argument("--steps", type=int, default=200, help="of recovery")
    parser.add_argument("--quick", action="store_true", help="20 %%, 32 x 512 tokens, 200 items")
    parser.add_argument("--markdown", action="store_true", help="only print the table")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="where models are kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.ratios, options.items, options.windows = [0.2], 200, 20
        options.samples, options.seq_len = 32, 512
    return options


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    yield Cell("dense", 0.0, 0)
    for ratio in options.ratios:
        for method in options.methods:
            for seed in options.seeds:
                for minutes in options.minutes:
                    yield Cell(method, ratio, seed, minutes)


class Table:
    """results/methods.json: per protocol and cell what has been measured, written as it comes."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self._tables: dict[str, Any] = read("methods") or {}
        self._table = self._tables.setdefault(
            protocol.name, {"protocol": asdict(protocol), "cells": {}}
        )

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self._table["cells"]
        return found

    def measured(self, cell: Cell, what: str, measure: Callable[[], Any]) -> None:
        """Measure what is not there yet."""
        row = self.cells.setdefault(cell.name, asdict(cell))
        if what not in row:
            row[what] = measure()
            write("methods", self._tables)


def run(cell: Cell, table: Table, options: argparse.Namespace) -> None:
    """Prune, then score; each step only where it is missing."""
    work = options.work / table.protocol.name.replace(" ", "-")
    work.mkdir(parents=True, exist_ok=True)
    pruned = work / cell.folder
    spec = table.protocol.model if cell.method == "dense" else str(pruned)
    if cell.method != "dense":
        table.measured(cell, "pruning", lambda: prune_in_child(cell, table.protocol, pruned))
    items = None if options.no_tasks else options.items
    score(cell, table, spec, work, items, "")
    if cell.method in options.recover:
        recovered = work / f"{cell.folder}-recovered"
        table.measured(cell, "recovery", lambda: recover(pruned, recovered, work, options.steps))
        score(cell, table, str(recovered), work, items, "recovered ")
    print(cell.name, _summary(table.cells[cell.name]), flush=True)


def score(cell: Cell, table: Table, spec: str, work: Path, items: int | None, prefix: str) -> None:
    """Perplexity on both texts, and that many items of each task (0: all; None: no tasks).

    The model is opened only if something is missing.
    """
    opened: list[Any] = []

    def source() -> Any:
        if not opened:
            opened.append(open_any(spec))
        return opened[0]

    for name, text in (("wikitext2", data_directory() / WIKITEXT), ("c4", split_c4(work)[1])):
        measure = _perplexity(source, text, table.protocol)
        table.measured(cell, f"{prefix}{name}", measure)
    if items is None:
        return
    what = f"{prefix}tasks, {items} items" if items else f"{prefix}tasks"
    table.measured(cell, what, lambda: tasks(source(), items))


def _perplexity(source: Callable[[], Any], text: Path, protocol: Protocol) -> Callable[[], Any]:
    def measure() -> dict[str, Any]:
        from prunec.evaluation import perplexity

        found = perplexity(
            source().model,
            source().tokenizer,
            text,
            window=protocol.window,
            max_windows=protocol.windows,
        )
        return {**asdict(found), "data": text.name}

    return measure


def tasks(source: Any, items: int) -> list[dict[str, Any]]:
    """lm-eval's scores on the tasks that lie beside the texts."""
    from prunec.evaluation import task_scores

    folder = data_directory() / "lm_eval_tasks"
    found = task_scores(
        source.model,
        source.tokenizer,
        TASKS,
        include_path=[folder],
        limit=items or None,
        batch_size=16,
    )
    return [asdict(entry) for entry in found]


def open_any(spec: str) -> Any:
    import prunec
    from prunec.models import open_model

    return open_model(spec, load_pruned=prunec.load)


def prune_in_child(cell: Cell, protocol: Protocol, out: Path) -> dict[str, Any]:
    """Prune and save in a process of its own; what it took."""
    text, _ = split_c4(out.parent)
    job = {
        "model": protocol.model,
        "method": cell.method,
        "ratio": cell.ratio,
        "seed": cell.seed,
        "minutes": cell.minutes,
        "samples": protocol.samples,
        "seq_len": protocol.seq_len,
        "texts": [str(text), str(data_directory() / WIKIPEDIA)],
        "out": str(out),
    }
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def prune(
    *,
    model: str,
    method: str,
    ratio: float,
    seed: int,
    minutes: float | None,
    samples: int,
    seq_len: int,
    texts: Sequence[str],
    out: str,
) -> dict[str, Any]:
    """Time, memory over the imports and sizes of one run, in this process.

    Processor seconds say what a run on a machine with other work would take alone, on one thread.
    """
    import transformers.models.llama.modeling_llama  # noqa: F401 - an import, not the model

    import prunec.api
    from prunec.calibration import calibrate
    from prunec.models import open_model

    imported = psutil.Process().memory_info().rss
    source = open_model(model)
    calibration = calibrate(texts, source.tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    start, worked = time.perf_counter(), time.process_time()
    result = prunec.prune(
        source.model,
        recipe=method,
        ratio=ratio,
        calibration=calibration,
        seed=seed,
        settings={} if minutes is None else {"allocation.minutes": minutes},
    )
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    forward = forward_seconds(source.model, calibration.batches)
    result.save(out, tokenizer=source.tokenizer, base_model=model, overwrite=True)
    return {
        "seconds": seconds,
        "processor_seconds": worked,
        "forward_seconds": forward,
        "peak_bytes": peak - imported,
        "realised_ratio": result.report.realised_ratio,
        "parameters": result.report.parameters,
        "recipe": result.report.to_json()["recipe"],
        "calibration_digest": calibration.digest,
    }


@torch.no_grad()
def forward_seconds(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Processor seconds of the dense model's forward passes over a calibration, from a tenth."""
    timed = batches[:: max(1, len(batches) // 10)]
    model(**timed[0])  # to warm up
    start = time.process_time()
    for batch in timed:
        model(**batch)
    return (time.process_time() - start) * len(batches) / len(timed)


def recover(pruned: Path, out: Path, work: Path, steps: int) -> dict[str, Any]:
    """LoRA on the calibration part of C4, through the command that a user has."""
    text, _ = split_c4(work)
    start = time.perf_counter()
    command = [sys.executable, "-m", "prunec", "recover", str(pruned), "-o", str(out)]
    options = ["--method", "lora", "--data", str(text), "--steps", str(steps), "--overwrite"]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    return {"method": "lora", "steps": steps, "seconds": time.perf_counter() - start}


def split_c4(work: Path) -> tuple[Path, Path]:
    """C4 in two files: the first four fifths of its lines to calibrate on, the rest to score."""
    lines = (data_directory() / C4).read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 4 // 5
    parts = work / "c4-calibration.txt", work / "c4-held-out.txt"
    for path, part in zip(parts, (lines[:cut], lines[cut:]), strict=True):
        if not path.exists():
            path.write_text("".join(part), encoding="utf-8")
    return parts


def markdown(table: Table) -> str:
    """The table as the README shows it; what was not run is blank."""
    head = ["ratio", "method", "WikiText-2", "C4", *METRICS, "with LoRA", "seconds", "peak memory"]
    lines = [head, ["--:", ":--", *["--:"] * (len(head) - 2)]]
    dense = table.cells.get(Cell("dense", 0.0, 0).name, {})
    rows = sorted(table.cells.values(), key=lambda row: row["ratio"])
    lines += [_row(row, dense) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    pruning = row.get("pruning", {})
    return [
        f"{row['ratio']:.0%}" if row["ratio"] else "",
        row["method"]
        + (f" (seed {row['seed']})" if row["seed"] else "")
        + (f" in {row['minutes']:g} min" if row.get("minutes") else ""),
        *[_times(row.get(text), dense.get(text)) for text in ("wikitext2", "c4")],
        *[_accuracy(row, task, metric) for task, metric in METRICS.items()],
        _times(row.get("recovered wikitext2"), dense.get("wikitext2")),
        _seconds(pruning),
        f"{pruning['peak_bytes'] / 1e9:.2f} GB" if pruning else "",
    ]


def _seconds(pruning: dict[str, Any]) -> str:
    """What pruning took, and how many times the dense model's forward passes over its tokens."""
    if not pruning:
        return ""
    times = ""
    if pruning.get("forward_seconds"):
        times = f" ({pruning['processor_seconds'] / pruning['forward_seconds']:.1f} forwards)"
    return f"{pruning['seconds']:.0f}{times}"


def _times(found: dict[str, Any] | None, dense: dict[str, Any] | None) -> str:
    """A perplexity and how many times the dense one it is."""
    if not found or not dense:
        return ""
    return f"{found['value']:,.2f} ({found['value'] / dense['value']:,.2f} x)"


def _accuracy(row: dict[str, Any], task: str, metric: str) -> str:
    """The accuracy on the most items that were run, in per cent with its standard error."""
    runs = [row[what] for what in row if what.startswith("tasks")]
    entries = [e for run in runs for e in run if (e["task"], e["metric"]) == (task, metric)]
    if not entries:
        return ""
    best = max(entries, key=lambda entry: int(entry["samples"]))
    return f"{100 * best['value']:.1f} ± {100 * best['stderr']:.1f}"


def _summary(row: dict[str, Any]) -> str:
    values = {what: row[what]["value"] for what in ("wikitext2", "c4")}
    return "  ".join(f"{what} {value:,.2f}" for what, value in values.items())


if __name__ == "__main__":
    main()

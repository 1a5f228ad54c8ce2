"""What each part of SlimGPT is worth, and the order of the methods, over seeds of the calibration.

    python benchmarks/ablations.py                     # 50 %, seeds 0, 1 and 2
    python benchmarks/ablations.py --ratio 0.2 --only methods
    python benchmarks/ablations.py --markdown          # the tables of what has been run

Every row is `slimgpt` with one setting changed, with fewer or more tokens, or another method; every
cell one of benchmarks/methods.py (its texts, its results/methods.json, its --work), without tasks.
A row is compared with `slimgpt` seed by seed: the mean of the ratio of the perplexities, and its
standard deviation over the seeds. It is a tie where 1 is within one standard deviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cells import Cell, Protocol, Table
from methods import run

SAMPLES, SEQ_LEN = 32, 512
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}


@dataclass(frozen=True)
class Row:
    """A line of a table: what differs from `slimgpt` on the tokens of all others."""

    name: str
    method: str = "slimgpt"
    changed: tuple[str, ...] = ()
    samples: int = SAMPLES

    def cell(self, ratio: float, seed: int) -> Cell:
        return Cell(self.method, ratio, seed, None, self.changed)

    def protocol(self) -> Protocol:
        return Protocol("smollm2", self.samples, SEQ_LEN, window=1024, windows=10)


REFERENCE = Row("`slimgpt`")
TABLES: Mapping[str, Sequence[Row]] = {
    "parts": (
        REFERENCE,
        Row("the paper's Cholesky score", changed=("importance.score=slimgpt",)),
        Row("diagonal score", changed=("importance.score=diagonal",)),
        Row(
            "batches of 128 channels",
            changed=("importance.first_batch=128", "importance.last_batch=128"),
        ),
        Row("the same ratio in every block", changed=("allocation=uniform",)),
        Row("no compensation", changed=("compensation=none",)),
        Row("a quarter of the tokens", samples=SAMPLES // 4),
    ),
    "methods": (
        REFERENCE,
        *(Row(f"`{name}`", name) for name in ("slimllm", "flap", "llm-pruner", "wanda-sp")),
        Row("`llm-pruner`, the same ratio in every block", "llm-pruner", ("allocation=uniform",)),
        Row("`wanda-sp`, the middle blocks alone", "wanda-sp", ("allocation=layer-range",)),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--markdown", action="store_true", help="only print the tables")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="where models are kept")
    options = parser.parse_args()
    options.no_tasks, options.recover = True, []
    for rows in (TABLES[name] for name in options.only):
        if not options.markdown:
            run(Cell("dense", 0.0, 0), Table(REFERENCE.protocol()), options)
            for seed in options.seeds:
                for row in rows:
                    run(row.cell(options.ratio, seed), Table(row.protocol()), options)
        print("\n".join(markdown(rows, options.ratio, options.seeds)), end="\n\n")


def markdown(rows: Sequence[Row], ratio: float, seeds: Sequence[int]) -> Iterator[str]:
    """Mean and standard deviation over the seeds; what was not run is blank."""
    yield (
        f"| {ratio:.0%} | seeds | "
        + " | ".join(f"{text} | of `slimgpt`'s" for text in TEXTS.values())
        + " |"
    )
    yield "|:--|--:|" + "--:|--:|" * len(TEXTS)
    for row in rows:
        found = measured(row, ratio, seeds)
        reference = {} if row is REFERENCE else measured(REFERENCE, ratio, seeds)
        cells = [entry for text in TEXTS for entry in compared(found, reference, text)]
        yield f"| {row.name} | {len(found)} | {' | '.join(cells)} |"


def measured(row: Row, ratio: float, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The cells of a row that have been scored on every text, by seed."""
    table = Table(row.protocol()).cells
    cells = {seed: table.get(row.cell(ratio, seed).name, {}) for seed in seeds}
    return {seed: cell for seed, cell in cells.items() if cell.keys() >= TEXTS.keys()}


def compared(
    found: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]], text: str
) -> Iterator[str]:
    """The geometric mean of the perplexities, and how many times the reference's they are."""
    values = {seed: log(cell[text]["value"]) for seed, cell in found.items()}
    yield spread(list(values.values()))
    paired = [
        value - log(reference[seed][text]["value"])
        for seed, value in values.items()
        if seed in reference
    ]
    tie = len(paired) > 1 and abs(mean(paired)) <= stdev(paired)
    yield spread(paired) + (" (tie)" if tie else "")


def spread(logs: Sequence[float]) -> str:
    """``exp(mean) ± its standard deviation``, of logarithms."""
    if not logs:
        return ""
    centre = exp(mean(logs))
    deviation = f" ± {centre * stdev(logs):,.2f}" if len(logs) > 1 else ""
    return f"{centre:,.2f}{deviation}"


if __name__ == "__main__":
    main()

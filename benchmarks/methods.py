"""Every method at every ratio on one model and the same calibration tokens: the README's table.

    python benchmarks/methods.py --quick                 # 20 %, little text, 200 items a task
    python benchmarks/methods.py                         # 20, 30 and 50 %, 500 items a task
    python benchmarks/methods.py --items 0               # the whole task sets
    python benchmarks/methods.py --no-tasks              # perplexity only; tasks can follow later
    python benchmarks/methods.py --methods slimgpt auto --ratios 0.5 --seeds 0 1 2
    python benchmarks/methods.py --methods auto --ratios 0.5 --minutes 10 20 40  # of its search
    python benchmarks/methods.py --methods slimgpt --set compensation=none  # cells of their own
    python benchmarks/methods.py --methods slimgpt auto --texts c4       # calibrated on C4 alone
    python benchmarks/methods.py --markdown              # the table of what has been run
    python benchmarks/methods.py --markdown --against auto  # its tasks against each, item by item

Each cell is a method at a ratio and a seed. What has been measured stands in results/methods.json
and is not measured again; pruned models stay in --work until they are deleted, and are made again
where a score is missing. Calibration is half C4 (its first four fifths) and half Wikipedia, or one
of them; scored are WikiText-2 validation and the last fifth of C4, which no calibration window
touches. Each cell is pruned in its own process, for its own seconds and memory; `--jobs 2` takes
two at a time, on a thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from cells import RECOVERED, TASKS, TEXTS, Cell, Protocol, Table, differences, markdown
from common import data_directory
from memory import peak_bytes
from torch import Tensor

# The longest first, so that several jobs end together.
METHODS = ("auto", "llm-pruner", "slimllm", "flap", "slimgpt", "wanda-sp", "magnitude")
WIKITEXT = "text/wikitext-2/valid.tokenised.txt"
C4, WIKIPEDIA = "text/calib/c4.utf8", "text/calib/wiki.utf8"


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(prune(**json.loads(options.child))))
        return
    size = options.samples, options.seq_len, options.window, options.windows
    protocol = Protocol(options.model, *size, tuple(options.texts))
    if not options.markdown:
        run_all(list(cells(options)), Table(protocol), options)
    print(markdown(Table(protocol)))
    if options.against:
        print(differences(Table(protocol), options.against))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="RECIPE")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--minutes", nargs="+", type=float, default=[None], help="bounds of auto, one cell each"
    )
    parser.add_argument("--set", nargs="+", default=[], dest="changed", metavar="KEY=VALUE")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS, help="to calibrate on")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--items", type=int, default=500, help="items a task; 0: all of them")
    parser.add_argument("--no-tasks", action="store_true", help="perplexity only")
    parser.add_argument("--recover", nargs="*", default=[], metavar="RECIPE", help="and LoRA these")
    parser.add_argument("--steps", type=int, default=200, help="of recovery")
    parser.add_argument(
        "--quick", action="store_true", help="20 %%, 16 x 512 tokens, 200 items, 2 jobs"
    )
    parser.add_argument("--markdown", action="store_true", help="only print the table")
    parser.add_argument("--against", metavar="RECIPE", help="and its differences on the tasks")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="where models are kept")
    parser.add_argument("--jobs", type=int, help="processes of a thread each; 1, with --quick 2")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.ratios, options.items, options.windows = [0.2], 200, 5
        options.samples, options.seq_len, options.minutes = 16, 512, [4]
    options.jobs = options.jobs or (2 if options.quick else 1)
    return options


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    yield Cell("dense", 0.0, 0)
    for ratio in options.ratios:
        for method in options.methods:
            for seed in options.seeds:
                for minutes in options.minutes if method == "auto" else [None]:
                    yield Cell(method, ratio, seed, minutes, tuple(options.changed))


def run_all(todo: Sequence[Cell], table: Table, options: argparse.Namespace) -> None:
    """One after another, or in several processes of a thread each."""
    if options.jobs == 1:
        for cell in todo:
            run(cell, table, options)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    split_c4(work_of(table.protocol, options))  # all read it
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, cell, table, options) for cell in todo]):
            done.result()


def work_of(protocol: Protocol, options: argparse.Namespace) -> Path:
    work: Path = options.work / protocol.calibrated.replace(" ", "-")
    work.mkdir(parents=True, exist_ok=True)
    return work


def run(cell: Cell, table: Table, options: argparse.Namespace) -> None:
    """Prune, then score; each step only where it is missing."""
    work = work_of(table.protocol, options)
    items = None if options.no_tasks else options.items
    if cell.method == "dense":
        score(cell, table, opener(table.protocol.model), work, items, "")
        return
    pruned = work / cell.folder
    make = partial(prune_in_child, cell, table.protocol, pruned)
    table.measured(cell, "pruning", make)
    score(cell, table, opener(pruned, make), work, items, "")
    if cell.method in options.recover:
        recovered = work / f"{cell.folder}-recovered"

        def recovery() -> dict[str, Any]:
            if not pruned.exists():
                make()
            return recover(pruned, recovered, work, options.steps)

        table.measured(cell, "recovery", recovery)
        score(cell, table, opener(recovered, recovery), work, items, RECOVERED)


def opener(spec: str | Path, make: Callable[[], Any] | None = None) -> Callable[[], Any]:
    """Opens a model once, when it is needed; a directory that was deleted is made again."""

    @cache
    def opened() -> Any:
        import prunec
        from prunec.models import open_model

        if make and not Path(spec).exists():
            make()
        return open_model(str(spec), load_pruned=prunec.load)

    return opened


def score(
    cell: Cell,
    table: Table,
    source: Callable[[], Any],
    work: Path,
    items: int | None,
    prefix: str,
) -> None:
    """Perplexity on both texts, and that many items of each task (0: all; None: no tasks)."""
    for name, text in (("wikitext2", data_directory() / WIKITEXT), ("c4", split_c4(work)[1])):
        measure = _perplexity(source, text, table.protocol)
        table.measured(cell, f"{prefix}{name}", measure)
    if items is not None:
        what = f"{prefix}tasks, {items} items" if items else f"{prefix}tasks"
        table.measured(cell, what, lambda: tasks(source(), items))
    row = table.cells[cell.name]
    values = {what: row[f"{prefix}{what}"]["value"] for what in ("wikitext2", "c4")}
    found = "  ".join(f"{what} {value:,.2f}" for what, value in values.items())
    print(f"{cell.name} {prefix}{found}", flush=True)


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
        tuple(TASKS),
        include_path=[folder],
        limit=items or None,
        batch_size=16,
    )
    return [asdict(entry) | {"outcomes": _digits(entry.outcomes)} for entry in found]


def _digits(outcomes: Sequence[float]) -> str:
    """A digit an item, 1 where it is right."""
    return "".join(f"{outcome:.0f}" for outcome in outcomes)


def prune_in_child(cell: Cell, protocol: Protocol, out: Path) -> dict[str, Any]:
    """Prune and save in a process of its own; what it took."""
    files = {"c4": split_c4(out.parent)[0], "wikipedia": data_directory() / WIKIPEDIA}
    job = {
        "model": protocol.model,
        "method": cell.method,
        "ratio": cell.ratio,
        "seed": cell.seed,
        "settings": cell.settings,
        "samples": protocol.samples,
        "seq_len": protocol.seq_len,
        "texts": [str(files[name]) for name in protocol.texts],
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
    settings: dict[str, Any],
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
        settings=settings,
    )
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    peak = peak_bytes()
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
    """Processor seconds of the dense model's passes over a calibration, from a few batches."""
    timed = batches[:: max(1, len(batches) // 5)]
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


if __name__ == "__main__":
    main()

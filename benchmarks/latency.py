"""Latency and memory of smaller models in each engine, beside the ideal.

    python benchmarks/latency.py                      # SmolLM2 less 20, 30 and 50 %
    python benchmarks/latency.py smaller --dense DIR --engines eager onnxruntime
    python benchmarks/latency.py --again compile      # measure it anew
    python benchmarks/latency.py --linears            # MLPs alone, at widths of several multiples
    python benchmarks/latency.py --markdown           # only print the table of what has been run

Without directories the dense model is pruned by the recipe slimgpt, with its own rule for widths,
on few random tokens: latency depends on the sizes alone. Each engine runs in a process of its own,
in which the models take turns, so that a machine that slows, slows all of them; a speed-up is the
median of those within a turn. The time of one thread is that of the processor, which other programs
on the core do not lengthen. Memory is the growth of a process with one model alone, opening
included. A profile says where the time of an eager prefill goes.

The ideal of prefill is the ratio of FLOPs of 1 x prompt tokens, LM head included (llama.cpp
computes the logits of the last token alone, and so does its ideal); of decoding the ratio of the
bytes of the weights, which a step reads once.

What has been measured stands in results/latency.json and is not measured again; the models and what
was exported stay in --work until they are deleted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import read, write
from engines import LIBRARIES
from torch.nn import functional as F

RATIOS = (0.2, 0.3, 0.5)
MULTIPLES = (1, 8, 16, 32, 64)
FORMS = {"onnxruntime": ("onnx", "model.onnx"), "llama.cpp": ("gguf", "model.gguf")}
NAMES = {"eager": "torch eager", "compile": "torch.compile"}
STEPS = 16


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    tables = read("latency") or {}
    table = tables.setdefault(subject(options), {})
    for name, measure in {} if options.markdown else cells(options).items():
        if name not in table or name in options.again:
            table[name] = measure()
            print("written:", write("latency", tables), name, file=sys.stderr, flush=True)
    print(markdown(table), parts(table), sep="\n\n")


def cells(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What to measure, by the name in the table."""
    if options.linears:
        return {"linears": partial(linears, options)}
    found: dict[str, Callable[[], Any]] = {}
    for name in options.engines:
        if all(map(find_spec, LIBRARIES[name])):
            found[name] = partial(measured, name, options)
        else:
            print(f"{name}: absent", file=sys.stderr)
    return {"ideal": partial(ideals, options), "profile": partial(profile, options), **found}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pruned", nargs="*", type=Path, help="directories that prunec wrote")
    parser.add_argument("--dense", default="smollm2", help="the model they were made from")
    parser.add_argument("--engines", nargs="+", choices=[*LIBRARIES], default=[*LIBRARIES])
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="of table's cells")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="turns, after one to warm up")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill")
    parser.add_argument("--work", type=Path, default=Path(".bench/latency"), help="for the models")
    parser.add_argument("--linears", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args()


def subject(options: argparse.Namespace) -> str:
    """What all cells of one table share; another subject is another table."""
    labels = [path.name for path in options.pruned] or [f"-{ratio:.0%}" for ratio in RATIOS]
    threads = f"{options.threads} thread" + "s" * (options.threads > 1)
    return ", ".join([Path(options.dense).name, *labels, f"1 x {options.prompt}", threads])


def directories(options: argparse.Namespace) -> dict[str, Path]:
    """The dense model and the smaller ones, as directories, by label; made where they are not."""
    if Path(options.dense).is_dir():
        found = {"dense": Path(options.dense)}
    else:
        found = {"dense": options.work / "dense"}
        if not found["dense"].exists():
            save_dense(options.dense, found["dense"])
    if options.pruned:
        return found | {path.name: path for path in options.pruned}
    for ratio in RATIOS:
        found[f"-{ratio:.0%}"] = folder = options.work / f"less_{100 * ratio:.0f}"
        if not folder.exists():
            save_pruned(options.dense, ratio, folder)
    return found


def save_dense(model: str, out: Path) -> None:
    from prunec.models import open_model

    source, part = open_model(model), out.with_name("part")
    source.model.save_pretrained(part)
    source.tokenizer.save_pretrained(part)
    part.rename(out)


def save_pruned(model: str, ratio: float, out: Path) -> None:
    import prunec
    from prunec.models import open_model

    source = open_model(model)
    tokens = torch.randint(1000, (4, 256), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": row[None]} for row in tokens]
    result = prunec.prune(source.model, recipe="slimgpt", ratio=ratio, calibration=batches)
    result.save(out, tokenizer=source.tokenizer)


def measured(engine: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By label the milliseconds of each turn, and the memory."""
    files = directories(options)
    if engine in FORMS:
        form, name = FORMS[engine]
        files = {label: exported(form, path, options) / name for label, path in files.items()}
    rows: dict[str, dict[str, Any]] = child(engine, files, options, options.repeats)
    for label, path in files.items():
        rows[label] |= child(engine, {label: path}, options, 0)[label]
    return rows


def exported(form: str, folder: Path, options: argparse.Namespace) -> Path:
    """What the engine opens; prunec compares it with the model there."""
    import prunec

    out: Path = options.work / form / folder.name
    if not out.exists():
        finding = prunec.export(folder, form, out).finding
        print(f"{folder.name}: {finding.engine}: {finding.detail}", file=sys.stderr)
    return out


def child(engine: str, files: dict[str, Path], options: argparse.Namespace, repeats: int) -> Any:
    job = {
        "engine": engine,
        "files": {label: str(path) for label, path in files.items()},
        "threads": options.threads,
        "prompt": options.prompt,
        "steps": STEPS,
        "repeats": repeats,
    }
    command = [sys.executable, str(Path(__file__).with_name("engines.py")), json.dumps(job)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def ideals(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of the dense model, by label: FLOPs with all logits and with the last, and weights."""
    from torch.utils.flop_counter import FlopCounterMode

    counts: dict[str, dict[str, float]] = {}
    ids = torch.ones(1, options.prompt, dtype=torch.long)
    for label, folder in directories(options).items():
        model = opened(folder, attn_implementation="eager")
        counts[label] = {"weights": sum(p.nbytes for p in model.parameters())}
        for name, kept in (("all logits", 0), ("last logits", 1)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(ids, use_cache=False, logits_to_keep=kept)
            counts[label][name] = counter.get_total_flops()
    dense = counts["dense"]
    return {label: {n: c / dense[n] for n, c in row.items()} for label, row in counts.items()}


def opened(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)
    return found.eval()


def profile(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of an eager prefill, by what computes: matrix products, attention, the rest.

    Medians of the turns, of the wall clock.
    """
    ids = torch.arange(options.prompt)[None] % 1000 + 1
    models = {label: opened(folder) for label, folder in directories(options).items()}
    turns: dict[str, list[Counter[str]]] = {label: [] for label in models}
    for _ in range(options.repeats + 1):
        for label, model in models.items():
            turns[label].append(_spent(lambda model=model: model(ids, use_cache=False)))
    return {
        label: {
            n: round(median(t[n] for t in own[1:]), 2) for n in ("products", "attention", "rest")
        }
        for label, own in turns.items()
    }


def _spent(run: Callable[[], object]) -> Counter[str]:
    from torch.profiler import ProfilerActivity

    with (
        torch.inference_mode(),
        torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        run()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[_part(event.key)] += event.self_cpu_time_total / 1e3
    return spent


def _part(operator: str) -> str:
    if operator in ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"):
        return "products"
    return "attention" if "scaled_dot_product" in operator else "rest"


def linears(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """MLPs of SmolLM2's sizes, on one row of input and on a prompt."""
    sizes = {"hidden": 576, "width": 1536, "layers": 10, "repeats": options.repeats}
    return {f"{rows} rows": gated(rows=rows, **sizes) for rows in (1, options.prompt)}


def gated(
    *, hidden: int, width: int, rows: int, layers: int, repeats: int
) -> list[dict[str, float]]:
    """Gated MLPs of widths around 0.8 of the dense one, on [rows, hidden] inputs.

    Without rounding each layer has a width of its own, as pruning leaves it: 0.8 +- 0.1 of the
    dense one, odd numbers included; rounded, the nearest multiples of these.
    """
    generator = torch.Generator().manual_seed(0)
    draws = (0.7 + 0.2 * torch.rand(layers, generator=generator)).tolist()
    x = torch.randn(rows, hidden, generator=generator)

    def stack(widths: list[int]) -> Callable[[], object]:
        weights = [
            (torch.randn(w, hidden), torch.randn(w, hidden), torch.randn(hidden, w)) for w in widths
        ]

        def run() -> object:
            out = x
            for gate, up, down in weights:
                out = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
            return out

        return run

    sizes = {0: [width] * layers}
    for multiple in MULTIPLES:
        sizes[multiple] = [max(multiple, round(d * width / multiple) * multiple) for d in draws]
    with torch.inference_mode():
        seconds = alternating({name: stack(widths) for name, widths in sizes.items()}, repeats)
    whole = sum(sizes[0])
    return [
        {"multiple_of": name, "time": seconds[name] / seconds[0], "ideal": sum(sizes[name]) / whole}
        for name in MULTIPLES
    ]


def alternating(runs: dict[int, Callable[[], object]], repeats: int) -> dict[int, float]:
    """Median seconds of each run, all of them in turn, after one warm-up."""
    seconds: dict[int, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def markdown(table: dict[str, Any]) -> str:
    """Speed-ups over the dense model, the ideal, and the part of it that was reached."""
    head = ["engine", "model", "prefill", "speed-up", "decoding", "speed-up", "memory"]
    lines = [head, [":--", ":--", *["--:"] * (len(head) - 2)]]
    for engine in [name for name in LIBRARIES if name in table]:
        for label, row in table[engine].items():
            flops = "last logits" if engine == "llama.cpp" else "all logits"
            lines.append(
                [
                    NAMES.get(engine, engine),
                    label,
                    *_times(table, engine, label, "prefill_ms", flops),
                    *_times(table, engine, label, "decode_ms", "weights"),
                    f"{row['memory_bytes'] / 1e6:,.0f} MB",
                ]
            )
    return _joined(lines)


def parts(table: dict[str, Any]) -> str:
    """What the time of an eager prefill goes to, and how much of the dense model's is left."""
    found = table.get("profile", {})
    lines = [["part", *found], [":--", *["--:"] * len(found)]]
    for name in next(iter(found.values()), {}):
        whole = found["dense"][name]
        left = (f", {row[name] / whole:.0%}" * (label != "dense") for label, row in found.items())
        shown = zip(found.values(), left, strict=True)
        lines.append([name, *(f"{row[name]:,.0f} ms{part}" for row, part in shown)])
    return _joined(lines)


def _joined(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(table: dict[str, Any], engine: str, label: str, what: str, ideal: str) -> list[str]:
    """Milliseconds; the dense model's over them, of the ideal."""
    rows = table[engine]
    if what not in rows[label]:
        return ["", ""]
    time = f"{median(rows[label][what]):,.1f} ms"
    if label == "dense":
        return [time, ""]
    found = median(d / p for d, p in zip(rows["dense"][what], rows[label][what], strict=True))
    best = 1 / table["ideal"][label][ideal]
    return [time, f"{found:.2f} of {best:.2f}: {found / best:.0%}"]


if __name__ == "__main__":
    main()

"""Latency and memory of smaller models in each engine, beside the ideal.

    python benchmarks/latency.py                      # SmolLM2 less 20, 30 and 50 %
    python benchmarks/latency.py smaller --dense DIR --engines eager onnxruntime

Without directories the dense model is cut to the sizes that the recipe slimgpt gives (by magnitude:
the weights do not matter here). Each engine runs in a process of its own, in which the models take
turns. The ideal of prefill is the ratio of FLOPs of 1 x prompt tokens, LM head included (llama.cpp
computes the logits of the last token alone, and so does its ideal); of decoding the ratio of the
bytes of the weights, which a step reads once. `--profile` says where the time of a prefill goes;
`--linears` times MLPs alone, at widths of several multiples. Writes results/latency.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import write
from engines import LIBRARIES
from torch.nn import functional as F

RATIOS = (0.2, 0.3, 0.5)
MULTIPLES = (1, 8, 16, 32, 64)
FORMS = {"onnxruntime": ("onnx", "model.onnx"), "llama.cpp": ("gguf", "model.gguf")}
STEPS = 16


def alternating(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, all of them in turn, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def linears(
    hidden: int, width: int, rows: int, layers: int, repeats: int
) -> list[dict[str, float]]:
    """Gated MLPs of the dense width, and of widths around 0.8 of it, on [rows, hidden] inputs.

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

    sizes = {"dense": [width] * layers}
    for multiple in MULTIPLES:
        sizes[str(multiple)] = [
            max(multiple, round(d * width / multiple) * multiple) for d in draws
        ]
    with torch.inference_mode():
        seconds = alternating({name: stack(widths) for name, widths in sizes.items()}, repeats)
    whole = sum(sizes["dense"])
    return [
        {
            "multiple_of": int(name),
            "time": seconds[name] / seconds["dense"],
            "ideal": sum(sizes[name]) / whole,
        }
        for name in sizes
        if name != "dense"
    ]


def directories(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """The dense model and the smaller ones, as directories, by label."""
    import prunec
    from prunec.models import open_model

    if Path(options.dense).is_dir():
        found = {"dense": Path(options.dense)}
        source = None
    else:
        source = open_model(options.dense)
        source.model.save_pretrained(work / "dense")
        source.tokenizer.save_pretrained(work / "dense")
        found = {"dense": work / "dense"}
    if options.pruned:
        return found | {path.name: path for path in options.pruned}
    source = source or open_model(options.dense)
    for ratio in RATIOS:
        result = prunec.prune(
            source.model,
            recipe="magnitude",
            ratio=ratio,
            calibration=[source.example],
            settings={"allocation": "log-increase"},
        )
        label = f"-{ratio:.0%}"
        result.save(work / label, tokenizer=source.tokenizer)
        found[label] = work / label
    return found


def exported(engine: str, folders: dict[str, Path], work: Path) -> dict[str, Path]:
    """What the engine opens, by label."""
    import prunec

    if engine not in FORMS:
        return folders
    form, name = FORMS[engine]
    for label, folder in folders.items():
        done = prunec.export(folder, form, work / form / label)
        print(f"{label}: {done.finding.engine}: {done.finding.detail}", file=sys.stderr)
    return {label: work / form / label / name for label in folders}


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


def ideals(folders: dict[str, Path], prompt: int) -> dict[str, dict[str, float]]:
    """Of the dense model, by label: FLOPs with all logits and with the last, and weights."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    counts: dict[str, dict[str, float]] = {}
    ids = torch.ones(1, prompt, dtype=torch.long)
    for label, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, attn_implementation="eager"
        )
        counts[label] = {"weights": sum(p.nbytes for p in model.parameters())}
        for name, kept in (("all logits", 0), ("last logits", 1)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(ids, use_cache=False, logits_to_keep=kept)
            counts[label][name] = counter.get_total_flops()
    dense = counts["dense"]
    return {label: {n: c / dense[n] for n, c in row.items()} for label, row in counts.items()}


def profile(folders: dict[str, Path], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of an eager prefill, by what computes: matrix products, attention, the rest."""
    from torch.profiler import ProfilerActivity
    from transformers import AutoModelForCausalLM

    ids = torch.arange(options.prompt)[None] % 1000 + 1
    found = {}
    for label, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.inference_mode():
            model(ids, use_cache=False)
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(options.repeats):
                    model(ids, use_cache=False)
        spent: Counter[str] = Counter()
        for event in profiler.key_averages():
            spent[_part(event.key)] += event.self_cpu_time_total / 1e3 / options.repeats
        found[label] = {name: round(spent[name], 2) for name in ("products", "attention", "rest")}
    return found


def _part(operator: str) -> str:
    if operator in ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"):
        return "products"
    return "attention" if "scaled_dot_product" in operator else "rest"


def table(engine: str, rows: dict[str, dict[str, float]], ideal: dict[str, Any]) -> None:
    """Beside each ratio to the dense model the part of the ideal speed-up that it is."""
    flops = "last logits" if engine == "llama.cpp" else "all logits"
    for label, row in rows.items():
        line = f"{engine:12} {label:8}"
        for name, best in (("prefill_ms", flops), ("decode_ms", "weights")):
            if name in row:
                ratio = row[name] / rows["dense"][name]
                part = ideal[label][best] / ratio
                line += f"  {name[:-3]} {row[name]:8.1f} ms {ratio:5.2f} x, {part:4.0%} of ideal"
        print(f"{line}  {row['memory_bytes'] / 1e6:7.0f} MB")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"prompt": options.prompt, "steps": STEPS}
    if options.linears:
        figures["linears"] = {
            f"{rows} x 576, width 1536": linears(576, 1536, rows, 10, options.repeats)
            for rows in (1, options.prompt)
        }
        print(json.dumps(figures["linears"], indent=1))
        return
    with tempfile.TemporaryDirectory(prefix="prunec-latency-") as name:
        work = Path(name)
        folders = directories(options, work)
        figures["ideal"] = ideal = ideals(folders, options.prompt)
        if options.profile:
            figures["profile"] = profile(folders, options)
            print(json.dumps(figures["profile"], indent=1))
        for engine in options.engines:
            if not all(map(find_spec, LIBRARIES[engine])):
                print(f"{engine:12} absent")
                continue
            files = exported(engine, folders, work)
            rows = child(engine, files, options, options.repeats)
            for label, path in files.items():
                rows[label] |= child(engine, {label: path}, options, 0)[label]
            figures[engine] = rows
            table(engine, rows, ideal)
    print("written:", write("latency", figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pruned", nargs="*", type=Path, help="directories that prunec wrote")
    parser.add_argument("--dense", default="smollm2", help="the model they were made from")
    parser.add_argument("--engines", nargs="+", choices=[*LIBRARIES], default=[*LIBRARIES])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--linears", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()

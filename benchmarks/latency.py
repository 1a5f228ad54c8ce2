"""What a narrower layer saves, in ratios to the dense one measured in the same process.

Two questions. Of a pruned directory beside its dense model: how much faster are prefill and decode,
and how much of the ideal (the ratio of FLOPs, LM head included) is that. Of the linears alone: what
widths rounded down to a multiple of 16, 32 or 64 give against the uneven width that pruning left.
Dense and pruned runs alternate, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

MULTIPLES = (1, 8, 16, 32, 64)


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


def models(dense: nn.Module, pruned: nn.Module, prompt: int, repeats: int) -> dict[str, float]:
    """Prefill of 1 x prompt and a decoding step after it, pruned over dense."""
    ids = torch.arange(prompt)[None] % 1000

    def prefill(model: nn.Module) -> Callable[[], object]:
        return lambda: model(ids, use_cache=False)

    def step(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            past = model(ids, use_cache=True).past_key_values
            start = time.perf_counter()
            for _ in range(8):
                model(ids[:, :1], past_key_values=past, use_cache=True)
            steps.append(time.perf_counter() - start)
            return None

        steps: list[float] = []
        run.__dict__["steps"] = steps
        return run

    pair = {"dense": dense, "pruned": pruned}
    with torch.inference_mode():
        whole = alternating({name: prefill(model) for name, model in pair.items()}, repeats)
        decoders = {name: step(model) for name, model in pair.items()}
        alternating(decoders, repeats)
    decode = {name: median(run.__dict__["steps"][1:]) for name, run in decoders.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in pair.items()}
    return {
        "prefill": whole["pruned"] / whole["dense"],
        "decode": decode["pruned"] / decode["dense"],
        "parameters": counts["pruned"] / counts["dense"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pruned", nargs="?", type=Path, help="a directory that prunec wrote")
    parser.add_argument("dense", nargs="?", default="smollm2", help="the model it was made from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, object] = {
        "torch": torch.__version__,
        "threads": arguments.threads,
        "linears": {
            f"{rows} x 576, width 1536": linears(576, 1536, rows, 10, arguments.repeats)
            for rows in (1, arguments.prompt)
        },
    }
    if arguments.pruned:
        import prunec
        from prunec.models import open_model

        pair = open_model(arguments.dense).model, prunec.load(arguments.pruned)
        found["models"] = models(*pair, arguments.prompt, arguments.repeats)
    json.dump(found, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

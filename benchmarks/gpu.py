"""Time and GPU memory of a whole prune of a LLaMA-shaped checkpoint on one GPU.

The checkpoint (random weights, bf16, sharded) is written first, and stays in its files: weights
come to the GPU between two sites, activations wait in memory. Needs this repository, which does not
have to be installed, and torch with CUDA, transformers, safetensors, networkx, and accelerate, with
which transformers leaves weights in their files:

    PYTHONPATH=. python benchmarks/gpu.py --shape 7b --samples 128 --tokens 2048
    PYTHONPATH=. python benchmarks/gpu.py --shape 13b

SlimGPT reports 11.3 minutes and 7.4 GB for 7B on an A100 (arXiv 2412.18110). Writes
results/gpu.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from common import read, write
from out_of_core import SHAPES, Meter, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--depth", type=int, help="layers, where not all of the shape's")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--recipe", default="slimgpt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is put, and removed")
    options = parser.parse_args()
    depth = options.depth or {"small": 8, "7b": 32, "13b": 40}[options.shape]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        declare_prunec(Path(folder) / "declared")
        size = write_checkpoint(Path(folder) / "model", SHAPES[options.shape], depth)
        row = measure(Path(folder), options)
        row |= {"shape": options.shape, "depth": depth, "weights_bytes": size}
        row |= {name: vars(options)[name] for name in ("samples", "tokens", "recipe")}
        show(row)
        kept = [other for other in read("gpu") or [] if other["shape"] != options.shape]
        print("written:", write("gpu", [*kept, row]))


def declare_prunec(folder: Path) -> None:
    """Let prunec, where it is not installed, find its plug-ins as its pyproject.toml names them."""
    try:
        version("prunec")
    except PackageNotFoundError:
        root = Path(__file__).resolve().parents[1]
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        home = folder / "prunec.dist-info"
        home.mkdir(parents=True)
        (home / "METADATA").write_text("Metadata-Version: 2.1\nName: prunec\nVersion: 0\n")
        lines = []
        for group, entries in project["entry-points"].items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        (home / "entry_points.txt").write_text("\n".join(lines))
        sys.path[:0] = [str(root), str(folder)]


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Open, prune, prove, write and reopen; times by step, and the peak on the GPU."""
    import prunec.api
    from prunec.models import open_model
    from prunec.models.quiet import quiet

    generator = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.randint(3, 500, (1, options.tokens), generator=generator)}
        for _ in range(options.samples)
    ]
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(options.device)
    meter, started = Meter(), time.perf_counter()
    with quiet():
        with meter.task("open"):
            source = open_model(
                str(folder / "model"), dtype="bfloat16", device=options.device, out_of_core=True
            )
        result = prunec.prune(
            source.model,
            recipe=options.recipe,
            ratio=0.2,
            calibration=batches,
            weights=source.weights,
            device=source.device,
            activations="memory",
            progress=meter,
        )
        result.save(folder / "out", progress=meter)
    return {
        "device": torch.cuda.get_device_name(options.device) if on_gpu else options.device,
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(options.device) if on_gpu else None,
        "peak_bytes": max(step["peak_bytes"] for step in meter.steps.values()),
        "removed": result.report.realised_ratio,
        "checks": list(result.report.checks),
        "steps": meter.steps,
    }


def show(row: dict[str, Any]) -> None:
    gpu = row["gpu_peak_bytes"]
    print(
        f"{row['shape']}, {row['depth']} layers on {row['device']}: {row['minutes']:.1f} minutes,"
        f" peak {gpu / 1e9 if gpu else 0:.2f} GB on the GPU, {row['peak_bytes'] / 1e9:.2f} GB here"
    )
    for name, step in row["steps"].items():
        print(f"    {name:45} {step['seconds']:7.1f} s")


if __name__ == "__main__":
    main()

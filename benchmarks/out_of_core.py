"""Peak memory of a prune against the size of the model, weights left in their files.

LLaMA-shaped checkpoints with random weights are written shard by shard, pruned by 20 % and saved,
each in a process of its own; with ``--in-memory`` also with the weights loaded. Peak resident
memory is what the system reports, over all and step by step; what the imports take
(``floor_bytes``) is measured in the same process before the model is opened. The process that opens
the result again is counted by itself (``gate_peak_bytes``).

    python benchmarks/out_of_core.py --depths 4 8 16
    python benchmarks/out_of_core.py --shape 7b --depths 32 --threads 2
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory import forget_peak, peak_bytes

SHAPES = {
    "small": {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816, "heads": 16},
    "7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "heads": 32},
    "13b": {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "heads": 40},
}
ABOUT_SHARD = 1_000_000_000  # bytes


def write_checkpoint(directory: Path, shape: Mapping[str, int], depth: int) -> int:
    """A LLaMA of this shape in bf16, a shard a gigabyte; bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {name: size for name, size in shape.items() if name != "heads"}
    heads = {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["heads"]}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=depth)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    placement: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(placement.values())):05}.safetensors"
        save_file(shard, directory / file, {"format": "pt"})
        placement.update(dict.fromkeys(shard, file))
        shard.clear()

    total = 0
    for name, like in model.state_dict().items():
        tensor = torch.ones(like.shape, dtype=torch.bfloat16)
        if like.ndim > 1:
            tensor.normal_(0.0, 0.02, generator=generator)
        shard[name], total = tensor, total + tensor.nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > ABOUT_SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": placement}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Meter:
    """A progress that notes what each step takes of memory and time (Linux only)."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, float]] = {}
        self._open = ["between steps"]
        self._since = self._now()
        self._note()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def _note(self) -> None:
        """What went on since the last note belongs to the innermost step."""
        new = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0}
        step, now = self.steps.setdefault(self._open[-1], new), self._now()
        for name, end, start in zip(("seconds", "cpu_seconds"), now, self._since, strict=True):
            step[name] = round(step[name] + end - start, 3)
        step["peak_bytes"] = max(step["peak_bytes"], peak_bytes())
        self._since = now
        forget_peak()

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Meter]:
        self._note()
        self._open.append(description)
        try:
            yield self
        finally:
            self._note()
            self._open.pop()

    def advance(self, n: int = 1) -> None:
        self._note()

    def update(self, description: str) -> None:
        """Only whole steps are told apart."""

    def row(self, cells: Mapping[str, str]) -> None:
        print(round(time.perf_counter() - START), dict(cells), file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def run_here(job: dict[str, Any]) -> dict[str, Any]:
    """One prune in this process."""
    import resource

    import psutil
    import torch

    import prunec
    import prunec.api
    from prunec.models import open_model
    from prunec.models.quiet import quiet

    torch.set_num_threads(job["threads"])
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.randint(3, 500, (1, job["tokens"]), generator=generator)}
        for _ in range(job["samples"])
    ]
    floor, started, meter = psutil.Process().memory_info().rss, time.perf_counter(), Meter()
    with quiet():
        with meter.task("open"):
            source = open_model(job["model"], dtype=job["dtype"], out_of_core=job["out_of_core"])
        result = prunec.prune(
            source.model,
            recipe=job["recipe"],
            ratio=0.2,
            calibration=batches,
            weights=source.weights,
            progress=meter,
        )
        result.save(job["out"], max_shard_size=job["shard"], progress=meter)
    return {
        "out_of_core": job["out_of_core"],
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(sum(step["cpu_seconds"] for step in meter.steps.values()), 1),
        "floor_bytes": floor,
        "peak_bytes": max(step["peak_bytes"] for step in meter.steps.values()),
        "gate_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "removed": result.report.realised_ratio,
        "checks": list(result.report.checks),
        "steps": meter.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--recipe", default="slimgpt")
    parser.add_argument("--dtype", default="bfloat16", help="in which the model is computed")
    parser.add_argument("--shard", default="1GB", help="largest file of the result")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--in-memory", action="store_true", help="also with the weights loaded")
    parser.add_argument("--folder", type=Path, help="where checkpoints are put, and removed again")
    parser.add_argument("--write", default="out_of_core", help="name of the file in results/")
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(run_here(json.loads(arguments.job))))
        return
    from common import read, write

    settings = {
        name: vars(arguments)[name]
        for name in ("samples", "tokens", "recipe", "dtype", "shard", "threads")
    }
    rows: list[dict[str, Any]] = []
    for depth in arguments.depths:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            size = write_checkpoint(Path(folder) / "model", SHAPES[arguments.shape], depth)
            for out_of_core in (True, False) if arguments.in_memory else (True,):
                out = Path(folder) / "out"
                paths = {"model": str(Path(folder) / "model"), "out": str(out)}
                found = _in_a_process({**settings, **paths, "out_of_core": out_of_core})
                shutil.rmtree(out)
                row = {"shape": arguments.shape, "depth": depth, "weights_bytes": size, **found}
                rows.append({**row, "settings": settings})
                _show(rows[-1])
        new = {(row["shape"], row["depth"]) for row in rows}
        earlier = read(arguments.write) or []
        kept = [row for row in earlier if (row["shape"], row["depth"]) not in new]
        print("written:", write(arguments.write, [*kept, *rows]))


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _show(row: Mapping[str, Any]) -> None:
    way = "out of core" if row["out_of_core"] else "in memory"
    print(
        f"{row['depth']:3} layers  weights {row['weights_bytes'] / 1e9:6.2f} GB  {way:11}"
        f"  peak {row['peak_bytes'] / 1e9:5.2f} GB (imports {row['floor_bytes'] / 1e9:.2f})"
        f"  gate {row['gate_peak_bytes'] / 1e9:5.2f} GB  {row['seconds']:6.0f} s"
    )
    for name, step in row["steps"].items():
        print(
            f"      {name:45} {step['peak_bytes'] / 1e9:5.2f} GB {step['seconds']:7.1f} s"
            f" {step['cpu_seconds']:7.1f} s of processor"
        )
    sys.stdout.flush()


START = time.perf_counter()

if __name__ == "__main__":
    main()

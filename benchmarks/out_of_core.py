"""Peak memory of a prune against the size of the model, weights loaded and weights in their files.

LLaMA-shaped checkpoints with random weights are written shard by shard, pruned by 20 % and saved,
each in a process of its own. Peak resident memory is what the system reports at the end; what the
imports take (`floor_bytes`) is measured in the same process before the model is opened.

    python benchmarks/out_of_core.py --depths 4 8 16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "out_of_core.json"


def write_checkpoint(directory: Path, shape: dict[str, int]) -> int:
    """A LLaMA of this shape in fp32, one shard a layer; bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, num_key_value_heads=shape["num_attention_heads"])
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float32
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    placement, total = {}, 0
    for file, names in shards.items():
        tensors = {}
        for name in names:
            size = model.state_dict()[name].shape
            noise = torch.randn(size, generator=generator)
            tensors[name] = noise * 0.02 if len(size) > 1 else noise * 0.0 + 1.0
            total += tensors[name].nbytes
        save_file(tensors, directory / file, {"format": "pt"})
        placement |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": placement}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


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
    floor, started = psutil.Process().memory_info().rss, time.perf_counter()
    with quiet():
        source = open_model(job["model"], out_of_core=job["out_of_core"])
        result = prunec.prune(
            source.model,
            recipe=job["recipe"],
            ratio=0.2,
            calibration=batches,
            weights=source.weights,
        )
        pruned = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result.save(job["out"])
    return {
        "out_of_core": job["out_of_core"],
        "seconds": time.perf_counter() - started,
        "floor_bytes": floor,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_before_save_bytes": pruned,
        "gate_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--recipe", default="slimgpt")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(run_here(json.loads(arguments.job))))
        return
    rows = []
    for depth in arguments.depths:
        shape = {
            "vocab_size": 8000,
            "hidden_size": arguments.hidden,
            "intermediate_size": arguments.ffn,
            "num_hidden_layers": depth,
            "num_attention_heads": arguments.hidden // 64,
        }
        with tempfile.TemporaryDirectory() as folder:
            size = write_checkpoint(Path(folder) / "model", shape)
            for out_of_core in (True, False):
                job = {
                    **{k: vars(arguments)[k] for k in ("samples", "tokens", "recipe", "threads")},
                    "model": str(Path(folder) / "model"),
                    "out": str(Path(folder) / f"out-{out_of_core}"),
                    "out_of_core": out_of_core,
                }
                command = [sys.executable, __file__, "--job", json.dumps(job)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                rows.append({"depth": depth, "weights_bytes": size, **found})
                over = (found["peak_bytes"] - found["floor_bytes"]) / size
                print(
                    f"{depth} layers, weights {size / 1e9:.2f} GB,"
                    f" {'out of core' if out_of_core else 'in memory'}:"
                    f" peak over imports {over:.2f} x the weights, {found['seconds']:.0f} s",
                    flush=True,
                )
                RESULTS.write_text(json.dumps({"shape": shape, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

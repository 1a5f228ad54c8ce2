"""One engine in a process of its own: how long prefill and decoding take, how much memory.

Started by latency.py. argv: a JSON job {"engine", "files": {label: path}, "threads", "prompt",
"steps", "repeats"}; prints JSON by label. With one file and no repeats it measures memory.

The time of one thread is that of the processor, which is the wall clock's where nothing else runs,
and which another program on the same core does not lengthen.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from memory import peak_bytes

LIBRARIES = {
    "eager": ("torch", "transformers"),
    "compile": ("torch", "transformers"),
    "onnxruntime": ("onnxruntime",),
    "llama.cpp": ("llama_cpp",),
}


def clock(job: dict[str, Any]) -> Callable[[], float]:
    """Seconds: of the processor where there is one thread, else of the wall clock."""
    return time.process_time if job["threads"] == 1 else time.perf_counter


@dataclass(frozen=True)
class Runs:
    """What one model does: a prefill of the prompt, and steps of one token after it."""

    prefill: Callable[[], object]
    decode: Callable[[], list[float]] | None = None


def eager(path: Path, job: dict[str, Any], *, compiled: bool = False) -> Runs:
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    # each layer has sizes of its own, so each is compiled
    torch._dynamo.config.recompile_limit = 256
    forward = torch.compile(model) if compiled else model
    ids = torch.arange(job["prompt"])[None] % 1000 + 1

    def cache() -> Any:
        if not compiled:
            return transformers.DynamicCache(config=model.config)
        length = job["prompt"] + job["steps"] + 1
        return transformers.StaticCache(config=model.config, max_cache_len=length)

    def decode() -> list[float]:
        past, seconds, now = cache(), [], clock(job)
        model(ids, past_key_values=past)
        for step in range(job["steps"]):
            start = now()
            forward(
                ids[:, :1], past_key_values=past, position_ids=ids[:, :1] * 0 + len(ids[0]) + step
            )
            seconds.append(now() - start)
        return seconds

    return Runs(lambda: forward(ids, use_cache=False), decode)


def compile_(path: Path, job: dict[str, Any]) -> Runs:
    return eager(path, job, compiled=True)


def onnxruntime(path: Path, job: dict[str, Any]) -> Runs:
    """The exported file has no KV cache: prefill alone."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = np.arange(job["prompt"], dtype=np.int64)[None] % 1000 + 1
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return Runs(lambda: session.run(None, fed))


def llama_cpp(path: Path, job: dict[str, Any]) -> Runs:
    """The logits of the last token alone."""
    import llama_cpp as library

    size = job["prompt"] + job["steps"] + 1
    engine = library.Llama(
        str(path),
        n_ctx=size,
        n_batch=size,
        n_ubatch=size,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        verbose=False,
    )
    ids = [i % 1000 + 1 for i in range(job["prompt"])]

    def prefill() -> None:
        engine.reset()
        engine.eval(ids)

    def decode() -> list[float]:
        prefill()
        seconds, now = [], clock(job)
        for _ in range(job["steps"]):
            start = now()
            engine.eval(ids[:1])
            seconds.append(now() - start)
        return seconds

    return Runs(prefill, decode)


OPEN = {"eager": eager, "compile": compile_, "onnxruntime": onnxruntime, "llama.cpp": llama_cpp}


def speed(
    runs: dict[str, Runs], repeats: int, now: Callable[[], float]
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each turn. The models take turns: a machine that slows slows all of them."""
    found: dict[str, dict[str, list[float]]] = {
        label: {"prefill_ms": [], **({"decode_ms": []} if model.decode else {})}
        for label, model in runs.items()
    }
    for turn in range(repeats + 1):
        for label, model in runs.items():
            start = now()
            model.prefill()
            times = {"prefill_ms": now() - start}
            if model.decode:
                times["decode_ms"] = median(model.decode()[1:])
            if turn:  # the first is for warming up
                for name, seconds in times.items():
                    found[label][name].append(round(1e3 * seconds, 3))
    return found


def memory(job: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By how much resident memory grew at its highest, over the process with its libraries."""
    ((label, path),) = job["files"].items()
    for library in LIBRARIES[job["engine"]]:
        __import__(library)
    before = psutil.Process().memory_info().rss
    runs = OPEN[job["engine"]](Path(path), job)
    runs.prefill()
    if runs.decode:
        runs.decode()
    return {label: {"memory_bytes": peak_bytes() - before}}


def main() -> None:
    job = json.loads(sys.argv[1])
    if not job["repeats"]:
        print(json.dumps(memory(job)))
        return
    runs = {label: OPEN[job["engine"]](Path(path), job) for label, path in job["files"].items()}
    print(json.dumps(speed(runs, job["repeats"], clock(job))))


if __name__ == "__main__":
    main()

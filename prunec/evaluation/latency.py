"""How fast a model runs here, and how much memory it needs while it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from prunec.errors import ModelError, PlanError
from prunec.evaluation.size import parameter_bytes
from prunec.graph.memory import release_freed
from prunec.models.context import context_length
from prunec.models.example import example_inputs
from prunec.models.generation import generates, plain_generation

_SAMPLE_S = 0.001
_PROMPT = 512


@dataclass(frozen=True)
class Speed:
    """Medians over repeats, after a warm-up run.

    `prefill_ms` is the time to the first token after `prompt` tokens in `batch` sequences;
    `decode_ms_per_token` that of each of the `new_tokens` - 1 steps after it, with a KV cache.
    Of a model that does not generate `prefill_ms` is one forward pass of its example inputs,
    `batch` the samples in them, and what is of tokens None. `peak_memory_bytes` is the weights and
    what a run needs beside them. `threads` is torch's.
    """

    prefill_ms: float
    decode_ms_per_token: float | None
    peak_memory_bytes: int
    threads: int
    batch: int
    prompt: int | None
    new_tokens: int | None


def measure(
    model: nn.Module,
    *,
    example: Mapping[str, Tensor] | None = None,
    batch: int = 1,
    prompt: int | None = None,
    new_tokens: int = 32,
    repeats: int = 3,
) -> Speed:
    """Latency of greedy generation from random tokens, and peak memory, in this process.

    `prompt` is 512 by default, or as much as the model reads beside the new tokens, which are then
    at most half of that. A model that does not generate runs on `example`, its inputs by name, by
    default `prunec.models.example_inputs`.

    Memory on the CPU: the bytes of the parameters, and the growth of the process's resident
    memory during one run of its own, sampled every millisecond after freed memory went back to
    the system. So it does not depend on what else the process holds. On CUDA it is the
    allocator's own peak.

    Raises:
        PlanError: sizes that cannot be measured, or more tokens than the model reads.
    """
    if prompt is None:
        prompt, limit = _PROMPT, context_length(model)
        if limit:
            new_tokens = min(new_tokens, max(2, limit // 2))
            prompt = min(prompt, limit - new_tokens)
    _check(model, batch, prompt, new_tokens, repeats)
    writes = generates(model)
    if writes:
        run = _generation(model, batch, prompt, new_tokens)
    else:
        example = example_inputs(model) if example is None else example
        batch, run = len(next(iter(example.values()))), _forward(model, example)
    with torch.inference_mode():
        run()
        runs = [run() for _ in range(repeats)]
        peak = _peak_memory(model, run)
    steps = [after for times in runs for after in times[1:]]
    return Speed(
        prefill_ms=1e3 * median(times[0] for times in runs),
        decode_ms_per_token=1e3 * median(steps) if steps else None,
        peak_memory_bytes=peak,
        threads=torch.get_num_threads(),
        batch=batch,
        prompt=prompt if writes else None,
        new_tokens=new_tokens if writes else None,
    )


def _check(model: Any, batch: int, prompt: int, new_tokens: int, repeats: int) -> None:
    if min(batch, prompt, repeats) < 1 or new_tokens < 2:
        raise PlanError(
            f"cannot time {repeats} runs of {batch} sequences of {prompt} + {new_tokens} tokens",
            fix="at least 1 run of 1 sequence of 1 + 2 tokens",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no weights, so it cannot be timed")
    limit = context_length(model)
    if limit and generates(model) and prompt + new_tokens > limit:
        raise PlanError(
            f"the model reads at most {limit} tokens, {prompt} + {new_tokens} were asked for",
            fix="a shorter prompt, or fewer new tokens",
        )


def _generation(model: Any, batch: int, prompt: int, new_tokens: int) -> Callable[[], list[float]]:
    """A run of generate(), which returns the seconds that each new token took."""
    generator = torch.Generator().manual_seed(0)
    size = int(model.get_input_embeddings().num_embeddings)
    ids = torch.randint(size, (batch, prompt), generator=generator).to(model.device)

    def run() -> list[float]:
        clock = _Clock(model.device)
        with plain_generation(model, padding=0):
            clock.start()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                stopping_criteria=[clock],
            )
        return clock.seconds

    return run


def _forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], list[float]]:
    device = next(iter(inputs.values())).device

    def run() -> list[float]:
        clock = _Clock(device)
        clock.start()
        model(**inputs)
        clock.tick()
        return clock.seconds

    return run


class _Clock(StoppingCriteria):
    """Asked after every token whether to stop: never, but it notes the time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.last = 0.0

    def start(self) -> None:
        self.last = self._now()

    def tick(self) -> None:
        now = self._now()
        self.seconds.append(now - self.last)
        self.last = now

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _peak_memory(model: nn.Module, run: Callable[[], list[float]]) -> int:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    with resident_growth() as growth:
        run()
    return parameter_bytes(model) + growth()


@contextmanager
def resident_growth() -> Iterator[Callable[[], int]]:
    """By how many bytes the process's resident memory grew at its highest, inside.

    Sampled every millisecond by a thread: torch lets it run beside its operators.
    """
    process = psutil.Process()
    release_freed()
    start = process.memory_info().rss
    highest = start
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(_SAMPLE_S):
            highest = max(highest, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield lambda: highest - start
    finally:
        done.set()
        sampler.join()

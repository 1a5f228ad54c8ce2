"""Text that the dense model samples itself: calibration that needs no data set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LogitsProcessor

from prunec.errors import CalibrationError
from prunec.events import Progress, Task
from prunec.models.cache import cached
from prunec.models.digest import state_digest
from prunec.models.generation import generates, plain_generation

# Pieces of 256 tokens, 64 at once. A step reads every weight once, so many sequences cost little
# more than few, up to about 64 on a few cores; what a step copies grows with the length so far.
_PIECE, _AT_ONCE = 256, 64
# Part of the cache's key: raise it when the same settings would give other tokens.
_VERSION = 1


def sample_tokens(
    model: nn.Module, tokenizer: Any | None, count: int, length: int, seed: int, progress: Progress
) -> Tensor:
    """`count` windows of `length` tokens that the model samples, int64 [count, length].

    Temperature 1, from the begin mark, in pieces of 256 tokens that are joined as they come. An
    end mark does not end a piece: the model goes on, as it did in packed training data. Kept on
    disk by the model's digest and these settings, so that it is done once.

    Raises:
        CalibrationError: the model does not generate text, or its logits are not finite.
    """
    start = _start_token(model, tokenizer)
    settings = f"{_VERSION} {start} {count} {length} {seed} {_PIECE} {_AT_ONCE}"
    key = hashlib.sha256(f"{state_digest(model)} {settings}".encode()).hexdigest()

    def build(directory: Path) -> None:
        tokens = _sample(model, start, count, length, seed, progress)
        save_file({"tokens": tokens}, directory / "tokens.safetensors")

    return load_file(cached(f"samples/{key[:32]}", build) / "tokens.safetensors")["tokens"]


def _sample(
    model: Any, start: int, count: int, length: int, seed: int, progress: Progress
) -> Tensor:
    total = count * length
    piece = min(_PIECE, length)
    sequences = -(-total // piece)
    generator = torch.Generator(model.device).manual_seed(seed)
    batches: list[Tensor] = []
    with (
        progress.task("sampling calibration text", sequences * piece) as task,
        plain_generation(model, padding=start),
    ):
        for first in range(0, sequences, _AT_ONCE):
            rows = min(_AT_ONCE, sequences - first)
            begin = torch.full((rows, 1), start, device=model.device)
            ids = model.generate(
                begin,
                attention_mask=torch.ones_like(begin),
                max_new_tokens=piece - 1,
                logits_processor=[_Draw(generator, task)],
            )
            task.advance(rows)
            batches.append(ids.cpu())
    return torch.cat(batches).reshape(-1)[:total].reshape(count, length).contiguous()


class _Draw(LogitsProcessor):
    """Draws the next token and leaves it as the only candidate of a greedy search.

    So the seed is a generator's own, the process's random state is left alone, and the draw (one
    uniform number a row against the cumulated probabilities) costs a tenth of torch.multinomial.
    """

    def __init__(self, generator: torch.Generator, task: Task) -> None:
        self.generator = generator
        self.task = task

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulated = torch.softmax(scores.float(), dim=-1).cumsum(dim=-1)
        end = cumulated[:, -1:]
        if not bool(end.isfinite().all()):
            raise CalibrationError(
                "the model's logits are not finite: it cannot sample text",
                fix="open it in another dtype, or calibrate on a text file",
            )
        point = torch.rand(end.shape, generator=self.generator, device=end.device) * end
        token = torch.searchsorted(cumulated, point, right=True)
        token = token.clamp_(max=cumulated.shape[1] - 1)
        self.task.advance(len(token))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _start_token(model: Any, tokenizer: Any | None) -> int:
    """The begin mark, else the end mark, which separates texts where there is no begin mark."""
    config = getattr(model, "config", None)
    if not generates(model):
        raise CalibrationError(
            f"{type(model).__name__} does not write text, so it cannot sample its own",
            fix="calibrate on a text file: --calibration PATH",
        )
    for name in ("bos_token_id", "eos_token_id"):
        for holder in (tokenizer, config):
            value = getattr(holder, name, None)
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None:
                return int(value)
    raise CalibrationError(
        "the model has neither a begin nor an end mark to sample from",
        fix="calibrate on a text file: --calibration PATH",
    )

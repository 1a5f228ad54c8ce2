"""Logits a few positions at a time, and the losses of the tokens that they predict."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunec.errors import CalibrationError

# Positions whose logits exist at one time: 50 MB of fp32 for a vocabulary of 49152.
_CHUNK = 256

Inputs = Mapping[str, Tensor]
Chunks = Callable[[Inputs], Iterator[Tensor]]


@contextmanager
def logit_chunks(model: Any) -> Iterator[Chunks]:
    """A function from inputs to their logits, in chunks [batch, positions, vocabulary].

    `input_ids` is int64 [batch, n]. The head is run here, chunk by chunk: a hook takes the hidden
    states on their way in, and leaves the model the last position only. Where the head cannot be
    found, or the model's logits are not its output (they are scaled or capped afterwards), the
    logits come whole.
    """
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if find is not None else None
    hidden: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states = arguments[0]
        hidden.append(states)
        return (states[:, -1:], *arguments[1:]) if states.dim() == 3 else arguments

    handle = head.register_forward_pre_hook(take) if isinstance(head, nn.Module) else None

    def chunks(inputs: Inputs) -> Iterator[Tensor]:
        hidden.clear()
        logits = _logits(model, inputs)
        if handle and not _is_output_of(head, hidden, logits, inputs["input_ids"]):
            handle.remove()
            hidden.clear()
            logits = _logits(model, inputs)
        positions = max(1, _CHUNK // len(inputs["input_ids"]))
        if hidden:
            for states in torch.split(hidden[0], positions, dim=1):
                yield head.forward(states)  # forward: past the hook
        else:
            yield from torch.split(logits, positions, dim=1)

    try:
        yield chunks
    finally:
        if handle:
            handle.remove()


def token_losses(chunks: Iterator[Tensor], ids: Tensor, scored: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of the scored tokens of each row, nats, fp64 [batch].

    `chunks` are the logits of consecutive positions; the logits at a position predict the token
    after it. `ids` int64 and `scored` bool are [batch, n]; a row's first token is never scored.
    """
    total = torch.zeros(len(ids), dtype=torch.float64)
    position = 0
    for logits in chunks:
        end = min(position + logits.shape[1], ids.shape[1] - 1)
        wanted = scored[:, position + 1 : end + 1]
        if wanted.any():
            target = ids[:, position + 1 : end + 1]
            losses = negative_log_likelihoods(logits[:, : end - position].float(), target)
            total += losses.masked_fill(~wanted, 0.0).sum(dim=1).cpu()
        position += logits.shape[1]
    return total


def negative_log_likelihoods(logits: Tensor, target: Tensor) -> Tensor:
    """In nats, fp64 [...], of targets [...] by logits fp32 [..., vocabulary].

    A sum of 50,000 terms in fp32 loses three digits, as cross_entropy shows on a strided axis.
    """
    top = logits.amax(dim=-1, keepdim=True)
    total = (logits - top).exp_().sum(dim=-1, dtype=torch.float64)
    chosen = logits.gather(-1, target[..., None]) - top
    return total.log() - chosen.squeeze(-1).double()


def with_positions(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs on the model's device, with the positions that left padding asks for."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    placed = {name: value.to(device) for name, value in inputs.items()}
    mask = placed.get("attention_mask")
    padded_left = mask is not None and not bool(mask[:, 0].all())
    if padded_left and "position_ids" not in placed and _accepts(model, "position_ids"):
        assert mask is not None
        placed["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return placed


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _is_output_of(head: Any, hidden: list[Tensor], logits: Tensor, ids: Tensor) -> bool:
    """Whether logits [batch, 1, vocabulary] are the head's own, of the last hidden states."""
    if len(hidden) != 1 or hidden[0].shape[:-1] != ids.shape:
        return False
    return torch.equal(head.forward(hidden[0][:, -1:]), logits)


def _logits(model: Any, inputs: Inputs) -> Tensor:
    if hasattr(model, "config"):
        output = model(**inputs, use_cache=False)
    else:
        output = model(inputs["input_ids"])
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise CalibrationError(
            f"{type(model).__name__} gives no logits of every token: it has no perplexity"
        )
    return logits

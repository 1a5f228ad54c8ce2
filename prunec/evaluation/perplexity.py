"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunec.calibration.text import read_text, tokenise
from prunec.errors import CalibrationError
from prunec.events import Progress, silent
from prunec.models.digest import token_digest
from prunec.models.generation import generates

# Positions whose logits exist at one time: 50 MB of fp32 for a vocabulary of 49152.
_CHUNK = 256


@dataclass(frozen=True)
class Perplexity:
    """`value` is exp(`nll`); `nll` the mean negative log-likelihood, in nats a token.

    `tokens` were scored in `windows` windows of `window` tokens, `stride` apart. `data` names the
    text; `digest` is the sha256 of all its tokens.
    """

    value: float
    nll: float
    tokens: int
    window: int
    stride: int
    windows: int
    data: str
    digest: str


@dataclass(frozen=True)
class _Window:
    """Tokens begin to end of the text, of which those from `scored` on count."""

    begin: int
    end: int
    scored: int


def perplexity(
    model: nn.Module,
    tokenizer_or_ids: Any,
    text: str | PathLike[str] | None = None,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """Perplexity on a text: exp of the mean negative log-likelihood of its tokens, in windows.


    Without `stride`: non-overlapping windows of `window` tokens, each loses its first, and what
    does not fill the last window is left out; the mean is over all tokens scored. This is the
    protocol of LLM-Pruner (window 128) and of SparseGPT (2048). With `stride` < `window`: windows
    begin `stride` tokens apart, each scores the tokens that the one before it did not reach, and
    the last may be shorter. Only values of one window, stride and text compare.

    The text is a string, the path of a UTF-8 file (a PathLike), or absent where token ids, int64
    [tokens], are given in place of a tokenizer. It is tokenised whole, with the special tokens
    that the tokenizer adds.

    Logits are held for 256 positions at a time where the model's head can be found and its
    output is the logits; the loss is in fp32, its sum in fp64.

    Raises:
        CalibrationError: the text is unusable or shorter than one window, the model does not
            predict next tokens, or its vocabulary is smaller than the tokenizer's.
    """
    ids, data = _token_ids(tokenizer_or_ids, text, progress)
    _check_model(model, ids)
    windows = _windows(len(ids), window, stride, data)[:max_windows]
    if not windows:
        raise CalibrationError(f"no windows were asked for: max_windows={max_windows}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total, count = 0.0, 0
    with (
        progress.task(f"perplexity on {data}", len(windows)) as task,
        torch.inference_mode(),
        _logit_chunks(model) as logit_chunks,
    ):
        for part in windows:
            inputs = ids[part.begin : part.end].to(device)
            total += _loss(logit_chunks(inputs), inputs, part.scored - part.begin)
            count += part.end - part.scored
            task.advance()
    nll = total / count
    return Perplexity(
        value=math.exp(nll) if nll < 700 else math.inf if nll == nll else math.nan,
        nll=nll,
        tokens=count,
        window=window,
        stride=stride or window,
        windows=len(windows),
        data=data,
        digest=token_digest(ids),
    )


def _token_ids(
    tokenizer_or_ids: Any, text: str | PathLike[str] | None, progress: Progress
) -> tuple[Tensor, str]:
    if isinstance(tokenizer_or_ids, Tensor):
        return tokenizer_or_ids.reshape(-1).cpu(), "tokens" if text is None else str(text)
    if tokenizer_or_ids is None:
        raise CalibrationError("the model has no tokenizer, so it cannot be measured on text")
    if text is None:
        raise CalibrationError("perplexity needs a text, or token ids")
    name = "text" if isinstance(text, str) else Path(text).name
    content = text if isinstance(text, str) else read_text(Path(text))
    with progress.task(f"tokenising {name}"):
        return tokenise(content, tokenizer_or_ids, special_tokens=True), name


def _windows(tokens: int, window: int, stride: int | None, data: str) -> list[_Window]:
    if window < 2 or (stride is not None and not 1 <= stride <= window):
        raise CalibrationError(
            f"window {window} and stride {stride} do not fit together",
            fix="take a window of 2 or more, and a stride from 1 to the window",
        )
    if tokens < window:
        raise CalibrationError(
            f"{data} has {tokens} tokens, fewer than one window of {window}",
            fix="take a longer text, or a smaller window: --window",
        )
    if stride is None or stride == window:
        starts = range(0, tokens - window + 1, window)
        return [_Window(start, start + window, start + 1) for start in starts]
    found = [_Window(0, window, 1)]
    while (reached := found[-1].end) < tokens:
        begin = found[-1].begin + stride
        found.append(_Window(begin, min(begin + window, tokens), reached))
    return found


def _loss(chunks: Iterator[Tensor], ids: Tensor, first: int) -> float:
    """Sum of the negative log-likelihoods of tokens `first` and after, in nats.

    `chunks` are the logits of consecutive positions, each [positions, vocabulary].
    """
    total, position = 0.0, 0
    for logits in chunks:
        # The logits at a position predict the token after it.
        begin, end = max(position, first - 1), min(position + len(logits), len(ids) - 1)
        if begin < end:
            scores = logits[begin - position : end - position].float()
            losses = F.cross_entropy(scores, ids[begin + 1 : end + 1], reduction="none")
            total += float(losses.sum(dtype=torch.float64))
        position += len(logits)
    return total


@contextmanager
def _logit_chunks(model: Any) -> Iterator[Callable[[Tensor], Iterator[Tensor]]]:
    """A function from token ids [n] to their logits, in chunks of positions.

    The head is run here, chunk by chunk: a hook takes the hidden states on their way in, and
    leaves the model the last position only. Where the head cannot be found, or the model's
    logits are not its output (they are scaled or capped afterwards), the logits come whole.
    """
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if find is not None else None
    hidden: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states = arguments[0]
        hidden.append(states)
        return (states[:, -1:], *arguments[1:]) if states.dim() == 3 else arguments

    handle = head.register_forward_pre_hook(take) if isinstance(head, nn.Module) else None

    def chunks(ids: Tensor) -> Iterator[Tensor]:
        hidden.clear()
        logits = _logits(model, ids)
        if handle and not _is_output_of(head, hidden, logits, ids):
            handle.remove()
            hidden.clear()
            logits = _logits(model, ids)
        if hidden:
            for states in torch.split(hidden[0], _CHUNK, dim=1):
                yield head.forward(states)[0]  # forward: past the hook
        else:
            yield from torch.split(logits[0], _CHUNK)

    try:
        yield chunks
    finally:
        if handle:
            handle.remove()


def _is_output_of(head: Any, hidden: list[Tensor], logits: Tensor, ids: Tensor) -> bool:
    """Whether logits [1, 1, vocabulary] are the head's own, of the last of the hidden states."""
    if len(hidden) != 1 or hidden[0].shape[:-1] != (1, len(ids)):
        return False
    return torch.equal(head.forward(hidden[0][:, -1:]), logits)


def _logits(model: Any, ids: Tensor) -> Tensor:
    output = model(ids[None], use_cache=False) if hasattr(model, "config") else model(ids[None])
    logits = getattr(output, "logits", output)
    assert isinstance(logits, Tensor)
    return logits


def _check_model(model: Any, ids: Tensor) -> None:
    if hasattr(model, "config") and not generates(model):
        raise CalibrationError(
            f"{type(model).__name__} does not predict next tokens: it has no perplexity"
        )
    find = getattr(model, "get_input_embeddings", None)
    size = getattr(find(), "num_embeddings", None) if find is not None else None
    if size is not None and len(ids) and int(ids.max()) >= size:
        raise CalibrationError(
            f"the tokenizer gives id {int(ids.max())}, but the model knows {size} tokens",
            fix="use the model's own tokenizer",
        )

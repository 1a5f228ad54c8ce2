"""The loss that a model computes by itself when it is given labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunec.errors import PlanError
from prunec.models.generation import generates

_IGNORED = -100
"""The label of a token that does not count: what PyTorch's cross entropy leaves out."""


def own_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss for inputs that hold ``labels``: next-token, masked-token, ...

    Raises:
        PlanError: the model returns none.
    """
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    output = model(**inputs, **options)
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(loss, Tensor):
        raise _no_loss(model)
    return loss


def loss_samples(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, labels: bool
) -> list[dict[str, Tensor]]:
    """Each sample of some batches by itself, a sample being an index of the first axis.

    Args:
        labels: give each its ``labels`` where it has none: its own tokens, padding left out; of
            an encoder-decoder, the token that follows each of ``decoder_input_ids``.

    Raises:
        PlanError: labels are needed and the model takes none, or learns something else than
            tokens, or there are no tokens.
    """
    samples = [sample for batch in batches for sample in _rows(batch)]
    if not labels:
        return samples
    if "labels" not in inspect.signature(model.forward).parameters:
        raise _no_loss(model)
    return [{**sample, "labels": _labels(model, sample)} for sample in samples]


def _rows(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    rows = len(next(iter(batch.values())))
    return [
        {
            name: value[i : i + 1] if value.ndim and len(value) == rows else value
            for name, value in batch.items()
        }
        for i in range(rows)
    ]


def _labels(model: nn.Module, sample: Mapping[str, Tensor]) -> Tensor:
    if "labels" in sample:
        return sample["labels"]
    if not _learns_tokens(model):
        raise PlanError(
            f"the calibration has no labels, and {type(model).__name__} does not learn its tokens",
            so="the loss would be of nothing",
            fix="give rows with a label, batches with labels, or a loss of your own",
        )
    if "decoder_input_ids" in sample:
        given = _unpadded(sample["decoder_input_ids"], sample.get("decoder_attention_mask"))
        return torch.cat((given[:, 1:], torch.full_like(given[:, :1], _IGNORED)), dim=1)
    tokens = sample.get("input_ids")
    if tokens is None:
        raise PlanError(
            f"the calibration of {type(model).__name__} has neither labels nor input_ids",
            fix="put labels into each batch, or give loss=callable",
        )
    return _unpadded(tokens, sample.get("attention_mask"))


def _learns_tokens(model: Any) -> bool:
    """Whether a model's loss is of tokens: of a transformers model that has a head for them."""
    head = getattr(model, "get_output_embeddings", None)
    return head is None or head() is not None or generates(model)


def _unpadded(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != tokens.shape:
        return tokens
    return tokens.masked_fill(mask == 0, _IGNORED)


def _no_loss(model: nn.Module) -> PlanError:
    return PlanError(
        f"{type(model).__name__} computes no loss of its own",
        so="criteria that need gradients cannot score it",
        fix="open it with its head, give loss=callable, or choose another importance",
    )

"""Samples in rows: several to a row where the model keeps them apart, else one, padded.

A packed row has no attention mask; its positions begin anew with every sample, by which
transformers' attention masks know where a sample begins. Models that do not read positions that way
(recurrent ones, remote code) mix the samples; `keeps_apart` finds out by trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunec.calibration.rows import Sample

IGNORED = -100
_TOLERANCE = 1e-3

Row = dict[str, Tensor]


def pack(samples: Sequence[Sample], length: int) -> list[Row]:
    """Rows of at most `length` tokens, each sample whole in the first row with room for it.

    A row is int64 [n]: `input_ids`; `labels`, -100 where nothing is learnt, as at the first token
    of every sample, which nothing predicts; `position_ids`, which begin anew with every sample.
    Order is kept as far as that allows; rows that are no longer near full are closed.
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    first = 0  # rows before it have no room left for anything
    for sample in samples:
        size = len(sample.ids)
        place = next((i for i in range(first, len(rows)) if room[i] >= size), None)
        if place is None:
            rows.append([])
            room.append(length)
            place = len(rows) - 1
        rows[place].append(sample)
        room[place] -= size
        while first < len(rows) and (room[first] < 2 or len(rows) - first > 64):
            first += 1
    return [_row(row) for row in rows]


def single(samples: Sequence[Sample]) -> list[Row]:
    """A row a sample."""
    return [_row([sample]) for sample in samples]


def _row(samples: Sequence[Sample]) -> Row:
    labels = []
    for sample in samples:
        learnt = sample.ids.clone()
        learnt[: max(1, sample.prompt)] = IGNORED
        labels.append(learnt)
    return {
        "input_ids": torch.cat([sample.ids for sample in samples]),
        "labels": torch.cat(labels),
        "position_ids": torch.cat([torch.arange(len(sample.ids)) for sample in samples]),
    }


def collate(rows: Sequence[Row], *, packed: bool) -> Row:
    """A batch int64 [rows, longest], padded on the right.

    Packed: the padding is one more sample, of which nothing is learnt. Else: an attention mask
    leaves it out, and positions are the model's own.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[Tensor]] = {name: [] for name in rows[0]}
    masks = []
    for row in rows:
        missing = longest - len(row["input_ids"])
        fill = {
            "input_ids": torch.zeros(missing, dtype=torch.int64),
            "labels": torch.full((missing,), IGNORED),
            "position_ids": torch.arange(missing),
        }
        for name, value in row.items():
            batch[name].append(torch.cat([value, fill[name]]))
        masks.append(torch.arange(longest) < longest - missing)
    stacked = {name: torch.stack(values) for name, values in batch.items()}
    if packed:
        return stacked
    del stacked["position_ids"]
    mask = torch.stack(masks)
    return stacked if bool(mask.all()) else stacked | {"attention_mask": mask.long()}


def keeps_apart(model: Any) -> bool:
    """Whether a packed row gives every sample the logits that it has alone; tried, not assumed."""
    size = int(model.get_input_embeddings().num_embeddings)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(size, (n,), generator=generator) for n in (7, 5, 6)]
    row = collate([_row([Sample(part) for part in parts])], packed=True)
    del row["labels"]
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = _logits(model, row)
            alone = torch.cat([_logits(model, {"input_ids": p[None]}) for p in parts], dim=1)
    except (TypeError, ValueError):  # a forward without position_ids
        return False
    finally:
        model.train(was)
    return float((packed - alone).abs().max()) <= _TOLERANCE * float(alone.abs().max())


def _logits(model: nn.Module, inputs: Row) -> Tensor:
    device = next(model.parameters()).device
    placed = {name: value.to(device) for name, value in inputs.items()}
    logits: Tensor = model(**placed, use_cache=False).logits
    return logits

"""Perplexity by batch, on padded and unpadded input, against twenty independent lines."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_model import TEXT, tiny_llama, tiny_tokenizer

from prunec.errors import CalibrationError
from prunec.evaluation import batch_nll, perplexity
from prunec.evaluation.perplexity import mean_and_error

MODEL = tiny_llama()
IDS = torch.tensor(tiny_tokenizer()(TEXT * 4).input_ids)


def alone(rows: list[torch.Tensor]) -> float:
    """Each sequence by itself, without padding, in fp64."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = MODEL(row[None]).logits[0].double()
        for position in range(1, len(row)):
            losses.append(-float(logits[position - 1].log_softmax(-1)[row[position]]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    rows = [IDS[:20], IDS[20:33], IDS[33:40]]
    ids = torch.full((3, 20), 7)
    mask = torch.zeros(3, 20, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(20 - len(row), 20) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    nll, count = batch_nll(MODEL, [{"input_ids": ids, "attention_mask": mask}])
    assert count == 19 + 12 + 6
    assert nll == pytest.approx(alone(rows), rel=1e-6)


def test_unpadded_batches_and_labels() -> None:
    batch = IDS[:40].reshape(2, 20)
    nll, count = batch_nll(MODEL, [{"input_ids": batch}])
    assert count == 38
    assert nll == pytest.approx(alone(list(batch)), rel=1e-6)
    labels = batch.clone()
    labels[:, 5:] = -100
    first, count = batch_nll(MODEL, [{"input_ids": batch, "labels": labels}])
    assert count == 8
    assert first == pytest.approx(alone([row[:5] for row in batch]), rel=1e-6)
    with pytest.raises(CalibrationError, match="no token"):
        batch_nll(MODEL, [{"input_ids": batch, "labels": torch.full_like(batch, -100)}])


def test_windows_in_batches_with_a_padded_last_one() -> None:
    one = perplexity(MODEL, IDS, window=32, stride=24)
    several = perplexity(MODEL, IDS, window=32, stride=24, batch_size=4)
    assert several.nll == pytest.approx(one.nll, rel=1e-6)
    assert (several.tokens, several.windows) == (one.tokens, one.windows)


def test_the_standard_error_is_that_of_the_windows_means() -> None:
    sums, counts = torch.tensor([30.0, 44.0, 25.0, 41.0]).double(), torch.full((4,), 10.0).double()
    mean, error = mean_and_error(sums, counts)
    means = [3.0, 4.4, 2.5, 4.1]
    spread = math.sqrt(sum((m - 3.5) ** 2 for m in means) / 3)
    assert mean == pytest.approx(3.5)
    assert error == pytest.approx(spread / math.sqrt(4))
    assert mean_and_error(sums[:1], counts[:1])[1] is None
    found = perplexity(MODEL, IDS, window=16)
    assert found.stderr is not None
    assert 0 < found.stderr < found.value

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_model import TEXT, tiny_llama, tiny_tokenizer

from prunec.evaluation import divergence

IDS = torch.tensor(tiny_tokenizer()(TEXT * 3).input_ids)


def test_a_model_does_not_diverge_from_itself() -> None:
    found = divergence(tiny_llama(), tiny_llama(), IDS, window=16)
    assert found.kl == 0
    assert found.agreement == 1


def test_kl_and_agreement_are_those_of_torch() -> None:
    ours, dense = tiny_llama(1), tiny_llama(0)
    found = divergence(ours, dense, IDS, window=16, max_windows=3)
    with torch.no_grad():
        batch = IDS[:48].reshape(3, 16)
        q, p = (m(batch).logits.double().log_softmax(-1).flatten(0, 1) for m in (ours, dense))
    assert found.tokens == 48
    assert found.kl == pytest.approx(float(F.kl_div(q, p, log_target=True, reduction="batchmean")))
    hits = (q.argmax(-1) == p.argmax(-1)).double()
    assert found.agreement == pytest.approx(float(hits.mean()))
    by_window = hits.reshape(3, 16).mean(1)
    assert found.agreement_stderr == pytest.approx(float(by_window.std() / 3**0.5))

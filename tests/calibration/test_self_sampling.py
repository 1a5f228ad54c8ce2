from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GenerationConfig

from prunec.calibration import calibrate, sampling
from prunec.errors import CalibrationError
from prunec.events import silent


def sampled(model: nn.Module, tokenizer: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    settings = {"samples": 4, "seq_len": 12, "batch_size": 4, **options}
    got = calibrate(["self"], tokenizer, seed=seed, model=model, **settings)
    (batch,) = got.batches
    return batch["input_ids"]


def test_samples_are_seeded_whole_and_start_at_the_begin_mark(model: Any, tokenizer: Any) -> None:
    first = sampled(model, tokenizer)
    assert first.shape == (4, 12)
    assert first[:, 0].tolist() == [tokenizer.bos_token_id] * 4
    assert len(first[:, 1:].unique()) > 5
    assert not torch.equal(first, sampled(model, tokenizer, seed=1))


def test_the_random_state_and_the_models_settings_are_left_alone(
    model: Any, tokenizer: Any
) -> None:
    settings = model.generation_config
    state = torch.get_rng_state()
    sampled(model, tokenizer, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is settings


def test_long_samples_are_joined_from_pieces(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_PIECE", 5)
    monkeypatch.setattr(sampling, "_AT_ONCE", 3)
    ids = sampled(model, tokenizer).reshape(-1)
    assert ids[::5].tolist() == [tokenizer.bos_token_id] * 10


def test_the_models_own_generation_settings_do_not_bend_the_samples(tokenizer: Any) -> None:
    plain, bent = tiny_llama(seed=3), tiny_llama(seed=3)
    bent.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, max_length=3, eos_token_id=[1, 2, 3]
    )
    drawn = [sampling._sample(model, 0, 4, 12, 0, silent) for model in (plain, bent)]
    assert torch.equal(*drawn)


def test_samples_follow_the_models_distribution(tokenizer: Any) -> None:
    model = tiny_llama(seed=4)
    logits = model(torch.tensor([[0]])).logits[0, 0]
    ids = sampling._sample(model, 0, 20_000, 2, 0, silent)[:, 1]
    observed = torch.bincount(ids, minlength=VOCABULARY) / len(ids)
    expected = torch.softmax(logits, -1)
    # Total variation distance of 20,000 draws over 320 outcomes: about 0.05 by chance.
    assert float((observed - expected).abs().sum() / 2) < 0.08
    assert float((torch.ones(VOCABULARY) / VOCABULARY - expected).abs().sum() / 2) > 0.2


def test_samples_are_kept_and_keyed_by_the_models_weights(
    cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(seed=5)
    first = sampled(model, tokenizer)
    assert len(list((cache / "samples").iterdir())) == 1

    def refuse(*args: Any) -> torch.Tensor:
        raise AssertionError("sampled again")

    monkeypatch.setattr(sampling, "_sample", refuse)
    assert torch.equal(sampled(model, tokenizer), first)
    model.model.norm.weight.mul_(1.5)
    with pytest.raises(AssertionError, match="sampled again"):
        sampled(model, tokenizer)


def test_an_interrupted_run_leaves_nothing(
    cache: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "_sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sampled(model, tokenizer)
    assert list((cache / "samples").iterdir()) == []


def test_progress_counts_every_token(model: Any) -> None:
    class Counter:
        done, total = 0, 0

        def task(self, description: str, total: int | None = None) -> Any:
            self.total = total or 0
            return nullcontext(self)

        def advance(self, n: int = 1) -> None:
            self.done += n

    counter = Counter()
    sampling._sample(model, 0, 4, 12, 0, counter)  # type: ignore[arg-type]
    assert counter.done == counter.total == 48


def test_without_a_begin_mark_the_end_mark_starts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    model = tiny_llama()
    model.config.bos_token_id = None
    assert sampled(model, tokenizer)[:, 0].tolist() == [tokenizer.eos_token_id] * 4
    model.config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(CalibrationError, match="neither a begin nor an end mark"):
        sampled(model, tokenizer)


def test_models_that_cannot_sample_are_refused(tokenizer: Any) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    for model in (BertForMaskedLM(config), nn.Linear(2, 2)):
        with pytest.raises(CalibrationError, match="does not write text"):
            sampled(model, tokenizer)
    with pytest.raises(CalibrationError, match="needs the model"):
        calibrate(["self"], tokenizer, samples=4, seq_len=12)


def test_logits_that_are_not_finite_are_refused(cache: Path, tokenizer: Any) -> None:
    model = tiny_llama()
    model.model.norm.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match="logits are not finite"):
        sampled(model, tokenizer)
    assert list((cache / "samples").iterdir()) == []

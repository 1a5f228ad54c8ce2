from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import TEXT

from prunec.calibration import calibrate
from prunec.calibration.sources import DataSource, parse_source, share_samples
from prunec.calibration.text import draw_windows, tokenise
from prunec.errors import CalibrationError


def test_batches_are_alike_unpadded_and_counted(text_file: Path, tokenizer: Any) -> None:
    got = calibrate([str(text_file)], tokenizer, samples=12, seq_len=32, batch_size=4)
    assert [batch["input_ids"].shape for batch in got.batches] == [(4, 32)] * 3
    assert all(batch["input_ids"].dtype == torch.int64 for batch in got.batches)
    assert got.tokens == 12 * 32
    (source,) = got.sources
    assert (source.name, source.kind, source.weight) == (str(text_file), "text", 1.0)
    assert (source.samples, source.tokens) == (12, 12 * 32)
    assert source.digest == got.digest
    assert len(got.digest) == 64


def test_every_window_is_a_stretch_of_the_text(text_file: Path, tokenizer: Any) -> None:
    whole = tokenise(text_file.read_text(), tokenizer)
    got = calibrate([str(text_file)], tokenizer, samples=6, seq_len=16)
    stretches = {tuple(row.tolist()) for row in whole.unfold(0, 16, 1)}
    windows = [tuple(row.tolist()) for batch in got.batches for row in batch["input_ids"]]
    assert len(windows) == 6
    assert set(windows) <= stretches


@pytest.mark.parametrize(
    ("samples", "seq_len", "batch"), [(128, 1024, 2), (6, 1024, 2), (7, 1024, 1), (6, 4096, 1)]
)
def test_the_default_batch_divides_the_samples(
    tmp_path: Path, tokenizer: Any, samples: int, seq_len: int, batch: int
) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 200)
    got = calibrate([str(tmp_path / "long.txt")], tokenizer, samples=samples, seq_len=seq_len)
    assert {b["input_ids"].shape for b in got.batches} == {(batch, seq_len)}


def test_same_seed_same_tokens_other_seed_others(text_file: Path, tokenizer: Any) -> None:
    def digest(seed: int) -> str:
        return calibrate([str(text_file)], tokenizer, samples=8, seq_len=16, seed=seed).digest

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)


def test_a_source_gives_the_same_windows_whatever_stands_beside_it(
    text_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("A different text, long enough for a window or two. " * 40)
    alone = calibrate([str(text_file)], tokenizer, samples=4, seq_len=16, batch_size=1)
    both = [str(other), f"{text_file}=1"]
    mixed = calibrate(both, tokenizer, samples=8, seq_len=16, batch_size=1)
    assert [b["input_ids"].tolist() for b in mixed.batches[4:]] == [
        b["input_ids"].tolist() for b in alone.batches
    ]
    assert [(s.name, s.samples, s.tokens) for s in mixed.sources] == [
        (str(other), 4, 64),
        (str(text_file), 4, 64),
    ]
    assert mixed.sources[1].digest == alone.digest


def test_a_source_named_twice_is_one_source(text_file: Path, tokenizer: Any) -> None:
    twice = calibrate([str(text_file)] * 2, tokenizer, samples=8, seq_len=16)
    once = calibrate([str(text_file)], tokenizer, samples=8, seq_len=16)
    assert twice.digest == once.digest


@given(
    tokens=st.integers(8, 200),
    count=st.integers(1, 30),
    length=st.integers(2, 8),
    seed=st.integers(0),
)
def test_windows_overlap_only_where_the_text_is_too_short(
    tokens: int, count: int, length: int, seed: int
) -> None:
    starts = draw_windows(torch.arange(tokens), count, length, seed)[:, 0]
    assert starts.shape == (count,)
    assert int(starts.min()) >= 0
    assert int(starts.max()) + length <= tokens
    gaps = starts.sort().values.diff()
    if count * length <= tokens:
        assert (gaps >= length).all()
    elif count <= tokens - length + 1:
        assert (gaps > 0).all()


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), samples=st.integers(1, 500))
def test_shares_add_up_and_are_within_one_of_exact(weights: list[float], samples: int) -> None:
    sources = [
        DataSource(f"s{i}", "text", f"s{i}", weight=weight) for i, weight in enumerate(weights)
    ]
    try:
        counts = share_samples(sources, samples)
    except CalibrationError as error:
        assert "none of the" in str(error)  # noqa: PT017 - both outcomes are facts
        assert samples * min(weights) < sum(weights)
        return
    assert sum(counts) == samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - samples * weight / sum(weights)) < 1 + 1e-9


@pytest.mark.parametrize(
    ("spec", "name", "weight"),
    [
        ("c4.txt", "c4.txt", 1.0),
        ("c4.txt=3", "c4.txt", 3.0),
        ("runs/lr=0.1/text.txt", "runs/lr=0.1/text.txt", 1.0),
        ("a=b.txt", "a=b.txt", 1.0),
        ("a=b.txt=2", "a=b.txt", 2.0),
    ],
)
def test_sources_are_read_with_their_weight(spec: str, name: str, weight: float) -> None:
    assert parse_source(spec) == DataSource(name, "text", name, weight=weight)


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("self", DataSource("self", "self", "self")),
        ("self=0.25", DataSource("self", "self", "self", weight=0.25)),
        ("rows.jsonl", DataSource("rows.jsonl", "rows", "rows.jsonl")),
        (
            "rows.json#a.b,c=2",
            DataSource("rows.json#a.b,c", "rows", "rows.json", ("a.b", "c"), 2.0),
        ),
        ("hub:o/n", DataSource("hub:o/n", "hub", "o/n")),
        ("hub:o/n:en:test#t=3", DataSource("hub:o/n:en:test#t", "hub", "o/n:en:test", ("t",), 3.0)),
        ("data.calib:make", DataSource("data.calib:make", "loader", "data.calib:make")),
    ],
)
def test_each_kind_of_source(spec: str, source: DataSource) -> None:
    assert parse_source(spec) == source


def test_a_file_that_looks_like_another_source_is_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text=2", "hub:x", "a.b:c", "is#it.txt"):
        (tmp_path / name).write_text("x")
        assert parse_source(name) == DataSource(name, "text", name)
    (tmp_path / "photos").mkdir()
    assert parse_source("photos=2") == DataSource("photos", "images", "photos", weight=2.0)


@pytest.mark.parametrize("spec", ["a.txt#b", "self#a", "r.jsonl#a,b,c", "r.jsonl#", "r.jsonl#a,"])
def test_fields_that_are_none(spec: str) -> None:
    with pytest.raises(CalibrationError, match=r"only rows have fields|one field of text"):
        parse_source(spec)


def test_a_long_text_is_tokenised_in_pieces_at_line_ends(
    text_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file.read_text()
    whole = tokenise(text, tokenizer)
    monkeypatch.setattr("prunec.calibration.text._PIECE", 1000)
    assert torch.equal(tokenise(text, tokenizer), whole)
    assert tokenizer.decode(tokenise("x" * 2500, tokenizer)) == "x" * 2500


def refusal(tokenizer: Any, *sources: Path | str, **options: Any) -> str:
    settings = {"samples": 8, "seq_len": 16, **options}
    with pytest.raises(CalibrationError) as caught:
        calibrate([str(source) for source in sources], tokenizer, **settings)
    assert "\n" not in caught.value.message
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"abc\0def" * 100, "is binary"),
        (b"caf\xe9 " * 100, "is not UTF-8 text: byte 3"),
        (b"too short", "fewer than one sequence of 16"),
    ],
)
def test_unusable_files(tmp_path: Path, tokenizer: Any, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    message = refusal(tokenizer, path)
    assert reason in message
    assert str(path) in message


def test_absent_files_and_directories(tmp_path: Path, tokenizer: Any) -> None:
    assert "no such text file: nope.txt" in refusal(tokenizer, "nope.txt")
    assert "is a directory, and the model reads no images" in refusal(tokenizer, tmp_path)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much", ""])
def test_bad_weights(tokenizer: Any, weight: str) -> None:
    assert "must be a positive number" in refusal(tokenizer, f"text.txt={weight}")


def test_a_source_without_a_name(tokenizer: Any) -> None:
    assert "a calibration source without a name" in refusal(tokenizer, "")


def test_numbers_that_do_not_fit(text_file: Path, tokenizer: Any, model: Any) -> None:
    assert "no calibration source" in refusal(tokenizer)
    assert "does not divide 8 samples" in refusal(tokenizer, text_file, batch_size=3)
    assert "fix  take 2" in refusal(tokenizer, text_file, batch_size=3)
    assert "at least 1" in refusal(tokenizer, text_file, samples=0)
    assert "none of the 8 samples" in refusal(tokenizer, text_file, "other=0.01")
    assert "reads at most 128 tokens" in refusal(tokenizer, text_file, seq_len=129, model=model)


def test_a_model_without_tokenizer(text_file: Path) -> None:
    assert "has no tokenizer" in refusal(None, text_file)


def test_the_shared_texts_are_usable(data: Path, tokenizer: Any) -> None:
    sources = [f"{data}/text/calib/{name}.utf8" for name in ("c4", "tiny")]
    got = calibrate(sources, tokenizer, samples=8, seq_len=256)
    assert got.tokens == 8 * 256

"""Rows of files and data sets: what each form says, and what a model reads of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_tokenizer

from prunec.calibration import Calibration, calibrate
from prunec.calibration.rows import Entry, encode, read_entries, source_rows
from prunec.calibration.sources import parse_source
from prunec.calibration.text import tokenise
from prunec.errors import CalibrationError, PluginError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'broken' %}{{ raise_exception('no such role') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.fixture
def chatty() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def entries(spec: str, tokenizer: Any = None) -> list[Entry]:
    source = parse_source(spec)
    return list(read_entries(source_rows(source), source, tokenizer))


def test_every_form_of_a_row(tmp_path: Path, chatty: Any) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    spec = write(
        tmp_path / "r.jsonl",
        {"text": "plain", "label": 2},
        {"prompt": "p", "completion": "c"},
        {"source": "s", "target": "t"},
        {"instruction": "Do.", "output": "Done.", "text": "all of it"},
        {"messages": turns},
        {"conversations": shared, "id": 7},
    )
    found = entries(spec, chatty)
    assert found[:3] == [Entry("plain", label=2), Entry("c", "p"), Entry("t", "s")]
    assert found[3].text == "Done."
    assert "### Instruction:\nDo.\n\n### Response:\n" in str(found[3].prompt)
    assert found[4] == found[5] == Entry("<user>hi<assistant>ho", formatted=True)


def test_named_fields(tmp_path: Path, chatty: Any) -> None:
    row = {"body": "b", "translation": {"de": "d", "en": "e"}, "x.y": "literal"}
    row |= {"chat": [{"role": "user", "content": "hi"}], "none": []}
    spec = write(tmp_path / "r.jsonl", row)
    assert entries(f"{spec}#body") == [Entry("b")]
    assert entries(f"{spec}#translation.de,translation.en") == [Entry("e", "d")]
    assert entries(f"{spec}#x.y") == [Entry("literal")]
    assert entries(f"{spec}#chat", chatty) == [Entry("<user>hi", formatted=True)]
    with pytest.raises(CalibrationError, match="empty conversation"):
        entries(f"{spec}#none", chatty)


def test_a_list_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('[{"text": "a"}, {"text": "b"}]')
    assert entries(str(tmp_path / "r.json")) == [Entry("a"), Entry("b")]


def drawn(spec: str, tokenizer: Any, **options: Any) -> Calibration:
    return calibrate([spec], tokenizer, **{"samples": 4, "seq_len": 16, **options})


def test_texts_are_joined_by_the_end_mark_and_cut(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"{i}. The quick brown fox." for i in range(12)]
    spec = write(tmp_path / "t.jsonl", *({"text": text} for text in texts))
    got = drawn(spec, tokenizer)
    ids = torch.cat([batch["input_ids"] for batch in got.batches])
    assert ids.shape == (4, 16)
    assert got.sources[0].kind == "rows"
    assert all(set(batch) == {"input_ids"} for batch in got.batches)
    ended = [[*tokenise(text, tokenizer).tolist(), tokenizer.eos_token_id] for text in texts]
    pieces = {tuple(text[-4:]) for text in ended}
    rows = [row.tolist() for row in ids]
    ends = [(row, at) for row in rows for at in range(4, 16) if row[at] == tokenizer.eos_token_id]
    assert ends
    assert all(tuple(row[at - 3 : at + 1]) in pieces for row, at in ends)


def test_of_an_exchange_only_the_answer_is_learnt(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)]
    spec = write(tmp_path / "e.jsonl", *rows)
    got = drawn(spec, tokenizer)
    ids, labels = (torch.cat([b[k] for b in got.batches]) for k in ("input_ids", "labels"))
    learnt = labels != -100
    assert bool((labels[learnt] == ids[learnt]).all())
    said = tokenizer.decode(ids[learnt])
    assert "answer" in said
    assert "question" not in said
    assert "question" in tokenizer.decode(ids[~learnt])


def test_a_text_beside_exchanges_is_learnt_whole(
    tmp_path: Path, text_file: Path, tokenizer: Any
) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)]
    spec = write(tmp_path / "e.jsonl", *rows)
    got = calibrate([str(text_file), f"{spec}=3"], tokenizer, samples=8, seq_len=16, batch_size=2)
    assert torch.equal(got.batches[0]["labels"], got.batches[0]["input_ids"])
    assert not torch.equal(got.batches[1]["labels"], got.batches[1]["input_ids"])
    assert [s.samples for s in got.sources] == [2, 6]
    assert [s.weight for s in got.sources] == [1.0, 3.0]


def test_the_same_seed_draws_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"{i} is a number, and so is {i + 1}"} for i in range(40)]
    spec = write(tmp_path / "t.jsonl", *rows)
    first, again, other = (drawn(spec, tokenizer, seed=seed).digest for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_chat_is_what_the_template_writes(tmp_path: Path, chatty: Any) -> None:
    turns = [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "lazy dog"}]
    spec = write(tmp_path / "c.jsonl", *[{"messages": turns}] * 30)
    got = drawn(spec, chatty)
    assert all(set(batch) == {"input_ids"} for batch in got.batches)
    text = chatty.decode(torch.cat([b["input_ids"] for b in got.batches]).flatten())
    assert "<user>quick<assistant>lazy dog<user>quick" in text
    assert encode(entries(spec, chatty)[0], chatty).prompt == 0


def test_a_turn_holds_what_the_template_reads(tmp_path: Path, chatty: Any) -> None:
    chatty.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% if 'tool_calls' in m %}{{ m.tool_calls[0].name }}{% endif %};{% endfor %}"
    )
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "fox"}]
    turns = [
        {"role": "user", "content": parts, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "find"}]},
        {"from": "tool", "value": "there"},
    ]
    spec = write(tmp_path / "c.jsonl", {"messages": turns})
    assert entries(spec, chatty)[0].text == "user:a fox;assistant:find;tool:there;"


def test_whatever_a_template_raises_is_one_message(tmp_path: Path, chatty: Any) -> None:
    chatty.chat_template = "{{ messages[0].content + 1 }}"
    spec = write(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(CalibrationError, match="does not take this conversation: can only"):
        entries(spec, chatty)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ('{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ('["a"]\n', "is not a list of rows"),
        ('{"question": "x"}\n', "a row has question"),
        ("{}\n", "a row has no fields"),
        ('{"text": 3}\n', "a row has text"),
        ('{"text": "few"}\n', "fewer than one sequence of 16"),
        ('{"messages": []}\n', "no chat template"),
        ('{"text": "a\0"}\n', "binary"),
    ],
)
def test_unusable_rows(tmp_path: Path, tokenizer: Any, content: str, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=reason) as caught:
        drawn(str(path), tokenizer)
    assert "bad.jsonl" in str(caught.value)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"text": "x"}, "#body", "no field 'body': it has text"),
        ({"body": 3}, "#body", "the field body is a int"),
        ({"messages": [{"role": "user"}]}, "", "no speaker or no text"),
        ({"messages": [{"role": "broken", "content": "x"}]}, "", "no such role"),
        ({"messages": ["x"]}, "", "no speaker"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "", "no text"),
    ],
)
def test_unusable_fields(tmp_path: Path, chatty: Any, row: Any, field: str, reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason) as caught:
        drawn(write(tmp_path / "r.jsonl", row) + field, chatty)
    assert "r.jsonl" in str(caught.value)
    assert "row 1" in str(caught.value)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


ROWS = [{"text": f"{i} is a number, and so is {i + 1}", "n": i} for i in range(40)]


def test_a_data_set_in_a_directory(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", *ROWS)
    write(folder / "test.jsonl", *reversed(ROWS))
    got = drawn(f"hub:{folder}", tokenizer)
    assert got.digest == drawn(str(folder / "train.jsonl"), tokenizer).digest
    assert got.sources[0].kind == "hub"
    test = drawn(f"hub:{folder}::test#text", tokenizer)
    assert test.digest == drawn(str(folder / "test.jsonl"), tokenizer).digest
    with pytest.raises(CalibrationError, match=r"cannot be had.*validation"):
        drawn(f"hub:{folder}::validation", tokenizer)


def test_a_data_set_that_was_saved(tmp_path: Path, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    got = drawn(f"hub:{tmp_path / 'saved'}", tokenizer)
    assert got.digest == drawn(write(tmp_path / "r.jsonl", *ROWS), tokenizer).digest


def test_of_a_saved_data_set_only_what_it_has(tmp_path: Path, offline: Any, capfd: Any) -> None:
    one = offline.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    offline.DatasetDict(train=one, valid=one.select(range(3))).save_to_disk(tmp_path / "two")
    capfd.readouterr()
    assert len(entries(f"hub:{tmp_path}/one")) == 40
    assert len(entries(f"hub:{tmp_path}/two::valid")) == 3
    for spec, held in (("one::test", "one split without a name"), ("two::test", "train, valid")):
        with pytest.raises(CalibrationError, match=f"it was saved with {held}"):
            entries(f"hub:{tmp_path}/{spec}")
    with pytest.raises(CalibrationError, match="without subsets"):
        entries(f"hub:{tmp_path}/two:de")
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_data_set_says_why_it_cannot_be_read(tmp_path: Path, offline: Any, capfd: Any) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text" "b"}\n')
    with pytest.raises(CalibrationError, match="JSON parse error"):
        entries(f"hub:{tmp_path}")
    assert capfd.readouterr() == ("", "")
    assert not offline.are_progress_bars_disabled()


def test_a_data_set_that_cannot_be_fetched(
    offline: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CalibrationError, match="nobody/nothing cannot be had") as caught:
        drawn("hub:nobody/nothing", tokenizer)
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")
    with pytest.raises(CalibrationError, match="without a name"):
        drawn("hub:", tokenizer)


def test_without_the_package_its_extra_is_named(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PluginError, match="datasets") as caught:
        drawn("hub:somebody/something", tokenizer)
    assert "prunec[data]" in str(caught.value)

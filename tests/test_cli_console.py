from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from prunec.cli.console import Screen, write_text
from prunec.cli.folding import folded
from prunec.errors import ExportError
from prunec.events import duration


def test_a_pipe_gets_words_and_no_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    with screen.task("score", total=2) as task:
        task.advance()
        task.update("score layer 1")
    screen.table("Result", ["", "before"], [["parameters", "134.5 M"]])
    screen.say("[not markup]")
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert err.startswith("score: 0.")
    assert "134.5 M" in out
    assert "[not markup]" in out


def test_seconds_are_kept_for_outermost_steps_that_ended() -> None:
    screen = Screen(quiet=True)
    with screen.task("outer"), screen.task("inner"):
        pass
    with pytest.raises(ZeroDivisionError), screen.task("failed"):
        1 / 0  # noqa: B018
    with screen.task("outer"):
        pass
    assert list(screen.seconds) == ["outer"]


def test_json_has_stdout_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(json="-")
    with screen.task("score"):
        pass
    screen.table("Result", ["", "before"], [["parameters", "134.5 M"]])
    screen.write_json({"perplexity": 1.5})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"perplexity": 1.5}
    assert "134.5 M" in err


def test_json_is_json_where_a_figure_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(json="-").write_json({"perplexity": math.inf, "entries": [math.nan, 1.5]})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"perplexity": None, "entries": [None, 1.5]}


def test_quiet_leaves_only_the_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    screen = Screen(quiet=True, json=str(tmp_path / "result.json"))
    with screen.task("score"):
        screen.message("downloading")
    screen.say("text")
    screen.timings()
    screen.write_json([1])
    assert capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "result.json").read_text()) == [1]


def test_a_json_target_that_cannot_be_written_fails_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such directory"):
        Screen(json=str(tmp_path / "absent" / "result.json"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "new \udcff")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_rows_of_a_step_are_a_table_above_its_bar_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    screen = Screen()
    with screen.task("pruning", total=2) as task:
        for number in (1, 2):
            task.row({"site": f"layers.{number}.mlp", "kept": "12 ffn_channel"})
            task.advance()
        screen._bars.refresh()
    err = capsys.readouterr().err
    assert "layers.2.mlp" in err
    assert err.index("site") < err.index("layers.1.mlp")


def test_rows_are_not_printed_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    with screen.task("pruning", total=1) as task:
        task.row({"site": "layers.1.mlp"})
    assert "layers.1.mlp" not in capsys.readouterr().err


NAMES = ("model.layers.*.self_attn/query_head", "layers.*.post_attention_layernorm.weight[0]")


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_names_fold_at_their_dots(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    head = ("group", "times", "units", "parameters a unit", "FLOPs a unit", "sits in")
    Screen().table(
        "Groups", head, [[NAMES[0], "2", "2", "1,024", "60.5 k", NAMES[1]]], words=(0, 5)
    )
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    rows = [re.split(r"[│ ]+", line) for line in shown.splitlines() if re.search(r"[a-z]", line)]
    parts = {part for row in rows for part in row}
    whole = re.findall(r"[^ ./_]+[./_]*", " ".join(NAMES))
    assert all(any(piece in part for part in parts) for piece in whole)
    assert "1,024" in parts
    assert (set(NAMES) <= parts) == (columns == 160)


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("a sentence of words", 10, ["a sentence", "of words"]),
        ("  kept in\nall  blocks", 9, ["  kept in", "all", "blocks"]),
        ("at model.layers.0.mlp", 14, ["at model.", "layers.0.mlp"]),
        ("model.up_projection_of_it", 14, ["model.up_", "projection_of_", "it"]),
        ("nosuchplace", 4, ["nosuchplace"]),
        ("", 4, [""]),
    ],
)
def test_a_text_folds_at_the_coarsest_place(text: str, width: int, lines: list[str]) -> None:
    assert folded(text, width).split("\n") == lines


def test_times_are_in_words() -> None:
    assert [duration(s) for s in (0.42, 59.6, 75, 3599.7, 7500)] == [
        "0.4 s", "60 s", "1 min 15 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip

"""Commands killed at any moment, or their disk full: no partial output; resumed, the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import pytest
from killed_command import Run, run
from tiny_model import TEXT, write_tiny_llama
from typer.testing import CliRunner

from prunec.cli.app import app
from prunec.models.quiet import quiet

WAYS: tuple[tuple[str, ...], ...] = ((), ("--out-of-core", "--activations", "disk"))
# The last step that a kill found ended, where it met the fit, and where writing or the gate.
FITTING = {"pruning", "fit the module to its new sizes"}
WRITING = {"compare the whole module with the masked one", "write the directory"}


class Place:
    """A directory with a model and a text, and the command that prunes it to `out`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder / "here", folder / "here" / "out"
        with quiet():
            write_tiny_llama(folder / "here" / "model", max_shard_size="20KB")
        (folder / "here" / "text").write_text(TEXT * 20, encoding="utf-8")
        self._log = folder / "log"
        self._before = self._names()

    def prune(self, *options: str, **faults: Any) -> Run:
        return self.run(*self._command, *options, **faults)

    def run(self, *command: str, **faults: Any) -> Run:
        return run(command, self._log, **faults)

    def files(self) -> set[str]:
        """Paths of what is there, input and all."""
        inside = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)) for path in inside}

    def prune_here(self, *options: str, code: int = 0) -> str:
        """What it says in this process."""
        done = CliRunner().invoke(app, [*self._command, *options])
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    @property
    def _command(self) -> list[str]:
        at = ["prune", str(self.folder / "model"), "-o", str(self.out), "--ratio", "0.25"]
        text = ["--calibration", str(self.folder / "text"), "--samples", "3", "--seq-len", "12"]
        return [*at, *text]

    @property
    def left(self) -> set[str]:
        """Names of what there is beside the input."""
        return self._names() - self._before

    def take(self) -> dict[str, bytes]:
        """What the output holds, which goes; nothing else must have been left."""
        assert self.left == {"out"}
        assert not self.temporary
        found = self.read()
        shutil.rmtree(self.out)
        return found

    def read(self) -> dict[str, bytes]:
        """What the output holds."""
        return {path.name: path.read_bytes() for path in self.out.iterdir()}

    @property
    def temporary(self) -> set[str]:
        """Names of what prunec has left where temporary files are."""
        return {path.name for path in Path(os.environ["TMPDIR"]).glob("prunec*")}

    def check_hidden(self) -> None:
        """Whatever a killed run has left does not look like a result."""
        assert all(name.startswith(".out.") for name in self.left - {"out"}), self.left

    def _names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "tmp").mkdir()
    settings = {
        "TMPDIR": str(tmp_path / "tmp"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    get_temp_dir()  # where the server listens: a socket's path is short, this test's may not be
    monkeypatch.setattr(tempfile, "tempdir", settings["TMPDIR"])
    return Place(tmp_path)


def whole(place: Place, way: Sequence[str]) -> tuple[dict[str, bytes], float]:
    """What an uninterrupted run writes, and the seconds that it takes."""
    done = place.prune(*way)
    assert done.code == 0, done.said
    return place.take(), done.seconds


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_is_resumed_to_the_same_bytes(place: Place, kills: int) -> None:
    wanted, draw = {way: whole(place, way) for way in WAYS}, random.Random(kills)
    met = set()
    for number in range(kills):
        way = WAYS[number % len(WAYS)]
        content, seconds = wanted[way]
        moment = (number + draw.random()) / kills * seconds
        while (killed := place.prune(*way, "--resume", kill_after=moment)).code is not None:
            assert place.take() == content, number  # it was faster this time
            moment *= 0.9
        met.add(killed.step)
        place.check_hidden()
        if place.left != {"out"}:
            resumed = place.prune(*way, "--resume")
            assert resumed.code == 0, resumed.said
        assert place.take() == content, (number, killed.said)
    assert kills < 100 or (met & FITTING and met & WRITING), met


COMMANDS = {
    "export": ("export", "small", "--to", "gguf", "-o", "new/there.gguf"),
    "eval": ("eval", "model", "--ppl", "text", "--window", "16", "--json", "there.json"),
    "recover": ("recover", "small", "-o", "new/there", "--data", "text", "--method", "full",
        "--steps", "2", "--set", "seq_len=16"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_what_is_killed_leaves_nothing_in_sight_and_is_done_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, command: str, kills: int
) -> None:
    place.out = place.folder / "small"
    place.prune_here()
    monkeypatch.chdir(place.folder)
    before, draw = place.files(), random.Random(kills)
    done = place.run(*COMMANDS[command])
    assert done.code == 0, done.said
    whole = place.files()
    for number in range(kills):
        for name in sorted(whole - before):
            (place.folder / name).unlink()
        place.run(*COMMANDS[command], kill_after=(number + draw.random()) / kills * done.seconds)
        seen = {name for name in place.files() if "/." not in f"/{name}"}
        assert seen in (before, whole), seen
        (place.folder / "there.json").unlink(missing_ok=True)
        shutil.rmtree(place.folder / "new" / "there", ignore_errors=True)
        (place.folder / "new" / "there.gguf").unlink(missing_ok=True)
        again = place.run(*COMMANDS[command])
        assert again.code == 0, again.said
        assert place.files() == whole
        assert not place.temporary


@pytest.fixture
def untidy(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A run was killed there when its output had its name, and its progress was not yet removed."""
    monkeypatch.setattr("prunec.codegen.hf.accept", lambda *_: [])  # the gate has its own tests
    with monkeypatch.context() as patch:
        patch.setattr("prunec.passes.checkpoint.remove_progress", lambda folder: None)
        place.prune_here()
    assert place.left == {"out", ".out.progress"}
    return place


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 2, "Removed what a killed run had left"),
        (("--overwrite",), 0, "Removed what a killed run had left"),
        (("--resume",), 0, "From its progress the same is written again"),
    ],
)
def test_a_run_killed_before_it_tidied_up(
    untidy: Place, options: tuple[str, ...], code: int, said: str
) -> None:
    content = untidy.read()
    next((untidy.folder / ".out.progress").glob("0002-*")).unlink()  # or while it did
    assert said in untidy.prune_here(*options, code=code)
    assert untidy.take() == content


def test_progress_beside_the_result_of_another_run(untidy: Place) -> None:
    record = untidy.out / "prunec.json"
    other = json.loads(record.read_text(encoding="utf-8"))
    other["report"]["run"] = "another"
    record.write_text(json.dumps(other), encoding="utf-8")
    assert "the output directory exists" in untidy.prune_here("--resume", code=2)
    assert untidy.left == {"out", ".out.progress"}


def test_an_error_leaves_no_parents(place: Place) -> None:
    place.out = place.folder / "new" / "deep" / "out"
    for option in (("--seq-len", "4000"), ("--max-ratio", "0.01")):
        assert "error: " in place.prune_here(*option, code=2)
        assert not place.left


@pytest.mark.parametrize(
    ("size", "said"), [(1000, "cannot keep progress"), (30_000, "the file system refuses")]
)
def test_a_disk_that_fills_up_on_the_way(place: Place, size: int, said: str) -> None:
    """The first limit is met by the progress, the second by the weights of the result."""
    failed = place.prune(file_limit=size)
    assert failed.code == 2, failed.said
    assert f"error: {said}" in failed.said
    assert not place.left

"""`prunec prune` killed at any moment, or its disk full: no partial output; resumed, the same bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from killed_command import Run, run
from tiny_model import TEXT, write_tiny_llama
from typer.testing import CliRunner, Result

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
        return run([*self._command, *options], self._log, **faults)

    def prune_here(self, *options: str) -> Result:
        """In this process."""
        return CliRunner().invoke(app, [*self._command, *options])

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
        found = {path.name: path.read_bytes() for path in self.out.iterdir()}
        for path in self.out.iterdir():
            path.unlink()
        self.out.rmdir()
        return found

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
        if not place.out.exists():
            resumed = place.prune(*way, "--resume")
            assert resumed.code == 0, resumed.said
        assert place.take() == content, (number, killed.said)
    assert kills < 100 or (met & FITTING and met & WRITING), met


@pytest.mark.parametrize("part_left", [False, True])
def test_a_run_killed_before_it_tidied_up(
    place: Place, monkeypatch: pytest.MonkeyPatch, part_left: bool
) -> None:
    """The output has its name already, and the progress is there, or in part."""
    content, _ = whole(place, ())
    for options, code in (((), 2), (("--overwrite",), 0), (("--resume",), 0)):
        with monkeypatch.context() as patch:
            patch.setattr("prunec.passes.checkpoint.remove_progress", lambda folder: None)
            assert place.prune_here("--overwrite").exit_code == 0
        progress = place.folder / ".out.progress"
        assert len(list(progress.glob("*.safetensors"))) == 4
        if part_left:
            next(progress.glob("0002-*")).unlink()
        again = place.prune(*options)
        assert again.code == code, again.said
        assert "is whole: the run that wrote it was killed" in again.said
        assert place.take() == content, options


def test_progress_of_another_run_beside_its_like(place: Place) -> None:
    content, seconds = whole(place, ())
    assert place.prune("--seed", "1").code == 0
    killed = place.prune("--overwrite", "--resume", kill_after=seconds * 0.7)
    assert killed.code is None
    refused = place.prune("--resume")
    assert refused.code == 2
    assert "the output directory exists" in refused.said
    assert place.prune("--overwrite", "--resume").code == 0
    assert place.take() == content


def test_an_error_leaves_no_parents(place: Place) -> None:
    place.out = place.folder / "new" / "deep" / "out"
    for options in (
        ("--min-ratio", "0.9"),
        ("--seq-len", "4000"),
        ("--scores", "new/a/b", "--set", "importance=random"),
    ):
        failed = place.prune(*options)
        assert failed.code == 2, failed.said
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

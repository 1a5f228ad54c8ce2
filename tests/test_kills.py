"""`prunec prune` killed at any moment, or its disk full: no partial output; resumed, the same bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from killed_command import Run, run
from tiny_model import TEXT, write_tiny_llama

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
        at = ["prune", str(self.folder / "model"), "-o", str(self.out), "--ratio", "0.25"]
        text = ["--calibration", str(self.folder / "text"), "--samples", "3", "--seq-len", "12"]
        return run([*at, *text, *options], self._log, **faults)

    @property
    def left(self) -> set[str]:
        """Names of what there is beside the input."""
        return self._names() - self._before

    def take(self) -> dict[str, bytes]:
        """What the output holds, which goes; nothing else must have been left."""
        assert self.left == {"out"}
        found = {path.name: path.read_bytes() for path in self.out.iterdir()}
        for path in self.out.iterdir():
            path.unlink()
        self.out.rmdir()
        return found

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


@pytest.mark.parametrize(
    ("size", "said"), [(1000, "cannot keep progress"), (30_000, "the file system refuses")]
)
def test_a_disk_that_fills_up_on_the_way(place: Place, size: int, said: str) -> None:
    """The first limit is met by the progress, the second by the weights of the result."""
    failed = place.prune(file_limit=size)
    assert failed.code == 2, failed.said
    assert f"error: {said}" in failed.said
    assert not place.left

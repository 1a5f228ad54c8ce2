"""Temporary folders: private, gone afterwards, and those of killed processes removed."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from prunec.passes.checkpoint import reserved
from prunec.staging import lock, no_empty_parents, sibling, temporary, temporary_of


def test_a_sibling_is_private_and_goes(tmp_path: Path) -> None:
    with sibling(tmp_path / "out") as folder:
        assert folder.parent == tmp_path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "file").touch()
    assert not list(tmp_path.iterdir())


def test_a_sibling_that_was_renamed_stays(tmp_path: Path) -> None:
    with sibling(tmp_path / "out") as folder:
        folder.rename(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_nobody_holds_is_removed_and_nothing_else(tmp_path: Path) -> None:
    others = [".out.part-inuse___", ".out.progress", ".other.part-abcdefgh", "out.part-abcdefgh"]
    for name in (".out.part-abcdefgh", *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    held = lock(tmp_path / others[0])
    assert held is not None
    try:
        with sibling(tmp_path / "out"):
            assert not (tmp_path / ".out.part-abcdefgh").exists()
    finally:
        os.close(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    assert all((tmp_path / name / "file").exists() for name in others)


def test_what_a_killed_process_left_the_next_one_removes(tmp_path: Path) -> None:
    """Of two that share a place for temporary files, the one that lives keeps its own."""
    code = f"""
import os, signal, sys
from pathlib import Path
from prunec.staging import temporary
for _ in range(2):
    with temporary(Path({str(tmp_path)!r})) as folder:
        (folder / "file").touch()
        print("there", flush=True)
        sys.stdin.readline()
"""
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    killed, living = (subprocess.Popen([sys.executable, "-c", code], **how) for _ in range(2))
    for process in (killed, living):
        assert process.stdout.readline() == "there\n"
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    with temporary(tmp_path) as mine:
        (other,) = set(tmp_path.iterdir()) - {mine}
        assert (other / "file").exists()
    living.communicate("\n\n")
    assert not list(tmp_path.iterdir())


def test_a_temporary_folder_goes_with_its_owner(tmp_path: Path) -> None:
    class Owner: ...

    owner = Owner()
    folder = temporary_of(owner, tmp_path)
    assert folder.parent == tmp_path
    del owner
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_parents_stay_only_if_something_is_in_them(tmp_path: Path) -> None:
    with no_empty_parents(tmp_path / "new" / "deep" / "out"):
        (tmp_path / "new" / "deep").mkdir(parents=True)
        (tmp_path / "new" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new"]
    with no_empty_parents(tmp_path / "new" / "other" / "out"):
        (tmp_path / "new" / "other").mkdir()
        (tmp_path / "new" / "other" / "out").touch()
    assert (tmp_path / "new" / "other" / "out").exists()


def test_a_lock_is_of_one_user_at_a_time(tmp_path: Path) -> None:
    first = lock(tmp_path)
    assert first is not None
    with pytest.raises(BlockingIOError):
        lock(tmp_path)
    os.close(first)
    again = lock(tmp_path)
    assert again is not None
    os.close(again)


Place = Callable[[Path], AbstractContextManager[Any]]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A suite that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("place", [sibling, temporary, reserved])
def test_an_interrupt_at_any_line_leaves_nothing(
    tmp_path: Path, place: Place, ctrl_c: None
) -> None:
    out = tmp_path / "new" / "out"
    (tmp_path / "new").mkdir()
    line = 0
    while _interrupted(place, out if place is not temporary else out.parent, line):
        gc.collect()
        assert not list((tmp_path / "new").iterdir()), f"line {line}"
        line += 1
    assert line > 15


def _interrupted(place: Place, path: Path, line: int) -> bool:
    """Whether an interrupt at this line of ours came before all was ready."""
    passed = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal passed
        if "prunec" not in Path(frame.f_code.co_filename).parts:
            return None
        if event == "line":
            passed += 1
            if passed == line + 1:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with place(path):
            sys.settrace(before)
            return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)

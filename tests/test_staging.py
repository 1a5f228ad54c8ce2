"""Temporary folders: private, gone afterwards, and those of killed processes removed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from prunec.staging import lock, sibling


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


def test_a_lock_is_of_one_user_at_a_time(tmp_path: Path) -> None:
    first = lock(tmp_path)
    assert first is not None
    with pytest.raises(BlockingIOError):
        lock(tmp_path)
    os.close(first)
    again = lock(tmp_path)
    assert again is not None
    os.close(again)

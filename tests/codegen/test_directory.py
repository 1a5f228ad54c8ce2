"""A directory appears whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from prunec.codegen import directory
from prunec.codegen.directory import check_target, staged
from prunec.errors import ExportError


def old_model(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("old")
    return path


def fail_after(path: Path, error: type[BaseException]) -> None:
    path.write_text("new")
    raise error


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_appears_under_its_name_with_the_usual_rights(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "out") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not (tmp_path / "deep" / "out").exists()
        (folder / "file").write_text("new")
    assert (tmp_path / "deep" / "out" / "file").read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "deep" / "out").stat().st_mode) == 0o777 & ~mask
    assert entries(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "deep" / "out") as folder:
        fail_after(folder / "file", error)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_any_failure_keeps_the_old_directory(tmp_path: Path, error: type[BaseException]) -> None:
    old = old_model(tmp_path / "out")
    with pytest.raises(error), staged(old, overwrite=True) as folder:
        fail_after(folder / "config.json", error)
    assert entries(tmp_path) == ["out"]
    assert (old / "config.json").read_text() == "old"


@pytest.mark.parametrize("atomic", [True, False])
def test_overwrite_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool) -> None:
    if not atomic:
        monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    old = old_model(tmp_path / "out")
    (old / "more").write_text("old")
    with staged(old, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert entries(tmp_path) == ["out"]
    assert entries(old) == ["config.json"]
    assert (old / "config.json").read_text() == "new"


def test_a_failing_last_rename_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    old, rename = old_model(tmp_path / "out"), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if (self / "config.json").exists() and (self / "config.json").read_text() == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ExportError, match="Input/output"), staged(old, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert entries(tmp_path) == ["out"]
    assert (old / "config.json").read_text() == "old"


def test_refuses_what_exists(tmp_path: Path) -> None:
    old = old_model(tmp_path / "out")
    with pytest.raises(ExportError, match="exists") as caught:
        check_target(old)
    assert caught.value.fix == "--overwrite"


def test_of_two_writers_the_first_keeps_the_place(tmp_path: Path) -> None:
    def write(name: str) -> None:
        with staged(tmp_path / "out") as folder:
            (folder / "config.json").write_text(name)
            if name == "late":
                write("first")

    with pytest.raises(ExportError, match="exists"):
        write("late")
    assert entries(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "first"


def test_a_place_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ExportError, match="Read-only file system"), staged(tmp_path / "a" / "out"):
        pass
    assert entries(tmp_path) == []


def test_refuses_to_replace_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ExportError, match="something else than a model"):
        check_target(tmp_path, overwrite=True)
    with pytest.raises(ExportError, match="is a file"):
        check_target(tmp_path / "thesis.tex", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    old_model(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged(tmp_path / "link", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "new"


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on file size stands for it: safetensors reports it as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ExportError) as caught, staged(tmp_path / "out") as folder:
            save_file({"weight": torch.zeros(10_000)}, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.so == "nothing was written"
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as tokenizers raises it
    ],
)
def test_no_space_is_said_plainly(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(ExportError, match="the disk is full"), staged(tmp_path / "out"):
        raise error
    assert entries(tmp_path) == []

"""Values that wait on disk come back as they were, and leave nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prunec.errors import CheckpointError, PlanError
from prunec.graph import waiting
from prunec.graph.waiting import Disk, Either, Filed, Memory, place_named, present

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _every_tensor_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_SMALL_BYTES", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (), (2, 0)])
def test_a_tensor_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype, shape) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    place = Disk(tmp_path)
    kept = place.keep({1: [tensor, None], 2: torch.atleast_2d(tensor).T}, {})  # type: ignore[dict-item]
    back = present(kept, CPU)
    assert torch.equal(back[1][0], tensor)  # type: ignore[index]
    assert back[1][1] is None  # type: ignore[index]
    assert torch.equal(back[2], torch.atleast_2d(tensor).T)  # type: ignore[index]
    assert back[2].stride() == torch.atleast_2d(tensor).T.stride()  # type: ignore[index]


def test_files_go_with_their_values_and_the_folder_with_its_owner(tmp_path: Path) -> None:
    place = Disk(tmp_path)
    kept = place.keep({1: torch.randn(9)}, {})  # type: ignore[dict-item]
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert len(list(folder.iterdir())) == 1
    again = place.keep(present(kept, CPU), kept)
    assert again == kept, "what lies there is not written again"
    del kept, again
    gc.collect()
    assert not list(folder.iterdir())
    del place
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "prunec-part-abcdefgh"
    left.mkdir()
    (left / "value").write_bytes(b"x" * 100)
    place = Disk(tmp_path)
    kept = place.keep({1: torch.randn(9)}, {})  # type: ignore[dict-item]
    assert not left.exists()
    assert isinstance(kept[1], Filed)  # type: ignore[index]


def test_much_goes_to_disk(tmp_path: Path) -> None:
    place = Either(Disk(tmp_path))
    place.expect(1000)
    assert isinstance(place.keep({1: torch.randn(9)}, {})[1], Tensor)  # type: ignore
    place.expect(10**15)
    assert isinstance(place.keep({1: torch.randn(9)}, {})[1], Filed)  # type: ignore


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot keep activations on disk"):
        Disk(tmp_path / "file").keep({1: torch.randn(9)}, {})  # type: ignore[dict-item]


def test_names_of_places() -> None:
    assert isinstance(place_named("memory"), Memory)
    with pytest.raises(PlanError, match="no place 'tape' for activations"):
        place_named("tape")

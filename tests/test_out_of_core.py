"""Weights that stay in their files, and runs that were killed, come to the same bytes."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import VOCABULARY, tiny_llama, write_tiny_llama
from torch import Tensor

import prunec
from prunec.errors import CheckpointError, ModelError, PlanError
from prunec.events import Task, silent
from prunec.graph import waiting
from prunec.models import open_model
from prunec.models.quiet import quiet

RECIPE = {"recipe": "slimgpt", "ratio": 0.25}


def batches(count: int = 3, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(2, VOCABULARY, (2, 9), generator=generator)}
        for _ in range(count)
    ]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file; of prunec.json all but which checks were run."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    record = json.loads(found.pop("prunec.json"))
    del record["checks"], record["report"]["checks"]
    return {**found, "prunec.json": json.dumps(record).encode()}


def test_out_of_core_writes_the_same_bytes(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "model", max_shard_size="20KB")
    for name, out_of_core in (("loaded", False), ("stored", True)):
        with quiet():
            opened = open_model(str(source), out_of_core=out_of_core)
            assert (opened.weights is not None) == out_of_core
            result = prunec.prune(
                opened.model, calibration=batches(), weights=opened.weights, **RECIPE
            )
            result.save(tmp_path / name)
    assert contents(tmp_path / "loaded") == contents(tmp_path / "stored")


@pytest.mark.parametrize(
    "how",
    [
        {"recipe": "short-gpt", "ratio": 0.5},
        {"recipe": "llm-pruner", "ratio": 0.2, "settings": {"mode": "channel"}},
    ],
)
def test_runs_that_load_a_stored_model_first(tmp_path: Path, how: dict[str, Any]) -> None:
    source, found = write_tiny_llama(tmp_path / "model"), []
    for out_of_core in (False, True):
        with quiet():
            opened = open_model(str(source), out_of_core=out_of_core)
            place = "cpu" if out_of_core else None
            result = prunec.prune(
                opened.model, calibration=batches(), weights=opened.weights, device=place, **how
            )
        found.append(result.model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"scores": "scores"}, "scores"),
        ({"resume": True}, "a checkpoint to resume from"),
        ({"activations": "disk"}, "a place for activations"),
        ({"settings": {"constraints.protect": ["0"]}}, "the constraint protect"),
    ],
)
@pytest.mark.parametrize("mode", ["layer", "channel"])
def test_what_would_be_without_effect_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, option: dict[str, Any], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"mode": mode, **option.get("settings", {})}
    given = {**option, "settings": settings, "calibration": batches()}
    with pytest.raises(PlanError, match=f"has no use for {named}"):
        prunec.prune(tiny_llama(), recipe="llm-pruner", ratio=0.4, **given)
    assert not list(tmp_path.iterdir())


def test_activations_on_disk_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = states(tmp_path / "memory", activations="memory")
    monkeypatch.setattr(waiting, "_SMALL_BYTES", 1)
    written: list[Path] = []
    keep = waiting.Filed.__init__

    def noted(self: waiting.Filed, tensor: Tensor, folder: Path, owner: object) -> None:
        keep(self, tensor, folder, owner)
        written.append(folder)

    monkeypatch.setattr(waiting.Filed, "__init__", noted)
    found = states(tmp_path / "disk", activations="disk")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {path.parent for path in written} == {tmp_path / "disk"}
    gc.collect()
    assert not list((tmp_path / "disk").glob("prunec-part-*"))


def test_a_model_on_meta_without_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="parameters are on the meta device"):
        prunec.prune(tiny_llama().to("meta"), calibration=batches(), **RECIPE)


class Killed(BaseException):
    """What a SIGKILL looks like from inside: nothing is cleaned up after it."""


class KilledAfter:
    """A Progress that ends the run when so many sites are done."""

    def __init__(self, sites: int) -> None:
        self.left = sites

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        yield self if description == "pruning" else silent.task("").__enter__()

    def advance(self, n: int = 1) -> None:
        self.left -= n
        if self.left < 0:
            raise Killed

    def update(self, description: str) -> None:
        pass

    def row(self, cells: Mapping[str, str]) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def module() -> torch.nn.Module:
    """Not of transformers: what is delivered is the program, in a second."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(6, 16), torch.nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block() for _ in range(4))).eval()


def vectors(seed: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input": torch.randn(7, 6, generator=generator)} for _ in range(3)]


def states(folder: Path, **options: object) -> dict[str, Tensor]:
    given = {"calibration": vectors(), "checkpoint": folder, **RECIPE, **options}
    return dict(prunec.prune(module(), **given).program.state)  # type: ignore[arg-type]


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, done: int) -> None:
    wanted = states(tmp_path / "whole")
    with pytest.raises(Killed):
        states(tmp_path / "killed", progress=KilledAfter(done))
    assert len(list((tmp_path / "killed").glob("0*.safetensors"))) == done + 1
    found = states(tmp_path / "killed", resume=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ratio": 0.3}, "target: "),
        ({"recipe": "magnitude"}, "recipe: "),
        ({"seed": 7}, "seed: 0 then, 7 now"),
        ({"calibration": vectors(9)}, "data: "),
    ],
)
def test_progress_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    states(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        states(tmp_path, resume=True, **change)
    assert named in str(caught.value)


def test_damaged_progress_is_refused(tmp_path: Path) -> None:
    states(tmp_path)
    last = sorted(tmp_path.glob("0*.safetensors"))[-1]
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        states(tmp_path, resume=True)
    states(tmp_path)  # without resume it is begun again


def test_two_runs_cannot_share_their_progress(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    states(tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another run"):
            states(tmp_path)

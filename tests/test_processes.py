"""Two processes on one machine come to the plan of one; one that dies ends the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# One process of some runs: argv is how they are made by name, as JSON, the folder to write to, and
# the rank that dies or -1.
WORKER = """
import json, os, sys
from contextlib import contextmanager
import torch
from safetensors.torch import save_file
sys.path.insert(0, os.environ["TESTS"])
from test_out_of_core import module, vectors
import prunec
from prunec.errors import PrunecError
from prunec.passes.distributed import launched

class Progress:
    @contextmanager
    def task(self, description, total=None):
        yield self
    def advance(self, n=1):
        if os.environ.get("RANK") == sys.argv[3]:
            os._exit(9)
    def update(self, description):
        pass
    def row(self, cells):
        pass
    def message(self, text):
        pass

try:
    with launched() as together:
        for name, how in json.loads(sys.argv[1]).items():
            result = prunec.prune(
                module(),
                ratio=0.3,
                calibration=vectors() * 2,
                loss=lambda model, inputs: model(**inputs).square().mean(),
                progress=Progress(),
                **how,
            )
            path = os.path.join(sys.argv[2], f"{name} {together.size}-{together.rank}")
            save_file(dict(result.program.state), path + ".safetensors")
            with open(path + ".json", "w") as file:
                json.dump(result.plan.to_json(), file)
except PrunecError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start(
    folder: Path, runs: Mapping[str, object], size: int, dies: int = -1
) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    here = {"TESTS": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(runs), str(folder), str(dies)],
            env={**os.environ, **common, **here, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


WAYS: dict[str, dict[str, object]] = {
    "inputs": {"recipe": "slimgpt"},
    "gradients": {"recipe": "llm-pruner"},
    "gradients by sample": {"recipe": "llm-pruner", "settings": {"importance": "fisher"}},
    "survey": {"recipe": "flap", "settings": {"compensation": "none"}},
    "similarities": {"recipe": "slimgpt", "settings": {"allocation": "similarity-softmax"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and what two have written, of every way to prune."""
    folder = tmp_path_factory.mktemp("runs")
    running = []
    for size in (1, 2):
        saved = {"recipe": "slimgpt", "scores": str(folder / f"scores-{size}")}
        running += start(folder, {**WAYS, "scores": saved}, size)
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    return folder


@pytest.mark.parametrize("way", [*WAYS, "scores"])
def test_two_processes_make_the_plan_of_one(folder: Path, way: str) -> None:
    names = [f"{way} {n}" for n in ("1-0", "2-0", "2-1")]
    alone, *both = (load_file(folder / f"{name}.safetensors") for name in names)
    plans = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    assert plans[0] == plans[1] == plans[2]
    for name, tensor in alone.items():
        assert torch.allclose(both[0][name], tensor, rtol=1e-5, atol=1e-5), name
        assert torch.equal(both[0][name], both[1][name]), name


def test_two_processes_save_the_same_scores(folder: Path) -> None:
    alone, both = (sorted((folder / f"scores-{size}").iterdir()) for size in (1, 2))
    assert [path.name for path in alone] == [path.name for path in both]


def test_a_process_that_dies_ends_the_other_with_an_error(tmp_path: Path) -> None:
    first, second = start(tmp_path, {"inputs": WAYS["inputs"]}, 2, dies=1)
    assert second.wait(300) == 9
    died = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert time.monotonic() - died < 30
    assert first.returncode == 1
    assert "ProcessError: another process of this run has ended" in said
    assert second.stderr is not None
    second.stderr.close()
    assert not list(tmp_path.iterdir())

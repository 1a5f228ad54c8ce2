"""Two processes on one machine come to the plan of one; one that dies ends the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

# One process of a run: argv is the recipe, the folder to write to, and the rank that dies or -1.
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
        result = prunec.prune(
            module(), recipe=sys.argv[1], ratio=0.3, calibration=vectors() * 2, progress=Progress()
        )
except PrunecError as error:
    sys.exit(f"{type(error).__name__}: {error}")
name = os.path.join(sys.argv[2], f"{together.size}-{together.rank}")
save_file(dict(result.program.state), name + ".safetensors")
with open(name + ".json", "w") as file:
    json.dump(result.plan.to_json(), file)
"""


def start(folder: Path, recipe: str, size: int, dies: int = -1) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    here = {"TESTS": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, recipe, str(folder), str(dies)],
            env={**os.environ, **common, **here, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def test_two_processes_make_the_plan_of_one(tmp_path: Path) -> None:
    for recipe in ("slimgpt",):
        for running in [*start(tmp_path, recipe, 1), *start(tmp_path, recipe, 2)]:
            assert running.wait(300) == 0, running.stderr and running.stderr.read()
            assert running.stderr is not None
            running.stderr.close()
    alone, *both = (load_file(tmp_path / f"{n}.safetensors") for n in ("1-0", "2-0", "2-1"))
    plans = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("1-0", "2-0", "2-1")]
    assert plans[0] == plans[1] == plans[2]
    for name, tensor in alone.items():
        assert torch.allclose(both[0][name], tensor, rtol=1e-5, atol=1e-5), name
        assert torch.equal(both[0][name], both[1][name]), name


def test_a_process_that_dies_ends_the_other_with_an_error(tmp_path: Path) -> None:
    first, second = start(tmp_path, "slimgpt", 2, dies=1)
    assert second.wait(300) == 9
    died = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert time.monotonic() - died < 30
    assert first.returncode == 1
    assert "ProcessError: another process of this run has ended" in said
    assert second.stderr is not None
    second.stderr.close()
    assert not list(tmp_path.iterdir())

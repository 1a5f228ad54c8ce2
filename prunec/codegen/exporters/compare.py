"""An exported file in its engine, in a process of its own, beside the model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunec.codegen.battery import difference, tolerance
from prunec.codegen.exporters import stranger
from prunec.codegen.exporters.exporter import Finding
from prunec.codegen.exporters.source import ModelDirectory
from prunec.codegen.exporters.traced import Inputs, expected, named_forward, unpadded
from prunec.codegen.streamed import in_single
from prunec.errors import VerifyError
from prunec.staging import temporary

PRUNEC = ("prunec",)


@dataclass(frozen=True)
class Engine:
    """What runs an exported file.

    Attributes:
        function: of `stranger`.
        package: whose version is reported.
        limit: of the largest difference, relative to the largest logit; None: of the model's type.
        hidden: packages that its process cannot import.
        single: it computes with 16-bit weights in fp32.
    """

    function: str
    package: str
    limit: float | None = None
    hidden: Sequence[str] = PRUNEC
    single: bool = False


def absent(engine: str, package: str, module: str, fix: str) -> Finding | None:
    """The finding for an engine that is not installed; None if it is."""
    if find_spec(module) is not None:
        return None
    return Finding(engine, "engine absent", f"not run: {package} is not installed ({fix})")


def named(package: str) -> str:
    """`package` with its version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def measure(
    engine: Engine,
    source: ModelDirectory,
    file: Path,
    cases: Mapping[str, Inputs] | None = None,
) -> Finding:
    """Run `cases` in the engine and compare with the model in `source`.

    Args:
        cases: inputs by name; those that the traced program was compared on by default.

    Raises:
        VerifyError: the file does not open, or gives other numbers.
    """
    cases = source.traced.cases if cases is None else cases
    found = outputs(engine.function, file, cases, hidden=engine.hidden)
    with in_single(source.model, None) if engine.single else nullcontext(source.model) as model:
        forward = named_forward(model, list(next(iter(cases.values()))))
        limit = tolerance(model) if engine.limit is None else engine.limit
        worst = 0.0
        for name, inputs in cases.items():
            wanted = expected(forward, inputs).float()
            gap = difference([unpadded(found[name], inputs).float()], [wanted])
            if not gap <= limit:
                raise VerifyError(
                    f"{file.name} is not the model",
                    where=f"{named(engine.package)}, {name}: off by {gap:.1e} of the largest logit",
                    so="nothing was delivered",
                )
            worst = max(worst, gap)
    detail = f"{', '.join(cases)}: equal within {worst:.1e} of the largest logit"
    return Finding(named(engine.package), "measured", detail)


def outputs(
    engine: str,
    file: Path,
    cases: Mapping[str, Inputs],
    *,
    hidden: Sequence[str] = PRUNEC,
    greedy: int = 0,
) -> dict[str, Tensor]:
    """What the engine computes for each case, and under "greedy" the tokens it continues with.

    Raises:
        VerifyError: it does not open or run the file.
    """
    with temporary() as folder:
        job = {
            "engine": engine,
            "file": str(file),
            "hidden": list(hidden),
            "threads": torch.get_num_threads(),
            "cases": {case: list(inputs) for case, inputs in cases.items()},
            "greedy": greedy,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        tensors = {f"{c}/{n}": t.clone() for c, i in cases.items() for n, t in i.items()}
        save_file(tensors, folder / "inputs.safetensors")
        # -B: a Python module that is opened leaves no bytecode beside it.
        command = [sys.executable, "-P", "-B", str(Path(stranger.__file__)), str(folder)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode or not (folder / "outputs.safetensors").exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise VerifyError(
                f"the engine does not run {file.name}",
                where=f"{engine}: {lines[-1][:300]}",
                so="nothing was delivered",
            )
        return load_file(folder / "outputs.safetensors")

"""What every benchmark shares: where the data is, what to record, how to write it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numpy", "prunec")


def data_directory() -> Path:
    """The benchmark texts: $PRUNEC_DATA, else ../shared/data beside the checkout."""
    here = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("PRUNEC_DATA", here.parent / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"no benchmark data in {folder}: set PRUNEC_DATA")
    return folder


def read(name: str) -> Any | None:
    """The figures that `write` left, None where there are none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else None


@contextmanager
def shared(name: str) -> Iterator[dict[str, Any]]:
    """The figures, to be changed and written again; other runs that do the same wait."""
    RESULTS.mkdir(exist_ok=True)
    with FileLock(RESULTS / f".{name}.lock"):
        figures = read(name) or {}
        yield figures
        write(name, figures)


def write(name: str, figures: Any) -> Path:
    """Write figures with the versions and the machine they come from."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "versions": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "figures": figures,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path

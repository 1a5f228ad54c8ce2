"""`python -m zoo [TYPE ...]`: examine architectures, resume where the last run stopped.

One forked process a type, so that a crash or a hang costs that type only. A record is reused while
the type's configuration and the sources of the analysis are what they were.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from zoo import configs, report
from zoo.check import examine

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".zoo"
SOURCES = (
    "prunec/graph",
    "prunec/passes/slice.py",
    "prunec/passes/oracle.py",
    "tests/zoo/check.py",
)


def sources_digest() -> str:
    digest = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def main() -> int:
    arguments = _parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    CACHE.mkdir(exist_ok=True)
    types = arguments.types or list(configs.all_types(arguments.family))
    sources = sources_digest()
    _warm_up()
    context = multiprocessing.get_context("fork")
    for number, name in enumerate(types, start=1):
        file = CACHE / f"{name.replace('/', '.')}.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        if _reusable(old, sources, arguments):
            continue
        start = time.perf_counter()
        process = context.Process(target=_work, args=(name, sources, file))
        process.start()
        process.join(arguments.timeout)
        if process.is_alive():
            process.kill()
            process.join()
            _write(file, {"type": name, "status": "timeout", "sources": sources, "failures": []})
        elif process.exitcode:
            reason = f"the process ended with {process.exitcode}"
            record = {"type": name, "status": "died", "reason": reason, "failures": []}
            _write(file, {**record, "sources": sources})
        record = json.loads(file.read_text())
        seconds = time.perf_counter() - start
        line = f"{number:3}/{len(types)} {name:32} {record['status']:12} {seconds:5.1f} s"
        sys.stdout.write(f"{line}  {report.first_failure(record)}\n")
        sys.stdout.flush()
    report.write(CACHE, ROOT)
    return 0


def _warm_up() -> None:
    """Import what tracing needs before forking, not in every child."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Softmax(-1))
    examine(layer, {"input": torch.ones(2, 2)})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--family", default="causal", choices=[*configs.FAMILIES, "all"])
    parser.add_argument("--timeout", type=float, default=240, help="seconds a type")
    parser.add_argument("--failed", action="store_true", help="only those not exact so far")
    parser.add_argument("--force", action="store_true", help="examine again what is known")
    return parser.parse_args()


def _reusable(old: dict[str, Any], sources: str, arguments: argparse.Namespace) -> bool:
    if not old or arguments.force:
        return False
    if arguments.failed:
        return bool(old["status"] == "exact")
    same = old.get("config") == configs.digest(old["type"])
    return bool(old["sources"] == sources and same)


def _work(name: str, sources: str, file: Path) -> None:
    """In the child: build, examine, write."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {"type": name, "sources": sources, "failures": []}
    start = time.perf_counter()
    try:
        record["config"] = configs.digest(name)
        model = configs.build(name)
        inputs = configs.example(model)
    except Exception as error:  # noqa: BLE001 - what transformers cannot build is a finding
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        _write(file, {**record, "status": "unbuilt", "reason": reason})
        return
    try:
        record.update(examine(model, inputs))
    except Exception as error:  # noqa: BLE001 - so is a crash
        lines = traceback.format_exc().strip().splitlines()
        record.update(status="crashed", reason=" | ".join(lines[-4:])[:400])
        record["failures"] = [{"subject": "examine", "way": "crash", "error": repr(error)[:200]}]
    record["seconds"] = round(time.perf_counter() - start, 1)
    _write(file, record)


def _write(file: Path, record: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())

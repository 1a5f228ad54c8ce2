"""`python -m zoo [TYPE ...]`: examine and deliver architectures, resume where the last run stopped.

Two steps. `examine`: trace, couple, both oracles, wrong slices. `deliver`: shrink, write, and reopen
the directories of many types in one fresh process. One forked process a type, so that a crash or a
hang costs that type only. A record is reused while the type's configuration and the sources that
it depends on are what they were; `--minutes` ends a shard, and the next run goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from torch import Tensor, nn

from prunec.codegen.gate import reopen
from zoo import configs, report
from zoo.check import examine
from zoo.deliver import deliver

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".zoo"
BATCH = 20  # directories that one fresh process opens
ANALYSIS = ("prunec/graph", "prunec/passes/slice.py", "prunec/passes/oracles/oracle.py")
Record = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One of the two things done with a type, and the sources that its record depends on."""

    name: str
    done: str
    sources: tuple[str, ...]
    work: Callable[[nn.Module, dict[str, Tensor], Path], Record]

    def file(self, name: str) -> Path:
        return CACHE / self.name / f"{name.replace('/', '.')}.json"

    def directory(self, name: str) -> Path:
        return CACHE / "directories" / self.name / name.replace("/", ".")

    def digest(self) -> str:
        digest = hashlib.sha256()
        for source in self.sources:
            path = ROOT / source
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                if not {"render", "exporters"} & set(file.parts):  # nothing depends on these
                    digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


def _examined(model: nn.Module, inputs: dict[str, Tensor], _: Path) -> Record:
    return examine(model, inputs)


EXAMINE = Step("examine", "exact", (*ANALYSIS, "tests/zoo/check.py"), _examined)
DELIVER = Step(
    "deliver", "reopened", (*ANALYSIS, "prunec/codegen", "tests/zoo/deliver.py"), deliver
)
STEPS = {step.name: step for step in (EXAMINE, DELIVER)}


def main() -> int:
    arguments = _parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    types = arguments.types or configs.all_types(arguments.family)
    end = time.monotonic() + 60 * arguments.minutes
    if not arguments.report:
        with _forwards():
            _warm_up()
            for name in arguments.step:
                _sweep(STEPS[name], types, arguments, end)
    digests = {step.name: step.digest() for step in STEPS.values()}
    try:
        report.write(CACHE, ROOT, digests)
    except LookupError as error:
        sys.stderr.write(f"The tables are as they were: {error}\n")
        return 1
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--family", default="all", choices=[*configs.FAMILIES, "all"])
    parser.add_argument("--step", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--timeout", type=float, default=240, help="seconds a type and step")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no type after these")
    parser.add_argument("--failed", action="store_true", help="only those that failed so far")
    parser.add_argument("--force", action="store_true", help="examine again what is known")
    parser.add_argument("--report", action="store_true", help="only write the tables")
    return parser.parse_args()


@contextmanager
def _forwards() -> Iterator[None]:
    """The plug-in of examples/: without it export cannot follow some of the classes."""
    with tempfile.TemporaryDirectory(prefix="prunec-forwards-") as folder:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                *("--no-deps", "--no-index", "--no-build-isolation", "--target", folder),
                ROOT / "examples" / "plugin_forwards",
            ],
            check=True,
        )
        sys.path.append(folder)
        yield
        sys.path.remove(folder)


def _warm_up() -> None:
    """Import what tracing needs before forking, not in every child."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Softmax(-1))
    examine(layer, {"input": torch.ones(2, 2)})


def _sweep(step: Step, types: list[str], arguments: argparse.Namespace, end: float) -> None:
    sources = step.digest()
    (CACHE / step.name).mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    for number, name in enumerate(types, start=1):
        if time.monotonic() > end:
            break
        file = step.file(name)
        old = json.loads(file.read_text()) if file.exists() else {}
        if _reusable(old, step, sources, arguments):
            continue
        start = time.perf_counter()
        _forked(step, name, sources, arguments.timeout)
        record = json.loads(file.read_text())
        seconds = time.perf_counter() - start
        line = f"{number:3}/{len(types)} {name:32} {record['status']:12} {seconds:5.1f} s"
        sys.stdout.write(f"{line}  {report.first_failure(record)}\n")
        sys.stdout.flush()
        written += [name] if record["status"] == "written" else []
        if len(written) == BATCH:
            _reopened(step, written)
            written = []
    _reopened(step, written)


def _reusable(old: Record, step: Step, sources: str, arguments: argparse.Namespace) -> bool:
    if not old or arguments.force:
        return False
    if arguments.failed:
        return bool(old["status"] == step.done)
    if old["sources"] != sources or old["status"] == "written":
        return False
    return bool(old.get("config") == _config_digest(old["type"]))


def _config_digest(name: str) -> str | None:
    try:
        return configs.digest(name)
    except Exception:  # noqa: BLE001 - what transformers cannot build has none
        return None


def _forked(step: Step, name: str, sources: str, timeout: float) -> None:
    file = step.file(name)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(step, name, sources))
    process.start()
    process.join(timeout)
    record: Record = {"type": name, "sources": sources, "failures": []}
    if process.is_alive():
        process.kill()
        process.join()
        _write(file, {**record, "status": "timeout"})
    elif process.exitcode:
        reason = f"the process ended with {process.exitcode}"
        _write(file, {**record, "status": "died", "reason": reason})


def _work(step: Step, name: str, sources: str) -> None:
    """In the child: build, do the step, write the record."""
    torch.set_num_threads(1)
    record: Record = {"type": name, "sources": sources, "failures": []}
    record["config"] = _config_digest(name)
    start = time.perf_counter()
    try:
        model = configs.build(name)
        inputs = configs.inputs_of(name, model)
    except Exception as error:  # noqa: BLE001 - what transformers cannot build is a finding
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        _write(step.file(name), {**record, "status": "unbuilt", "reason": reason})
        return
    directory = step.directory(name)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        record.update(step.work(model, inputs, directory))
    except Exception as error:  # noqa: BLE001 - so is a crash
        lines = traceback.format_exc().strip().splitlines()
        record.update(status="crashed", reason=" | ".join(lines[-4:])[:400])
        record["failures"] = [{"subject": step.name, "way": "crash", "error": repr(error)[:200]}]
    record["seconds"] = round(time.perf_counter() - start, 1)
    _write(step.file(name), record)


def _reopened(step: Step, names: list[str]) -> None:
    """One fresh process opens the directories of these types; their records say what it found."""
    if not names:
        return
    folders = [step.directory(name) for name in names]
    for name, folder, problems in zip(names, folders, reopen(folders), strict=True):
        record = json.loads(step.file(name).read_text())
        if problems:
            record.update(
                status="not reopened", reason="; ".join(problems).replace(f"{ROOT}/", "")[:400]
            )
        else:
            record["status"] = "partial" if record["refused"] else step.done
        _write(step.file(name), record)
        sys.stdout.write(f"{name:40} {record['status']}  {report.first_failure(record)}\n")
        shutil.rmtree(folder)
    sys.stdout.flush()


def _write(file: Path, record: Record) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())

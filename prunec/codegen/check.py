"""Whether a delivered directory is whole, and which engines can open it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prunec.codegen.battery import FORWARD_ERRORS
from prunec.codegen.engines import Engine, engines
from prunec.codegen.exporters.source import ModelDirectory
from prunec.codegen.exporters.traced import named_forward
from prunec.codegen.perturb import meta_model
from prunec.codegen.twin import stock_class, tensors_of
from prunec.errors import ModelError, PlanError, PrunecError
from prunec.events import Progress, silent
from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.models.checkpoint import NO_JSON, PICKLES, check_weights
from prunec.models.digest import file_digest
from prunec.models.quiet import quiet
from prunec.passes.plan import Plan

RECORD = "prunec.json"


@dataclass(frozen=True)
class Test:
    """One test of the directory itself: what was looked at, and what is wrong, if anything."""

    name: str
    problem: str | None
    detail: str = ""


@dataclass(frozen=True)
class Checked:
    """The tests of a directory and the table of engines."""

    tests: tuple[Test, ...]
    engines: tuple[Engine, ...]

    @property
    def whole(self) -> bool:
        return all(test.problem is None for test in self.tests)

    def to_json(self) -> dict[str, Any]:
        return {"whole": self.whole, **asdict(self)}


def check(directory: str | Path, *, measure: bool = True, progress: Progress = silent) -> Checked:
    """Test a directory that prunec wrote, and say which engines can open it.

    Args:
        measure: run it in the engines that are installed, each in the form that it reads.

    Raises:
        ModelError: it is no model directory at all.
    """
    source = ModelDirectory.read(Path(directory))
    tests: list[Test] = []
    steps: dict[str, Callable[[ModelDirectory], str]] = {
        "files": _files,
        "hashes": _hashes,
        "weights": _weights,
        "model": _opens,
        "plan": _plan,
    }
    with quiet(), progress.task("test the directory", total=len(steps)) as task:
        for name, test in steps.items():
            task.update(f"test the {name}")
            try:
                tests.append(Test(name, None, test(source)))
            except PrunecError as error:
                tests.append(Test(name, error.message, error.where or ""))
            task.advance()
        whole = all(test.problem is None for test in tests)
    with quiet(), progress.task("see which engines can open it"):
        table = tuple(engines(source, measure=measure)) if whole else ()
    return Checked(tuple(tests), table)


def _files(source: ModelDirectory) -> str:
    """Every shard is there and as long as its header says; nothing is pickled."""
    shards = check_weights(source.path)
    pickles = [path.name for path in source.path.iterdir() if path.suffix in PICKLES]
    if pickles:
        raise ModelError(f"there are pickled files: {', '.join(sorted(pickles))}")
    if "auto_map" in source.config and not (source.path / "modeling_prunec.py").is_file():
        raise ModelError("config.json names modeling_prunec.py, which is missing")
    return f"{len(shards)} weight files, {len(source.shapes)} tensors"


def record(source: ModelDirectory) -> dict[str, Any]:
    """prunec.json; empty where there is none."""
    path = source.path / RECORD
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except NO_JSON as error:
        raise ModelError(f"{RECORD} is not valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _hashes(source: ModelDirectory) -> str:
    wanted: Mapping[str, str] = record(source).get("sha256") or {}
    if not wanted:
        return "none are recorded"
    for name, digest in wanted.items():
        path = source.path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"{RECORD} names a file that is not one of the directory: {name}")
        if not path.is_file():
            raise ModelError(f"{name} is missing")
        if file_digest(path) != digest:
            raise ModelError(f"{name} is not the file that prunec wrote", where=str(path))
    return f"{len(wanted)} files as written"


def _weights(source: ModelDirectory) -> str:
    """The shapes that the config stands for, on meta, against those of the files."""
    table = source.table
    for kind in ("shapes", "added"):
        for name, shape in table[kind].items():
            if name in source.shapes and list(source.shapes[name]) != shape:
                found = list(source.shapes[name])
                raise ModelError(f"{name} is {found} in the weights, {shape} in config.prunec")
            if name not in source.shapes and name in {n for n, _ in _saved(source)}:
                raise ModelError(f"{name} of config.prunec is not in the weights")
    if "prunec" in source.config:
        return f"{len(table['shapes'])} sizes as config.prunec lists them"
    model: Any = source.model
    stock = meta_model(stock_class(model), model.config, {}, validate=False)
    if stock is None:
        raise ModelError("the stock class cannot be built from this config")
    sizes = {name: tensor.shape for name, tensor in tensors_of(stock).items()}
    for name, tensor in model.named_parameters():
        if sizes.get(name) != tensor.shape:
            raise ModelError(f"{name} is {list(tensor.shape)}, the stock class has another size")
    return "sizes as the stock config says"


def _saved(source: ModelDirectory) -> Iterator[tuple[str, Any]]:
    """Parameters that are no other name of one before: those a file holds."""
    yield from source.model.named_parameters()


def _opens(source: ModelDirectory) -> str:
    names = list(source.example)
    try:
        with torch.no_grad():
            found = named_forward(source.model, names)(**source.example)
    except FORWARD_ERRORS as error:
        raise ModelError(f"the model does not run: {error}") from error
    if not found.isfinite().all():
        raise ModelError("the model computes NaN or Inf on its example inputs")
    count = sum(parameter.numel() for parameter in source.model.parameters())
    return f"{type(source.model).__name__}, {count:,} parameters, runs"


def _plan(source: ModelDirectory) -> str:
    """Every group that the plan cuts has as many units in the model as the plan keeps."""
    path = source.path / "plan.json"
    if not path.is_file():
        return "there is none"
    plan = Plan.read(path)
    sizes = {group.name: group.size for group in couple(trace(source.model, source.example)).groups}
    shared = [name for name in plan.groups if name in sizes]
    for name in shared:
        if sizes[name] != plan.groups[name].count:
            kept = plan.groups[name].count
            raise PlanError(f"{name} has {sizes[name]} units, the plan keeps {kept}")
    return f"{len(shared)} of {len(plan.groups)} groups found, all as large as planned"

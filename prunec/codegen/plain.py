"""The directory of a plain PyTorch module: a program that torch alone runs, and its weights.

model.pt2           torch.export.load("DIR/model.pt2").module()(**inputs)
model.safetensors   the weights by the module's own names
prunec.json         what ran, and the sizes and numbers that a dense module of the class takes on
plan.json, recipe.yaml, README.md
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

import prunec
from prunec.codegen.battery import difference, tolerance
from prunec.codegen.directory import staged
from prunec.codegen.exporters.compare import outputs
from prunec.codegen.exporters.traced import Traced, results, trace_dynamic
from prunec.codegen.load_plain import PROGRAM, RECORD, WEIGHTS
from prunec.codegen.shrink import Shrunk
from prunec.errors import VerifyError
from prunec.events import Progress, silent
from prunec.models.digest import file_digest

FORMAT = 1
_CARD = """\
# {name}, pruned

{count:,} parameters; written by prunec {version}.

`model.pt2` runs with torch alone{free}:

```python
import torch

module = torch.export.load("{folder}/model.pt2").module()
output = module({call})
```
"""
_AS_ITSELF = """
As the class itself, with its own code, from a dense one of the same sizes as before pruning:

```python
import prunec

model = prunec.load("{folder}", into={name}(...))
```
"""


def save_plain(
    model: nn.Module,
    directory: Path,
    *,
    example: Mapping[str, Tensor],
    shrunk: Shrunk | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Write the directory, prove in a process without prunec that it is the model, name it.

    Args:
        example: the inputs by name that the program is traced with; batch (and the length of token
            ids) are free where the module allows it.
        shrunk: how the module came to its sizes; None for a graph, of which no class is known.
        metadata: goes into prunec.json; "plan" and "recipe" get files of their own.

    Raises:
        ExportError: `directory` exists or cannot be written.
        TraceError: torch.export cannot take the module.
        VerifyError: what was written is not the model; nothing is delivered.
    """
    if any(tensor.device.type != "cpu" for tensor in model.state_dict().values()):
        model = copy.deepcopy(model).cpu()  # a program holds the device that it is traced on
    with progress.task("trace the smaller module"):
        inputs = {name: value.cpu() for name, value in example.items()}
        traced = trace_dynamic(model, inputs, whole=True)
    with staged(directory, overwrite=overwrite, holds=RECORD) as folder:
        with progress.task("write the directory"):
            torch.export.save(traced.program, folder / PROGRAM)
            tied = _save_weights(model, folder / WEIGHTS)
        with progress.task("open it in a fresh process without prunec"):
            passed = _accept(model, folder, traced)
        data = dict(metadata or {})
        plan, recipe = data.pop("plan", None), data.get("recipe")
        if plan is not None:
            _dump(folder / "plan.json", plan)
        if recipe is not None:
            text = yaml.safe_dump(recipe, sort_keys=False)
            (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_card(model, directory, traced, shrunk), encoding="utf-8")
        record = {
            "plain": FORMAT,
            "torch": torch.__version__,
            **data,
            "class": None if shrunk is None else type(model).__qualname__,
            "tables": _tables(shrunk),
            "tied": tied,
            "dynamic": list(traced.dynamic),
            "checks": [*data.get("report", {}).get("checks", ()), passed],
            "sha256": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
        }
        _dump(folder / RECORD, record)


def _save_weights(model: nn.Module, path: Path) -> dict[str, str]:
    """Write every tensor of the state dict once; other names of the same one -> its first name."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and first.setdefault(key, name) != name:
            tied[name] = first[key]
        else:
            tensors[name] = tensor.detach().contiguous().clone()
    save_file(tensors, path, metadata={"format": "pt"})
    return tied


@torch.no_grad()
def _accept(model: nn.Module, folder: Path, traced: Traced) -> str:
    try:
        found = outputs("pt2", folder / PROGRAM, traced.cases, hidden=("prunec", "transformers"))
    except VerifyError as error:
        if own := _operators_of_others(traced):
            raise VerifyError(
                f"torch alone does not run {PROGRAM}: it does not have {', '.join(own)}",
                so="nothing was delivered",
                fix="write that in operators of torch, or stay in Python: prunec.prune(...).model",
            ) from error
        raise
    for name, inputs in traced.cases.items():
        gap = difference([found[name]], results(model, inputs)[:1])
        if not gap <= tolerance(model):
            raise VerifyError(
                "the written program is not the model in memory",
                where=f"{name}: off by {gap:.1e} of the largest output",
                so="nothing was delivered",
            )
    return f"{PROGRAM} in a fresh process equals the module: {', '.join(traced.cases)}"


def _operators_of_others(traced: Traced) -> list[str]:
    """The operators that some package, not torch, has registered, as far as their names tell."""
    calls = (node.target for node in traced.program.graph.nodes if node.op == "call_function")
    names = {
        str(target._schema.name) for target in calls if isinstance(target, torch._ops.OpOverload)
    }
    return sorted(name for name in names if name.partition("::")[0] not in ("aten", "prims"))


def _tables(shrunk: Shrunk | None) -> dict[str, Any]:
    """What a dense module of the class takes on: shapes before and after, numbers by module."""
    if shrunk is None:
        return {}
    return {
        "shapes": {name: [list(old), list(new)] for name, (old, new) in shrunk.sizes.items()},
        "added": list(shrunk.added),
        "attrs": {path: dict(values) for path, values in shrunk.attributes.items()},
    }


def _card(model: nn.Module, directory: Path, traced: Traced, shrunk: Shrunk | None) -> str:
    free = " and ".join(traced.dynamic)
    values = {
        "name": "A graph" if shrunk is None else type(model).__name__,
        "count": sum(parameter.numel() for parameter in model.parameters()),
        "version": prunec.__version__,
        "free": f", for any {free}" if free else ", for inputs of the traced shapes alone",
        "folder": directory.name,
        "call": ", ".join(f"{name}=..." for name in traced.example),
    }
    return (_CARD if shrunk is None else _CARD + _AS_ITSELF).format(**values)


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

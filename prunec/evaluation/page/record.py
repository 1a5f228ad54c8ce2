"""What the page knows of a model: its directory's record, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunec.codegen.generated import auto_classes_named
from prunec.codegen.load import read_config
from prunec.codegen.load_plain import PROGRAM, is_plain
from prunec.codegen.rewrite import read_record
from prunec.errors import ModelError
from prunec.evaluation.comparison import Evaluation
from prunec.graph.paths import block_of

_READERS = {
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
    "preprocessor_config.json": ("processor", "AutoImageProcessor"),
}


@dataclass(frozen=True)
class Measured:
    """Figures and words of one model.

    `samples` are what it made of each prompt.
    """

    name: str
    evaluation: Evaluation | None = None
    samples: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A pruned directory: prunec.json with its plan, and the measurements.

    `opening` is the Python that opens it; `kept` is group kind -> block -> (units kept, units
    before).
    """

    name: str
    record: Mapping[str, Any]
    opening: str
    measured: Measured
    kept: Mapping[str, Mapping[str, tuple[int, int]]]

    @property
    def report(self) -> Mapping[str, Any]:
        """What the pruning reported."""
        found: Mapping[str, Any] = self.record.get("report") or {}
        return found

    @property
    def recovery(self) -> Mapping[str, Any]:
        """What the recovery reported; empty where there was none."""
        found: Mapping[str, Any] = self.record.get("recovery") or {}
        return found

    @property
    def code(self) -> bool:
        """Whether the directory holds a generated class."""
        return bool(self.record.get("code"))


def read_case(directory: Path, *, measured: Measured | None = None) -> Case:
    """The record of a directory that prunec wrote.

    Raises:
        ModelError: prunec did not write it, or not so.
    """
    record = read_record(directory)
    if "report" not in record and "recovery" not in record:
        raise ModelError(
            "not a directory that prunec wrote: it has no prunec.json",
            where=str(directory),
            fix="name the OUT of prunec prune or prunec recover",
        )
    name = directory.resolve().name
    try:
        plan = (record.get("plan") or {}).get("groups", {})
        sites = (record.get("report") or {}).get("sites", [])
        kept = _kept(plan, sites)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"prunec.json or plan.json is damaged: {error}", where=name) from error
    return Case(name, record, _opening(directory), measured or Measured(name), kept)


def _opening(directory: Path) -> str:
    """The Python that opens a directory, with what reads its inputs where that is there too."""
    if is_plain(directory):
        return f'import torch\n\nmodel = torch.export.load("{directory / PROGRAM}").module()'
    config = read_config(directory)
    named = config.get("architectures") or ["?"]
    autos = auto_classes_named(str(named[0]).removeprefix("Prunec")) or ["AutoModel"]
    trust = ", trust_remote_code=True" if "auto_map" in config else ""
    makers = {"model": (autos[0], trust)}
    for file, (name, maker) in _READERS.items():
        if (directory / file).is_file():
            makers[name] = (maker, "")
    lines = [f"from transformers import {', '.join(maker for maker, _ in makers.values())}", ""]
    for name, (maker, argument) in makers.items():
        lines.append(f'{name} = {maker}.from_pretrained("{directory}"{argument})')
    return "\n".join(lines)


def _kept(
    plan: Mapping[str, Any], sites: list[Mapping[str, Any]]
) -> dict[str, dict[str, tuple[int, int]]]:
    """By kind and block; groups outside blocks, and kinds of which nothing went, are left out."""
    counts: dict[str, tuple[int, int]] = {}
    for site in sites:
        counts |= {group: (count, count) for group, count in site["kept"].items()}
    for group, entry in plan.items():
        keep = entry["keep"]
        rows = list(keep.values()) if isinstance(keep, dict) else [keep]
        counts[group] = (len(rows[0]), int(entry["size"]))
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for group, pair in counts.items():
        block = block_of(group.rpartition("/")[0])
        if block is not None:
            found.setdefault(group.rpartition("/")[2], {})[block] = pair
    return {
        kind: dict(sorted(blocks.items(), key=lambda item: _natural(item[0])))
        for kind, blocks in found.items()
        if any(count < size for count, size in blocks.values())
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

"""From a tiny model to a directory: other units gone in every layer, shrunk, written, reopened.

Each kind of sub-layer (the attention of the layers, their feed-forward, their experts ...) loses
units, other ones and another number of them in each layer. What the stock forward cannot express
is refused with the reason, sub-layer by sub-layer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunec.codegen.gate import prepare
from prunec.codegen.hf import check_model, write_model
from prunec.codegen.shrink import Shrunk, shrink
from prunec.errors import ExportError, PrunecError, TraceError
from prunec.graph.coupling import CouplingGraph, Group, couple
from prunec.graph.paths import common_path
from prunec.graph.program import Program
from prunec.graph.trace import trace
from prunec.passes.oracles import oracle
from prunec.passes.plan import GroupKeep, Plan
from prunec.passes.slice import slice_program, slice_state, sliced_parameters

Record = dict[str, Any]
# What is taken from a sub-layer, the first of these rows that it has any unit of. Queries and keys
# lose as much as values: many classes have one number for both.
UNITS = (
    ("ffn_channel", "head", "query_head", "kv_group", "conv_channel"),
    ("expert",),
    ("value_dim", "head_dim", "qk_dim"),
    ("rope_pair",),
)


def deliver(model: nn.Module, inputs: Mapping[str, Tensor], folder: Path) -> Record:
    """Write the shrunk model and what a fresh process is to find there; a JSON-able record."""
    try:
        program = trace(model, dict(inputs))
    except TraceError as error:
        return {"status": "untraceable", "reason": str(error.message)[:300]}
    redraw(program, getattr(model, "_keys_to_ignore_on_save", None) or ())
    coupling = couple(program)
    offers = sub_layers(coupling)
    shrunk, plan, refused = _smallest(model, coupling, offers, inputs)
    taken = _taken(coupling, plan, offers)
    record: Record = {
        "taken": taken,
        "refused": {path: reason for path, reason in refused.items() if path not in taken},
        "less": {path: reason for path, reason in refused.items() if path in taken},
        "trials": shrunk.trials if shrunk else 0,
        "code": shrunk.config.reason if shrunk else "",
    }
    if shrunk is None or not taken:
        return {**record, "status": "refused"}
    directory = folder / "model"
    directory.mkdir(parents=True)
    try:
        auto = check_model(shrunk.model)
        write_model(shrunk.model, directory, "5GB")
        record["checks"] = [*shrunk.checks, *prepare(shrunk.model, directory, auto, inputs, folder)]
    except ExportError as error:
        return {**record, "status": "refused", "refused": {"save": str(error.message)[:300]}}
    return {**record, "status": "written"}


@torch.no_grad()
def redraw(program: Program, constant: Collection[str] = ()) -> None:
    """Weights of unit gain in the model itself, where those do not overflow.

    Args:
        constant: tables that are no weights and not saved with them.
    """
    drawn = oracle.redraw(program)
    if bool(torch.isfinite(drawn.run(None, **drawn.example)).all()):
        for name in program.parameters.difference(constant):
            program.state[name].copy_(drawn.state[name])


def sub_layers(coupling: CouplingGraph) -> dict[str, list[list[Group]]]:
    """Sub-layer (a path with * for numbers) -> the rows of UNITS that it has groups of.

    A part of one that has inner dimensions only, such as a fused projection, is no sub-layer of
    its own: they are the last rows of the one around it. Heads and experts count where layers
    share them too (by a table of relative positions), and all groups where none lies within one
    layer (a chain of convolutions).
    """
    free = [group for group in coupling.groups if group.kind != "hidden"]
    shared = ("head", "query_head", "kv_group", "expert")
    inside = [group for group in free if "*" in sub_layer(group) or group.kind in shared]
    found: dict[str, list[Group]] = {}
    for group in inside or free:
        found.setdefault(sub_layer(group), []).append(group)
    offers = {
        path: [row for kinds in UNITS if (row := [g for g in groups if g.kind in kinds])]
        for path, groups in found.items()
    }
    for path, rows in list(offers.items()):
        around = [other for other in offers if path.startswith(f"{other}.")]
        if around and rows[0][0].kind not in UNITS[0] + UNITS[1]:
            offers[max(around, key=len)] += offers.pop(path)
    return offers


def sub_layer(group: Group) -> str:
    path = common_path([member.parameter for member in group.members])
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", path)


def _smallest(
    model: nn.Module,
    coupling: CouplingGraph,
    offers: Mapping[str, Sequence[Sequence[Group]]],
    inputs: Mapping[str, Tensor],
) -> tuple[Shrunk | None, Plan, dict[str, str]]:
    """The first row of every sub-layer at once; failing that, what each can alone give."""
    first = {path: rows[0] for path, rows in offers.items() if rows}
    groups = [group for row in first.values() for group in row]
    try:
        plan = uneven_plan(coupling, groups)
        return _shrunk(model, coupling, plan, inputs), plan, {}
    except PrunecError:
        pass
    taken: list[Group] = []
    refused: dict[str, str] = {}
    best: tuple[Shrunk | None, Plan] = None, Plan()
    for path, rows in offers.items():
        for choice in _choices(rows):
            try:
                plan = uneven_plan(coupling, [*taken, *choice])
                best = _shrunk(model, coupling, plan, inputs), plan
            except PrunecError as error:
                refused.setdefault(path, f"{_kinds(choice)}: {said(error)}")
                continue
            taken += choice
            break
    return *best, refused


def _choices(rows: Sequence[Sequence[Group]]) -> Iterator[Sequence[Group]]:
    """Each row whole, then its kinds one by one."""
    for row in rows:
        yield row
        kinds = dict.fromkeys(group.kind for group in row)
        if len(kinds) > 1:
            for kind in kinds:
                yield [group for group in row if group.kind == kind]


def _kinds(groups: Sequence[Group]) -> str:
    return ", ".join(dict.fromkeys(group.kind for group in groups))


def said(error: PrunecError) -> str:
    """An error's message with the place and the reason that it gives."""
    parts = (error.message, error.where, error.so)
    return "; ".join(str(part) for part in parts if part)[:400]


def _shrunk(
    model: nn.Module, coupling: CouplingGraph, plan: Plan, inputs: Mapping[str, Tensor]
) -> Shrunk:
    selection = plan.selection(coupling)
    state = slice_state(coupling, selection, coupling.program.state)
    sliced = sliced_parameters(coupling, selection, state)
    if not any(coupling[name].normalised for name in plan.groups):
        return shrink(model, sliced, example=inputs)

    def reference(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """Zeroed units are no truth where a norm or a router runs over them: the sliced graph."""
        drawn = {name: weights.get(name, tensor) for name, tensor in state.items()}
        return slice_program(coupling, selection, drawn).run(None, **given)

    return shrink(model, sliced, example=inputs, reference=reference)


def uneven_plan(coupling: CouplingGraph, groups: Sequence[Group]) -> Plan:
    """Other units, and another number of them, in each of the groups that are alike."""
    rng = random.Random(0)
    seen: dict[tuple[str, str, int], int] = {}
    keeps: dict[str, GroupKeep] = {}
    for group in groups:
        counts = _counts(group)
        if not counts:
            continue
        key = sub_layer(group), group.kind, group.size
        seen[key] = seen.get(key, -1) + 1
        kept = counts[seen[key] % len(counts)]
        rows = _rows(coupling, group, keeps)
        units = {row: tuple(sorted(rng.sample(range(group.size), kept))) for row in rows}
        keeps[group.name] = GroupKeep(group.size, units)
    return Plan(keeps)


def _counts(group: Group) -> list[int]:
    """How many may stay: about half and more; whole vectors of 16 bytes where there are many."""
    low = max(1, group.minimum, group.size // 2)
    counts = [n for n in range(low, group.size) if n % group.multiple == 0]
    vectors = [n for n in counts if n % 4 == 0]
    return vectors if len(vectors) > 1 else counts


def _rows(
    coupling: CouplingGraph, group: Group, keeps: Mapping[str, GroupKeep]
) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = [()]
    for name in group.companions:
        units = keeps[name].rows[()] if name in keeps else range(coupling[name].size)
        rows = [(*row, unit) for row in rows for unit in units]
    return rows


def _taken(
    coupling: CouplingGraph, plan: Plan, offers: Mapping[str, Sequence[Sequence[Group]]]
) -> dict[str, dict[str, str]]:
    """Sub-layer -> kind -> units kept in each of its layers, of how many."""
    homes = {g.name: path for path, rows in offers.items() for row in rows for g in row}
    found: dict[str, dict[str, str]] = {}
    for name, keep in plan.groups.items():
        group = coupling[name]
        own = found.setdefault(homes[name], {})
        before = own[group.kind].partition("/")[0] + " " if group.kind in own else ""
        own[group.kind] = f"{before}{keep.count}/{group.size}"
    return found

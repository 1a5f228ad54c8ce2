"""The Plan: which units each group keeps. The one decision that is written down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from prunec.errors import PlanError
from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.dims import Dim
from prunec.graph.selection import Keep, Selection
from prunec.models.checkpoint import NO_JSON

FORMAT = 1


@dataclass(frozen=True)
class GroupKeep:
    """The units that one group keeps.

    Attributes:
        size: units before.
        rows: kept indices, sorted, by companion index: ``()`` is the key of a group without
            companions; otherwise one key for every surviving combination of companion units.
    """

    size: int
    rows: Mapping[tuple[int, ...], tuple[int, ...]]

    @property
    def count(self) -> int:
        """Units kept in every row."""
        return len(next(iter(self.rows.values())))


@dataclass(frozen=True)
class Plan:
    """How many and which units each group keeps; groups that are not named stay whole.

    ``dropped`` names the branches that are left out; the groups are those of the model without
    them.
    """

    groups: Mapping[str, GroupKeep] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """``{"format": 1, "groups": {name: {"size": n, "keep": [...] or {"0": [...]}}}}``.

        With branches left out: ``"dropped": [name, ...]``.
        """
        return {
            "format": FORMAT,
            **({"dropped": list(self.dropped)} if self.dropped else {}),
            "groups": {
                name: {"size": keep.size, "keep": _rows_to_json(keep.rows)}
                for name, keep in self.groups.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Raises PlanError naming the entry that is not as `to_json` writes it."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"not a plan of format {FORMAT}", fix="use a plan.json of this version")
        groups = data.get("groups")
        if not isinstance(groups, dict):
            raise PlanError('a plan needs "groups": {name: {"size": n, "keep": [...]}}')
        dropped = data.get("dropped", [])
        if not isinstance(dropped, list) or not all(isinstance(name, str) for name in dropped):
            raise PlanError('"dropped" in a plan is a list of names of branches')
        kept = {name: _group_from_json(name, entry) for name, entry in groups.items()}
        return cls(kept, tuple(dropped))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Plan:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, *NO_JSON) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        return cls.from_json(data)

    @classmethod
    def of(cls, coupling: CouplingGraph, selection: Selection, dropped: Sequence[str] = ()) -> Plan:
        """The plan that a selection amounts to, on a model that these branches were dropped of."""
        entries = {}
        for group in coupling.groups:
            keep = selection.keep(group.dim)
            if keep is not None:
                entries[group.name] = GroupKeep(group.size, dict(_rows_of(keep, selection)))
        return cls(entries, tuple(dropped))

    def selection(self, coupling: CouplingGraph) -> Selection:
        """The keep masks of this plan on a model, the dropped branches gone (`depth.drop`).

        Raises:
            PlanError: for a group that the model lacks, another size, or units that cannot be
                kept as asked.
        """
        keeps: dict[Dim, Keep] = {}
        for name, entry in self.groups.items():
            group = coupling[name]
            _check(group, entry)
            companions = tuple(coupling[companion].dim for companion in group.companions)
            ragged = set(entry.rows) != {()}
            keeps[group.dim] = _keep(group, entry, companions if ragged else ())
        return Selection(keeps)


def _keep(group: Group, entry: GroupKeep, companions: tuple[Dim, ...]) -> Keep:
    mask = np.zeros((*(dim.size for dim in companions), group.size), dtype=bool)
    for row, units in entry.rows.items():
        if len(row) != len(companions) or any(
            not 0 <= i < dim.size for i, dim in zip(row, companions, strict=False)
        ):
            raise PlanError(
                f"{group.name}: no companion unit {list(row)}",
                fix=f"its companions are {', '.join(group.companions) or 'none'}",
            )
        mask[row][list(units)] = True
    return Keep(mask, companions)


def _check(group: Group, entry: GroupKeep) -> None:
    if entry.size != group.size:
        raise PlanError(
            f"{group.name} has {group.size} units, the plan says {entry.size}",
            fix="use a plan that was made for this model",
        )
    if len({len(units) for units in entry.rows.values()}) != 1:
        raise PlanError(f"{group.name}: every companion unit must keep as many units")
    for units in entry.rows.values():
        ordered = all(a < b for a, b in pairwise(units))
        if not units or not ordered or units[0] < 0 or units[-1] >= group.size:
            raise PlanError(
                f"{group.name}: keep must be sorted indices from 0 to {group.size - 1}",
                where=str(list(units))[:80],
            )
        if len(units) < group.minimum:
            raise PlanError(
                f"{group.name}: {len(units)} units kept, {group.minimum} are needed",
                fix="a top-k over them needs that many",
            )


def _rows_of(keep: Keep, selection: Selection) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for row in np.argwhere(selection.surviving_rows(keep)).tolist():
        yield tuple(row), tuple(np.flatnonzero(keep.mask[tuple(row)]).tolist())


def _rows_to_json(rows: Mapping[tuple[int, ...], tuple[int, ...]]) -> Any:
    if set(rows) == {()}:
        return list(rows[()])
    return {",".join(map(str, row)): list(units) for row, units in rows.items()}


def _row(key: str) -> tuple[int, ...]:
    return tuple(int(index) for index in key.split(",")) if key else ()


def _group_from_json(name: str, entry: Any) -> GroupKeep:
    try:
        size, keep = entry["size"], entry["keep"]
        listed = keep if isinstance(keep, dict) else {"": keep}
        rows = {_row(str(key)): tuple(units) for key, units in listed.items()}
        whole = all(type(i) is int for units in rows.values() for i in units)
    except (TypeError, KeyError, ValueError) as error:
        raise PlanError(f"the plan's entry for {name} is not readable: {error!r}") from error
    if not rows or not whole or type(size) is not int:
        raise PlanError(f"the plan's entry for {name} needs whole numbers")
    return GroupKeep(size, rows)

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunec.cli import options

if TYPE_CHECKING:
    import prunec
    from prunec.cli.console import Screen
    from prunec.graph.coupling import Group


def analyze(
    model: options.Model,
    why: Annotated[bool, typer.Option("--why", help="List every pinned dim and why.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw the coupling of one block.")
    ] = None,
    json: options.Json = None,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """List what can be pruned, and what is pinned.

    A group is a set of weights that must be cut together; a unit is what one cut removes.

    Example: prunec analyze smollm2 --why --svg coupling.svg
    """
    from prunec.cli.console import Screen
    from prunec.cli.opening import open_coupled

    screen = Screen(quiet=quiet, json=json)
    _, coupling = open_coupled(model, screen, trust_remote_code=trust_remote_code)
    groups = [_group(coupling, group) for group in coupling.groups]
    pinned = [vars(found) for found in coupling.pinned]
    _show_groups(screen, groups)
    _show_pinned(screen, pinned, why=why)
    screen.write_json({"model": model, "groups": groups, "pinned": pinned})


def _group(coupling: prunec.CouplingGraph, group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "kind": group.kind,
        "units": group.size,
        "parameters_per_unit": _parameters_per_unit(coupling, group),
        "minimum": group.minimum,
        "companions": list(group.companions),
        "block": group.block,
        "members": [{"parameter": m.parameter, "axis": m.axis} for m in group.members],
    }


def _show_groups(screen: Screen, groups: list[dict[str, Any]]) -> None:
    """One row for the same group in every layer."""
    rows = []
    for alike in _alike(groups, _group_pattern):
        first = alike[0]
        places = [f"{_local(m['parameter'], first)}[{m['axis']}]" for m in first["members"]]
        rows.append(
            [
                _pattern(first["name"]),
                str(len(alike)),
                str(first["units"]),
                f"{first['parameters_per_unit']:,}",
                "\n".join(dict.fromkeys(places)),
            ]
        )
    columns = ["group", "times", "units", "parameters a unit", "sits in"]
    screen.table("Groups", columns, rows, words=(0, 4))


def _show_pinned(screen: Screen, pinned: list[dict[str, Any]], *, why: bool) -> None:
    if not pinned:
        return
    if not why:
        screen.say(f"Pinned dims: {len(pinned)}. --why lists them with the reason.")
        return
    rows = [
        [
            f"{_pattern(alike[0]['parameter'])}[{alike[0]['axis']}]",
            str(len(alike)),
            str(alike[0]["size"]),
            alike[0]["reason"],
            alike[0]["where"],
        ]
        for alike in _alike(pinned, _pinned_pattern)
    ]
    columns = ["pinned", "times", "size", "reason", "where"]
    screen.table("Pinned", columns, rows, words=(0, 3, 4))


def _alike(
    items: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Hashable]
) -> list[list[dict[str, Any]]]:
    """Items that differ in layer numbers only, in the order of the first of each kind."""
    found: dict[Hashable, list[dict[str, Any]]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def _group_pattern(group: dict[str, Any]) -> Hashable:
    return _pattern(group["name"]), group["units"], group["parameters_per_unit"], group["minimum"]


def _pinned_pattern(pinned: dict[str, Any]) -> Hashable:
    return _pattern(pinned["parameter"]), pinned["axis"], pinned["size"], pinned["reason"]


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=[./]|$)", "*", path)


def _local(parameter: str, group: dict[str, Any]) -> str:
    """A parameter's name below the module that the group is named after."""
    return _pattern(parameter.removeprefix(group["name"].rpartition("/")[0] + "."))


def _parameters_per_unit(coupling: prunec.CouplingGraph, group: Group) -> int:
    """Parameters that go when one unit of the group goes (one in each row of its companions)."""
    from prunec.graph.cost import parameter_count

    names = {m.parameter for m in group.members} & coupling.program.parameters
    fewer = {group.dim: group.size - 1}
    return parameter_count(coupling, names=names) - parameter_count(coupling, fewer, names)

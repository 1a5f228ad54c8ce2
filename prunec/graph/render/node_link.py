"""The coupling graph as node-link JSON; docs/graph-json.md describes every field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.program import module_path, source_line
from prunec.graph.render.depth import BranchFigures, branch_figures
from prunec.graph.render.figures import Figures
from prunec.graph.render.flow import operator_name

FORMAT = 1


def to_node_link(
    coupling: CouplingGraph, importance: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """A coupling graph as plain values, readable by ``networkx.node_link_graph``.

    Nodes are axes: every axis of a parameter, and of other tensors those that carry a group.

    Args:
        importance: plain values per group name, to be told with the group.
    """
    program, known = coupling.program, importance or {}
    calls = {node.name: node for node in program.graph.nodes}
    nodes: list[dict[str, Any]] = []
    for name, data in coupling.graph.nodes(data=True):
        role = _role(coupling, data["owner"])
        if not data["groups"] and role != "parameter":
            continue
        node = {"id": name, "role": role, **data}
        call = calls.get(data["owner"])
        if role == "value" and call is not None:
            node |= {
                "operator": operator_name(call),
                "module": module_path(call),
                "source": source_line(call),
            }
        nodes.append(node)
    kept = {node["id"] for node in nodes}
    edges = [
        {"source": a, "target": b, "op": data["op"]}
        for a, b, data in coupling.graph.edges(data=True)
        if a in kept and b in kept
    ]
    return {
        "format": FORMAT,
        "directed": False,
        "multigraph": False,
        "graph": {
            "inputs": {name: list(value.shape) for name, value in program.example.items()},
            "parameters": sum(program.state[name].numel() for name in program.parameters),
            "tied": dict(program.tied),
        },
        "groups": [
            {
                **group,
                **({"importance": dict(found)} if (found := known.get(group["name"])) else {}),
            }
            for group in describe_groups(coupling)
        ],
        "branches": [_branch(found) for found in branch_figures(coupling)],
        "pinned": [dict(vars(found)) for found in coupling.pinned],
        "nodes": nodes,
        "edges": edges,
    }


def describe_groups(coupling: CouplingGraph) -> list[dict[str, Any]]:
    """Every group in plain values, with its figures."""
    figures = Figures(coupling)
    return [_group(figures, group) for group in coupling.groups]


def _group(figures: Figures, group: Group) -> dict[str, Any]:
    found = figures[group]
    return {
        "name": group.name,
        "kind": group.kind,
        "units": group.size,
        "minimum": group.minimum,
        "companions": list(group.companions),
        "normalised": group.normalised,
        "block": group.block,
        "blocks": found.blocks,
        "parameters_per_unit": found.parameters_per_unit,
        "flops_per_unit": found.flops_per_unit,
        "members": [{"parameter": m.parameter, "axis": m.axis} for m in group.members],
    }


def _branch(found: BranchFigures) -> dict[str, Any]:
    branch = found.branch
    return {
        "name": branch.name,
        "kind": branch.kind,
        "block": branch.block,
        "parameters": found.parameters,
        "flops": found.flops,
        "modules": list(branch.modules),
        "members": list(branch.parameters),
    }


def _role(coupling: CouplingGraph, owner: str) -> str:
    if owner in coupling.program.parameters:
        return "parameter"
    return "buffer" if owner in coupling.layout.parameters else "value"

"""What the units of a leaf are called, told from their role in the graph, never from a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from prunec.graph.dims import Dim
from prunec.graph.program import Program
from prunec.graph.propagate import Layout
from prunec.graph.sums import residual_leaves


class Place(Protocol):
    """A parameter axis (see coupling.Member)."""

    @property
    def parameter(self) -> str: ...
    @property
    def axis(self) -> int: ...


def infer_kinds(
    program: Program,
    layout: Layout,
    leaves: Sequence[Dim],
    members: Mapping[Dim, Sequence[Place]],
    companions: Mapping[Dim, Sequence[Dim]],
) -> dict[Dim, str]:
    """A kind for every leaf.

    The roles that decide: ranked by a top-k (expert), on the sum of a residual branch (hidden),
    batched in attention and broadcast over keys (query_head) or not (kv_group, head), contracted
    between queries and keys (rope_pair, qk_dim), carried from values to the output (value_dim),
    a channel of a convolution, else a channel between two linears.
    """
    residual = residual_leaves(program, layout)
    shared = {
        leaf for leaf in leaves if leaf.has("head") and leaf.has("shared") and leaf not in residual
    }
    grouped = {major for leaf in shared for major in companions[leaf]}
    kinds: dict[Dim, str] = {}
    for leaf in leaves:
        if leaf.has("ranked"):
            kinds[leaf] = "expert"
        elif leaf in residual:
            kinds[leaf] = "hidden"
        elif leaf in shared:
            kinds[leaf] = "query_head"
        elif leaf.has("head"):
            kinds[leaf] = "kv_group" if leaf in grouped else "head"
        elif leaf.has("score"):
            kinds[leaf] = _score_kind(leaf, layout, members[leaf])
        elif leaf.has("value"):
            kinds[leaf] = "value_dim"
        elif leaf.has("channel"):
            kinds[leaf] = "conv_channel"
        else:
            kinds[leaf] = "ffn_channel"
    return kinds


def _score_kind(leaf: Dim, layout: Layout, places: Sequence[Place]) -> str:
    if leaf.has("value"):
        return "head_dim"
    halves = any(
        _in_two_halves(layout.parameters[place.parameter][place.axis], leaf) for place in places
    )
    return "rope_pair" if halves else "qk_dim"


def _in_two_halves(dim: Dim, leaf: Dim) -> bool:
    """Whether the leaf is paired with itself, as the two numbers that a rotation turns are.

    Two segments of one sum by itself (halves), or the major factor beside two pinned phases
    (interleaved). Queries and keys in one weight are two segments as well: beside the values.
    """
    root, parts = dim.root, dim.parts
    others = [part for part in parts if part is not leaf]
    if root.form == "sum" and len(parts) - len(others) == 2:
        return not any(part.has("value") for part in others)
    if root.form == "product" and parts[-1].size == 2 and parts[-1].has("pinned"):
        return len(parts) > 1 and parts[-2] is leaf
    return any(_in_two_halves(part, leaf) for part in parts)

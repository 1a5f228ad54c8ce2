"""What the units of a leaf are called, told from their role in the graph, never from a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from prunec.graph.dims import Dim
from prunec.graph.program import Program
from prunec.graph.propagate import Layout
from prunec.graph.sums import residual_leaves

KINDS = (
    *("ffn_channel", "conv_channel", "head", "query_head", "kv_group", "head_dim", "rope_pair"),
    *("qk_dim", "value_dim", "expert", "hidden"),
)
"""Every kind that `infer_kinds` tells."""


def infer_kinds(
    program: Program,
    layout: Layout,
    leaves: Sequence[Dim],
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
    calls = {node.name: node for node in program.graph.nodes}
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
            kinds[leaf] = _score_kind(leaf, calls, layout)
        elif leaf.has("value"):
            kinds[leaf] = "value_dim"
        elif leaf.has("channel"):
            kinds[leaf] = "conv_channel"
        else:
            kinds[leaf] = "ffn_channel"
    return kinds


def _score_kind(leaf: Dim, calls: Mapping[str, fx.Node], layout: Layout) -> str:
    """What meets in a score: a rotary pair if the leaf is there twice, as halves or phases are."""
    if leaf.has("value"):
        return "head_dim"
    met = (calls[note.node] for note in leaf.notes if note.kind == "score")
    operands = (layout.values.get(node, []) for call in met for node in call.all_input_nodes)
    axes = (axis for values in operands for value in values for axis in value.dims)
    return "rope_pair" if any(_paired(axis, leaf) for axis in axes) else "qk_dim"


def _paired(dim: Dim, leaf: Dim) -> bool:
    """Whether the leaf is paired with itself, as the two numbers that a rotation turns are.

    Two segments of one sum (halves), or the major factor beside two phases, both of which stay
    (interleaved).
    """
    parts = dim.parts
    if dim.form == "sum":
        return sum(part is leaf for part in parts) > 1 or any(_paired(p, leaf) for p in parts)
    if dim.form == "product" and parts[-1].size == 2 and parts[-2] is leaf:
        return parts[-1].form == "sum" or parts[-1].has("pinned")
    return any(_paired(part, leaf) for part in parts)

"""The residual stream: where each repeated block reads it, and where it leaves it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from prunec.graph.paths import block_of
from prunec.graph.program import Program, module_path
from prunec.graph.propagate import Layout
from prunec.graph.sums import ResidualSum, residual_sums


@dataclass(frozen=True)
class Passage:
    """A block's way along the residual stream.

    Attributes:
        enters: the value that the block's first branch is added to.
        leaves: the value that the next block's first branch is added to; of the last block, its
            last sum. So a norm behind the sum counts to the block (post-norm), one before the next
            branch does not (pre-norm).
    """

    enters: fx.Node
    leaves: fx.Node


def passages(program: Program, layout: Layout) -> dict[str, Passage]:
    """The passage of every block that adds to a residual stream, in graph order.

    A block that is called several times enters at its first call and leaves at its last. Where a
    second stream begins (a decoder beside its encoder) the block before it leaves at its last sum.
    """
    found: dict[str, list[ResidualSum]] = {}
    for residual in residual_sums(program, layout):
        block = block_of(module_path(residual.total))
        if block is not None:
            found.setdefault(block, []).append(residual)
    enters = {block: sums[0].stream for block, sums in found.items()}
    result: dict[str, Passage] = {}
    following = [*list(enters.values())[1:], None][: len(found)]
    for (block, sums), after in zip(found.items(), following, strict=True):
        last = sums[-1].total
        continued = after is not None and last in ancestors(after) | {after}
        result[block] = Passage(enters[block], after if continued and after else last)
    return result


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node is computed from."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return seen

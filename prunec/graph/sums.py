"""Residual sums ``x + f(x)``: a stream that goes on, and the branches that are added to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from prunec.graph.dims import Dim
from prunec.graph.program import Program
from prunec.graph.propagate import Layout


@dataclass(frozen=True)
class ResidualSum:
    """A stream and what is added to it, in one addition or in a tree of them.

    Attributes:
        total: the outermost addition.
        stream: the value that goes on, an operand of one of the additions.
        terms: the other operands that are computed from the stream by way of a weight.
    """

    total: fx.Node
    stream: fx.Node
    terms: tuple[fx.Node, ...]


def residual_sums(program: Program, layout: Layout) -> list[ResidualSum]:
    """Every sum of a value with others that are computed from it by way of a weight.

    ``x + a(x) + m(x)``, in any order and bracketing, is one sum with two terms. A cast, a dropout
    or a number that multiplies an operand does not hide it. The way through a product matters:
    ``x + x**3`` inside an activation is no residual branch.
    """
    lineage = _Lineage(program)
    inner: set[fx.Node] = set()
    found: list[ResidualSum] = []
    for node in reversed(program.graph.nodes):
        if _is_addition(node, layout) and node not in inner:
            tree = _sum(node, node, layout)
            inner.update(tree.sums())
            found += _residual(tree, lineage)
    return found[::-1]


def residual_leaves(program: Program, layout: Layout) -> set[Dim]:
    """Leaves on a residual stream: axes of a sum ``x + f(x)``."""
    return {
        leaf
        for found in residual_sums(program, layout)
        for dim in layout.dims(found.total)
        for leaf in dim.leaves()
    }


class _Lineage:
    """Which values a value is computed from by way of a product."""

    def __init__(self, program: Program):
        self.position = {node: i for i, node in enumerate(program.graph.nodes)}
        self._through: dict[fx.Node, int] = {}  # bit sets over positions
        every: dict[fx.Node, int] = {}
        for node in self.position:
            known = mixed = 0
            for source in node.all_input_nodes:
                known |= every[source] | 1 << self.position[source]
                mixed |= self._through[source]
            every[node] = known
            self._through[node] = known if is_product(node) else mixed

    def computes(self, source: fx.Node, target: fx.Node) -> bool:
        """Whether ``target`` is computed from ``source`` by way of a product."""
        return bool(self._through[target] >> self.position[source] & 1)


@dataclass(frozen=True)
class _Operand:
    """What enters an addition: itself a sum (of ``parts``) if nothing else reads that sum.

    ``plain`` is what it is before casts, dropouts and numbers that multiply it.
    """

    node: fx.Node
    plain: fx.Node
    parts: tuple[_Operand, ...] = ()

    def leaves(self) -> Iterator[_Operand]:
        for part in self.parts:
            yield from part.leaves()
        if not self.parts:
            yield self

    def sums(self) -> Iterator[fx.Node]:
        if self.parts:
            yield self.plain
        for part in self.parts:
            yield from part.sums()


def _sum(node: fx.Node, plain: fx.Node, layout: Layout) -> _Operand:
    return _Operand(node, plain, tuple(_operand(n, layout) for n in plain.all_input_nodes))


def _operand(node: fx.Node, layout: Layout) -> _Operand:
    plain, alone = node, len(node.users) == 1
    while (source := unscaled(plain, layout)) is not None:
        plain = source
        alone &= len(plain.users) == 1
    inner = alone and _is_addition(plain, layout)
    return _sum(node, plain, layout) if inner else _Operand(node, plain)


def _residual(tree: _Operand, lineage: _Lineage) -> Iterator[ResidualSum]:
    """The stream is the earliest operand that another one is computed from."""
    operands = sorted(tree.leaves(), key=lambda operand: lineage.position[operand.node])
    for stream in operands:
        others = [o.node for o in operands if o is not stream]
        if any(lineage.computes(stream.plain, other) for other in others):
            terms = _terms(tree, stream, lineage)
            yield ResidualSum(tree.plain, stream.node, tuple(terms))
            return


def _terms(tree: _Operand, stream: _Operand, lineage: _Lineage) -> Iterator[fx.Node]:
    """The other operands; an inner sum counts as several only if each part is computed so."""
    for operand in tree.parts:
        leaves = list(operand.leaves())
        computed = [lineage.computes(stream.plain, leaf.node) for leaf in leaves]
        if stream in leaves or (len(leaves) > 1 and all(computed)):
            yield from _terms(operand, stream, lineage)
        elif any(computed):
            yield operand.node


def _is_addition(node: fx.Node, layout: Layout) -> bool:
    """Whether a node adds two values that depend on the input, each counted once."""
    operands = node.all_input_nodes
    return (
        operator_name(node) == "add"
        and len(operands) == 2
        and all(operand in layout.data for operand in operands)
        and "alpha" not in node.kwargs
    )


# operators that pass their first operand on
UNCHANGED = ("to", "_to_copy", "dropout", "clone", "contiguous", "detach", "alias", "lift_fresh")


def unscaled(node: fx.Node, layout: Layout) -> fx.Node | None:
    """The operand of a cast, a dropout or a product with a number; None for any other call."""
    name, operands = operator_name(node), node.all_input_nodes
    if name in UNCHANGED:
        return operands[0]
    if name not in ("mul", "div") or not operands or operands[0] not in layout.data:
        return None
    numbers = all(_is_number(other, layout) for other in operands[1:])
    return operands[0] if numbers and node.args[0] is operands[0] else None


def _is_number(node: fx.Node, layout: Layout) -> bool:
    return node not in layout.data and all(dim.size == 1 for dim in layout.dims(node))


_PRODUCTS = ("linear", "addmm", "baddbmm", "mm", "bmm", "matmul", "einsum", "_grouped_mm")


def is_product(node: fx.Node) -> bool:
    """Whether a call contracts two values: a matrix product or a convolution."""
    name = operator_name(node)
    return name in _PRODUCTS or "conv" in name or "grouped_mm" in name


def operator_name(node: fx.Node) -> str:
    """``linear`` of ``aten.linear.default``; empty for anything but an operator."""
    schema = getattr(node.target, "_schema", None)
    name = "" if schema is None else str(schema.name).removeprefix("aten::")
    return name.removesuffix("_")

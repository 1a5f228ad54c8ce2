"""Residual branches as units of depth: regions of the graph that the stream can do without.

A branch ends in a term of a residual sum that nothing else reads; it holds every call and every
parameter that only that term needs. Leaving it out replaces the term by zero, so that the sum
passes the stream on. Found from the graph alone.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from prunec.graph.paths import common_module, common_path, enclosing, indexed_modules
from prunec.graph.program import Program, module_path
from prunec.graph.propagate import Layout
from prunec.graph.sums import UNCHANGED, is_product, operator_name, residual_sums


@dataclass(frozen=True)
class Branch:
    """A region that ends in a sum with a residual stream.

    Attributes:
        name: stable across runs and shapes: ``<module path>/<kind>``.
        kind: attention, mixer (positions meet in another way), experts, convolution or mlp; for
            display and defaults only.
        block: the repeated module that it is a part of ("model.layers.3"), if any.
        total: the sum.
        exit: the term of the sum, which nothing else reads.
        stream: the value that the term is added to.
        nodes: the calls that only the exit needs, in the order of the graph.
        parameters: names of the parameters that only the exit needs.
        modules: the outermost modules all of whose calls lie in it.
    """

    name: str
    kind: str
    block: str | None
    total: fx.Node
    exit: fx.Node
    stream: fx.Node
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    modules: tuple[str, ...]


def find_branches(program: Program, layout: Layout) -> tuple[Branch, ...]:
    """Every branch of a program, in the order of the graph.

    A term that is read elsewhere too, or that does not have the shape of the stream, is none.
    """
    readers = _Readers(program)
    calls = _calls_by_module(program.graph.nodes)
    found = []
    for residual in residual_sums(program, layout):
        for term in residual.terms:
            if len(term.users) == 1 and _shape(term) == _shape(residual.stream):
                nodes = _region(term, readers)
                made = _branch(program, layout, term, residual.total, nodes, calls)
                found.append(replace(made, stream=residual.stream))
    found.sort(key=lambda branch: readers.position[branch.exit])
    return tuple(_named(_in_blocks(found)))


def blocks(branches: Iterable[Branch]) -> dict[str, tuple[Branch, ...]]:
    """The branches of each repeated module; those outside any are left out."""
    found: dict[str, list[Branch]] = {}
    for branch in branches:
        if branch.block is not None:
            found.setdefault(branch.block, []).append(branch)
    return {block: tuple(inside) for block, inside in found.items()}


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return None if value is None else tuple(value.shape)


_VIEWS = ("slice", "select", "view", "narrow", "transpose", "permute", "unsqueeze", "squeeze")


class _Readers:
    """Who reads what a call computes, those that read it out of a buffer it writes to included."""

    def __init__(self, program: Program):
        self.position = {node: i for i, node in enumerate(program.graph.nodes)}
        self._buffer: dict[fx.Node, fx.Node] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and not node.users:  # writes in place, or it were gone
                buffer = next(iter(node.all_input_nodes), node)
                while operator_name(buffer) in _VIEWS:
                    buffer = buffer.all_input_nodes[0]
                self._buffer[node] = buffer
                self.writes.setdefault(buffer, []).append(node)

    def of(self, node: fx.Node) -> list[fx.Node]:
        buffer = self._buffer.get(node)
        if buffer is None:
            return list(node.users)
        return [user for user in buffer.users if self.position[user] > self.position[node]]


def _region(end: fx.Node, readers: _Readers) -> tuple[fx.Node, ...]:
    """``end`` and every node all of whose readers are in the region."""
    position = readers.position
    inside, seen = {end}, {end}
    waiting: list[tuple[int, fx.Node]] = []

    def wait_for_inputs(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            for value in (source, *readers.writes.get(source, ())):
                if value not in seen:
                    seen.add(value)
                    heapq.heappush(waiting, (-position[value], value))

    wait_for_inputs(end)
    while waiting:  # later nodes first: every reader of a node is decided before it is
        _, node = heapq.heappop(waiting)
        if all(reader in inside for reader in readers.of(node)):
            inside.add(node)
            wait_for_inputs(node)
    return tuple(sorted(inside, key=position.__getitem__))


def _calls_by_module(nodes: Iterable[fx.Node]) -> Counter[str]:
    """How many calls each module makes, its children's included.

    Casts count nowhere: export lets the stream go on behind the first norm's.
    """
    return Counter(
        path
        for node in nodes
        if node.op == "call_function" and operator_name(node) not in UNCHANGED
        for path in enclosing(module_path(node))
    )


def _branch(
    program: Program,
    layout: Layout,
    term: fx.Node,
    total: fx.Node,
    nodes: Sequence[fx.Node],
    calls: Mapping[str, int],
) -> Branch:
    bound = [program.bindings.get(node.name, "") for node in nodes if node.op == "placeholder"]
    parameters = tuple(name for name in dict.fromkeys(bound) if name in program.parameters)
    inside = tuple(node for node in nodes if node.op == "call_function")
    paths = [path for path in map(module_path, inside) if path]
    kind = _kind(inside, layout)
    path = common_path(parameters) if parameters else common_module(paths or [""])
    return Branch(
        name=f"{path}/{kind}" if path else kind,
        kind=kind,
        block=module_path(total) if indexed_modules(module_path(total)) else path,
        total=total,
        exit=term,
        stream=total,
        nodes=inside,
        parameters=parameters,
        modules=_modules(inside, calls),
    )


def _modules(inside: Sequence[fx.Node], calls: Mapping[str, int]) -> tuple[str, ...]:
    own = _calls_by_module(inside)
    whole = (
        next((path for path in enclosing(module_path(node)) if own[path] == calls[path] > 0), None)
        for node in inside
    )
    return tuple(dict.fromkeys(path for path in whole if path))


_SCANS = ("cumsum", "cumprod", "logcumsumexp", "conv1d", "constant_pad_nd", "_fft_r2c")


def _kind(nodes: Sequence[fx.Node], layout: Layout) -> str:
    """What a region does, told from its operators.

    A top-k chooses: experts. Queries meet keys in a product of two values and a softmax follows:
    attention. Positions meet in another way: mixer. In images they meet in convolutions.
    """
    names = {operator_name(node) for node in nodes}
    meets = any(
        is_product(node) and all(source in layout.data for source in node.args[:2])
        for node in nodes
    )
    softmax = not names.isdisjoint(("softmax", "_softmax", "_safe_softmax"))
    if "topk" in names:
        return "experts"
    if "scaled_dot_product_attention" in names or (meets and softmax):
        return "attention"
    if meets or not names.isdisjoint(_SCANS):
        return "mixer"
    return "convolution" if any("conv" in name for name in names) else "mlp"


def _in_blocks(found: Sequence[Branch]) -> list[Branch]:
    """Each with its block, the repeated module that its sum lies in.

    That is the innermost indexed one; but where a list holds single branches of several kinds
    (attention, then mlp), the module around the list.
    """
    around = {branch.exit: indexed_modules(branch.block or "") for branch in found}
    while True:
        inside: dict[str, list[Branch]] = {}
        for branch in found:
            if around[branch.exit]:
                inside.setdefault(around[branch.exit][-1], []).append(branch)
        lists: dict[str, set[str]] = {}
        for path, branches in inside.items():
            kinds = "+".join(branch.kind for branch in branches)
            lists.setdefault(path.rpartition(".")[0], set()).add(kinds)
        parts = [
            branch
            for path, (branch, *others) in inside.items()
            if not others and len(lists[path.rpartition(".")[0]]) > 1
            if len(around[branch.exit]) > 1
        ]
        if not parts:
            break
        for branch in parts:
            around[branch.exit].pop()
    return [
        replace(branch, block=around[branch.exit][-1] if around[branch.exit] else None)
        for branch in found
    ]


def _named(found: Iterable[Branch]) -> Iterator[Branch]:
    """Each under a name of its own: where a module runs several times, later ones are numbered."""
    used: Counter[str] = Counter()
    for branch in found:
        used[branch.name] += 1
        number = used[branch.name]
        if number > 1:
            block = branch.block and f"{branch.block}#{number}"
            branch = replace(branch, name=f"{branch.name}#{number}", block=block)
        yield branch

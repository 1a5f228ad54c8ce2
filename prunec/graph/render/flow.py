"""A program as a picture sees it: calls that read parameters, joins, and what flows between.

A traced model has far more calls than a reader wants to see. Here views, casts, activations and
everything else with one source are folded into the edges; what stays are *steps*: calls that read
parameters, sums of a residual branch, and joins of several values (attention, gates).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import fx
from torch.utils import _pytree as pytree

from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.program import module_path

StepKind = Literal["input", "output", "table", "weights", "join", "sum"]

# Contractions of two values are joins even where both come from one step, as in fused attention.
CONTRACTIONS = frozenset(
    {"scaled_dot_product_attention", "matmul", "bmm", "mm", "baddbmm", "einsum", "_grouped_mm"}
)
# Operators that read the values of their first operand only.
FIRST_ONLY = frozenset({"type_as", "expand_as", "view_as", "reshape_as"})
# Operators worth naming on an edge; the rest of what is folded there is arithmetic and layout.
NAMED = frozenset(
    {
        *("relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish"),
        *("hardswish", "hardsigmoid", "hardtanh", "sigmoid", "log_sigmoid", "tanh", "softplus"),
        *("softmax", "log_softmax", "glu", "topk", "pixel_shuffle", "upsample_nearest2d"),
        *("upsample_bilinear2d", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d"),
        *("avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        *("adaptive_max_pool2d", "cumsum", "sort"),
    }
)


@dataclass
class Step:
    """One box of a picture.

    Attributes:
        index: position in `Flow.steps`.
        kind: "weights" reads parameters, "table" is a buffer that carries a group, "sum" adds a
            residual branch, "join" computes from several values.
        module: path of the module it belongs to, in the model's own names.
        nodes: its calls, in order.
        tensors: the parameters and buffers that it reads.
    """

    index: int
    kind: StepKind
    module: str
    nodes: list[fx.Node] = field(default_factory=list)
    tensors: tuple[str, ...] = ()

    @property
    def operators(self) -> list[str]:
        """Short names of its calls, each once."""
        return list(dict.fromkeys(operator_name(node) for node in self.nodes))


@dataclass(frozen=True)
class Flow:
    """Steps in the order of the program and the values that flow between them.

    ``edges`` maps (source, target) step indices to the values, first read first. ``through`` names
    the activations, poolings and the like that a value has passed since its step.
    """

    steps: tuple[Step, ...]
    edges: dict[tuple[int, int], tuple[fx.Node, ...]]
    through: dict[fx.Node, tuple[str, ...]]


def operator_name(node: fx.Node) -> str:
    """The short name of a call's operator: ``linear``, ``add``."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else str(getattr(node.target, "__name__", node.target))
    return str(name).rpartition("::")[2].rstrip("_")


def groups_in(coupling: CouplingGraph, nodes: Iterable[fx.Node]) -> list[Group]:
    """The groups that lie on some axis of these values, in order of appearance."""
    found: dict[str, Group] = {}
    for node in nodes:
        for value in coupling.layout.values.get(node, [])[:1]:
            for dim in value.dims:
                for leaf in dim.leaves():
                    if leaf in coupling.by_dim:
                        group = coupling.by_dim[leaf]
                        found.setdefault(group.name, group)
    return list(found.values())


def find_flow(coupling: CouplingGraph) -> Flow:
    """Contract a program's graph to its steps."""
    builder = _Builder(coupling)
    for node in coupling.program.graph.nodes:
        builder.visit(node)
    edges = {ends: tuple(dict.fromkeys(values)) for ends, values in builder.edges.items()}
    return Flow(tuple(builder.steps), edges, builder.through)


class _Builder:
    def __init__(self, coupling: CouplingGraph):
        self.coupling = coupling
        self.program = coupling.program
        self.data = coupling.layout.data
        self.steps: list[Step] = []
        self.edges: dict[tuple[int, int], list[fx.Node]] = {}
        self.through: dict[fx.Node, tuple[str, ...]] = {}
        self._ancestors: list[int] = []  # bit masks of step indices
        self._behind: list[int] = []  # those of them that lie behind a step with parameters
        self._source: dict[fx.Node, int] = {}  # the step that a value comes from
        self._read: dict[fx.Node, tuple[str, ...]] = {}  # tensors behind a value without data
        self._tables: dict[str, int] = {}
        self._latest: dict[tuple[object, ...], int] = {}  # the last step that may take more calls

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "output":
            step = self._new("output", "", [node])
            leaves = pytree.tree_leaves(node.args)
            self._connect(step, [n for n in leaves if isinstance(n, fx.Node)])
        elif node in self.data:
            self._call(node)
        else:
            names = (self._read.get(source, ()) for source in node.all_input_nodes)
            self._read[node] = tuple(dict.fromkeys(name for found in names for name in found))

    def _placeholder(self, node: fx.Node) -> None:
        name = self.program.bindings.get(node.name)
        if name is not None:
            self._read[node] = (name,)
        elif node in self.data:
            self._source[node] = self._new("input", "", [node]).index

    def _call(self, node: fx.Node) -> None:
        operands = node.all_input_nodes
        if operator_name(node) in FIRST_ONLY and operands[0] in self.data:
            operands = operands[:1]
        reads = dict.fromkeys(name for n in operands for name in self._read.get(n, ()))
        parameters = [name for name in reads if name in self.program.parameters]
        owners = {name.rpartition(".")[0] for name in parameters}
        buffers = [name for name in reads if name not in parameters and self._is_grouped(name)]
        own = [name for name in buffers if name.rpartition(".")[0] in owners]
        tables = [self._table(name) for name in buffers if name not in own]
        sources = dict.fromkeys([*(self._source[n] for n in operands if n in self.data), *tables])
        if parameters:
            module, tensors = _module(node, parameters), (*parameters, *own)
            step = self._merged("weights", node, module, tensors, list(sources))
        elif len(sources) == 1 and not self._is_contraction(node):
            (self._source[node],) = sources
            self.through[node] = self._passed(node)
            return
        elif self._is_residual(node):
            step = self._new("sum", module_path(node), [node])
        else:
            step = self._merged("join", node, module_path(node), (), list(sources))
        self._connect(step, [n for n in operands if n in self.data])
        for table in tables:
            self._edge(table, step, self.steps[table].nodes[0])
        self._source[node] = step.index

    def _is_grouped(self, name: str) -> bool:
        dims = self.coupling.layout.parameters.get(name, ())
        return any(leaf in self.coupling.by_dim for dim in dims for leaf in dim.leaves())

    def _table(self, name: str) -> int:
        if name not in self._tables:
            nodes = [n for n, names in self._read.items() if names == (name,)][:1]
            step = self._new("table", name.rpartition(".")[0], nodes, (name,))
            self._tables[name] = step.index
        return self._tables[name]

    def _is_contraction(self, node: fx.Node) -> bool:
        data = sum(operand in self.data for operand in node.all_input_nodes)
        return operator_name(node) in CONTRACTIONS and data > 1

    def _passed(self, node: fx.Node) -> tuple[str, ...]:
        before = [name for n in node.all_input_nodes for name in self.through.get(n, ())]
        name = operator_name(node)
        return tuple(dict.fromkeys([*before, *([name] if name in NAMED else [])]))

    def _is_residual(self, node: fx.Node) -> bool:
        """Whether this adds a value to what parameters made of it.

        A recurrence adds too, step after step, but has no parameters in between.
        """
        operands = [self._source[n] for n in node.all_input_nodes if n in self.data]
        if operator_name(node) != "add" or len(operands) != 2:
            return False
        a, b = operands
        return bool(self._behind[a] >> b & 1 or self._behind[b] >> a & 1)

    def _merged(
        self,
        kind: StepKind,
        node: fx.Node,
        module: str,
        tensors: tuple[str, ...],
        sources: Sequence[int],
    ) -> Step:
        """Joins of one module are one step, and so are equal calls that read equal parameters.

        Unless a result comes back: a module that is run once more has steps of its own.
        """
        key = (kind, module, tensors, operator_name(node) if tensors else "")
        last = self._latest.get(key)
        if last is not None and not any(
            self._ancestors[source] >> last & 1 for source in sources if source != last
        ):
            step = self.steps[last]
            if not tensors or last not in sources:
                step.nodes.append(node)
                return step
        step = self._new(kind, module, [node], tensors)
        self._latest[key] = step.index
        return step

    def _new(
        self, kind: StepKind, module: str, nodes: list[fx.Node], tensors: tuple[str, ...] = ()
    ) -> Step:
        step = Step(len(self.steps), kind, module, nodes, tensors)
        self.steps.append(step)
        self._ancestors.append(0)
        self._behind.append(0)
        return step

    def _connect(self, step: Step, operands: Iterable[fx.Node]) -> None:
        for operand in operands:
            if operand in self._source:
                self._edge(self._source[operand], step, operand)

    def _edge(self, source: int, step: Step, value: fx.Node) -> None:
        if source == step.index:
            return
        self.edges.setdefault((source, step.index), []).append(value)
        self._ancestors[step.index] |= self._ancestors[source] | 1 << source
        self._behind[step.index] |= (
            self._ancestors[step.index] if step.kind == "weights" else self._behind[source]
        )
        for later in range(step.index + 1, len(self.steps)):
            if self._ancestors[later] >> step.index & 1:
                self._ancestors[later] |= self._ancestors[step.index]
                self._behind[later] |= self._behind[step.index]


def _module(node: fx.Node, parameters: Sequence[str]) -> str:
    """Where a call that reads parameters is shown.

    A tied weight is shown where it is used, not where it is defined; an embedding that a parent
    adds by itself is shown under its own name.
    """
    here, owner = module_path(node), parameters[0].rpartition(".")[0]
    return owner if not here or owner.startswith(here + ".") else here

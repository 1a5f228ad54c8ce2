"""What a rule is, and the table of all rules.

A rule tells how one operator ties the axes of its operands to the axes of its result, and which of
its literal arguments are sizes that follow those axes. Most rules are one line of notation::

    RULES.spec("aten::linear", "... i, o i, o -> ... o")

An operator without a rule is never guessed: everything it touches is pinned, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, Literal

import torch
from torch import Tensor, fx

from prunec.errors import DimError
from prunec.graph.dims import Dim, unify
from prunec.graph.selection import Selection

Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Domain:
    """What the integers in a tensor mean: positions on ``dim``.

    ``ordinal`` marks a plain counter (arange): its values may also be used as numbers, as
    relative positions or slopes are; the values of a top-k may not.
    """

    dim: Dim
    ordinal: bool = False


@dataclass(frozen=True)
class Value:
    """One tensor in a program: its axes, and the axis that its integers index, if any."""

    dims: Dims
    domain: Domain | None = None


Result = Sequence[Dim] | Value | list[Value]
Usage = Literal["compute", "move", "index"]


@dataclass(frozen=True)
class Resized:
    """An operator call after slicing: changed arguments, perhaps another target.

    ``select`` asks for the kept positions to be taken from the result, for operators whose result
    cannot be asked for at the new size (a table of numbers computed from positions).
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    target: Callable[..., Any] | None = None
    select: bool = False


@dataclass(frozen=True)
class Rule:
    """How one operator relates axes.

    Attributes:
        propagate: reads a Call, unifies and refines, returns the result's axes.
        resize: the literal arguments after slicing; None where the operator has none.
        usage: what becomes of integer operands: "compute" uses them as numbers, "move" only moves
            them, "index" knows what they index.
        strides: the call depends on its operand's strides, so that ``resize`` is asked even where
            none of its axes changes.
    """

    propagate: Callable[[Call], Result]
    resize: Callable[[Call, Selection], Resized] | None = None
    usage: Usage = "compute"
    strides: bool = False


class Call:
    """One operator call in a graph, with the axes of its operands at hand."""

    def __init__(
        self, node: fx.Node, values: Mapping[fx.Node, Sequence[Value]], data: set[fx.Node]
    ):
        self.node = node
        self._values = values
        self._data = data
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        self.target = target
        self.name = target._schema.name
        self.arguments = bind_arguments(node)

    def arg(self, name: str) -> Any:
        """An argument by its schema name, the schema's default where it was not given."""
        return self.arguments.get(name)

    def value(self, operand: str | fx.Node) -> Value:
        node = self.arg(operand) if isinstance(operand, str) else operand
        return self._values[node][0]

    def dims(self, operand: str | fx.Node) -> Dims:
        """The axes of a tensor operand, by argument name or node; () for an absent one."""
        node = self.arg(operand) if isinstance(operand, str) else operand
        return self._values[node][0].dims if isinstance(node, fx.Node) else ()

    def domain(self, operand: str | fx.Node) -> Domain | None:
        node = self.arg(operand) if isinstance(operand, str) else operand
        return self._values[node][0].domain if isinstance(node, fx.Node) else None

    def axis(self, name: str = "dim", of: str = "self") -> int:
        """A dim argument as a non-negative axis of operand ``of``."""
        return int(self.arg(name)) % max(1, len(self.dims(of)))

    @property
    def first(self) -> str:
        """The name of the first tensor operand."""
        for argument in self.target._schema.arguments:
            if isinstance(self.arg(argument.name), fx.Node):
                return argument.name
        raise DimError(f"{self.name} has no tensor operand")

    @property
    def operands(self) -> list[fx.Node]:
        return [node for node in self.node.all_input_nodes if node in self._values]

    @property
    def shapes(self) -> list[list[int]]:
        """The shapes of the results."""
        return [list(map(known_size, v.shape)) for v in result_tensors(self.node)]

    @property
    def shape(self) -> list[int]:
        return self.shapes[0]

    @property
    def result(self) -> Value:
        """The first result's axes, once propagated."""
        return self._values[self.node][0]

    @property
    def results(self) -> Sequence[Value]:
        return self._values[self.node]

    def is_data(self, operand: str | fx.Node) -> bool:
        """Whether an operand depends on the user's inputs (not only on weights and constants)."""
        node = self.arg(operand) if isinstance(operand, str) else operand
        return node in self._data

    def unify(self, a: Dim, b: Dim) -> Dim:
        """Unify two axes; where they cannot be, pin both with the reason."""
        try:
            return unify(a, b)
        except DimError as error:
            self.pin(a, str(error))
            self.pin(b, str(error))
            return a

    def pin(self, dim: Dim, reason: str) -> None:
        if dim.size > 1:
            dim.pin(reason, self.node.name)

    def note(self, dim: Dim, kind: str) -> None:
        if dim.size > 1:
            dim.note(kind, self.name, self.node.name)

    def fresh(self, size: int, label: str = "") -> Dim:
        return Dim(size, label or self.node.name)

    def broadcast(self, operands: Sequence[Sequence[Dim]], shape: Sequence[int]) -> Dims:
        """Align axes from the right, unify those that are not broadcast."""
        result: list[Dim] = []
        for back in range(len(shape), 0, -1):
            present = [dims[-back] for dims in operands if len(dims) >= back]
            wide = [dim for dim in present if dim.size != 1]
            if not wide or wide[0].size != shape[-back]:
                result.append(self.fresh(shape[-back]))
                continue
            for other in wide[1:]:
                self.unify(wide[0], other)
            result.append(wide[0])
        return tuple(result)

    def index_into(self, index: str | fx.Node, dim: Dim) -> None:
        """An integer operand addresses positions of ``dim``: tie what it counts to it, or pin."""
        domain = self.domain(index)
        if domain is not None and domain.dim.size == dim.size:
            merged = self.unify(domain.dim, dim)
            merged.note("indexed", self.name, self.node.name)
            return
        self.pin(dim, "addressed by position")
        self.use_as_number(domain)

    def use_as_number(self, domain: Domain | None) -> None:
        """Integers are computed with: after removal a top-k index would mean another unit."""
        if domain is None:
            return
        if domain.ordinal:
            domain.dim.note("numbered", self.name, self.node.name)
        else:
            self.pin(domain.dim, "its indices are used as numbers")


def bind_arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by schema name, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def known_size(size: int | torch.SymInt) -> int:
    """A size as an integer. One that depends on the data gets a prime that nothing else has.

    The same symbol gets the same prime everywhere, so that expressions of it stay consistent.
    """
    if isinstance(size, int):
        return size
    expression = size.node.expr
    primes = {symbol: _prime(symbol.name) for symbol in expression.free_symbols}
    return int(expression.subs(primes))


def _prime(symbol: str) -> int:
    """A prime above 1000 for an unbacked symbol such as u12."""
    number = int("0" + "".join(filter(str.isdigit, symbol)))
    primes = (n for n in count(1001, 2) if all(n % k for k in range(3, math.isqrt(n) + 1, 2)))
    return next(islice(primes, number, None))


def result_tensors(node: fx.Node) -> list[Tensor]:
    """The (fake) tensors a node produces."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


class Rules:
    """A table from operator name (``aten::linear``) to Rule."""

    def __init__(self) -> None:
        self._table: dict[str, Rule] = {}

    def __contains__(self, target: torch._ops.OpOverload) -> bool:
        return self.find(target) is not None

    @property
    def names(self) -> frozenset[str]:
        """The operators that have a rule of their own."""
        return frozenset(self._table)

    def find(self, target: torch._ops.OpOverload) -> Rule | None:
        """The rule of an operator; in-place forms share the functional one's."""
        name = target._schema.name
        found = self._table.get(name) or self._table.get(name.removesuffix("_"))
        if found is None and torch.Tag.pointwise in target.tags:
            found = self._table.get("pointwise")
        return found

    def register(
        self, *operators: str, usage: Usage = "compute"
    ) -> Callable[[Callable[[Call], Result]], Callable[[Call], Result]]:
        """Decorator: this function propagates axes through these operators."""

        def add(propagate: Callable[[Call], Result]) -> Callable[[Call], Result]:
            for operator in operators:
                self._table[operator] = Rule(propagate, usage=usage)
            return propagate

        return add

    def resizes(
        self, *operators: str, strides: bool = False
    ) -> Callable[[Callable[[Call, Selection], Resized]], Callable[[Call, Selection], Resized]]:
        """Decorator: this function gives the literal arguments of these operators after slicing."""

        def add(
            resize: Callable[[Call, Selection], Resized],
        ) -> Callable[[Call, Selection], Resized]:
            for operator in operators:
                rule = self._table[operator]
                self._table[operator] = replace(rule, resize=resize, strides=strides)
            return resize

        return add

    def spec(
        self, operator: str, notation: str, *, pinned: Mapping[str, str] | None = None
    ) -> None:
        """Declare a rule in einsum-like notation, one term an operand (see `apply_spec`).

        ``pinned`` maps a letter to the reason why no unit of that axis may go.

        >>> rules = Rules()
        >>> rules.spec("my::roll", "... a -> ... a", pinned={"a": "order matters"})
        """
        operands, results = (
            [term.split() for term in side.split(",")] for side in notation.split("->")
        )

        def propagate(call: Call) -> Result:
            return apply_spec(call, operands, results, pinned or {})

        self._table[operator] = Rule(propagate)


def apply_spec(
    call: Call,
    operands: Sequence[Sequence[str]],
    results: Sequence[Sequence[str]],
    pinned: Mapping[str, str],
) -> list[Value]:
    """Unify axes that share a letter; ``...`` stands for the leading axes, broadcast together.

    Operands are the call's tensor arguments in schema order; absent optional ones are skipped.
    A letter that only the result has is a new axis.
    """
    letters: dict[str, Dim] = {}
    leading: list[Dims] = []
    tensors = [a.name for a in call.target._schema.arguments if _is_tensor(a)]
    for name, term in zip(tensors, operands, strict=False):
        if not isinstance(call.arg(name), fx.Node):
            continue
        dims = call.dims(name)
        named = [letter for letter in term if letter != "..."]
        if len(dims) < len(named) or ("..." not in term and len(dims) != len(named)):
            raise DimError(
                f"{call.name}: operand {name} has {len(dims)} axes, not {' '.join(term)}"
            )
        start = len(dims) - len(named)
        if "..." in term:
            leading.append(dims[:start])
        for letter, dim in zip(named, dims[start:], strict=True):
            letters[letter] = call.unify(letters[letter], dim) if letter in letters else dim
    for letter, reason in pinned.items():
        if letter in letters:
            call.pin(letters[letter], reason)
    values: list[Value] = []
    for term, shape in zip(results, call.shapes, strict=True):
        named = [letter for letter in term if letter != "..."]
        lead = len(shape) - len(named)
        front = call.broadcast(leading, shape[:lead]) if "..." in term else ()
        back = [
            letters.get(letter) or call.fresh(size)
            for letter, size in zip(named, shape[lead:], strict=True)
        ]
        values.append(Value((*front, *back)))
    return values


def _is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type) and "List" not in str(argument.type)


RULES = Rules()

"""The dim algebra: what a tensor axis is made of.

Every axis of every tensor in a traced program is a `Dim`: a *leaf* of n units, a *product* of
Dims in mixed radix, major to minor (``kv_group x q_per_group x head_dim``), or a *sum* of
segments (``q + k + v``). Dims live in a union-find; operators only ever `unify` two Dims or
refine one (`as_product`, `as_sum`), so the order in which a graph is walked does not matter and
what remains at the end, the leaves, are the units that can be pruned.

The notation follows the factor rules of Shardy and DTensor's view rules; the algebra itself needs
no tensor library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from prunec.errors import DimError

Form = Literal["leaf", "product", "sum"]


@dataclass(frozen=True)
class Note:
    """A fact about a leaf: what kind of fact, why it holds, and at which node it was learnt.

    ``kind`` is "pinned" (no unit may go), "normalised" (a mean, norm or softmax reduces over it),
    or a role that tells what the leaf is for ("head", "score", "value", "expert", ...).
    """

    kind: str
    reason: str = ""
    node: str = ""


class Dim:
    """An axis, or a factor or segment of one. Compare Dims by `root`, never by size."""

    __slots__ = ("_form", "_minimum", "_notes", "_parent", "_parts", "label", "size")

    def __init__(self, size: int, label: str = "", form: Form = "leaf", parts: Sequence[Dim] = ()):
        self.size = size
        self.label = label
        self._form: Form = form
        self._parts = list(parts)
        self._parent: Dim | None = None
        self._notes: dict[Note, None] = {}
        self._minimum = 1

    @property
    def root(self) -> Dim:
        """The representative of everything this Dim was unified with."""
        dim = self
        while dim._parent is not None:
            if dim._parent._parent is not None:
                dim._parent = dim._parent._parent
            dim = dim._parent
        return dim

    @property
    def form(self) -> Form:
        return self.root._form

    @property
    def parts(self) -> list[Dim]:
        """Factors of a product (major to minor) or segments of a sum; empty for a leaf."""
        return [part.root for part in self.root._parts]

    @property
    def notes(self) -> tuple[Note, ...]:
        """The facts known about this leaf (empty for a product or sum: see its leaves)."""
        return tuple(self.root._notes)

    @property
    def minimum(self) -> int:
        """How many units of this leaf must stay at least (1, or the k of a top-k over it)."""
        return self.root._minimum

    def leaves(self) -> Iterator[Dim]:
        """Every distinct leaf below this Dim, major to minor, in order of appearance."""
        yield from dict.fromkeys(self._all_leaves())

    def _all_leaves(self) -> Iterator[Dim]:
        root = self.root
        if root._form == "leaf":
            yield root
        else:
            for part in root._parts:
                yield from part._all_leaves()

    def note(self, kind: str, reason: str = "", node: str = "") -> None:
        """Record a fact on every leaf below this Dim."""
        for leaf in self.leaves():
            leaf._notes.setdefault(Note(kind, reason, node))

    def pin(self, reason: str, node: str = "") -> None:
        """Forbid the removal of any unit below this Dim, with the reason to show."""
        self.note("pinned", reason, node)

    def require(self, count: int) -> None:
        """At least ``count`` units must stay; a product or sum is pinned instead."""
        root = self.root
        if root._form != "leaf":
            self.pin(f"at least {count} positions must stay")
        elif count > root._minimum:
            root._minimum = min(count, root.size)

    def has(self, kind: str) -> bool:
        """Whether some leaf below carries a note of this kind."""
        return any(note.kind == kind for leaf in self.leaves() for note in leaf._notes)

    def __repr__(self) -> str:
        return f"Dim({self.describe()})"

    def describe(self) -> str:
        """The structure as text: ``(3 x 3 x 64)``, ``(32 + 32)``."""
        root = self.root
        if root._form == "leaf":
            return str(root.size)
        sign = " x " if root._form == "product" else " + "
        return "(" + sign.join(part.describe() for part in root._parts) + ")"

    def _become(self, form: Form, parts: Sequence[Dim]) -> None:
        """Refine this leaf in place; its notes move down to the new parts."""
        self._form, self._parts = form, [part for part in parts if part.size != 1 or form == "sum"]
        notes, minimum = self._notes, self._minimum
        self._notes, self._minimum = {}, 1
        for note in notes:
            self.note(note.kind, note.reason, note.node)
        if minimum > 1:
            self.pin(f"at least {minimum} positions must stay")


def product_of(dims: Iterable[Dim]) -> Dim:
    """The mixed-radix product of ``dims``, major to minor; factors of size 1 vanish."""
    factors = [dim.root for dim in dims if dim.size != 1]
    if not factors:
        return Dim(1)
    if len(factors) == 1:
        return factors[0]
    return Dim(math.prod(f.size for f in factors), form="product", parts=factors)


def sum_of(dims: Iterable[Dim]) -> Dim:
    """The concatenation of ``dims``; empty segments vanish."""
    segments = [dim.root for dim in dims if dim.size != 0]
    if len(segments) == 1:
        return segments[0]
    return Dim(sum(s.size for s in segments), form="sum", parts=segments)


def as_product(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Read ``dim`` as a product of factors of these sizes (major to minor), refining it as needed.

    Raises:
        DimError: if its known structure cannot be cut that way.
    """
    dim = dim.root
    if math.prod(sizes) != dim.size:
        raise DimError(f"an axis of {dim.size} is no product of {list(sizes)}")
    if sum(size != 1 for size in sizes) <= 1:
        return [dim if size != 1 else Dim(1) for size in sizes]
    if dim.form == "leaf":
        factors = [Dim(size, f"{dim.label}/{i}") for i, size in enumerate(sizes)]
        dim._become("product", factors)
        return factors
    if dim.form == "sum":
        return _sum_as_product(dim, sizes)
    return _product_as_product(dim, sizes)


def _sum_as_product(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """(a + b) x inner: every segment is a whole number of the same inner block."""
    while sizes and sizes[0] == 1:
        return [Dim(1), *as_product(dim, sizes[1:])]
    inner = math.prod(sizes[1:])
    outer: list[Dim] = []
    shared: list[Dim] = []
    for segment in dim.parts:
        if segment.size % inner:
            raise DimError(f"a segment of {segment.size} is cut inside a block of {inner}")
        first, *rest = as_product(segment, [segment.size // inner, *sizes[1:]])
        outer.append(first)
        if shared:
            for ours, theirs in zip(shared, rest, strict=True):
                unify(ours, theirs)
        else:
            shared = rest
    return [sum_of(outer), *shared]


def _product_as_product(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Consume the known factors from the minor side, splitting one where a cut falls inside it."""
    pending = dim.parts
    factors: list[Dim] = []
    for size in reversed(sizes):
        taken: list[Dim] = []
        need = size
        while need > 1:
            factor = pending.pop()
            if factor.size == 1:
                continue
            if need % factor.size == 0:
                taken.insert(0, factor)
                need //= factor.size
            elif factor.size % need == 0:
                major, minor = as_product(factor, [factor.size // need, need])
                pending.append(major)
                taken.insert(0, minor)
                need = 1
            else:
                raise DimError(f"a factor of {factor.size} is cut by a factor of {size}")
        factors.insert(0, product_of(taken))
    return factors


def as_sum(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Read ``dim`` as segments of these sizes, refining it as needed.

    Raises:
        DimError: if its known structure cannot be cut that way.
    """
    dim = dim.root
    if sum(sizes) != dim.size:
        raise DimError(f"an axis of {dim.size} has no segments of {list(sizes)}")
    if len(sizes) == 1:
        return [dim]
    if dim.form == "leaf":
        segments = [Dim(size, f"{dim.label}+{i}") for i, size in enumerate(sizes)]
        dim._become("sum", segments)
        return segments
    if dim.form == "product":
        major, *inner = dim.parts
        block = math.prod(d.size for d in inner)
        if any(size % block for size in sizes):
            raise DimError(f"segments {list(sizes)} cut a block of {block}")
        outer = as_sum(major, [size // block for size in sizes])
        return [product_of([segment, *inner]) for segment in outer]
    return _sum_as_sum(dim, sizes)


def _sum_as_sum(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    pending = dim.parts
    segments: list[Dim] = []
    refined: list[Dim] = []
    for size in sizes:
        taken: list[Dim] = []
        need = size
        while need > 0:
            segment = pending.pop(0)
            if segment.size > need:
                segment, rest = as_sum(segment, [need, segment.size - need])
                pending.insert(0, rest)
            taken.append(segment)
            need -= segment.size
        segments.append(sum_of(taken))
        refined += taken
    dim._parts = refined
    return segments


def extent(dim: Dim, counts: Mapping[Dim, int]) -> int:
    """The size of ``dim`` when these leaves have these many units, all others their own."""
    root = dim.root
    if root in counts:
        return counts[root]
    if root.form == "leaf":
        return root.size
    sizes = [extent(part, counts) for part in root.parts]
    return math.prod(sizes) if root.form == "product" else sum(sizes)


def unify(a: Dim, b: Dim) -> Dim:
    """Declare two axes the same, refining both to a common structure; returns their root.

    Raises:
        DimError: if the sizes differ or no common structure exists. What was unified until then
            stays: the caller pins both.
    """
    a, b = a.root, b.root
    if a is b:
        return a
    if a.size != b.size:
        raise DimError(f"an axis of {a.size} meets an axis of {b.size}")
    if a.size == 1:
        return a
    if a.form == "leaf":
        a, b = b, a
    if b.form != "leaf":
        _unify_structures(a, b)
    return _merge(a.root, b.root)


def _merge(keep: Dim, drop: Dim) -> Dim:
    if keep is drop:
        return keep
    drop._parent = keep
    keep.label = keep.label or drop.label
    notes, drop._notes = drop._notes, {}
    for note in notes:
        keep.note(note.kind, note.reason, note.node)
    if drop._minimum > 1:
        keep.require(drop._minimum)
    return keep


def _unify_structures(a: Dim, b: Dim) -> None:
    if a.form == b.form == "product":
        radices = _common_radices([p.size for p in a.parts], [p.size for p in b.parts])
        pairs = zip(as_product(a, radices), as_product(b, radices), strict=True)
    elif a.form == b.form == "sum":
        segments = _common_segments([p.size for p in a.parts], [p.size for p in b.parts])
        pairs = zip(as_sum(a, segments), as_sum(b, segments), strict=True)
    else:
        product, total = (a, b) if a.form == "product" else (b, a)
        segments = [part.size for part in total.parts]
        pairs = zip(as_sum(product, segments), total.parts, strict=True)
    for left, right in pairs:
        unify(left, right)


def _common_radices(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """The coarsest radices that refine both, major to minor."""
    strides = {
        s for sizes in (left, right) for s in accumulate(reversed(sizes), initial=1, func=_mul)
    }
    ordered = sorted(strides)
    if any(high % low for low, high in pairwise(ordered)):
        raise DimError(f"factors {list(left)} and {list(right)} have no common refinement")
    return [high // low for low, high in pairwise(ordered)][::-1]


def _common_segments(left: Sequence[int], right: Sequence[int]) -> list[int]:
    cuts = sorted({0, *accumulate(left), *accumulate(right)})
    return [high - low for low, high in pairwise(cuts)]


def _mul(a: int, b: int) -> int:
    return a * b

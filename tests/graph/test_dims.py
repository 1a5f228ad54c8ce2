"""The dim algebra: products, sums, refinement, clashes, and facts that move down to the leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunec.errors import DimError
from prunec.graph.dims import Dim, as_product, as_sum, extent, product_of, sum_of, unify
from prunec.graph.selection import positions


def labels(dim: Dim) -> list[frozenset[tuple[int, int]]]:
    """What stands at every position: (leaf, index) pairs; leaves of one unit tell nothing."""
    found: list[set[tuple[int, int]]] = [set() for _ in range(dim.size)]
    for leaf, index in positions(dim):
        for place, unit in enumerate(index.tolist()):
            if unit >= 0 and leaf.size > 1:
                found[place].add((id(leaf), unit))
    return [frozenset(f) for f in found]


def test_a_leaf_refines_into_a_product_in_place() -> None:
    axis = Dim(12)
    heads, width = as_product(axis, [3, 4])
    assert (heads.size, width.size) == (3, 4)
    assert axis.describe() == "(3 x 4)"
    assert list(axis.leaves()) == [heads, width]


def test_reading_a_product_twice_gives_the_same_factors() -> None:
    axis = Dim(24)
    first = as_product(axis, [2, 12])
    again = as_product(axis, [2, 3, 4])
    assert again[0].root is first[0].root
    assert axis.describe() == "(2 x (3 x 4))"
    assert as_product(axis, [6, 4])[1].root is again[2].root


def test_factors_of_one_carry_nothing() -> None:
    axis = Dim(6)
    one, whole, other = as_product(axis, [1, 6, 1])
    assert whole is axis
    assert one.size == other.size == 1
    assert product_of([Dim(1), Dim(1)]).size == 1
    assert product_of([axis, Dim(1)]) is axis


def test_a_product_whose_radices_cross_is_refused() -> None:
    axis = Dim(12)
    as_product(axis, [4, 3])
    with pytest.raises(DimError, match="a factor of 3 is cut by a factor of 4"):
        as_product(axis, [3, 4])


def test_sizes_must_multiply_and_add_up() -> None:
    with pytest.raises(DimError, match=r"an axis of 12 is no product of \[5, 2\]"):
        as_product(Dim(12), [5, 2])
    with pytest.raises(DimError, match=r"an axis of 12 has no segments of \[5, 6\]"):
        as_sum(Dim(12), [5, 6])


def test_segments_are_cut_finer_where_a_second_cut_falls_inside() -> None:
    axis = Dim(10)
    as_sum(axis, [4, 6])
    left, middle, right = as_sum(axis, [4, 1, 5])
    assert [leaf.size for leaf in axis.leaves()] == [4, 1, 5]
    assert [d.size for d in (left, middle, right)] == [4, 1, 5]
    assert as_sum(axis, [5, 5])[1].root is right.root


def test_segments_of_a_product_are_whole_blocks() -> None:
    axis = Dim(24)
    _, width = as_product(axis, [6, 4])
    queries, keys = as_sum(axis, [16, 8])
    assert queries.describe() == "(4 x 4)"
    assert queries.parts[1] is keys.parts[1] is width.root
    with pytest.raises(DimError, match=r"segments \[14, 10\] cut a block of 4"):
        as_sum(axis, [14, 10])


def test_a_sum_is_a_product_when_every_segment_is_whole_blocks() -> None:
    axis = sum_of([Dim(8), Dim(12)])
    heads, width = as_product(axis, [5, 4])
    assert heads.describe() == "(2 + 3)"
    assert width.size == 4
    assert [part.parts[1] for part in axis.parts] == [width.root, width.root]


def test_a_sum_is_no_product_when_a_block_spans_two_segments() -> None:
    with pytest.raises(DimError, match="a segment of 6 is cut inside a block of 4"):
        as_product(sum_of([Dim(6), Dim(2)]), [2, 4])


def test_empty_segments_vanish() -> None:
    axis = Dim(5)
    assert sum_of([Dim(0), axis]) is axis
    assert sum_of([Dim(0), Dim(0)]).size == 0


def test_unify_joins_leaves_and_their_facts() -> None:
    a, b = Dim(8, "left"), Dim(8, "right")
    a.note("head", "matmul", "n1")
    b.pin("order matters", "n2")
    b.require(3)
    assert unify(a, b) is a.root
    assert a.root is b.root
    assert {note.kind for note in a.notes} == {"head", "pinned"}
    assert b.minimum == 3


def test_unify_refines_both_products_to_common_radices() -> None:
    a, b = Dim(24), Dim(24)
    as_product(a, [2, 12])
    as_product(b, [6, 4])
    unify(a, b)
    assert [leaf.size for leaf in a.leaves()] == [2, 3, 4]
    assert a.root is b.root


def test_unify_refines_both_sums_to_common_cuts() -> None:
    a, b = Dim(10), Dim(10)
    as_sum(a, [3, 7])
    as_sum(b, [5, 5])
    unify(a, b)
    assert [leaf.size for leaf in a.leaves()] == [3, 2, 5]


def test_unify_reads_a_product_as_the_segments_of_a_sum() -> None:
    product, total = Dim(12), Dim(12)
    as_product(product, [3, 4])
    as_sum(total, [8, 4])
    unify(product, total)
    assert [leaf.size for leaf in product.leaves()] == [2, 1, 4]
    assert product.root is total.root


def test_unify_refuses_what_has_no_common_refinement() -> None:
    a, b = Dim(12), Dim(12)
    as_product(a, [4, 3])
    as_product(b, [3, 4])
    with pytest.raises(DimError, match="have no common refinement"):
        unify(a, b)
    with pytest.raises(DimError, match="an axis of 3 meets an axis of 4"):
        unify(Dim(3), Dim(4))


def test_facts_of_a_leaf_move_down_when_it_is_refined() -> None:
    axis = Dim(12)
    axis.note("normalised", "rms_norm", "n1")
    axis.pin("token ids", "n2")
    heads, width = as_product(axis, [3, 4])
    for leaf in (heads, width):
        assert {note.kind for note in leaf.notes} == {"normalised", "pinned"}
    assert axis.notes == ()


def test_facts_noted_on_a_product_reach_every_leaf() -> None:
    axis = Dim(12)
    heads, width = as_product(axis, [3, 4])
    axis.note("score", "bmm", "n1")
    assert heads.has("score")
    assert width.has("score")
    assert axis.has("score")


def test_a_minimum_becomes_a_pin_when_the_leaf_is_refined() -> None:
    experts = Dim(8)
    experts.require(2)
    groups, _ = as_product(experts, [2, 4])
    assert groups.has("pinned")
    assert groups.minimum == 1


def test_a_minimum_never_exceeds_the_size() -> None:
    experts = Dim(4)
    experts.require(9)
    assert experts.minimum == 4


def test_extent_follows_the_structure() -> None:
    head, width, tail = Dim(3), Dim(4), Dim(5)
    axis = sum_of([product_of([head, width]), tail])
    assert extent(axis, {}) == 17
    assert extent(axis, {width.root: 2, tail.root: 1}) == 7


SIZES = st.integers(2, 3)


@st.composite
def structures(draw: st.DrawFn, leaves: list[Dim] | None = None, depth: int = 3) -> Dim:
    """A random Dim; leaves may be shared between its parts."""
    leaves = [] if leaves is None else leaves
    form = draw(st.sampled_from(["leaf", "leaf", "product", "sum"])) if depth else "leaf"
    if form == "leaf":
        if leaves and draw(st.booleans()):
            return draw(st.sampled_from(leaves))
        leaves.append(Dim(draw(SIZES)))
        return leaves[-1]
    parts = [draw(structures(leaves, depth - 1)) for _ in range(2)]
    return product_of(parts) if form == "product" else sum_of(parts)


@given(structures())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_positions_agree_with_sizes(dim: Dim) -> None:
    assert dim.size == len(labels(dim))
    assert extent(dim, {}) == dim.size
    assert {id(leaf) for leaf, _ in positions(dim)} == {id(leaf) for leaf in dim.leaves()}


@given(structures(), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_cut_keeps_every_position_what_it_was_or_is_refused(
    dim: Dim, data: st.DataObject
) -> None:
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(1, dim.size - 1))
        sizes, read = [cut, dim.size - cut], as_sum
    else:
        factor = data.draw(
            st.sampled_from([k for k in range(2, dim.size + 1) if dim.size % k == 0])
        )
        sizes, read = [dim.size // factor, factor], as_product
    try:
        parts = read(dim, sizes)
    except DimError:
        return
    assert [part.size for part in parts] == sizes
    whole = sum_of(parts) if read is as_sum else product_of(parts)
    assert labels(whole) == labels(dim)


@given(structures(), structures())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_unified_axes_are_one_axis(a: Dim, b: Dim) -> None:
    if a.size != b.size:
        with pytest.raises(DimError):
            unify(a, b)
        return
    try:
        unify(a, b)
    except DimError:
        return
    assert a.root is b.root
    assert labels(a) == labels(b)


@given(st.permutations(range(4)))
@settings(max_examples=24, deadline=None, derandomize=True)
def test_the_order_of_operations_does_not_matter(order: list[int]) -> None:
    q, k, fused = Dim(24), Dim(24), Dim(48)
    steps = [
        lambda: as_product(q, [6, 4]),
        lambda: as_product(k, [3, 2, 4]),
        lambda: [unify(q, part) for part in as_sum(fused, [24, 24])[:1]],
        lambda: [unify(k, part) for part in as_sum(fused, [24, 24])[1:]],
    ]
    for step in order:
        steps[step]()
    unify(q, k)
    assert [leaf.size for leaf in fused.leaves()] == [3, 2, 4]
    assert math.prod(leaf.size for leaf in q.leaves()) == 24
    assert np.array_equal(positions(q)[0][1], positions(k)[0][1])

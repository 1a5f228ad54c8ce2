"""The two oracles on any program: slicing equals masking, and permuting units changes nothing.

That a sliced model runs is no evidence. These checks are: every group of units is removed in part
and the smaller program compared with the full-size one, in which the same units take no part. Run
them in double precision on weights drawn anew (`redraw`): at a library's default initialisation a
wrong slice is often too small to be seen.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prunec.graph.coupling import CouplingGraph, Group, Member
from prunec.graph.dims import Dim
from prunec.graph.masked import run_masked
from prunec.graph.program import Program
from prunec.graph.selection import IntArray, Keep, Selection
from prunec.passes.oracles.mask import relative_difference
from prunec.passes.slice import pad_state, slice_program, slice_state

VACUOUS = 1e-7


@dataclass(frozen=True)
class Check:
    """What one oracle found for one selection.

    Attributes:
        subject: the group, or "all groups".
        way: "uniform", "ragged" (rows differ by companion), "permuted".
        difference: relative, between the result and its reference.
        reference: "masked" (weights zeroed), "kept" (reductions that know what is gone),
            "dense" (for permutations).
        effect: relative, how far removing the units moves the output; next to nothing means that
            the check could not have failed.
    """

    subject: str
    way: str
    difference: float
    reference: str
    effect: float

    @property
    def vacuous(self) -> bool:
        return self.effect < VACUOUS

    def exact(self, tolerance: float) -> bool:
        return self.difference <= tolerance


def check_groups(coupling: CouplingGraph, *, tolerance: float = 1e-9) -> Iterator[Check]:
    """Both oracles on every group by itself, then on all groups at once.

    Args:
        tolerance: relative; where zeroed weights are no reference within it (a mean, norm or
            softmax runs over the units) the one with kept-count statistics is used.

    Raises:
        PrunecError, RuntimeError: where a slice does not run at all.
    """
    dense = coupling.program.run(None, **coupling.program.example)
    for group in coupling.groups:
        yield check_selection(coupling, choose([group]), group.name, "uniform", dense, tolerance)
        if group.companions:
            ragged = choose([group], ragged=True, by_name=coupling)
            yield check_selection(coupling, ragged, group.name, "ragged", dense, tolerance)
        if not ordered(group.dim):
            yield check_permutation(coupling, group, dense)
    if coupling.groups:
        for way in ("uniform", "ragged"):
            everything = choose(coupling.groups, ragged=way == "ragged", by_name=coupling)
            yield check_selection(coupling, everything, "all groups", way, dense, tolerance)


def ordered(dim: Dim) -> bool:
    """Whether units of this leaf are numbered, or summed up one after the other.

    No order but their own is right: they can be removed, but not permuted.
    """
    return any(dim.has(kind) for kind in ("numbered", "tabled", "scanned"))


def check_selection(
    coupling: CouplingGraph,
    selection: Selection,
    subject: str,
    way: str,
    dense: Tensor,
    tolerance: float,
) -> Check:
    """Slice the program's own weights and compare with the masked program."""
    program, inputs = coupling.program, coupling.program.example
    sliced = slice_state(coupling, selection, program.state)
    result = slice_program(coupling, selection, sliced).run(None, **inputs)
    effect = relative_difference(result, dense)
    masked = program.run(pad_state(coupling, selection, sliced), **inputs)
    difference = relative_difference(result, masked)
    if difference <= tolerance:
        return Check(subject, way, difference, "masked", effect)
    kept = run_masked(program, coupling.layout, selection, inputs)
    return Check(subject, way, relative_difference(result, kept), "kept", effect)


def check_permutation(coupling: CouplingGraph, group: Group, dense: Tensor) -> Check:
    """Permute the units of a group in every tensor that carries them: nothing may change."""
    program = coupling.program
    order = _generator(group.name).permutation(group.size)
    if (order == np.arange(group.size)).all():
        order = np.roll(order, 1)
    permuted = {
        name: permute_units(tensor, coupling.layout.parameters.get(name, ()), group.dim, order)
        for name, tensor in program.state.items()
    }
    result = program.run(permuted, **program.example)
    half = {name: permuted[name] for name in [group.members[0].parameter]}
    moved = program.run({**program.state, **half}, **program.example)
    return Check(
        group.name,
        "permuted",
        relative_difference(result, dense),
        "dense",
        relative_difference(moved, dense),
    )


def permute_units(tensor: Tensor, dims: Iterable[Dim], leaf: Dim, order: IntArray) -> Tensor:
    """A tensor whose unit i of ``leaf`` is the one that was at ``order[i]``."""
    for axis, dim in enumerate(dims):
        if any(found is leaf.root for found in dim.leaves()):
            index = torch.from_numpy(_permuted_positions(dim, leaf.root, order))
            tensor = tensor.index_select(axis, index)
    return tensor


def _permuted_positions(dim: Dim, leaf: Dim, order: IntArray) -> IntArray:
    root = dim.root
    if root is leaf:
        return order
    if root.form == "leaf":
        return np.arange(root.size)
    tables = [_permuted_positions(part, leaf, order) for part in root.parts]
    if root.form == "sum":
        starts = np.cumsum([0, *(len(table) for table in tables[:-1])])
        return np.concatenate(
            [table + start for table, start in zip(tables, starts, strict=True)]
        ).astype(np.int64)
    result = np.zeros(1, dtype=np.int64)
    for table in tables:
        result = (result[:, None] * len(table) + table[None, :]).reshape(-1)
    return result


def choose(
    groups: Iterable[Group],
    *,
    ragged: bool = False,
    by_name: CouplingGraph | None = None,
    salt: str = "",
) -> Selection:
    """About half of each group's units, drawn from its name: the same in every run.

    Args:
        ragged: rows that differ by companion unit, for groups that have companions.
    """
    keeps: dict[Dim, Keep] = {}
    for group in groups:
        generator = _generator(group.name + salt)
        low, high = max(1, group.minimum), group.size - 1
        if low > high:
            continue
        count = min(max(group.size // 2, low), high)
        companions: tuple[Dim, ...] = ()
        if ragged and by_name is not None:
            companions = tuple(by_name[name].dim for name in group.companions)
        mask = np.zeros((*(dim.size for dim in companions), group.size), dtype=bool)
        for row in mask.reshape(-1, group.size):
            row[generator.permutation(group.size)[:count]] = True
        keeps[group.dim] = Keep(mask, companions)
    return Selection(keeps)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


@dataclass(frozen=True)
class Control:
    """A slice that is wrong on purpose: one member of a group keeps other units than the rest.

    ``inert`` parameters are no test: the smaller program's output does not depend on them at all,
    as on a constant that is taken off again by a norm of which each group has one channel left.
    """

    group: str
    parameter: str
    axis: int
    difference: float
    inert: bool

    def caught(self, tolerance: float) -> bool:
        return not self.difference <= tolerance


def wrong_slices(coupling: CouplingGraph, *, limit: int = 40) -> Iterator[Control]:
    """Negative controls, at most ``limit`` of them, spread over all groups' members."""
    program = coupling.program
    places = [
        (group, member)
        for group in coupling.groups
        if max(1, group.minimum) < group.size and len(group.members) > 1
        for member in group.members
        if member.parameter in program.parameters
    ]
    smaller: dict[str, tuple[Selection, Program, Tensor]] = {}
    for group, member in places[:: max(1, -(-len(places) // limit))]:
        if group.name not in smaller:
            right = choose([group])
            sliced = slice_program(coupling, right, slice_state(coupling, right, program.state))
            smaller[group.name] = right, sliced, sliced.run(None, **program.example)
        right, sliced, reference = smaller[group.name]
        wrong = _wrong_member(coupling, right, group, member)
        result = sliced.run({**sliced.state, member.parameter: wrong}, **program.example)
        difference = relative_difference(result, reference)
        inert = difference < VACUOUS and _is_inert(sliced, member.parameter)
        yield Control(group.name, member.parameter, member.axis, difference, inert)


def _wrong_member(
    coupling: CouplingGraph, right: Selection, group: Group, member: Member
) -> Tensor:
    """A parameter sliced right on every axis but the member's."""
    wrong = _other_units(right, group)
    tensor = coupling.program.state[member.parameter]
    whole = [Dim(size) for size in tensor.shape]
    for axis, dim in enumerate(coupling.layout.parameters[member.parameter]):
        if right.touches(dim):
            selection = wrong if axis == member.axis else right
            tensor = selection.take(tensor, [*whole[:axis], dim, *whole[axis + 1 :]])
    return tensor


def _other_units(selection: Selection, group: Group) -> Selection:
    """As many units, shifted by one where that changes the set."""
    keep = selection.keep(group.dim)
    assert keep is not None
    return Selection({group.dim: Keep(np.roll(keep.mask, 1), ())})


def _is_inert(program: Program, name: str) -> bool:
    """Whether the output is the same with other numbers in this parameter."""
    dense = program.run(None, **program.example)
    generator = torch.Generator().manual_seed(1)
    value = program.state[name]
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    moved = program.run({**program.state, name: value + noise}, **program.example)
    return relative_difference(moved, dense) < VACUOUS


def redraw(program: Program, seed: int = 0) -> Program:
    """The program with parameters drawn anew at unit gain.

    Matrices keep the variance of what they multiply; tables of constants (norm weights, decay
    rates) are perturbed around their values, so that no two units are alike.
    """
    generator = torch.Generator().manual_seed(seed)
    state = dict(program.state)
    kernels = _kernel_names(program)
    for name in sorted(program.parameters):
        value = state[name]
        if value.is_floating_point() and value.numel():
            state[name] = _redrawn(value, name in kernels, generator)
    return replace(program, state=state)


def _redrawn(value: Tensor, kernel: bool, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    mean, spread = float(value.double().mean()), float(value.double().std(correction=0))
    if not (np.isfinite(mean) and np.isfinite(spread)):
        mean = spread = 0.0
    if value.ndim < 2 or abs(mean) > spread:
        base = value.double() if np.isfinite(mean) else torch.zeros(())
        return (base * (1 + 0.2 * noise) + 0.3 * noise.flip(0)).to(value.dtype)
    return (noise * _unit_gain(value, kernel)).to(value.dtype)


def _unit_gain(value: Tensor, kernel: bool) -> float:
    if kernel:
        return math.sqrt(1 / max(1, value[0].numel()))
    rows, columns = value.shape[-2:]
    return math.sqrt(1 / math.sqrt(rows * columns))


def _kernel_names(program: Program) -> set[str]:
    names = set()
    for node in program.graph.nodes:
        if "conv" in getattr(getattr(node.target, "_schema", None), "name", ""):
            names |= {program.bindings.get(source.name, "") for source in node.all_input_nodes}
    return names

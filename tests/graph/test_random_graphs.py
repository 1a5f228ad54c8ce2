"""Both oracles on random programs, in double precision.

The examples are the same in every run; PRUNEC_RANDOM_GRAPHS=5000 draws other and more ones.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import TOLERANCE
from random_programs import STEPS, Step, build

from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.passes.oracles import oracle
from prunec.passes.slice import bound_module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small lose time to every thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


steps = st.lists(
    st.tuples(st.sampled_from(list(STEPS)), st.integers(0, 9999)), min_size=1, max_size=5
)
quiet = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def assert_holds(drawn: Sequence[Step], *, every_group: bool = False) -> None:
    """Permutation of each group; slicing of a few groups, then of all at once."""
    assert_exact_coupling(couple(build(drawn)), every_group=every_group)


def assert_exact_coupling(coupling: CouplingGraph, *, every_group: bool = False) -> None:
    wrong = [c for c in checks(coupling, every_group) if not c.exact(TOLERANCE)]
    assert not wrong, (wrong, coupling.program.graph_module.code)
    assert not coupling.layout.missing


def checks(coupling: CouplingGraph, every_group: bool) -> list[oracle.Check]:
    program = coupling.program
    dense = program.run(None, **program.example)
    found = [
        oracle.check_permutation(coupling, group, dense)
        for group in coupling.groups
        if not oracle.ordered(group.dim)
    ]
    plans = [("uniform", group.name, [group]) for group in coupling.groups]
    plans = plans if every_group else plans[:1]
    plans += [(way, "all groups", list(coupling.groups)) for way in ("uniform", "ragged")]
    for way, subject, groups in plans:
        selection = oracle.choose(groups, ragged=way == "ragged", by_name=coupling)
        if selection:
            found.append(
                oracle.check_selection(coupling, selection, subject, way, dense, TOLERANCE)
            )
    return found


@given(steps)
@settings(max_examples=500, derandomize=True, **quiet)
def test_slicing_and_permuting_random_programs(drawn: list[Step]) -> None:
    assert_holds(drawn)


@given(steps)
@settings(max_examples=100, derandomize=True, **quiet)
def test_random_programs_that_went_through_export(drawn: list[Step]) -> None:
    """The same program as a module, exported: other operators and sizes, the same groups."""
    program = build(drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, of parameters registered under flat names
        exported = trace(bound_module(program), program.example)
    assert_exact_coupling(couple(exported))


@pytest.mark.slow
@given(steps)
@settings(max_examples=int(os.environ.get("PRUNEC_RANDOM_GRAPHS", "5000")), **quiet)
def test_many_random_programs(drawn: list[Step]) -> None:
    assert_holds(drawn, every_group=True)


def test_wrong_slices_of_random_programs_are_caught() -> None:
    """The oracle has power: a slice that is wrong on purpose does not pass."""
    generator = random.Random(0)
    made = caught = 0
    for _ in range(40):
        drawn = [(generator.choice(list(STEPS)), generator.randrange(9999)) for _ in range(4)]
        for control in oracle.wrong_slices(couple(build(drawn)), limit=6):
            if not control.inert:
                made += 1
                caught += control.caught(TOLERANCE)
    assert made > 100
    assert caught >= 0.98 * made, (caught, made)

"""The stream computes what the program computes, before and after units went."""

from __future__ import annotations

import pytest
import torch
from programs import net
from tiny_model import VOCABULARY, tiny_llama
from torch import Tensor

from prunec.errors import TraceError, VerifyError
from prunec.graph import waiting
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.interpreter import Stream
from prunec.graph.retarget import retarget
from prunec.graph.trace import trace
from prunec.passes.oracles.oracle import choose
from prunec.passes.sites import find_sites
from prunec.passes.slice import Weights, slice_program, slice_state

KINDS = ("kv_group", "query_head", "value_dim", "ffn_channel")


def tokens(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, VOCABULARY, (2, 7), generator=generator)}


@pytest.fixture(scope="module")
def coupling() -> CouplingGraph:
    return couple(retarget(trace(tiny_llama(), tokens(0)), torch.float64))


def test_a_stream_computes_what_the_program_computes(coupling: CouplingGraph) -> None:
    program = coupling.program
    batches = [tokens(seed) for seed in range(3)]
    stream = Stream(program, coupling.layout, batches, program.state.__getitem__)
    for batch, result in zip(batches, stream.finish(), strict=True):
        assert torch.equal(result, program.run(None, **batch))


def test_stopping_on_the_way_changes_nothing(coupling: CouplingGraph) -> None:
    program = coupling.program
    batches = [tokens(seed) for seed in range(2)]
    stream = Stream(program, coupling.layout, batches, program.state.__getitem__)
    sites, _ = find_sites(coupling, KINDS)
    shapes = []
    for site in sites:
        for node, rows in site.inputs[0].calls:
            stream.advance(
                node, rows.operand, lambda number, value: shapes.append(tuple(value.shape))
            )
    assert len(sites) == 4
    assert shapes == [(2, 7, 32)] * 2 + [(2, 7, 48)] * 2 + [(2, 7, 32)] * 2 + [(2, 7, 48)] * 2
    for batch, result in zip(batches, stream.finish(), strict=True):
        assert torch.equal(result, program.run(None, **batch))


def test_a_stream_left_half_way_leaves_gradients_on(coupling: CouplingGraph) -> None:
    program = coupling.program
    batches = [tokens(seed) for seed in range(2)]
    stream = Stream(program, coupling.layout, batches, program.state.__getitem__)
    assert torch.is_grad_enabled()
    results = stream.finish()
    assert not next(results).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("hold_bytes", [None, 0])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_slicing_on_the_way_equals_the_sliced_program(
    coupling: CouplingGraph,
    ragged: bool,
    hold_bytes: int | None,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Live values that carry removed units are cut where they are, or computed again."""
    monkeypatch.setattr(waiting, "_SMALL_BYTES", 1)
    program = coupling.program
    batches = [tokens(seed) for seed in range(2)]
    weights = Weights(coupling, program.state)
    stream = Stream(
        program,
        coupling.layout,
        batches,
        weights.__getitem__,
        hold_bytes=hold_bytes,
        place=waiting.place_named(place),
    )
    sites, _ = find_sites(coupling, KINDS)
    everything = []
    for site in sites:
        for node, rows in site.inputs[0].calls:
            stream.advance(node, rows.operand, lambda number, value: None)
        everything += site.groups
        selection = choose(everything, ragged=ragged, by_name=coupling)
        weights.select(selection, {})
        stream.select(selection)
    sliced = slice_program(coupling, selection, slice_state(coupling, selection, program.state))
    assert any(weights[name].shape != program.state[name].shape for name in program.parameters)
    for batch, result in zip(batches, stream.finish(), strict=True):
        expected = sliced.run(None, **batch)
        assert float((result - expected).abs().max()) < 1e-12


def test_a_selection_that_holds_from_the_start(coupling: CouplingGraph) -> None:
    program = coupling.program
    selection = choose(coupling.groups)
    state = slice_state(coupling, selection, program.state)
    batch = tokens(3)
    stream = Stream(program, coupling.layout, [batch], state.__getitem__, selection=selection)
    (result,) = stream.finish()
    expected = slice_program(coupling, selection, state).run(None, **batch)
    assert float((result - expected).abs().max()) < 1e-12


def test_other_shapes_are_refused(coupling: CouplingGraph) -> None:
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    with pytest.raises(TraceError, match=r"traced for inputs .*\(2, 7\)"):
        Stream(coupling.program, coupling.layout, [batch], coupling.program.state.__getitem__)


def test_infinity_names_the_node_and_the_batch() -> None:
    module = net(lambda p, x: torch.log(x @ p.up) @ p.down, up=(6, 4), down=(4, 3))
    coupling = couple(trace(module, torch.zeros(2, 6, dtype=torch.float64)))
    batches = [{"x": torch.zeros(2, 6, dtype=torch.float64)}]
    stream = Stream(coupling.program, coupling.layout, batches, coupling.program.state.__getitem__)
    product = [n for n in coupling.program.graph.nodes if "matmul" in n.name][-1]
    with pytest.raises(VerifyError, match="NaN or Inf in log for calibration batch 0"):
        stream.advance(product, product.all_input_nodes[0], lambda number, value: None)

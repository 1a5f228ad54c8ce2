"""The mask oracle: slicing units away equals zeroing them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunec.errors import VerifyError
from prunec.graph.coupling import CouplingGraph
from prunec.graph.masked import run_masked
from prunec.graph.program import Program
from prunec.graph.selection import Selection
from prunec.passes.slice import pad_state, slice_program


def relative_difference(result: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    scale = float(reference.abs().max())
    return float((result - reference).abs().max()) / scale if scale else float(result.abs().max())


def tolerance(program: Program) -> float:
    """What rounding may explain, relative: 1e-4; of 16-bit numbers, eight units in the last place.

    It adds up over layers. Where a module is delivered, it is compared in fp32 afterwards.
    """
    dtypes = {program.state[name].dtype for name in program.parameters}
    units = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point]
    return max(1e-4, 8 * max(units, default=0.0))


def slicing_difference(
    coupling: CouplingGraph,
    selection: Selection,
    sliced: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> float:
    """Relative difference between the sliced program and its full-size twin, zero where units went.

    Where a norm, mean or top-k runs over the units, it is told what is gone (`run_masked`).

    Args:
        sliced: the program's tensors at their new sizes, compensated or not.
    """
    padded = pad_state(coupling, selection, sliced)
    if reduced_over(coupling, selection):
        layout, program = coupling.layout, coupling.program
        reference = run_masked(program, layout, selection, inputs, state=padded)
    else:
        reference = coupling.program.run(padded, **dict(inputs))
    result = slice_program(coupling, selection, sliced).run(None, **dict(inputs))
    return relative_difference(result, reference)


def reduced_over(coupling: CouplingGraph, selection: Selection) -> bool:
    """Whether a norm, mean or top-k runs over units that go: zeroed weights are no reference."""
    return any(group.normalised and selection.touches(group.dim) for group in coupling.groups)


def verify_sliced(
    coupling: CouplingGraph,
    selection: Selection,
    sliced: Mapping[str, Tensor],
) -> float:
    """How far slicing is from masking on the traced inputs; VerifyError if too far."""
    difference = slicing_difference(coupling, selection, sliced, coupling.program.example)
    if not difference <= tolerance(coupling.program):
        raise VerifyError(
            f"the sliced model differs from the masked one by {difference:.2g} (relative)",
            so="nothing was written",
            fix="please report the model: a dim rule is wrong",
        )
    return difference

"""The mask oracle: slicing units away equals zeroing them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunec.errors import VerifyError
from prunec.graph.coupling import CouplingGraph
from prunec.graph.masked import run_masked
from prunec.graph.program import source_line
from prunec.graph.selection import Selection
from prunec.passes.slice import pad_state, slice_program


def relative_difference(result: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    scale = float(reference.abs().max())
    return float((result - reference).abs().max()) / scale if scale else float(result.abs().max())


def in_single(coupling: CouplingGraph) -> CouplingGraph:
    """The coupling of a program of 16-bit parameters in fp32, any other as it is.

    Rounding to 16 bits adds up over layers to more than an oracle may allow.
    """
    program = coupling.program
    dtypes = {program.state[name].dtype for name in program.parameters}
    half = bool(dtypes) and all(d.is_floating_point and d.itemsize == 2 for d in dtypes)
    return coupling.retargeted(torch.float32) if half else coupling


def like_state(coupling: CouplingGraph, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These tensors of a program in the types that its own have."""
    state = coupling.program.state
    return {
        name: tensor.to(state[name].dtype) if name in state else tensor
        for name, tensor in tensors.items()
    }


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
    *,
    tolerance: float = 1e-4,
) -> float:
    """How far slicing is from masking on the traced inputs; VerifyError if too far."""
    coupling = in_single(coupling)
    sliced = like_state(coupling, sliced)
    difference = slicing_difference(coupling, selection, sliced, coupling.program.example)
    if not difference <= tolerance:
        _check_reproducible(coupling)
        raise VerifyError(
            f"the sliced model differs from the masked one by {difference:.2g} (relative)",
            so="nothing was written",
            fix="please report the model: a dim rule is wrong",
        )
    return difference


def _check_reproducible(coupling: CouplingGraph) -> None:
    """Raises VerifyError for a model that draws random numbers, of which nothing can be proven."""
    program = coupling.program
    first, second = (program.run(None, **program.example) for _ in range(2))
    if torch.equal(first, second):
        return
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    random = torch.Tag.nondeterministic_seeded
    drawn = next((node for node in calls if random in getattr(node.target, "tags", ())), None)
    raise VerifyError(
        "the model gives other numbers each time it is called",
        where=None if drawn is None else f"{drawn.target}, {source_line(drawn).strip()}",
        so="a smaller one cannot be compared with it, and nothing was written",
        fix="let its forward draw no random numbers in eval mode: if self.training: ...",
    )

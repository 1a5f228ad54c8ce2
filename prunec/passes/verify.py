"""The mask oracle: slicing units away equals zeroing them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunec.errors import VerifyError
from prunec.graph.coupling import CouplingGraph
from prunec.graph.selection import Selection
from prunec.passes.slice import mask_state, slice_program, slice_state


def relative_difference(result: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    scale = float(reference.abs().max())
    return float((result - reference).abs().max()) / scale if scale else float(result.abs().max())


def slicing_difference(
    coupling: CouplingGraph,
    selection: Selection,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> float:
    """Relative difference between the sliced program and the masked one on these inputs.

    Exact (rounding aside) for every selection of groups that no norm or top-k runs over.
    """
    masked = coupling.program.run(mask_state(coupling, selection, state), **inputs)
    sliced = slice_program(coupling, selection, slice_state(coupling, selection, state))
    return relative_difference(sliced.run(**inputs), masked)


def verify_slicing(
    coupling: CouplingGraph,
    selection: Selection,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    tolerance: float = 1e-4,
) -> float:
    """Raises VerifyError unless slicing equals masking; returns the relative difference."""
    difference = slicing_difference(coupling, selection, state, inputs)
    if not difference <= tolerance:
        raise VerifyError(
            f"the sliced model differs from the masked one by {difference:.2g} (relative)",
            so="nothing was written",
            fix="please report the model: a dim rule is wrong",
        )
    return difference

"""Tiny programs for the tests of the analysis, and what is asked of all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.trace import trace
from prunec.passes.oracles import oracle

TOLERANCE = 1e-9
Forward = Callable[..., Tensor]


class Net(nn.Module):
    """A function of named parameters and inputs, as a module."""

    def __init__(self, forward: Forward, shapes: dict[str, Sequence[int]]):
        super().__init__()
        self.function = forward
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            gain = max(1, shape[-1]) ** -0.5 if len(shape) > 1 else 1.0
            value = gain * torch.randn(*shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(SimpleNamespace(**dict(self.named_parameters())), x)


def net(forward: Forward, **shapes: Sequence[int]) -> Net:
    return Net(forward, shapes)


def inputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def coupled(module: nn.Module, *example: Tensor) -> CouplingGraph:
    """A module traced and coupled, in double precision."""
    with torch.no_grad():
        return couple(trace(module.double(), list(example)))


def describe(coupling: CouplingGraph) -> str:
    """Groups, one a line, then what is pinned and why."""
    lines = []
    for group in coupling.groups:
        places = " ".join(f"{m.parameter}[{m.axis}]" for m in group.members)
        notes = [f"minimum {group.minimum}"] if group.minimum > 1 else []
        notes += [f"companions {', '.join(group.companions)}"] if group.companions else []
        notes += ["normalised"] if group.normalised else []
        line = f"{group.name} {group.size}: {places}" + "".join(f"; {n}" for n in notes)
        lines += textwrap.wrap(line, 96, subsequent_indent="    ", break_on_hyphens=False)
    for pin in coupling.pinned:
        lines.append(f"pinned {pin.parameter}[{pin.axis}] {pin.size}: {pin.reason}")
    return "\n".join(lines) + "\n"


def assert_exact(coupling: CouplingGraph, *, at_least: int = 1) -> None:
    """Both oracles on every group; at least so many checks could have failed."""
    checks = list(oracle.check_groups(coupling, tolerance=TOLERANCE))
    wrong = [check for check in checks if not check.exact(TOLERANCE)]
    assert not wrong, wrong
    assert sum(not check.vacuous for check in checks) >= at_least, checks


def checked(module: nn.Module, example: Tensor) -> str:
    """The groups of a module as text, after both oracles passed on each."""
    coupling = coupled(module, example)
    if coupling.groups:
        assert_exact(coupling)
    return describe(coupling)


def kinds(coupling: CouplingGraph) -> dict[str, int]:
    found: dict[str, Any] = {}
    for group in coupling.groups:
        found[group.kind] = found.get(group.kind, 0) + 1
    return found

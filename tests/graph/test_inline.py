"""What export sets apart in a graph comes back in line."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.passes.oracles.oracle import check_groups


class Modes(nn.Module):
    """Regions within regions, and one without a result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            up = self.up(x).relu()
            with torch.no_grad():
                twice = up * 2
                with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                    twice = twice + 1
            twice = twice + up
        with torch.enable_grad():
            return self.down(up + twice)


class Mapped(nn.Module):
    """A mask from a function of two positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        def near(query: Tensor, key: Tensor) -> Tensor:
            return (query - key).abs() < 2

        positions = torch.arange(x.shape[1])
        rows = torch.vmap(near, in_dims=(None, 0))
        mask = torch.vmap(rows, in_dims=(0, None))(positions, positions)
        return self.down(mask.to(x.dtype) @ self.up(x).relu())


def assert_exact(model: nn.Module, x: Tensor) -> None:
    program = trace(model.double(), x)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert all(isinstance(target, torch._ops.OpOverload) for target in targets), targets
    assert torch.equal(program.run(None, **program.example), model(x))
    coupling = couple(program)
    assert [group.size for group in coupling.groups] == [6]
    assert all(check.exact(1e-9) for check in check_groups(coupling))


def test_regions_of_another_gradient_mode() -> None:
    assert_exact(Modes(), torch.ones(2, 4, dtype=torch.float64))


def test_a_function_mapped_over_positions() -> None:
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_exact(Mapped(), x)

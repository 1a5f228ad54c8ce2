"""A model with an operator of its own: one line tells prunec how its axes go together.

Without the rule the hidden channels are pinned, and `prunec analyze --why` says by which operator.
"""

from __future__ import annotations

import python_text
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

import prunec
from prunec.graph.rules import RULES
from prunec.passes.oracles.oracle import check_groups

CONTEXT = 12


def _gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return silu(x @ gate.T) * (x @ up.T)


@torch.library.custom_op("examples::gated_linear", mutates_args=())
def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """A kernel that the graph shows as one call, as a fused one would."""
    return _gated(x, gate, up)


@gated_linear.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], up.shape[0])


class Block(nn.Module):
    """Gated feed-forward around a residual."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.randn(hidden, width) * width**-0.5)
        self.up = nn.Parameter(torch.randn(hidden, width) * width**-0.5)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        product = _gated if self.training else gated_linear  # the kernel has no gradient
        return x + self.down(product(self.norm(x), self.gate, self.up))


class NextByte(nn.Module):
    """The next byte from the last ones: embeddings side by side, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 8)
        self.blocks = nn.ModuleList([Block(8 * CONTEXT, 96) for _ in range(2)])
        self.head = nn.Linear(8 * CONTEXT, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model: nn.Module, text: Tensor) -> Tensor:
    return cross_entropy(model(text[:, :-1]), text[:, -1])


def main() -> dict[str, float]:
    torch.manual_seed(0)
    model = NextByte()
    python_text.train(model, loss, steps=250, length=CONTEXT + 1)
    calibration = [{"tokens": python_text.windows(64, CONTEXT, seed=s)} for s in range(8)]

    coupling = prunec.couple(prunec.trace(model, calibration[0]))
    reason = next(pin.reason for pin in coupling.pinned if "no dim rule" in pin.reason)
    print(f"groups without a rule: {len(coupling.groups)} ({reason})")
    RULES.spec("examples::gated_linear", "... i, o i, o i -> ... o")
    coupling = prunec.couple(prunec.trace(model, calibration[0]))
    assert all(check.exact(1e-4) for check in check_groups(coupling, tolerance=1e-4))
    print("groups with it:", ", ".join(f"{g.name} ({g.size})" for g in coupling.groups))

    result = prunec.prune(model, recipe="slimgpt", ratio=0.3, calibration=calibration)
    before = python_text.bits_per_byte(model, loss, length=CONTEXT + 1)
    after = python_text.bits_per_byte(result.model, loss, length=CONTEXT + 1)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, result.model)]
    print(f"parameters {sizes[0]:,} -> {sizes[1]:,}; bits per byte {before:.3f} -> {after:.3f}")
    return {"before": before, "after": after, "parameters": sizes[1] / sizes[0]}


if __name__ == "__main__":
    main()

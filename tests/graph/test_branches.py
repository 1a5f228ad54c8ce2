"""Residual branches: what is found, and that dropping equals multiplying by zero."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from programs import coupled, inputs, net
from torch import nn

from prunec.errors import PlanError, VerifyError
from prunec.graph.branches import Branch, blocks
from prunec.graph.cost import flops, parameter_count
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.dropping import drop_branches, silence
from prunec.graph.trace import trace
from prunec.passes import depth
from prunec.passes.oracles.mask import relative_difference
from prunec.passes.oracles.oracle import redraw

WIDE = {"w": (6, 6), "v": (6, 6)}
SMALL = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def names(coupling: CouplingGraph) -> list[str]:
    return [branch.name for branch in coupling.branches]


def exact(coupling: CouplingGraph, branch: Branch) -> bool:
    """Dropped equals silenced on redrawn weights, and the branch matters."""
    program = redraw(coupling.program)
    result = drop_branches(program, [branch]).run(None, **program.example)
    silenced = silence(program, [branch]).run(None, **program.example)
    assert relative_difference(result, program.run(None, **program.example)) > 1e-3
    return relative_difference(result, silenced) < 1e-9


@pytest.mark.parametrize(
    "forward",
    [
        lambda p, x: x + (x @ p.w).relu() @ p.v,
        lambda p, x: (x @ p.w).relu() @ p.v + x,
        lambda p, x: 0.5 * x + 2 * ((x @ p.w).relu() @ p.v),
        lambda p, x: x.float() + ((x @ p.w).relu() @ p.v).float(),
        lambda p, x: torch.dropout((x @ p.w).relu() @ p.v, 0.1, train=False) + x,
    ],
)
def test_a_branch_is_found_however_the_sum_is_written(forward: object) -> None:
    coupling = coupled(net(forward, **WIDE), inputs(3, 6))  # type: ignore[arg-type]
    (branch,) = coupling.branches
    assert branch.kind == "mlp"
    assert branch.parameters == ("w", "v")
    assert exact(coupling, branch)


def coupling_of_two() -> CouplingGraph:
    def forward(p, x):  # type: ignore[no-untyped-def]
        x = x + (x @ p.w).relu()
        return x + (x @ p.v).relu()

    return coupled(net(forward, **WIDE), inputs(3, 6))


def test_costs_fall_by_what_a_branch_holds() -> None:
    coupling = coupling_of_two()
    less = depth.drop(coupling, ["mlp"])
    assert names(coupling) == ["mlp", "mlp#2"]
    assert (parameter_count(coupling), parameter_count(less)) == (72, 36)
    assert (flops(coupling), flops(less)) == (2 * 216, 216)


@pytest.mark.parametrize(
    "forward",
    [
        lambda p, x: x + x**3,  # no weight between
        lambda p, x: x @ p.w + x @ p.v,  # neither is computed from the other
        lambda p, x: x.sum(-1, keepdim=True) + (x.sum(-1, keepdim=True) @ p.w[:1]) @ p.v,  # wider
    ],
)
def test_what_is_no_residual_branch_is_not_taken_for_one(forward: object) -> None:
    assert not coupled(net(forward, **WIDE), inputs(3, 6)).branches  # type: ignore[arg-type]


def test_a_term_that_is_read_elsewhere_is_no_branch() -> None:
    def forward(p, x):  # type: ignore[no-untyped-def]
        f = (x @ p.w).relu()
        return (x + f) * f

    assert not coupled(net(forward, **WIDE), inputs(3, 6)).branches


def test_parallel_branches_in_one_sum_are_two() -> None:
    def forward(p, x):  # type: ignore[no-untyped-def]
        return (x @ p.w).relu() + (x @ p.v).tanh() + x

    coupling = coupled(net(forward, **WIDE), inputs(3, 6))
    assert [branch.parameters for branch in coupling.branches] == [("w",), ("v",)]
    assert all(exact(coupling, branch) for branch in coupling.branches)


class Residual(nn.Module):
    """Convolutions around a stream, one of them with a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
            for _ in range(2)
        )
        self.shortcut = nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(4, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.shortcut(x) + self.last(x)


def test_a_plain_convolutional_module() -> None:
    coupling = coupled(Residual().eval(), inputs(2, 4, 5, 5))
    assert names(coupling) == ["blocks.0/convolution", "blocks.1/convolution"]
    assert all(exact(coupling, branch) for branch in coupling.branches)
    assert coupling.branches[0].modules == ("blocks.0",)


MODELS = {
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**SMALL)), ["attention", "mlp"]),
    "post norms": (
        lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SMALL, num_key_value_heads=3, head_dim=8)),
        ["attention", "mlp"],
    ),
    "parallel": (lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SMALL)), ["attention", "mlp"]),
    "experts": (
        lambda: T.MixtralForCausalLM(
            T.MixtralConfig(**SMALL, num_key_value_heads=3, num_local_experts=3)
        ),
        ["attention", "experts"],
    ),
    "cast residual": (
        lambda: T.MambaForCausalLM(
            T.MambaConfig(vocab_size=31, hidden_size=24, num_hidden_layers=2, state_size=5)
        ),
        ["mixer"],
    ),
    "encoder": (lambda: T.BertForMaskedLM(T.BertConfig(**SMALL)), ["attention", "mlp"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_branches_of_transformers(name: str) -> None:
    build, kinds = MODELS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    coupling = couple(trace(model, {"input_ids": torch.randint(3, 31, (2, 7))}))
    assert [branch.kind for branch in coupling.branches] == kinds * 2
    assert all(exact(coupling, branch) for branch in coupling.branches)
    found = blocks(coupling.branches)
    assert [len(inside) for inside in found.values()] == [len(kinds)] * 2
    for block, inside in found.items():
        held = {name for name in coupling.program.parameters if name.startswith(f"{block}.")}
        taken = {name for branch in inside for name in branch.parameters}
        assert taken <= held
        # all but norms behind a sum (post-norm encoders), or shared by parallel branches
        assert all("norm" in name.lower() for name in held - taken)


def test_a_module_that_runs_several_times_has_numbered_branches() -> None:
    config = T.AlbertConfig(**{**SMALL, "embedding_size": 10})
    model = T.AlbertForMaskedLM(config).double().eval()
    coupling = couple(trace(model, {"input_ids": torch.randint(3, 31, (2, 7))}))
    assert len(coupling.branches) == 4
    assert coupling.branches[2].name == f"{coupling.branches[0].name}#2"
    assert not coupling.branches[0].parameters  # its weights are needed by the other run
    assert all(exact(coupling, branch) for branch in coupling.branches)


def test_writes_into_a_buffer_belong_to_the_branch_that_reads_it() -> None:
    def forward(p, x):  # type: ignore[no-untyped-def]
        buffer = x.new_empty(x.shape)
        buffer[:, :3] = (x @ p.w)[:, :3]
        buffer[:, 3:] = (x @ p.v)[:, 3:]
        return x + buffer @ p.w

    coupling = coupled(net(forward, **WIDE), inputs(3, 6))
    (branch,) = coupling.branches
    assert set(branch.parameters) == {"w", "v"}
    assert exact(coupling, branch)


def test_a_wrong_region_is_caught() -> None:
    """Negative control: the exit of one branch taken for that of another."""
    coupling = coupling_of_two()
    first, second = coupling.branches
    program = redraw(coupling.program)
    dropped = drop_branches(program, [first]).run(None, **program.example)
    other = silence(program, [second]).run(None, **program.example)
    assert relative_difference(dropped, other) > 1e-3


def test_verification_refuses_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    coupling = coupling_of_two()
    assert depth.verify_dropped(coupling, ["mlp"]) < 1e-12
    monkeypatch.setattr(depth, "silence", lambda program, branches: program)
    with pytest.raises(VerifyError, match="differs from the masked one"):
        depth.verify_dropped(coupling, ["mlp"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["mpl"], "no branch 'mpl'"),
        (["mlp", "mlp"], "drops a branch twice"),
        (["mlp", "mlp#2"], "every branch would go"),
    ],
)
def test_branches_that_cannot_be_dropped(wanted: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        depth.drop(coupling_of_two(), wanted)

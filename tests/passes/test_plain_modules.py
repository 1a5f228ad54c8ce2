"""Plain PyTorch modules: they come back as themselves, with smaller tensors, or as a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import prunec
from prunec.api import Result, apply_plan
from prunec.errors import PlanError
from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.passes.plan import GroupKeep, Plan


def conv(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """A stem, two residual blocks, a head: ResNet's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.blocks = nn.ModuleList([nn.Sequential(conv(12, 10), conv(10, 12)) for _ in range(2)])
        self.head = nn.Linear(12, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Expansion, a convolution of each channel, projection: MobileNet's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.each, self.project = conv(3, 14), conv(14, 14, groups=14), conv(14, 6)

    def forward(self, image: Tensor) -> Tensor:
        return self.project(self.each(self.expand(image)))


class Dense(nn.Module):
    """Every layer reads all before it: DenseNet's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 8), conv(11, 6), conv(17, 7)])
        self.head = nn.Linear(24, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x.mean((2, 3)))


class UpAndDown(nn.Module):
    """A transposed convolution after a plain one, with group normalisation between."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 12, 3, 2, 1)
        self.norm = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 9, 4, 2, 1)
        self.out = nn.Conv2d(9, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.out(self.up(self.norm(self.down(image)).relu()).relu())


class Rigid(nn.Module):
    """Its forward names a size that is nowhere an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).reshape(-1, 12))


@torch.no_grad()
def redrawn(model: nn.Module) -> nn.Module:
    """Weights and statistics that leave no unit like another."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1 + noise)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def pruned(model: nn.Module, example: Tensor, kinds: Sequence[str]) -> tuple[Result, Plan]:
    groups = couple(trace(model, example)).groups
    wanted = [group for group in groups if group.kind in kinds]
    plan = Plan(
        {
            g.name: GroupKeep(g.size, {(): tuple(range(i % 2, g.size, 2))})
            for i, g in enumerate(wanted)
        }
    )
    return apply_plan(model, plan, example=example), plan


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CHANNELS = ("conv_channel", "hidden")


@pytest.mark.parametrize("build", [Residual, Depthwise, Dense, UpAndDown])
def test_a_convolutional_module_comes_back_as_itself(build: type[nn.Module]) -> None:
    model = redrawn(build())
    dense = model(IMAGE)
    result, plan = pruned(model, IMAGE, CHANNELS)
    assert plan.groups
    assert type(result.model) is build
    sizes = [parameter.numel() for parameter in result.model.parameters()]
    assert sum(sizes) < 0.75 * sum(parameter.numel() for parameter in model.parameters())
    small = result.model(IMAGE)
    torch.testing.assert_close(small, result.program.run(None, image=IMAGE))
    assert not torch.allclose(small, dense, rtol=1e-2)
    for batch in (1, 5):  # unlike the graph, the module takes other batches
        assert result.model(torch.randn(batch, 3, 8, 8)).shape[0] == batch


def test_its_numbers_say_the_new_sizes() -> None:
    result, _ = pruned(redrawn(Depthwise()), IMAGE, CHANNELS)
    each, norm = result.model.get_submodule("each.0"), result.model.get_submodule("each.1")
    assert (each.groups, each.in_channels, each.out_channels) == (7, 7, 7)
    assert norm.num_features == 7
    assert norm.running_mean.shape == (7,)


def test_a_module_with_a_literal_size_comes_back_as_a_graph() -> None:
    example = torch.randn(4, 6)
    result, _ = pruned(redrawn(Rigid()), example, ("ffn_channel",))
    assert isinstance(result.model, torch.fx.GraphModule)
    assert "delivered as a graph" in result.report.checks[-1]
    torch.testing.assert_close(result.model(example)[0], result.program.run(None, x=example))


class Listed(nn.Module):
    """What repeats is `kind`, beside the layers that could be pruned."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.expand, self.project = nn.Linear(6, 20), nn.Linear(20, 6)
        self.listed = nn.ModuleList([kind() for _ in range(10)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        for module in self.listed:
            x = module(x) if isinstance(module, nn.LayerNorm) else x + module(x.new_zeros(1).long())
        return self.project(x.relu())


def test_a_list_of_norms_is_no_list_of_blocks() -> None:
    model = Listed(lambda: nn.LayerNorm(20))
    data = [{"x": torch.randn(30, 6)}]
    result = prunec.prune(model, ratio=0.3, recipe="magnitude", calibration=data)
    assert result.report.block_parameters[0] == sum(p.numel() for p in model.parameters())
    assert result.report.realised_ratio == pytest.approx(0.3, abs=0.03)


def test_what_goes_with_a_unit_lies_in_every_block() -> None:
    model = Listed(lambda: nn.Embedding(3, 20))
    with pytest.raises(PlanError, match="the blocks that hold what can be pruned hold less"):
        prunec.prune(model, ratio=0.3, recipe="magnitude", calibration=[{"x": torch.randn(30, 6)}])

"""Plain PyTorch modules: they come back as themselves, with smaller tensors, or as a graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import prunec
from prunec.api import Result, apply_plan
from prunec.errors import ModelError, PlanError, TraceError, VerifyError
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
    assert "delivered as a graph, for any batch size" in result.report.checks[-1]
    torch.testing.assert_close(result.model(example), result.program.run(None, x=example))


class Attended(nn.Module):
    """Attention beside a perceptron, whose layers are items of a list but no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.perceptron = nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.perceptron(x)


class TwoHeaded(nn.Module):
    """Attention whose module cannot have other heads, and results by name."""

    def __init__(self) -> None:
        super().__init__()
        self.attended = Attended()
        self.score, self.place = nn.Linear(24, 3), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.attended(x).mean(1)
        return {"score": self.score(x), "place": self.place(x)}


def test_a_graph_takes_any_batch_size_and_returns_what_the_model_does() -> None:
    """The units that stay of a larger batch give what they give of a smaller one."""
    result, plan = pruned(redrawn(TwoHeaded()), torch.randn(4, 7, 24), ("head", "ffn_channel"))
    assert "attended.attention/head" in plan.groups
    assert isinstance(result.model, torch.fx.GraphModule)
    batch = torch.randn(9, 7, 24)
    whole = result.model(x=batch)
    assert set(whole) == {"score", "place"}
    for size in (1, 2, 5):
        part = result.model(batch[:size])
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, whole[name][:size])


class BatchOfFour(nn.Module):
    """Its forward holds the batch size as a constant of that length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.tensor([float(i) for i in range(len(x))])
        return self.second(self.first(x).reshape(-1, 12)) + ramp[:, None]


def test_a_graph_of_one_batch_size_says_so() -> None:
    example = torch.randn(4, 6)
    result, _ = pruned(redrawn(BatchOfFour()), example, ("ffn_channel",))
    assert "for the batch size of the calibration alone" in result.report.checks[-1]
    torch.testing.assert_close(result.model(example), result.program.run(None, x=example))


@pytest.mark.parametrize("build", [UpAndDown, TwoHeaded])
def test_a_plain_module_is_saved_and_opened_with_torch_alone(
    build: type[nn.Module], tmp_path: Path
) -> None:
    """`save` itself compares it in a process without prunec; here for another batch size."""
    example = IMAGE if build is UpAndDown else torch.randn(2, 7, 24)
    kinds = (*CHANNELS, "head", "ffn_channel") if build is UpAndDown else ("head", "ffn_channel")
    result, _ = pruned(redrawn(build()), example, kinds)
    result.save(tmp_path / "small")
    other = torch.cat([example, example.flip(0), example[:1]])
    program = torch.export.load(tmp_path / "small" / "model.pt2").module()
    name = next(iter(result.program.example))
    torch.testing.assert_close(program(**{name: other}), result.model(other))
    record = json.loads((tmp_path / "small" / "prunec.json").read_text())
    assert record["dynamic"] == ["batch"]
    assert "in a fresh process" in record["checks"][-1]


def test_a_dense_module_takes_on_a_saved_one(tmp_path: Path) -> None:
    result, _ = pruned(redrawn(UpAndDown()), IMAGE, CHANNELS)
    result.save(tmp_path / "small")
    opened = prunec.load(tmp_path / "small", into=UpAndDown())
    torch.testing.assert_close(opened(IMAGE), result.model(IMAGE), rtol=0, atol=0)
    assert opened.norm.num_features == result.model.get_submodule("norm").num_features
    wider = UpAndDown()
    wider.out = nn.Conv2d(9, 5, 1)
    for wrong in (Residual(), opened):
        with pytest.raises(ModelError, match="is not the dense UpAndDown that was pruned"):
            prunec.load(tmp_path / "small", into=wrong)
    with pytest.raises(ModelError, match="is not the dense UpAndDown"):
        prunec.load(tmp_path / "small", into=wider)
    with pytest.raises(ModelError, match="a plain PyTorch module"):
        prunec.load(tmp_path / "small")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_plain_module_of_another_type_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    result, _ = pruned(redrawn(UpAndDown()).to(dtype), IMAGE.to(dtype), CHANNELS)
    result.save(tmp_path / "small")
    opened = prunec.load(tmp_path / "small", into=UpAndDown().to(dtype))
    image = IMAGE.to(dtype)
    torch.testing.assert_close(opened(image), result.model(image), rtol=0, atol=0)


def test_tied_weights_of_a_plain_module_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.embed = nn.Linear(8, 20), nn.Embedding(11, 8)
            self.back, self.head = nn.Linear(20, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.back(self.inner(self.embed(ids)).relu()))

    result, _ = pruned(redrawn(Tied()), torch.arange(10).view(2, 5), ("ffn_channel",))
    result.save(tmp_path / "small")
    opened = prunec.load(tmp_path / "small", into=Tied())
    assert opened.head.weight is opened.embed.weight
    torch.testing.assert_close(opened(torch.arange(6)[None]), result.model(torch.arange(6)[None]))


def test_parts_keep_the_modes_that_they_were_in() -> None:
    model = redrawn(UpAndDown()).train()
    model.norm.eval()
    prunec.trace(model, IMAGE)
    assert model.training
    assert not model.norm.training


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


def test_what_goes_with_a_unit_may_lie_in_every_item_of_a_list() -> None:
    model = Listed(lambda: nn.Embedding(3, 20))
    data = [{"x": torch.randn(30, 6)}]
    result = prunec.prune(model, ratio=0.3, recipe="magnitude", calibration=data)
    assert result.report.block_parameters[0] == sum(p.numel() for p in model.parameters())
    assert result.report.realised_ratio == pytest.approx(0.3, abs=0.03)


def test_the_layers_of_a_perceptron_are_no_blocks() -> None:
    data = [{"x": torch.randn(5, 7, 24)}]
    result = prunec.prune(Attended(), ratio=0.6, recipe="magnitude", calibration=data)
    assert {group.rpartition("/")[2] for group in result.plan.groups} == {"head", "ffn_channel"}
    assert result.report.realised_ratio == pytest.approx(0.6, abs=0.02)


def test_wrappers_of_torch_are_taken_off() -> None:
    data = [{"image": IMAGE}]
    plain = prunec.prune(redrawn(Residual()), recipe="magnitude", calibration=data)
    for wrapped in (
        torch.compile(redrawn(Residual()), backend="eager"),
        nn.DataParallel(redrawn(Residual())),
    ):
        result = prunec.prune(wrapped, recipe="magnitude", calibration=data)
        assert type(result.model) is Residual
        torch.testing.assert_close(result.model(IMAGE), plain.model(IMAGE))


class Noisy(nn.Module):
    """What it adds differs from call to call, as in a variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        return y + torch.randn_like(y)


def test_a_random_forward_is_told_so() -> None:
    with pytest.raises(VerifyError, match="other numbers each time") as caught:
        prunec.prune(Noisy(), recipe="magnitude", calibration=[{"x": torch.randn(4, 6)}])
    assert "aten.randn_like.default, (test_plain_modules.py:" in str(caught.value)


class Undecided(nn.Module):
    """Its branch hangs on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 0 else x


def test_a_forward_that_cannot_be_traced_gives_one_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(TraceError, match="Undecided cannot be traced"):
        prunec.trace(Undecided(), torch.randn(4, 6))
    assert capfd.readouterr() == ("", "")


def test_what_is_no_module_and_no_tensor_is_named() -> None:
    with pytest.raises(TraceError, match="the model is a str"):
        prunec.prune("smollm2")  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="no tensors: dict"):
        prunec.trace(Undecided(), {"x": {"nested": torch.randn(4, 6)}})  # type: ignore[dict-item]


def test_a_model_that_lies_on_disk_is_told_how_to_be_opened(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    rest = dict.fromkeys(("model.embed_tokens", "lm_head", "model.rotary_emb"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, **rest}, offload_folder=tmp_path / "off"
    )
    with pytest.raises(TraceError, match="lie on disk"):
        prunec.prune(model, ratio=0.3, calibration=[{"input_ids": torch.ones(2, 9).long()}])


def test_a_module_without_parameters_and_units_without_readers() -> None:
    with pytest.raises(PlanError, match="nothing can be pruned in this model"):
        prunec.prune(nn.ReLU(), calibration=[{"input": torch.randn(4, 6)}])
    with pytest.raises(PlanError, match="its groups are of other kinds: ffn_channel"):
        prunec.prune(Rigid(), settings={"units": "head"}, calibration=[{"x": torch.randn(4, 6)}])

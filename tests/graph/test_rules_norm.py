"""Rules of norms and reductions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from programs import checked, coupled, inputs, net
from torch import Tensor, nn

from prunec.graph.coupling import couple
from prunec.passes.oracles import oracle

X = inputs(2, 5, 6)
IMAGE = inputs(2, 3, 8, 8)


def test_layer_norm() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(F.linear(x, p.up), (10,), p.w, p.b), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), w=(10,), b=(10,), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] w[0] b[0] down[1]; normalised
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_rms_norm_written_out() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * p.w
        return F.linear(y, p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), w=(10,), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] w[0] down[1]; normalised
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_group_norm_keeps_whole_groups_or_equal_parts_of_them() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(x, p.stem)
        return F.conv2d(F.group_norm(y, 3, p.w, p.b).relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(12, 3, 3, 3), w=(12,), b=(12,), head=(2, 12, 1, 1)), IMAGE),
        """\
conv_channel 3: stem[0] w[0] b[0] head[1]
conv_channel#2 4: stem[0] w[0] b[0] head[1]; companions conv_channel; normalised
pinned stem[1] 3: an axis of the input
pinned stem[2] 3: a kernel position
pinned stem[3] 3: a kernel position
pinned head[0] 2: an axis of the output
""",
    )


def test_batch_norm() -> None:
    module = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 2, 1))
    module[1].running_mean = torch.randn(10, generator=torch.Generator().manual_seed(2))
    assert_expected_inline(
        checked(module.double(), IMAGE),
        """\
conv_channel 10: 0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0] 3.weight[1] 1.running_mean[0]
    1.running_var[0]
pinned 0.weight[1] 3: an axis of the input
pinned 0.weight[2] 3: a kernel position
pinned 0.weight[3] 3: a kernel position
pinned 3.weight[0] 2: an axis of the output
pinned 3.bias[0] 2: an axis of the output
""",
    )


def test_weights_standardised_by_a_batch_norm() -> None:
    """Over all of a kernel, its input channels included: fewer of them have other statistics."""

    def standard(weight: Tensor) -> Tensor:
        flat = weight.reshape(1, weight.shape[0], -1)
        return F.batch_norm(flat, None, None, training=True).reshape_as(weight)

    def forward(p: object, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, standard(p.stem)).relu(), standard(p.head))

    assert_expected_inline(
        checked(net(forward, stem=(12, 3, 3, 3), head=(4, 12, 1, 1)), IMAGE),
        """\
conv_channel 12: stem[0] head[1]; normalised
pinned stem[1] 3: an axis of the input
pinned stem[2] 3: a kernel position
pinned stem[3] 3: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_softmax_and_variance_over_units() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        return F.linear(y.softmax(-1) / y.std(-1, keepdim=True), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] down[1]; minimum 2; normalised
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_an_unbiased_spread_needs_two_units() -> None:
    """Found by the random programs: of one channel a group the deviation was 0 / 0."""

    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        y = (y * y.std(-1, keepdim=True)).transpose(1, 2)
        return F.linear(F.conv1d(y, p.mix, groups=2).transpose(1, 2), p.down)

    module = net(forward, up=(6, 6), mix=(4, 3, 1), down=(3, 4))
    assert_expected_inline(
        checked(module, X),
        """\
conv_channel 2: mix[0] down[1]
pinned up[0] 2: at least 2 positions must stay
pinned up[0] 3: at least 2 positions must stay
pinned up[1] 6: an axis of the input
pinned mix[0] 2: at least 2 positions must stay
pinned mix[1] 3: at least 2 positions must stay
pinned down[0] 3: an axis of the output
pinned down[1] 2: at least 2 positions must stay
""",
    )


def test_weight_norm() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 10))
    assert_expected_inline(
        checked(nn.Sequential(layer, nn.Tanh(), nn.Linear(10, 4)).double(), X),
        """\
ffn_channel 10: 0.bias[0] 0.parametrizations.weight.original0[0]
    0.parametrizations.weight.original1[0] 2.weight[1]; normalised
pinned 0.parametrizations.weight.original1[1] 6: an axis of the input
pinned 2.weight[0] 4: an axis of the output
pinned 2.bias[0] 4: an axis of the output
""",
    )


def test_maximum_over_units() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up)
        return F.linear(y - y.amax(-1, keepdim=True), p.down)

    assert_expected_inline(
        checked(net(forward, up=(10, 6), down=(4, 10)), X),
        """\
ffn_channel 10: up[0] down[1]; normalised
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


@pytest.mark.parametrize("compare", [F.cosine_similarity, F.pairwise_distance, torch.cdist])
def test_what_is_compared_is_pruned_in_both(compare: Callable[..., Tensor]) -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return compare(F.linear(x, p.left).relu(), F.linear(x.flip(0), p.right).relu())

    assert_expected_inline(
        checked(net(forward, left=(10, 6), right=(10, 6)), inputs(5, 6)),
        """\
ffn_channel 10: left[0] right[0]
pinned left[1] 6: an axis of the input
pinned right[1] 6: an axis of the input
""",
    )


@pytest.mark.parametrize("left", [1, 2])
def test_a_constant_in_front_of_a_norm_of_one_channel_is_no_control(left: int) -> None:
    """Of 2 * `left` channels in a group half stay; the mean of one is that channel itself."""
    channels = 2 * 2 * left
    layers = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.GroupNorm(2, channels), nn.ReLU(), nn.Conv2d(channels, 2, 1)
    )
    program = oracle.redraw(coupled(layers, IMAGE).program)
    controls = list(oracle.wrong_slices(couple(program)))
    inert = [control.parameter for control in controls if control.inert]
    assert inert == (["0.bias"] if left == 1 else [])
    assert len(controls) == 2 * 5  # whole groups, and channels within each
    assert all(control.caught(1e-9) for control in controls if not control.inert)

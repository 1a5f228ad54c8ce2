"""Rules of convolutions and what goes with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from programs import checked, inputs, net
from torch import Tensor

X = inputs(2, 5, 6)
IMAGE = inputs(2, 3, 8, 8)


def test_convolution_pooled_and_flattened() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.conv2d(x, p.stem, p.bias, padding=1).relu(), 2)
        return F.linear(F.adaptive_avg_pool2d(y, 2).flatten(1), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(10, 3, 3, 3), bias=(10,), head=(4, 40)), IMAGE),
        """\
conv_channel 10: stem[0] bias[0] head[1]
pinned stem[1] 3: an axis of the input
pinned stem[2] 3: a kernel position
pinned stem[3] 3: a kernel position
pinned head[0] 4: an axis of the output
pinned head[1] 2: a position
pinned head[1] 2: a position
""",
    )


def test_depthwise_convolution() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(F.conv2d(x, p.stem), p.depth, groups=10)
        return F.conv2d(y.relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(10, 3, 1, 1), depth=(10, 1, 3, 3), head=(4, 10, 1, 1)), IMAGE),
        """\
conv_channel 10: stem[0] depth[0] head[1]
pinned stem[1] 3: an axis of the input
pinned depth[2] 3: a kernel position
pinned depth[3] 3: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_depthwise_convolution_with_a_multiplier() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(F.conv2d(x, p.stem), p.depth, groups=5)
        return F.conv2d(y.relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(5, 3, 1, 1), depth=(10, 1, 3, 3), head=(4, 10, 1, 1)), IMAGE),
        """\
conv_channel 5: stem[0] depth[0] head[1]
conv_channel#2 2: depth[0] head[1]; companions conv_channel
pinned stem[1] 3: an axis of the input
pinned depth[2] 3: a kernel position
pinned depth[3] 3: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_grouped_convolution() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(F.conv2d(x, p.stem), p.middle, groups=3)
        return F.conv2d(y.relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(12, 3, 1, 1), middle=(15, 4, 3, 3), head=(4, 15, 1, 1)), IMAGE),
        """\
conv_channel 3: stem[0] middle[0] head[1]
conv_channel#2 4: stem[0] middle[1]
conv_channel#3 5: middle[0] head[1]; companions conv_channel
pinned stem[1] 3: an axis of the input
pinned middle[2] 3: a kernel position
pinned middle[3] 3: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_transposed_convolution() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(F.conv2d(x, p.stem).relu(), p.up, p.bias, stride=2)
        return F.conv2d(y.relu(), p.head)

    assert_expected_inline(
        checked(
            net(forward, stem=(10, 3, 1, 1), up=(10, 7, 2, 2), bias=(7,), head=(4, 7, 1, 1)), IMAGE
        ),
        """\
conv_channel 10: stem[0] up[0]
conv_channel#2 7: up[1] bias[0] head[1]
pinned stem[1] 3: an axis of the input
pinned up[2] 2: a kernel position
pinned up[3] 2: a kernel position
pinned head[0] 4: an axis of the output
""",
    )


def test_concatenated_branches_and_a_gate() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        a = F.conv2d(x, p.a)
        y = torch.cat([a.relu(), F.conv2d(a, p.b)], 1)
        gate = F.conv2d(F.conv2d(y.mean((2, 3), keepdim=True), p.squeeze).relu(), p.excite)
        return F.conv2d(y * gate.sigmoid(), p.head)

    module = net(
        forward,
        a=(4, 3, 1, 1),
        b=(5, 4, 1, 1),
        squeeze=(3, 9, 1, 1),
        excite=(9, 3, 1, 1),
        head=(2, 9, 1, 1),
    )
    assert_expected_inline(
        checked(module, IMAGE),
        """\
conv_channel 4: a[0] b[1] squeeze[1] excite[0] head[1]
conv_channel#2 5: b[0] squeeze[1] excite[0] head[1]
conv_channel#3 3: squeeze[0] excite[1]
pinned a[1] 3: an axis of the input
pinned head[0] 2: an axis of the output
""",
    )


def test_shuffled_channels() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.conv2d(x, p.stem)
        y = y.view(2, 2, 5, 8, 8).transpose(1, 2).reshape(2, 10, 8, 8)
        return F.conv2d(y, p.head)

    assert_expected_inline(
        checked(net(forward, stem=(10, 3, 1, 1), head=(4, 10, 1, 1)), IMAGE),
        """\
conv_channel 2: stem[0] head[1]
conv_channel#2 5: stem[0] head[1]
pinned stem[1] 3: an axis of the input
pinned head[0] 4: an axis of the output
""",
    )


def test_resampled_and_padded_images() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.interpolate(F.pad(F.conv2d(x, p.stem), (1, 1, 1, 1)), scale_factor=2.0)
        return F.conv2d(F.pixel_shuffle(y, 1).relu(), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(10, 3, 1, 1), head=(4, 10, 1, 1)), IMAGE),
        """\
pinned stem[0] 10: mixed with positions
pinned stem[1] 3: an axis of the input
pinned head[0] 4: an axis of the output
pinned head[1] 10: mixed with positions
""",
    )


def test_windows_cut_out_and_put_back() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = F.unfold(F.conv2d(x, p.stem), 2, stride=2).view(2, 10, 4, 16)
        y = F.fold((y * p.gate[:, None, None]).view(2, 40, 16), (8, 8), 2, stride=2)
        return F.conv2d(y, p.head)

    module = net(forward, stem=(10, 3, 1, 1), gate=(10,), head=(4, 10, 1, 1))
    assert_expected_inline(
        checked(module, IMAGE),
        """\
conv_channel 10: stem[0] gate[0] head[1]
pinned stem[1] 3: an axis of the input
pinned head[0] 4: an axis of the output
""",
    )


def test_fourier_transforms_mix_the_axes_that_they_run_over() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        y = torch.fft.rfft(F.linear(x, p.up), dim=1).real
        return torch.fft.fft(F.linear(F.linear(y, p.mix), p.down)).imag

    assert_expected_inline(
        checked(net(forward, up=(10, 6), mix=(7, 10), down=(4, 7)), X),
        """\
ffn_channel 10: up[0] mix[1]
ffn_channel#2 7: mix[0] down[1]
pinned up[1] 6: an axis of the input
pinned down[0] 4: mixed by a Fourier transform
""",
    )


def test_a_recurrent_state_that_is_read_out() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        step, state = F.softplus(F.linear(x, p.dt)), -p.a.exp()
        inner, read, write = (F.linear(x, w) for w in (p.inner, p.read, p.write))
        memory = inner.new_zeros(2, 7, 3)
        outputs = []
        for t in range(5):
            decay = (step[:, t, :, None] * state).exp()
            memory = memory * decay + (step[:, t] * inner[:, t])[..., None] * write[:, t, None]
            outputs.append((memory * read[:, t, None]).sum(-1))
        return F.linear(torch.stack(outputs, 1), p.out)

    module = net(forward, dt=(7, 6), a=(7, 3), inner=(7, 6), read=(3, 6), write=(3, 6), out=(4, 7))
    assert_expected_inline(
        checked(module, X),
        """\
ffn_channel 7: dt[0] a[0] inner[0] out[1]
ffn_channel#2 3: a[1] read[0] write[0]
pinned dt[1] 6: an axis of the input
pinned inner[1] 6: an axis of the input
pinned read[1] 6: an axis of the input
pinned write[1] 6: an axis of the input
pinned out[0] 4: an axis of the output
""",
    )


def test_rows_that_differ_by_a_companion_that_itself_differs() -> None:
    """Widths by query head, query heads by group: three nested choices."""

    def forward(p: object, x: Tensor) -> Tensor:
        y = F.linear(x, p.up).view(2, 5, 3, 4, 5)
        y = y * p.outer[:, None, None] + y * p.middle[:, :, None] * p.inner
        return F.linear(y.reshape(2, 5, 60), p.down)

    module = net(forward, up=(60, 6), outer=(3,), middle=(3, 4), inner=(3, 4, 5), down=(4, 60))
    assert_expected_inline(
        checked(module, X),
        """\
ffn_channel 3: up[0] outer[0] middle[0] inner[0] down[1]
ffn_channel#2 4: up[0] middle[1] inner[1] down[1]
ffn_channel#3 5: up[0] inner[2] down[1]
pinned up[1] 6: an axis of the input
pinned down[0] 4: an axis of the output
""",
    )


def test_a_slope_for_each_channel() -> None:
    def forward(p: object, x: Tensor) -> Tensor:
        return F.conv2d(F.prelu(F.conv2d(x, p.stem), p.slope), p.head)

    assert_expected_inline(
        checked(net(forward, stem=(10, 3, 3, 3), slope=(10,), head=(4, 10, 1, 1)), IMAGE),
        """\
conv_channel 10: stem[0] slope[0] head[1]
pinned stem[1] 3: an axis of the input
pinned stem[2] 3: a kernel position
pinned stem[3] 3: a kernel position
pinned head[0] 4: an axis of the output
""",
    )

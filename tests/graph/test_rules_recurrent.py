"""Rules of recurrent layers and cells."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from programs import assert_exact, checked, coupled, inputs
from torch import Tensor, nn

import prunec

SEQUENCE = inputs(3, 5, 6)


class Read(nn.Module):
    """A recurrent layer whose last step a linear layer reads."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = layer, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def test_an_lstm_of_two_layers() -> None:
    model = Read(nn.LSTM(6, 8, num_layers=2, batch_first=True), 8)
    assert_expected_inline(
        checked(model, SEQUENCE),
        """\
ffn_channel 8: layer.weight_ih_l0[0] layer.weight_hh_l0[0] layer.weight_hh_l0[1]
    layer.bias_ih_l0[0] layer.bias_hh_l0[0] layer.weight_ih_l1[0] layer.weight_ih_l1[1]
    layer.weight_hh_l1[0] layer.weight_hh_l1[1] layer.bias_ih_l1[0] layer.bias_hh_l1[0]
    head.weight[1]
pinned layer.weight_ih_l0[0] 4: a gate
pinned layer.weight_ih_l0[1] 6: an axis of the input
pinned layer.weight_hh_l0[0] 4: a gate
pinned layer.bias_ih_l0[0] 4: a gate
pinned layer.bias_hh_l0[0] 4: a gate
pinned layer.weight_ih_l1[0] 4: a gate
pinned layer.weight_hh_l1[0] 4: a gate
pinned layer.bias_ih_l1[0] 4: a gate
pinned layer.bias_hh_l1[0] 4: a gate
pinned head.weight[0] 4: an axis of the output
pinned head.bias[0] 4: an axis of the output
""",
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_units_of_a_recurrence_go_from_every_layer(
    kind: type[nn.RNNBase], bias: bool, bidirectional: bool
) -> None:
    options = {"num_layers": 2, "bidirectional": bidirectional, "bias": bias}
    layer = kind(6, 8, batch_first=True, **options)
    coupling = coupled(Read(layer, 16 if bidirectional else 8), SEQUENCE)
    (group,) = coupling.groups
    assert group.size == 8
    assert {m.parameter for m in group.members} >= {
        n for n, _ in coupling.program.state.items()
    } - {"head.bias"}
    assert_exact(coupling)


class Steps(nn.Module):
    """A cell called in a loop."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = cell, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_units_of_a_cell(kind: type[nn.RNNCellBase]) -> None:
    coupling = coupled(Steps(kind(6, 8)), SEQUENCE)
    (group,) = coupling.groups
    assert group.size == 8
    assert_exact(coupling)


def test_a_recurrence_with_projections_is_pinned() -> None:
    coupling = coupled(Read(nn.LSTM(6, 8, proj_size=5, batch_first=True), 5), SEQUENCE)
    assert not coupling.groups
    assert any("with projections" in pin.reason for pin in coupling.pinned)


@pytest.mark.parametrize("recipe", ["magnitude", "slimgpt", "flap"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_classifier_comes_back_as_itself(kind: type[nn.RNNBase], recipe: str) -> None:
    model = Read(kind(6, 8, num_layers=2, batch_first=True, bidirectional=True), 16)
    data = [{"x": torch.randn(12, 5, 6)} for _ in range(2)]
    result = prunec.prune(model, recipe=recipe, ratio=0.4, calibration=data)
    assert type(result.model) is Read
    small = result.model.layer
    assert isinstance(small, kind)
    assert small.hidden_size < 8
    x = torch.randn(2, 9, 6)  # another length than that of the calibration
    torch.testing.assert_close(result.model(x), result.model(x.repeat(2, 1, 1))[:2])

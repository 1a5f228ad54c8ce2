"""Layers under torch's weight_norm come back as themselves: both their tensors are cut."""

from __future__ import annotations

from pathlib import Path

import torch
from test_plain_modules import pruned, redrawn
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import prunec


class Normed(nn.Module):
    """Convolutions whose kernels are a length and a direction; zeros have no direction."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = weight_norm(nn.Conv1d(3, 12, 3)), nn.Conv1d(12, 10, 1)
        self.third = weight_norm(nn.Conv1d(10, 4, 1))

    def forward(self, wave: Tensor) -> Tensor:
        return self.third(self.second(self.first(wave).relu()).relu())


WAVE = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))


def test_weight_norm_comes_back_as_its_own_class(tmp_path: Path) -> None:
    result, plan = pruned(redrawn(Normed()), WAVE, ("conv_channel",))
    assert len(plan.groups) == 2
    assert type(result.model) is Normed
    parts = result.model.first.parametrizations.weight
    assert (parts.original0.shape, parts.original1.shape) == ((6, 1, 1), (6, 3, 3))
    assert result.model(torch.randn(5, 3, 20)).shape == (5, 4, 18)
    result.save(tmp_path / "small")
    opened = prunec.load(tmp_path / "small", into=Normed())
    torch.testing.assert_close(opened(WAVE), result.program.run(None, wave=WAVE))

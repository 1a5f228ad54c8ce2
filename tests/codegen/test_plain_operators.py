"""A plain module with an operator of its own: pruned, but not written for torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunec
from prunec.errors import VerifyError
from prunec.graph.rules import RULES


@pytest.fixture(autouse=True)
def _operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = torch.library.Library("prunec_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("prunec_test::twice", torch.empty_like, lib=library)
    monkeypatch.setattr(RULES, "_table", dict(RULES._table))
    RULES.spec("prunec_test::twice", "... a -> ... a")
    yield
    library._destroy()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.ops.prunec_test.twice(self.up(x)).relu())
        return found


def test_the_message_names_the_operator(tmp_path: Path) -> None:
    example = {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(1))}
    result = prunec.prune(Net(), recipe="magnitude", ratio=0.3, calibration=[example])
    assert result.model(**example).shape == (5, 3)
    with pytest.raises(VerifyError, match=r"it does not have prunec_test::twice"):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

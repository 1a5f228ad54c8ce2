"""The code of docs/plain.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plain.md"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image).mean((2, 3))


def test_the_page_of_plain_modules_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, image = Net().eval(), torch.randn(7, 3, 8, 8)
    torch.save(model.state_dict(), "net.pt")
    names = {"model": model, "image": image, "Net": Net, "loader": [torch.randn(4, 3, 8, 8)]}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec("\n".join(["import torch", *blocks]), names)
    dense, example = names["factory"]()
    torch.testing.assert_close(dense(image), model(image))
    assert example.shape[1:] == (3, 224, 224)
    wanted = names["result"].model(image)
    torch.testing.assert_close(names["output"], wanted)
    torch.testing.assert_close(names["model"](image), wanted)
    assert sum(p.numel() for p in names["model"].parameters()) < 0.75 * sum(
        p.numel() for p in dense.parameters()
    )

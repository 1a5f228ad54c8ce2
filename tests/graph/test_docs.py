"""The example in docs/rules.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from prunec.graph.rules import RULES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rules.md"


@pytest.fixture(autouse=True)
def no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that the page registers do not outlive it."""
    monkeypatch.setattr(RULES, "_table", dict(RULES._table))


def test_the_page_runs() -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    running = [block for block in blocks if "docs::scaled_linear" in block]
    namespace: dict[str, object] = {}
    exec(compile(running[0], str(PAGE), "exec"), namespace)
    assert namespace["group"]
    exec(compile(blocks[1], str(PAGE), "exec"), {"RULES": RULES})

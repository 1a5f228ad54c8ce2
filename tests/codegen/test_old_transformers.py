"""A directory written today opens in the newest transformers of the 4 series, or says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from delivered import SMOLLM2
from exporting import written
from safetensors.torch import save_file
from slicing import example_for

import prunec

pytestmark = pytest.mark.slow
OLD = "transformers==4.57.1"
STRANGER = """
import sys, torch, transformers
from safetensors.torch import load_file
sys.modules["prunec"] = None
assert transformers.__version__.startswith("4.57"), transformers.__version__
torch.set_num_threads(1)
want = load_file(sys.argv[2])
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
with torch.no_grad():
    found = model.eval()(input_ids=want["ids"]).logits
gap = (found - want["out"]).abs().max() / want["out"].abs().max()
assert gap < 1e-5, gap
kind = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
tokens = [model.generate(want["ids"], **kind, use_cache=cached) for cached in (True, False)]
assert torch.equal(*tokens)
print("ok")
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that shadows the installed transformers; torch stays."""
    folder = tmp_path_factory.mktemp("old")
    done = subprocess.run(
        [*(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder), OLD],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"{OLD} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def opened_there(directory: Path, old: Path, work: Path) -> subprocess.CompletedProcess[str]:
    """The directory in a process with the old transformers, beside what the new one computes."""
    model = prunec.load(directory)
    ids = example_for(model)["input_ids"]
    with torch.no_grad():
        save_file({"ids": ids, "out": model(ids).logits}, work / "want")
    environment = os.environ | {"PYTHONPATH": str(old), "HF_MODULES_CACHE": str(work / "modules")}
    return subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, str(directory), str(work / "want")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize("name", ["llama_square", "qwen3", "gpt2"])  # two with rope of their own
def test_opens(name: str, tmp_path: Path, old: Path) -> None:
    written(name, tmp_path / name)
    done = opened_there(tmp_path / name, old, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "ok"


@pytest.mark.parametrize("name", ["tiny, skipped", *SMOLLM2])
def test_opens_without_some_parts(
    name: str, delivery: Callable[[str], Path], tmp_path: Path, old: Path
) -> None:
    done = opened_there(delivery(name), old, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "ok"


def test_other_parameter_names_are_said(tmp_path: Path, old: Path) -> None:
    written("gpt_neox", tmp_path / "gpt_neox")
    done = opened_there(tmp_path / "gpt_neox", old, tmp_path)
    assert done.returncode != 0
    assert "ImportError: this model needs transformers 5 or newer" in done.stderr

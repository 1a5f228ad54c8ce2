"""Tiny models of real architectures: every group exact under both oracles, wrong slices caught.

`make zoo` runs all of them, resumable, and writes docs/zoo.md; here is a subset with every family
of operators, and all of them as slow tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo import configs, report
from zoo.check import examine

SUBSET = (
    *("gpt2", "gptj", "gpt_neox", "bloom", "mpt", "falcon", "phi3", "llama", "olmo2"),
    *("mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "jetmoe"),
    *("mamba", "mamba2", "recurrent_gemma", "bert", "bart", "xlnet"),
)

# what torch.export or transformers cannot do with inputs of token ids alone; the first five it can
# with the forwards of examples/plugin_forwards, see tests/test_plugin_forwards.py
UNTRACEABLE = {
    "blt": "entropy patching guards on data",
    "dbrx": "its experts loop guards on data",
    "longcat_flash": "its experts loop guards on data",
    "qwen4_exp": "its indexer guards on data",
    "qwen4_exp_text": "its indexer guards on data",
    "gemma3n": "its vision tower needs Pillow and timm",
    "gemma4_assistant": "reads the key-value states of another model",
    "gemma4_unified_assistant": "reads the key-value states of another model",
}


def assert_exact(model_type: str, controls: int) -> None:
    with torch.random.fork_rng(devices=[]):
        model = configs.build(model_type)
    record = examine(model, configs.inputs_of(model_type, model), controls=controls)
    assert record["status"] == "exact", record["failures"] or record["reason"]
    assert record["groups"] >= 3
    checks = record["checks"]
    assert checks.get("vacuous", 0) <= 0.1 * checks["exact"]
    assert not record["controls"]["missed"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", SUBSET)
def test_every_group_is_exact(model_type: str) -> None:
    assert_exact(model_type, controls=6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(set(configs.all_types()) - set(UNTRACEABLE)))
def test_every_group_of_every_type_is_exact(model_type: str) -> None:
    assert_exact(model_type, controls=24)


def test_tables_are_not_written_of_fewer_types_than_they_tell_of(tmp_path: Path) -> None:
    """As after `python -m zoo bert` where nothing else was examined."""
    cache, results = tmp_path / "cache", tmp_path / "benchmarks" / "results"
    (cache / "deliver").mkdir(parents=True)
    results.mkdir(parents=True)
    (cache / "deliver" / "bert.json").write_text(json.dumps({"type": "bert", "sources": "1"}))
    told = json.dumps({"deliver": [{"type": "bert"}, {"type": "gpt2"}, {"type": "gone"}]})
    (results / "zoo.json").write_text(told)
    with pytest.raises(LookupError, match="1 records of zoo"):
        report.write(cache, tmp_path, {"deliver": "1"})
    assert (results / "zoo.json").read_text() == told
    assert not (tmp_path / "docs").exists()

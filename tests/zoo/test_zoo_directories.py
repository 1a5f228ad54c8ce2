"""Tiny models of real architectures, uneven in every layer, reopened by one fresh process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunec.codegen.gate import reopen
from zoo import configs
from zoo.deliver import deliver

# one of every way in which sub-layers differ from layer to layer in a directory
DELIVERED = (
    *("gpt2", "gptj", "olmo2", "falcon", "llama", "mixtral", "deepseek_v2", "gpt_oss", "jetmoe"),
    *("mamba", "mamba2", "bamba", "falcon_h1", "lfm2", "rwkv", "xlnet", "encoder/bert"),
    "seq2seq/bart",
    *("vision/vit", "vision/resnet", "vision/convnext", "audio/wav2vec2", "image/internvl"),
)


@pytest.mark.filterwarnings("ignore")
def test_every_operator_family_reopens_in_one_process(tmp_path: Path) -> None:
    """Every kind of sub-layer smaller, otherwise in each layer; the same logits to the bit."""
    for name in DELIVERED:
        with torch.random.fork_rng(devices=[]):
            model = configs.build(name)
        record = deliver(model, configs.inputs_of(name, model), tmp_path / name)
        assert record["status"] == "written", (name, record)
        assert not record["refused"], (name, record["refused"])
    found = dict(zip(DELIVERED, reopen([tmp_path / name for name in DELIVERED]), strict=True))
    assert not any(found.values()), {name: what for name, what in found.items() if what}

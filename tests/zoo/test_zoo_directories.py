"""Tiny models of real architectures, uneven in every layer, reopened by one fresh process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from prunec.codegen.gate import reopen
from prunec.graph.coupling import couple
from prunec.graph.trace import trace
from prunec.passes.sites import find_sites
from prunec.passes.targets.constraints import Constraints
from prunec.pipeline.foresight import check_class
from zoo import configs
from zoo.deliver import UNITS, deliver

# one of every way in which sub-layers differ from layer to layer in a directory
DELIVERED = (
    *("gpt2", "gptj", "olmo2", "falcon", "llama", "mixtral", "deepseek_v2", "gpt_oss", "jetmoe"),
    *("mamba", "mamba2", "bamba", "falcon_h1", "lfm2", "rwkv", "xlnet", "encoder/bert"),
    "seq2seq/bart",
    *("vision/vit", "vision/resnet", "vision/convnext", "audio/wav2vec2", "image/internvl"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of sub-layer smaller, otherwise in each layer."""
    folder = tmp_path_factory.mktemp("delivered")
    for name in DELIVERED:
        with torch.random.fork_rng(devices=[]):
            model = configs.build(name)
        record = deliver(model, configs.inputs_of(name, model), folder / name)
        assert record["status"] == "written", (name, record)
        assert not record["refused"], (name, record["refused"])
    return folder


@pytest.mark.filterwarnings("ignore")
def test_every_operator_family_reopens_in_one_process(folder: Path) -> None:
    """The same logits to the bit."""
    found = dict(zip(DELIVERED, reopen([folder / name for name in DELIVERED]), strict=True))
    assert not any(found.values()), {name: what for name, what in found.items() if what}


@pytest.mark.filterwarnings("ignore")
def test_every_class_begins_anew_from_its_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the delivered sizes, and with finite numbers; on meta too."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "code"))
    for name in DELIVERED:
        directory = folder / name / "model"
        config = transformers.AutoConfig.from_pretrained(directory)
        auto = getattr(transformers, max(config.auto_map))  # AutoModel comes before all others
        model = auto.from_config(config, trust_remote_code=True)
        saved = {}
        for file in directory.glob("*.safetensors"):
            with safe_open(file, "pt") as held:
                saved |= {key: held.get_slice(key).get_shape() for key in held.keys()}  # noqa: SIM118
        made = model.state_dict()
        assert {key: list(made[key].shape) for key in saved} == saved, name
        assert all(bool(tensor.isfinite().all()) for tensor in made.values()), name
        with torch.device("meta"):
            empty = auto.from_config(config, trust_remote_code=True)
        assert {key: t.shape for key, t in empty.state_dict().items()} == {
            key: t.shape for key, t in made.items()
        }, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DELIVERED)
def test_what_can_be_delivered_is_not_refused_beforehand(name: str) -> None:
    model = configs.build(name)
    coupling = couple(trace(model, configs.inputs_of(name, model)))
    sites, _ = find_sites(coupling, UNITS[0] + UNITS[1])
    check_class(model, coupling, sites, Constraints())

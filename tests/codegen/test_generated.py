"""The generated class and its file."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers as T
from slicing import ARCHITECTURES, build, shrunk
from zoo import configs

from prunec.codegen import modeling_prunec
from prunec.codegen.generated import auto_map, pruned_class, source
from prunec.codegen.modeling_prunec import LayerConfig

LLAMA = {
    "AutoModel": "modeling_prunec.PrunecLlamaModel",
    "AutoModelForCausalLM": "modeling_prunec.PrunecLlamaForCausalLM",
}


def config_with(skip: dict[str, str]) -> T.LlamaConfig:
    return T.LlamaConfig(num_hidden_layers=1, prunec={"skip": skip}, auto_map=dict(LLAMA))


def test_the_file_is_short_and_needs_transformers_and_torch_only() -> None:
    text = source(T.LlamaForCausalLM, config_with({}))
    assert len(text.splitlines()) < 150
    tree = ast.parse(text)
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"__future__", "collections", "typing", "torch", "transformers"}
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert classes[-2:] == ["PrunecLlamaForCausalLM", "PrunecLlamaModel"]
    assert "from transformers import LlamaForCausalLM, LlamaModel\n" in text


def test_only_a_model_that_skips_carries_the_code_for_it() -> None:
    config = config_with({"model.layers.1.mlp": "zeros"})
    text = source(T.LlamaForCausalLM, config)
    classes = {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    assert classes >= {"Skipped", "SkippingPruned"}
    assert "class PrunecLlamaForCausalLM(SkippingPruned, LlamaForCausalLM):" in text
    assert text.count("import torch\n") == 1
    config.prunec["skip"] = {}
    assert "Skip" not in source(T.LlamaForCausalLM, config)


def test_a_bare_model_that_lacks_a_part_is_not_offered() -> None:
    """Perceiver's decoder is given to it by the head: AutoModel builds it without."""
    with torch.device("meta"):
        model = T.LlamaForCausalLM(T.LlamaConfig(num_hidden_layers=1))
    model.config.prunec = {"attrs": {"model.layers.0.mlp": {"a": 1}}}
    assert auto_map(model) == LLAMA
    model.config.prunec = {"attrs": {"model.decoder": {"a": 1}}}
    assert auto_map(model).keys() == {"AutoModelForCausalLM"}


def test_the_file_has_the_classes_that_its_config_names() -> None:
    """What can be built may differ when the file is written; what was promised stays."""
    config = config_with({})
    config.prunec["attrs"] = {"model.decoder": {"a": 1}}
    assert "class PrunecLlamaModel" in source(T.LlamaForCausalLM, config)
    del config.auto_map["AutoModel"]
    assert "class PrunecLlamaModel" not in source(T.LlamaForCausalLM, config)


def test_the_view_of_a_config_is_live() -> None:
    config = T.GPT2Config(n_head=4)
    view = LayerConfig(config, {"num_attention_heads": 3})
    assert (view.n_head, view.num_attention_heads, config.n_head) == (3, 3, 4)
    config._attn_implementation = "eager"
    assert view._attn_implementation == "eager"
    view.use_cache = False
    assert config.use_cache is False
    for other in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert (other.n_head, other.n_embd) == (3, 768)
        other.use_cache = True
        assert config.use_cache is False
    with pytest.raises(AttributeError):
        view.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "bloom", "mixtral"])
def test_switching_attention_is_the_stock_class_s_business(name: str) -> None:
    """transformers looks for it in the text of the class's file, which is not this one."""
    stock = type(build(name))
    made = pruned_class(stock)
    assert made._can_set_attn_implementation() == stock._can_set_attn_implementation()
    assert made._can_set_experts_implementation() == stock._can_set_experts_implementation()
    assert name in ARCHITECTURES


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shrunk("gpt_neox")[-1].model
    monkeypatch.setattr(modeling_prunec.transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match="needs transformers 5 or newer"):
        type(model)(model.config)


def test_varying_fields_can_be_read_globally() -> None:
    """transformers raises RuntimeError there, which no `getattr(.., default)` survives."""
    config = shrunk("llama")[-1].model.config
    assert config.is_heterogeneous
    assert config.num_attention_heads == 6
    assert config.per_layer_config[0].num_attention_heads == 2


def test_in_memory_it_is_a_stock_model_to_everyone() -> None:
    model = shrunk("llama")[-1].model
    assert isinstance(model, T.LlamaForCausalLM)
    assert type(model).__name__ == "PrunecLlamaForCausalLM"
    assert model.config.model_type == "llama"


def test_offload_to_disk(tmp_path: Path) -> None:
    import torch
    from slicing import example_for

    from prunec.codegen.load import load

    model = shrunk("llama")[-1].model
    model.save_pretrained(tmp_path / "out")
    places = {"model": "cpu", "lm_head": "cpu", "model.layers.1": "disk"}
    parts = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.2")
    places = {**{f"model.{part}": "cpu" for part in parts}, "lm_head": "cpu"}
    places["model.layers.1"] = "disk"
    loaded = load(tmp_path / "out", device_map=places, offload_folder=str(tmp_path / "disk"))
    with torch.no_grad():
        assert torch.equal(loaded(**example_for(model)).logits, model(**example_for(model)).logits)


@pytest.mark.filterwarnings("ignore")
def test_buffers_that_a_parent_fills_are_filled_in_a_generated_class_too(tmp_path: Path) -> None:
    """They are in no checkpoint: falcon_h1's multipliers would be whatever lay in memory."""
    with torch.random.fork_rng(devices=[]):
        model = configs.build("falcon_h1")
    model.save_pretrained(tmp_path)
    again = pruned_class(type(model)).from_pretrained(tmp_path)
    assert type(again) is not type(model)
    buffers = dict(again.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert any("mup_vector" in name for name in buffers)

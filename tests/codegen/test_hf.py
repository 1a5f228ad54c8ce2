"""The directory: its files, what its config says, and that a stranger's process opens it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from slicing import by_plan, example_for, prepared, random_plan, shrunk
from torch import nn

from prunec.codegen import hf
from prunec.codegen.hf import save
from prunec.codegen.shrink import Shrunk, shrink
from prunec.errors import ExportError, VerifyError

METADATA = {
    "base_model": "someone/tiny",
    "recipe": {"name": "slimgpt", "importance": "obs"},
    "plan": {"format": 1, "groups": {}},
    "report": {"parameters": [1000, 800], "ratio": 0.2},
    "metrics": {"perplexity": {"dense": 10.0, "pruned": 12.34567, "window": 1024}},
}


@pytest.fixture
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "accept", lambda *_: ["opened (fresh process)"])


def written(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


@pytest.mark.usefixtures("no_gate")
def test_layers_that_differ(tmp_path: Path) -> None:
    *_, result = shrunk("llama")
    save(result, tmp_path / "out", metadata=METADATA)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_prunec.py",
        "plan.json",
        "prunec.json",
        "recipe.yaml",
    ]
    config = written(tmp_path / "out")
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["PrunecLlamaForCausalLM"]
    assert config["auto_map"] == {
        "AutoModel": "modeling_prunec.PrunecLlamaModel",
        "AutoModelForCausalLM": "modeling_prunec.PrunecLlamaForCausalLM",
    }
    assert config["num_attention_heads"] == 6  # the largest stays global
    assert set(config["per_layer_config"]["0"]) == {
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    }
    assert config["allow_global_per_layer_attribute_access"] is True
    table = config["prunec"]
    assert sorted(table) == ["added", "attrs", "format", "shapes", "skip", "transformers"]
    assert table["transformers"] == 4
    assert table["shapes"]["model.layers.0.self_attn.k_proj.weight"] == [16, 48]
    assert table["attrs"]["model.layers.0.self_attn"] == {"num_key_value_groups": 1}


@pytest.mark.usefixtures("no_gate")
@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        (
            "llama",
            {"kv_group": 2, "query_head": 2, "ffn_channel": 30},
            {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 30},
        ),
        ("qwen2", {"kv_group": 2, "query_head": 2}, {"num_attention_heads": 4, "head_dim": 8}),
        ("gpt2", {"ffn_channel": 100}, {"n_inner": 100}),
        ("gpt_neox", {"ffn_channel": 30}, {"intermediate_size": 30}),
        ("t5", {"ffn_channel": 30}, {"d_ff": 30}),
    ],
)
def test_layers_alike_need_no_code(
    tmp_path: Path, name: str, count: Mapping[str, int], said: Mapping[str, int]
) -> None:
    *_, result = shrunk(name, tuple(count), alike=True, count=count)
    save(result, tmp_path / "out", metadata=METADATA)
    config = written(tmp_path / "out")
    assert said.items() <= config.items()
    assert not {"auto_map", "prunec", "per_layer_config"} & config.keys()
    assert not (tmp_path / "out" / "modeling_prunec.py").exists()
    cls = type(result.model)
    assert cls.__module__.startswith("transformers.")
    again = cls.from_pretrained(tmp_path / "out").eval()
    example = example_for(result.model)
    with torch.no_grad():
        assert torch.equal(again(**example)[0], result.model(**example)[0])


@pytest.mark.parametrize(
    ("name", "count", "reason"),
    [
        ("llama", {"kv_group": 1, "query_head": 2, "ffn_channel": 20}, ""),
        ("llama_square", {"kv_group": 2, "query_head": 2}, ""),
        # 72 features cannot be had from 5 heads, nor from 7
        ("bert", {"head": 4}, "no fields of its config give these sizes"),
        ("opt", {"head": 4}, "no fields of its config give these sizes"),
    ],
)
def test_the_reason_for_code(name: str, count: Mapping[str, int], reason: str) -> None:
    *_, result = shrunk(name, tuple(count), alike=True, count=count)
    assert result.config.reason == reason


def test_a_head_count_that_the_config_refuses() -> None:
    """48 is no multiple of 5: LlamaConfig says no, though the class could."""
    model, coupling = prepared("llama_mha")
    plan = random_plan(coupling, ("head",), alike=True, count={"head": 5})
    result = shrink(model, by_plan(model, coupling, plan), example=example_for(model))
    assert result.config.uniform is None
    assert result.config.reason.startswith("its config refuses")
    assert "num_attention_heads=5" in result.config.reason


@pytest.mark.usefixtures("no_gate")
def test_metadata_and_card(tmp_path: Path) -> None:
    *_, result = shrunk("llama")
    save(result, tmp_path / "out", metadata=METADATA)
    folder = tmp_path / "out"
    assert json.loads((folder / "plan.json").read_text()) == METADATA["plan"]
    assert (folder / "recipe.yaml").read_text() == "name: slimgpt\nimportance: obs\n"
    record = json.loads((folder / "prunec.json").read_text())
    assert record["report"]["ratio"] == 0.2
    assert record["checks"][-1] == "opened (fresh process)"
    assert record["trials"] >= 1
    assert (folder / "README.md").read_text() == CARD
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.usefixtures("no_gate")
def test_shards_and_tokenizer(tmp_path: Path) -> None:
    from tiny_model import tiny_tokenizer

    *_, result = shrunk("gpt2")
    save(result, tmp_path / "out", tokenizer=tiny_tokenizer(), max_shard_size="100KB")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors.index.json", "tokenizer.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1


def test_old_transformers_read_the_rope_settings() -> None:
    """4.x ignores rope_parameters, and would silently take 10000."""
    config = {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        "layer_types": None,
        "_name_or_path": "/home/someone",
    }
    assert hf._portable(config) == {
        "rope_parameters": config["rope_parameters"],
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }


def test_old_transformers_read_which_part_is_rotated() -> None:
    """4.x looks for it beside rope_parameters, and would silently rotate another part."""
    rope = {"rope_type": "default", "partial_rotary_factor": 0.4, "rope_theta": 1e4}
    assert hf._portable({"rope_parameters": rope}) == {
        "rope_parameters": rope,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.4,
    }


def test_renamed_parameters_ask_for_new_transformers() -> None:
    """In 4.x this head is called embed_out: it would come up random there."""
    assert shrunk("gpt_neox")[-1].model.config.prunec["transformers"] == 5


def test_refuses_what_is_not_transformers(tmp_path: Path) -> None:
    *_, result = shrunk("llama")
    with pytest.raises(ExportError, match="not a transformers class"):
        save(replace(result, model=nn.Linear(2, 2)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_gate_delivers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, result = shrunk("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")

    def refuses(*_: Any) -> list[str]:
        raise VerifyError("the written directory is not the model in memory")

    monkeypatch.setattr(hf, "accept", refuses)
    with pytest.raises(VerifyError):
        save(result, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_stock_class_that_fails_the_gate_gets_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, coupling = prepared("llama")
    plan = random_plan(coupling, ("ffn_channel",), alike=True)
    result = shrink(model, by_plan(model, coupling, plan), example=example_for(model))

    def no_stock(_: Any, folder: Path, *__: Any) -> list[str]:
        if not (folder / "modeling_prunec.py").exists():
            raise VerifyError("differs", where="2 x 9")
        return []

    monkeypatch.setattr(hf, "accept", no_stock)
    save(result, tmp_path / "out")
    assert written(tmp_path / "out")["architectures"] == ["PrunecLlamaForCausalLM"]
    assert "gives other numbers" in json.loads((tmp_path / "out/prunec.json").read_text())["code"]


STRANGER = """
import json, sys, torch, transformers
from safetensors.torch import load_file
sys.modules["prunec"] = None
torch.set_num_threads(1)
for folder, auto in json.loads(sys.argv[1]).items():
    want = load_file(folder + ".want")
    model, info = getattr(transformers, auto).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
    inputs = {k[3:]: v for k, v in want.items() if k.startswith("in.")}
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], want["out"]), folder
        assert torch.equal(model(**inputs, use_cache=True)[0], want["out"]), folder
    if "ids" not in want or not model.can_generate():
        continue
    kind = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    tokens = model.generate(**inputs, **kind)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1}):
        assert torch.equal(model.generate(**inputs, **kind, **other), tokens), (folder, other)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(**inputs, **kind), tokens), folder
    model.save_pretrained(folder + "-again")
    again = getattr(transformers, auto).from_pretrained(folder + "-again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs)[0], want["out"]), folder
    print("ok", folder)
"""


def test_a_stranger_opens_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fresh process for all: forward, generation with every cache, saving again."""
    from safetensors.torch import save_file

    monkeypatch.setattr(hf, "accept", lambda *_: [])
    results: dict[str, Shrunk] = {
        name: shrunk(name)[-1] for name in ("llama_square", "phi3", "gpt2", "gpt_neox", "opt")
    }
    model, coupling = prepared("qwen2")
    sliced = by_plan(model, coupling, random_plan(coupling, ("ffn_channel", "kv_group")))
    biased = replace(sliced, added={"model.layers.1.mlp.down_proj.bias": torch.ones(48)})
    results["biased"] = shrink(model, biased, example=example_for(model))
    for name, result in results.items():
        save(result, tmp_path / name)
        inputs = example_for(result.model)
        with torch.no_grad():
            out = result.model(**inputs).logits
        tensors = {"out": out, "ids": torch.ones(1), **{f"in.{k}": v for k, v in inputs.items()}}
        save_file(tensors, tmp_path / f"{name}.want")
    jobs = json.dumps({str(tmp_path / name): "AutoModelForCausalLM" for name in results})
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, jobs],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ok") == len(results)


def test_the_gate(tmp_path: Path) -> None:
    """For real: it passes what is right and finds a wrong number in the config."""
    from prunec.codegen.gate import accept

    *_, result = shrunk("llama")
    save(result, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "prunec.json").read_text())
    assert "generate, cached" in record["checks"]
    config = written(tmp_path / "out")
    config["prunec"]["attrs"]["model.layers.0.self_attn"]["num_key_value_groups"] = 2
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match="not the model in memory") as caught:
        accept(result.model, tmp_path / "out", "AutoModelForCausalLM", result.example)
    assert caught.value.so == "nothing was delivered"


CARD = """\
---
library_name: transformers
tags:
- prunec
- pruned
base_model: someone/tiny
---

# someone/tiny, pruned

Structured pruning by prunec: smaller dense matrices, no sparse format.

## Size

|  | before | after |
| --- | --- | --- |
| parameters | 1,000 | 800 (-20.0%) |

## Loading

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
```

The stock class alone cannot be this model: the layers differ in size
(model.layers.*.self_attn.q_proj.weight). `modeling_prunec.py` gives it the sizes that `config.json`
lists; it needs transformers and torch only. Where prunec is installed, `prunec.load("PATH")` opens
it without `trust_remote_code`.

## Layers

| layer | intermediate_size (was 40) | num_attention_heads (was 6) | num_key_value_heads (was 3) |
| --- | --- | --- | --- |
| 0 | 29 | 2 | 2 |
| 1 | 36 | 1 | 1 |
| 2 | 29 | 2 | 2 |

## Measured

|  |  |
| --- | --- |
| perplexity | dense 10, pruned 12.35, window 1024 |

## Recipe

```yaml
name: slimgpt
importance: obs
```

The units kept are in `plan.json`.

## Limits

peft prefix tuning assumes one number of KV heads for all layers and does not fit; LoRA does.
"""

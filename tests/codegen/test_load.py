"""The way back in: load, register, and everything that is done to a model afterwards."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from slicing import UNITS, build, by_plan, coupling_of, example_for, random_plan, shrunk
from tiny_model import tiny_tokenizer
from torch import nn
from transformers.models.auto import modeling_auto

from prunec.codegen import hf
from prunec.codegen.battery import difference
from prunec.codegen.hf import save
from prunec.codegen.load import load, register
from prunec.codegen.shrink import Shrunk, shrink
from prunec.errors import ModelError


@pytest.fixture(autouse=True)
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "accept", lambda *_: [])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """`register()` for the time of a test."""
    for cls in vars(modeling_auto).values():
        if inspect.isclass(cls) and getattr(cls, "_model_mapping", None) is not None:
            for name in ("from_pretrained", "from_config"):
                monkeypatch.setattr(cls, name, classmethod(getattr(cls, name).__func__))
    register()
    register()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**example_for(model))[0]


def generated(model: Any, cache: str | None = None) -> torch.Tensor:
    kind = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = example_for(model)["input_ids"]
    tokens: torch.Tensor = model.generate(ids, **kind, cache_implementation=cache)
    return tokens


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Shrunk, Path]:
    *_, result = shrunk("llama")
    save(result, tmp_path / "pruned")
    return result, tmp_path / "pruned"


def test_load_runs_no_code_of_the_directory(pruned: tuple[Shrunk, Path]) -> None:
    result, directory = pruned
    (directory / "modeling_prunec.py").write_text("raise SystemExit('ran')")
    model = load(directory)
    assert isinstance(model, T.LlamaForCausalLM)
    assert not model.training
    assert torch.equal(logits(model), logits(result.model))
    assert load(directory, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_opens_a_stock_directory(tmp_path: Path) -> None:
    *_, result = shrunk("llama", ("ffn_channel",), alike=True)
    save(result, tmp_path / "out")
    model = load(tmp_path / "out")
    assert type(model) is T.LlamaForCausalLM
    assert torch.equal(logits(model), logits(result.model))


def test_load_refuses(tmp_path: Path, pruned: tuple[Shrunk, Path]) -> None:
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Nothing"]}')
    with pytest.raises(ModelError, match="no model class 'Nothing'"):
        load(tmp_path)
    _, directory = pruned
    config = json.loads((directory / "config.json").read_text())
    config["prunec"]["format"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="format 2, this prunec reads 1"):
        load(directory)


@pytest.mark.usefixtures("registered")
def test_registered_auto_classes_open_both_kinds(
    tmp_path: Path, pruned: tuple[Shrunk, Path]
) -> None:
    result, directory = pruned
    dense = build("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = T.AutoModelForCausalLM.from_pretrained(directory)
    assert type(model).__name__ == "PrunecLlamaForCausalLM"
    assert torch.equal(logits(model), logits(result.model))
    bare = T.AutoModel.from_pretrained(directory)
    assert type(bare).__name__ == "PrunecLlamaModel"
    with torch.no_grad():
        wanted = result.model.model(**example_for(result.model)).last_hidden_state
        assert torch.equal(bare(**example_for(result.model)).last_hidden_state, wanted)
    stock = T.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(stock) is T.LlamaForCausalLM
    assert torch.equal(logits(stock), logits(dense))
    assert type(T.AutoModelForCausalLM.from_config(dense.config)) is T.LlamaForCausalLM
    text = T.pipeline("text-generation", str(directory), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(text.model), logits(result.model))
    fresh = T.AutoModelForCausalLM.from_config(T.AutoConfig.from_pretrained(directory))
    assert fresh.model.layers[0].mlp.up_proj.weight.shape == (29, 48)
    assert logits(fresh).isfinite().all()
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


def test_saved_again_by_transformers(tmp_path: Path, pruned: tuple[Shrunk, Path]) -> None:
    """As a Trainer does with its checkpoints; from memory, and once loaded."""
    result, directory = pruned
    for number, model in enumerate((result.model, load(directory))):
        model.save_pretrained(tmp_path / str(number))
        again = load(tmp_path / str(number))
        assert torch.equal(logits(again), logits(result.model))
        assert (tmp_path / str(number) / "modeling_prunec.py").exists()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama_square", UNITS),
        ("llama", ("ffn_channel",)),
        ("phi3", UNITS),
        ("gpt2", UNITS),
    ],
)
def test_pruned_again(tmp_path: Path, name: str, kinds: tuple[str, ...]) -> None:
    """What was found the first time, config views included, is where the second one starts."""
    *_, first = shrunk(name)
    save(first, tmp_path / "once")
    once = load(tmp_path / "once").requires_grad_(False)
    coupling = coupling_of(once)
    plan = random_plan(coupling, kinds, seed=1)
    second = shrink(once, by_plan(once, coupling, plan), example=example_for(once))
    save(second, tmp_path / "twice")
    twice = load(tmp_path / "twice")
    assert torch.equal(logits(twice), logits(second.model))
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())
    assert torch.equal(generated(twice, "static"), generated(twice))


def test_trains(pruned: tuple[Shrunk, Path]) -> None:
    _, directory = pruned
    model = load(directory).train()
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"  # 5.2x renamed it
    getattr(model, new if hasattr(model, new) else old)()
    ids = example_for(model)["input_ids"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_half_precision_and_static_cache(pruned: tuple[Shrunk, Path]) -> None:
    result, directory = pruned
    model = load(directory, dtype=torch.bfloat16)
    assert difference([logits(model).float()], [logits(result.model)]) < 0.1
    assert torch.equal(generated(result.model, "static"), generated(result.model))

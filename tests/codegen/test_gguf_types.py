"""GGUF of fewer bits: what these change is measured, that nothing else is changed is proven."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prunec
from prunec.codegen.exporters import gguf
from prunec.codegen.exporters.gguf import Gguf, rounding
from prunec.codegen.exporters.llama_graph import llama_graph
from prunec.codegen.exporters.source import ModelDirectory


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """Its rows are whole blocks of q8_0."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).eval().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.engine("llama-cpp-python")
def test_fewer_bits_in_llama_cpp(dense: Path, tmp_path: Path) -> None:
    """What they change is measured; that nothing else is changed is proven in f32."""
    done = prunec.export(dense, "gguf", tmp_path / "small.gguf", settings={"type": "q8_0"})
    assert done.finding.detail.startswith("in f32 64 tokens: argmax equal at 100.0%")
    assert "in q8_0 weights within 4." in done.finding.detail
    assert list(done.files) == ["model.gguf"]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_stored_weights_are_compared_one_by_one(dense: Path, tmp_path: Path, kind: str) -> None:
    """A row that is another is found, and so is a missing or a resized tensor."""
    source = ModelDirectory.read(dense)
    graph = source.once(llama_graph)
    limit, least = gguf._ROUNDING[kind]
    Gguf(kind).write(source, tmp_path)
    file = tmp_path / "model.gguf"
    assert 0.4 * limit < rounding(file, graph, least) <= limit
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = graph.tensors[name]
    for other in (weight.roll(1, 0), torch.cat([weight, weight])):
        assert rounding(file, replace(graph, tensors={**graph.tensors, name: other}), least) > 0.1
    assert rounding(file, replace(graph, tied=not graph.tied), least) == float("inf")
    norm = {"model.norm.weight": graph.tensors["model.norm.weight"] * (1 + 1e-6)}
    changed = replace(graph, tensors={**graph.tensors, **norm})
    assert rounding(file, changed, least) == float("inf")

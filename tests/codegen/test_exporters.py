"""`prunec export`: what each form holds, what it refuses, and the file in its engine."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from exporting import saved, written
from safetensors.torch import load_file
from slicing import ARCHITECTURES, example_for, prepared
from tiny_model import TEXT, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import prunec
from prunec.codegen.exporters import compare
from prunec.codegen.exporters.deci import sizes_read
from prunec.codegen.exporters.gguf import interleaved
from prunec.codegen.exporters.llama_graph import Layer, llama_graph
from prunec.codegen.exporters.padded import solve
from prunec.codegen.exporters.source import ModelDirectory
from prunec.codegen.load import load
from prunec.errors import ExportError, ModelError, PlanError, PluginError, VerifyError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    written("llama_square", folder / "llama")
    written("phi3", folder / "phi3")
    return folder


def test_pt2_is_exact_at_other_shapes_in_a_fresh_process(folder: Path, tmp_path: Path) -> None:
    done = prunec.export(folder / "llama", "pt2", tmp_path / "small.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt2"]
    assert done.finding.state == "measured"
    assert done.finding.detail == (
        "as traced, 1 x 1, 3 x 17, 2 x 11, left padding: equal within 0.0e+00 of the largest logit"
    )
    assert done.notes == ()
    module = torch.export.load(tmp_path / "small.pt2").module()
    ids = torch.arange(20)[None]
    wanted = load(folder / "llama")(ids).logits
    assert torch.allclose(
        module(input_ids=ids, attention_mask=torch.ones_like(ids)), wanted, atol=1e-5
    )


def test_sizes_that_the_model_fixes_are_said(tmp_path: Path) -> None:
    """A ViT takes any batch, one image size; nothing is called dynamic that is not."""
    written("vit", tmp_path / "vit")
    source = ModelDirectory.read(tmp_path / "vit")
    assert source.traced.dynamic == ("batch",)
    assert source.traced.fixed == []
    assert sorted(source.traced.cases) == ["as traced", "batch 1", "batch 2", "batch 3"]


@pytest.mark.engine("onnxruntime")
def test_onnx_in_onnxruntime(folder: Path, tmp_path: Path) -> None:
    import onnxruntime

    done = prunec.export(folder / "llama", "onnx", tmp_path / "onnx")
    assert done.finding.state == "measured"
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [o.name for o in session.get_outputs()] == ["logits"]


def test_an_absent_engine_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda _: None)
    done = prunec.export(folder / "llama", "gguf", tmp_path / "small.gguf")
    assert done.finding.state == "engine absent"
    assert "llama-cpp-python is not installed" in done.finding.detail


def test_gguf_holds_sizes_by_layer_and_turns_the_rotary_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda _: None)
    prunec.export(folder / "llama", "gguf", tmp_path / "small.gguf")
    reader = gguf.GGUFReader(tmp_path / "small.gguf")
    layers = ModelDirectory.read(folder / "llama").once(llama_graph).layers
    assert len({layer.width for layer in layers}) > 1

    def numbers(key: str) -> list[int]:
        return list(reader.fields[f"deci.{key}"].contents())

    assert numbers("attention.head_count") == [layer.heads for layer in layers]
    assert numbers("attention.head_count_kv") == [layer.kv_heads for layer in layers]
    assert numbers("feed_forward_length") == [layer.width for layer in layers]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    model = load(folder / "llama").requires_grad_(False)
    key = model.model.layers[0].self_attn.k_proj.weight.numpy()
    found = tensors["blk.0.attn_k.weight"].data
    assert not np.array_equal(found, key)
    assert np.array_equal(np.sort(found, 0), np.sort(key, 0))
    assert np.array_equal(found[:4], key[[0, 4, 1, 5]])
    assert np.array_equal(
        tensors["blk.1.ffn_down.weight"].data, model.model.layers[1].mlp.down_proj.weight.numpy()
    )


def test_gguf_of_removed_parts(
    delivery: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there, of zeros: llama.cpp skips the rest of a layer that has no FFN, and takes
    the size of all heads from the first layer.
    """
    monkeypatch.setattr(compare, "find_spec", lambda _: None)
    prunec.export(delivery("tiny, skipped"), "gguf", tmp_path / "small.gguf")
    reader = gguf.GGUFReader(tmp_path / "small.gguf")
    heads, widths = (
        list(reader.fields[f"deci.{key}"].contents())
        for key in ("attention.head_count", "feed_forward_length")
    )
    assert heads[0] == 1
    assert widths[2] == 32
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert tensors["blk.0.attn_output.weight"].shape == (48, 8)
    assert not any(tensors[f"blk.0.attn_{name}.weight"].any() for name in ("q", "k", "v", "output"))
    assert not any(tensors[f"blk.2.ffn_{name}.weight"].any() for name in ("gate", "up", "down"))


def test_neighbours_and_halves() -> None:
    rows = torch.arange(8)
    assert interleaved(rows, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.engine("llama-cpp-python")
def test_removed_parts_in_llama_cpp(delivery: Callable[[str], Path], tmp_path: Path) -> None:
    done = prunec.export(delivery("tiny, skipped"), "gguf", tmp_path / "small.gguf")
    assert "argmax equal at 100.0%" in done.finding.detail


@pytest.mark.engine("llama-cpp-python")
def test_gguf_in_llama_cpp(tmp_path: Path) -> None:
    written("llama", tmp_path / "llama")
    for kind in ("f32", "f16"):
        done = prunec.export(
            tmp_path / "llama", "gguf", tmp_path / f"{kind}.gguf", settings={"type": kind}
        )
        assert done.finding.state == "measured"
        assert "argmax equal at 100.0%" in done.finding.detail


@pytest.mark.engine("llama-cpp-python")
def test_the_tokenizer_in_llama_cpp(tmp_path: Path) -> None:
    import llama_cpp
    from tiny_model import write_tiny_llama

    write_tiny_llama(tmp_path / "model")
    prunec.export(tmp_path / "model", "gguf", tmp_path / "small.gguf")
    engine = llama_cpp.Llama(str(tmp_path / "small.gguf"), vocab_only=True, verbose=False)
    for text in (TEXT, "dog’s  1234\n\n\tüber 🙂"):
        wanted = tiny_tokenizer()(text)["input_ids"]
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == wanted


def test_padded_is_stock_and_equal(folder: Path, tmp_path: Path) -> None:
    """Also where q, k and v are one matrix: zeros go between them."""
    done = prunec.export(folder / "phi3", "padded", tmp_path / "stock")
    assert done.finding.state == "measured"
    assert done.notes == ("padding costs 3,552 parameters: 27,408 become 30,960",)
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert not {"auto_map", "prunec", "per_layer_config"} & config.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    inputs = example_for(model)
    with torch.no_grad():
        wanted = load(folder / "phi3")(**inputs).logits
        assert torch.allclose(model(**inputs).logits, wanted, atol=1e-5)


def test_counts_are_found_from_shapes_or_not_at_all() -> None:
    model, coupling = prepared("phi3")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert solve(coupling, shapes) == {group.dim.root: group.size for group in coupling.groups}
    shapes["model.layers.0.mlp.down_proj.weight"] = (48, 39)  # gate_up_proj says 40
    assert solve(coupling, shapes) is None


def decilm(tmp_path: Path, **sizes: int) -> Path:
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, num_hidden_layers=2, max_position_embeddings=64, **sizes
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).eval().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_deci_config_reads_back_as_the_model(tmp_path: Path) -> None:
    dense = decilm(tmp_path, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    done = prunec.export(dense, "deci", tmp_path / "deci")
    config = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert sizes_read(config) == [Layer(4, 2, 512)] * 2
    assert done.finding.state == "engine absent"
    assert load_file(tmp_path / "deci" / "model.safetensors").keys() >= {"model.norm.weight"}


def test_deci_names_the_layers_it_cannot_hold(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="deci cannot hold") as caught:
        prunec.export(folder / "llama", "deci", tmp_path / "deci")
    assert "FFN widths must be multiples of 256, not so: layer 0, 1, 2" in str(caught.value)
    assert "query heads" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gpt2", "parameters that the LLaMA graph lacks"), ("gemma2", "the LLaMA graph lacks")],
)
def test_gguf_refuses_other_families(tmp_path: Path, name: str, reason: str) -> None:
    ARCHITECTURES[name]().save_pretrained(tmp_path / name)
    with pytest.raises(ExportError, match="gguf cannot hold") as caught:
        prunec.export(tmp_path / name, "gguf", tmp_path / "out.gguf")
    assert reason in str(caught.value.where)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_same_names_with_another_forward_are_no_llama(tmp_path: Path) -> None:
    """Granite has LLaMA's parameters and multiplies by factors of its own."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = GraniteConfig(
        vocab_size=61, intermediate_size=40, num_hidden_layers=2, residual_multiplier=0.5, **sizes
    )
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    with pytest.raises(ExportError) as caught:
        prunec.export(tmp_path / "granite", "gguf", tmp_path / "out.gguf")
    assert "its logits would be off" in str(caught.value.where)


def test_a_fitted_bias_has_no_place_in_a_stock_class(tmp_path: Path) -> None:
    from slicing import by_plan, random_plan

    from prunec.codegen.shrink import shrink

    model, coupling = prepared("llama")
    sliced = by_plan(model, coupling, random_plan(coupling, ("ffn_channel",)))
    biased = replace(sliced, added={"model.layers.1.mlp.down_proj.bias": torch.ones(48)})
    saved(shrink(model, biased, example=example_for(model)), tmp_path / "biased")
    with pytest.raises(ExportError) as caught:
        prunec.export(tmp_path / "biased", "padded", tmp_path / "stock")
    assert "no place for model.layers.1.mlp.down_proj.bias" in str(caught.value)
    source = ModelDirectory.read(tmp_path / "biased")
    assert source.once(llama_graph).biases == ["mlp.down_proj"]  # GGUF has one


def test_bad_requests(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="no exporters named 'gguff'"):
        prunec.export(folder / "llama", "gguff", tmp_path / "out")
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        prunec.export(tmp_path, "pt2", tmp_path / "out")
    with pytest.raises(ExportError, match="no GGUF type 'q2'"):
        prunec.export(folder / "llama", "gguf", tmp_path / "a.gguf", settings={"type": "q2"})
    with pytest.raises(PlanError, match="exporters gguf has no option 'kind'"):
        prunec.export(folder / "llama", "gguf", tmp_path / "a.gguf", settings={"kind": "q2"})
    (tmp_path / "taken.gguf").write_text("mine")
    with pytest.raises(ExportError, match="exists"):
        prunec.export(folder / "llama", "gguf", tmp_path / "taken.gguf")
    assert (tmp_path / "taken.gguf").read_text() == "mine"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ExportError, match="too full"):
        prunec.export(folder / "llama", "gguf", tmp_path / "b.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]


@pytest.mark.parametrize(
    ("form", "settings", "each"),
    [
        ("pt2", {}, 2),
        ("onnx", {}, 4),  # its engine computes in fp32
        ("gguf", {}, 4),
        ("gguf", {"type": "f16"}, 2 + 4),  # and an f32 file to compare
    ],
)
def test_room_is_wanted_for_what_is_written_and_not_for_what_was_read(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    settings: dict[str, str],
    each: int,
) -> None:
    monkeypatch.setattr("prunec.codegen.exporters.gguf.find_spec", lambda name: object())
    model = prunec.load(folder / "llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    weights = sum(parameter.numel() for parameter in model.parameters())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=each * weights - 1))
    with pytest.raises(ExportError, match="too full") as caught:
        prunec.export(tmp_path / "half", form, tmp_path / "new" / "out", settings=settings)
    assert f" {each * weights / 1e6:,.0f} MB are needed" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_a_file_that_is_not_the_model_is_not_delivered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the program of other weights."""
    from prunec.codegen.exporters.pt2 import Pt2

    def wrong(self: Pt2, source: ModelDirectory, out: Path) -> list[str]:
        program = source.traced.program
        weight = program.state_dict["model.model.norm.weight"]
        program.state_dict["model.model.norm.weight"] = torch.nn.Parameter(weight * 1.01)
        torch.export.save(program, out / self.file)
        return []

    monkeypatch.setattr(Pt2, "write", wrong)
    (tmp_path / "old.pt2").write_text("old")
    with pytest.raises(VerifyError, match=r"model\.pt2 is not the model"):
        prunec.export(folder / "llama", "pt2", tmp_path / "old.pt2", overwrite=True)
    assert (tmp_path / "old.pt2").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt2"]


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from prunec.cli.app import app

    monkeypatch.setattr(compare, "find_spec", lambda _: None)
    arguments = ["export", str(folder / "llama"), "--to", "gguf", "-o", str(tmp_path / "a.gguf")]
    found = CliRunner().invoke(app, [*arguments, "--set", "type=q8_0", "--json", "-"])
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record["to"] == "gguf"
    assert list(record["files"]) == ["model.gguf"]
    assert record["finding"]["state"] == "engine absent"
    assert "rows are no whole blocks" in record["notes"][-1]


STRANGER = """
import importlib.util, json, sys
import torch

for name in ("prunec", "transformers", "safetensors"):
    sys.modules[name] = None
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("model", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = module.load()
ids = torch.arange(24).reshape(2, 12)
print(json.dumps(model(input_ids=ids, attention_mask=torch.ones_like(ids)).tolist()))
"""


def test_python_is_readable_and_needs_torch_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    done = prunec.export(folder / "llama", "python", tmp_path / "module")
    assert done.finding.state == "measured"
    assert sorted(done.files) == ["model.py", "model.safetensors"]
    text = (tmp_path / "module" / "model.py").read_text()
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"json", "mmap", "pathlib", "torch"}
    assert text.count("class LlamaDecoderLayer") == text.count("class LlamaMLP") == 1
    assert "for layer in self.layers:" in text
    model = load(folder / "llama").eval()
    for layer in model.model.layers:
        assert f"intermediate_size={layer.mlp.gate_proj.out_features}" in text
    assert max(map(len, text.splitlines())) <= 120
    run = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, tmp_path / "module" / "model.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    with torch.no_grad():
        wanted = model(torch.arange(24).reshape(2, 12)).logits
    assert torch.allclose(torch.tensor(json.loads(run.stdout)), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "vit", "gpt_neox", "gemma2", "phi3"])
def test_python_of_other_architectures(tmp_path: Path, name: str) -> None:
    written(name, tmp_path / name)
    done = prunec.export(tmp_path / name, "python", tmp_path / "module")
    assert done.finding.state == "measured"

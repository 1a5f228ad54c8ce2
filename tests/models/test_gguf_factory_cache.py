from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import tiny_llama

from prunec.errors import ModelError
from prunec.models import open_model
from prunec.models.cache import cache_directory, cached

FACTORIES = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)
    def forward(self, a, b):
        return self.left(a) + self.right(b)

def pair(): return Pair(), (torch.ones(2, 4), torch.ones(2, 5))
def named(): return Pair(), {"b": torch.ones(2, 5), "a": torch.ones(2, 4)}
def single(): return nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4)
def double(): return nn.Linear(4, 3).double(), torch.ones(2, 4).double()
def bare(): return Pair()
def many(): return Pair(), (torch.ones(1),) * 3
def wrong(): return "a string"
def text(): return Pair(), "a string"
def fails(): return {}["missing"]
value = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factories_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("factory", ["pair", "named"])
def test_a_factory_gives_model_and_inputs_by_keyword(factories: str, factory: str) -> None:
    source = open_model(f"{factories}:{factory}")
    assert source.tokenizer is None
    assert {name: tuple(t.shape) for name, t in source.example.items()} == {
        "a": (2, 4),
        "b": (2, 5),
    }
    assert source.model(**source.example).shape == (2, 3)
    assert not source.model.training


def test_a_factory_is_cast_with_its_inputs(factories: str) -> None:
    source = open_model(f"{factories}:double", dtype="bfloat16")
    assert source.model(**source.example).dtype == torch.bfloat16
    assert open_model(f"{factories}:double", dtype="auto").model.weight.dtype == torch.float64
    assert list(open_model(f"{factories}:single").example) == ["input"]


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("absent", "cannot import"),
        ("value", "is no function: int"),
        ("wrong", "returned str, not an nn.Module"),
        ("bare", "no example inputs are known for Pair"),
        ("many", "gave 3 example inputs, but forward takes 2"),
        ("text", "example input a is a str"),
        ("fails", "raised KeyError: 'missing'"),
    ],
)
def test_a_bad_factory(factories: str, factory: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        open_model(f"{factories}:{factory}")


def test_the_error_names_the_line_of_the_factory(factories: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_model(f"{factories}:fails")
    assert f"{factories}.py:" in str(caught.value.where)


def test_an_absent_module() -> None:
    with pytest.raises(ModelError, match="cannot import no_such_module:factory"):
        open_model("no_such_module:factory")


def write_gguf(path: Path) -> torch.nn.Module:
    """The tiny model in GGUF as converters write it: q and k rows permuted for its rotary order."""
    gguf = pytest.importorskip("gguf")
    from tiny_model import VOCABULARY, tiny_tokenizer

    model = tiny_llama()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))
    merges = [
        " ".join(pair)
        for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_types([3, 3, *[1] * (VOCABULARY - 2)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        array = parameter.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                rows = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2)
                array = np.ascontiguousarray(rows.reshape(array.shape))
        writer.add_tensor(names.get_name(name, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    expected = write_gguf(path)
    source = open_model(str(path))
    logits = source.model(**source.example).logits
    torch.testing.assert_close(logits, expected(**source.example).logits)
    assert source.tokenizer.decode(source.tokenizer("the lazy dog").input_ids) == "the lazy dog"
    (entry,) = (tmp_path / "cache" / "models").iterdir()
    before = entry.stat().st_mtime_ns
    assert open_model(str(path)).digest == source.digest
    assert entry.stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF"])
def test_a_file_that_is_not_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf") as caught:
        open_model(str(path))
    assert caught.value.where == str(path)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_truncated_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match=r"cannot convert tiny\.gguf"):
        open_model(str(path))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("PRUNEC_CACHE")
    assert cache_directory().name == "prunec"


def test_an_entry_is_built_once_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path))

    def interrupted(directory: Path) -> None:
        (directory / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("things/one", interrupted)
    assert list((tmp_path / "things").iterdir()) == []

    def build(directory: Path) -> None:
        # Another process finishes the same entry first.
        (tmp_path / "things" / "one").mkdir()
        (tmp_path / "things" / "one" / "theirs").write_text("whole")
        (directory / "ours").write_text("whole")

    entry = cached("things/one", build)
    assert [file.name for file in entry.iterdir()] == ["theirs"]
    assert cached("things/one", interrupted) == entry
    assert [path.name for path in (tmp_path / "things").iterdir()] == ["one"]


def test_a_full_disk_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path))

    def build(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="No space left on device") as caught:
        cached("things/one", build)
    assert "PRUNEC_CACHE" in str(caught.value)
    assert list((tmp_path / "things").iterdir()) == []

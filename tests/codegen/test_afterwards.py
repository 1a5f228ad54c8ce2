"""What is done to a delivered directory later: uploaded, trained, pruned again, quantised, saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as T
from slicing import UNITS, coupling_of, random_plan
from tiny_model import TEXT, tiny_tokenizer, write_tiny_llama
from torch import nn
from typer.testing import CliRunner

import prunec
from prunec.cli.app import app
from prunec.codegen import hub
from prunec.codegen.battery import difference
from prunec.passes.plan import Plan

CALIBRATION = ("--calibration", "text.txt", "--samples", "2", "--seq-len", "32", "--quiet")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and a text, where the command runs."""
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    return tmp_path


@pytest.fixture
def directory(delivery: Callable[[str], Path]) -> Path:
    return delivery("tiny, skipped")


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 25).reshape(2, 11)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def shards(folder: Path) -> int:
    return len(list(folder.glob("model-*.safetensors")))


def test_weights_in_several_files_prune_again(work: Path) -> None:
    first = command("prune", "model", "-o", "once", "--max-shard-size", "20KB", *CALIBRATION)
    assert first.exit_code == 0, first.output
    assert shards(work / "once") > 1
    index = json.loads((work / "once" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        path.name for path in (work / "once").glob("*.safetensors")
    }
    assert prunec.check(work / "once").whole
    second = command("prune", "once", "-o", "twice", *CALIBRATION)
    assert second.exit_code == 0, second.output
    assert shards(work / "twice") == 0
    once, twice = prunec.load(work / "once"), prunec.load(work / "twice")
    assert twice.num_parameters() < once.num_parameters()


@pytest.mark.parametrize("size", ["much", "0MB", "-5GB", "5"])
def test_a_size_of_files_that_is_none(work: Path, size: str) -> None:
    found = command("prune", "absent", "-o", "out", "--max-shard-size", size)
    assert found.exit_code == 2
    assert f"no size of a weight file: {size!r}" in found.stderr


class Hub:
    """Stands in for HfApi."""

    uploads: ClassVar[list[tuple[str, set[str]]]] = []

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo: str, **_: Any) -> None:
        if repo == "someone/else":
            raise OSError("403 Forbidden")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        self.uploads.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
        return f"hub:{repo_id}"


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "uploads", [])
    return Hub.uploads


def test_push_by_the_command(work: Path, uploads: list[tuple[str, set[str]]]) -> None:
    options = ("prune", "model", "-o", "out", "--overwrite", *CALIBRATION, "--push-to-hub")
    found = command(*options, "someone/small")
    assert found.exit_code == 0, found.output
    assert uploads == [("someone/small", {path.name for path in (work / "out").iterdir()})]
    assert {"README.md", "tokenizer.json", "plan.json", "recipe.yaml"} <= uploads[0][1]
    refused = command(*options, "someone/else")
    assert refused.exit_code == 2
    assert "the Hub does not take it: 403 Forbidden" in refused.stderr
    assert (work / "out" / "config.json").is_file()  # the work is not lost


def test_push_of_a_result(directory: Path, uploads: list[tuple[str, set[str]]]) -> None:
    model = prunec.load(directory).requires_grad_(False)
    result = prunec.apply_plan(model, Plan(), example={"input_ids": torch.arange(8)[None]})
    address = result.push_to_hub("someone/small", tokenizer=tiny_tokenizer())
    assert address == "hub:someone/small"
    assert {"config.json", "model.safetensors", "modeling_prunec.py"} <= uploads[0][1]


def test_trained_saved_in_parts_and_pruned_again(directory: Path, tmp_path: Path) -> None:
    """Through the gate once more; what was skipped and resized before stays so."""
    model = prunec.load(directory).train()
    before = logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(3, 25).reshape(2, 11)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "trained", max_shard_size="20KB")
    assert shards(tmp_path / "trained") > 1
    trained = prunec.load(tmp_path / "trained").requires_grad_(False)
    assert torch.equal(logits(trained), logits(model))
    assert not torch.equal(logits(trained), before)
    plan = random_plan(coupling_of(trained, {"input_ids": ids}), UNITS, seed=3)
    result = prunec.apply_plan(trained, plan, example={"input_ids": ids})
    result.save(tmp_path / "again")
    again = prunec.load(tmp_path / "again")
    assert torch.equal(logits(again), logits(result.model))
    assert again.num_parameters() < trained.num_parameters()
    assert again.config.prunec["skip"] == trained.config.prunec["skip"]


def test_linears_are_what_quantisers_take_them_for(directory: Path) -> None:
    """They build their own from in_features and out_features."""
    for name, module in prunec.load(directory).named_modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape, name


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_dynamic_int8(directory: Path) -> None:
    model = prunec.load(directory)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(module, nn.Linear) for module in small.modules())
    assert difference([logits(small)], [logits(model)]) < 0.3


@pytest.mark.engine("bitsandbytes")
def test_bitsandbytes(directory: Path, tmp_path: Path) -> None:
    """Quantised while it is opened as a stranger opens it, saved, and opened again."""
    plain = prunec.load(directory)
    config = T.BitsAndBytesConfig(load_in_8bit=True)
    small = opened(directory, tmp_path, quantization_config=config)
    layer = small.model.layers[1].mlp.up_proj
    assert type(layer).__module__.startswith("bitsandbytes")
    assert difference([logits(small).float()], [logits(plain)]) < 0.3
    small.save_pretrained(tmp_path / "quantised")
    again = opened(tmp_path / "quantised", tmp_path)
    assert torch.equal(logits(again), logits(small))


@pytest.mark.engine("torchao")
def test_torchao(directory: Path, tmp_path: Path) -> None:
    """As above, by torch's own quantiser."""
    from torchao.quantization import Int8WeightOnlyConfig

    plain = prunec.load(directory)
    config = T.TorchAoConfig(Int8WeightOnlyConfig())
    small = opened(directory, tmp_path, quantization_config=config)
    assert type(small.model.layers[1].mlp.up_proj.weight).__module__.startswith("torchao")
    assert difference([logits(small).float()], [logits(plain)]) < 0.3
    small.save_pretrained(tmp_path / "quantised")
    again = opened(tmp_path / "quantised", tmp_path)
    assert torch.equal(logits(again), logits(small))


def opened(directory: Path, tmp_path: Path, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        return T.AutoModelForCausalLM.from_pretrained(
            directory, trust_remote_code=True, **options
        ).eval()

"""`prunec check`: a damaged directory is found out, and the table of engines says what is true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from exporting import written
from safetensors.torch import load_file, save_file
from slicing import ARCHITECTURES
from typer.testing import CliRunner

import prunec
from prunec.cli.app import app
from prunec.codegen import hub
from prunec.codegen.exporters.source import ModelDirectory
from prunec.errors import ExportError, ModelError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from slicing import shrunk

    directory = tmp_path_factory.mktemp("check") / "llama"
    _, _, plan, _ = shrunk("llama")
    written("llama", directory, metadata={"plan": plan.to_json()})
    return directory


def problems(directory: Path) -> dict[str, str]:
    found = prunec.check(directory).tests
    return {test.name: test.problem for test in found if test.problem}


def test_a_whole_directory(whole: Path) -> None:
    found = prunec.check(whole)
    assert found.whole
    assert [test.name for test in found.tests] == ["files", "hashes", "weights", "model", "plan"]
    assert found.tests[1].detail == "6 files as written"
    assert found.tests[4].detail == "3 of 9 groups found, all as large as planned"
    engines = {engine.name.split()[0]: engine for engine in found.engines}
    assert engines["transformers"].opens == "code"
    assert engines["llama.cpp"].opens == "export"
    assert engines["SGLang,"].opens == "no"
    assert "FFN widths must be multiples of 256" in engines["SGLang,"].reason
    assert engines["vLLM"].reason.startswith("its Transformers backend")
    (prefix,) = (engine for engine in found.engines if engine.name == "peft prefix tuning")
    assert (prefix.opens, prefix.reason) == ("no", "it assumes one number of KV heads")
    quick = {e.name.split()[0]: e for e in prunec.check(whole, measure=False).engines}
    assert quick["onnxruntime"].state in ("not run", "engine absent")
    assert quick["onnxruntime"].reason == "prunec export --to onnx"


@pytest.mark.engine("onnxruntime")
def test_an_engine_that_is_there_is_run(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a file that is not the model is no way to open it."""
    from prunec.codegen.exporters.onnx import Onnx

    (found,) = (e for e in prunec.check(whole).engines if e.name == "onnxruntime")
    assert (found.opens, found.state) == ("export", "measured")
    assert "equal within" in found.reason
    write = Onnx.write

    def wrong(self: Onnx, source: ModelDirectory, folder: Path) -> Sequence[str]:
        other = ModelDirectory.read(source.path)
        other.model.model.norm.weight.mul_(1.1)
        return write(self, other, folder)

    monkeypatch.setattr(Onnx, "write", wrong)
    (found,) = (e for e in prunec.check(whole).engines if e.name == "onnxruntime")
    assert (found.opens, found.state) == ("no", "measured")
    assert "off by" in found.reason


def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


def test_a_changed_weight_is_found_by_its_hash(whole: Path, tmp_path: Path) -> None:
    directory = damaged(whole, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert problems(directory) == {"hashes": "model.safetensors is not the file that prunec wrote"}


def test_a_truncated_file(whole: Path, tmp_path: Path) -> None:
    directory = damaged(whole, tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "truncated" in problems(directory)["files"]


def test_a_table_of_other_sizes(whole: Path, tmp_path: Path) -> None:
    directory = damaged(whole, tmp_path)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["prunec"]["shapes"]["model.layers.0.mlp.up_proj.weight"] = [30, 48]
    path.write_text(json.dumps(config))
    assert problems(directory)["weights"] == (
        "model.layers.0.mlp.up_proj.weight is [29, 48] in the weights, [30, 48] in config.prunec"
    )


def test_a_plan_of_another_model(whole: Path, tmp_path: Path) -> None:
    directory = damaged(whole, tmp_path)
    path = directory / "plan.json"
    plan = json.loads(path.read_text())
    plan["groups"]["model.layers.0.mlp/ffn_channel"]["keep"].pop()
    path.write_text(json.dumps(plan))
    assert "the plan keeps 28" in problems(directory)["plan"]


def test_pickles_and_missing_code(whole: Path, tmp_path: Path) -> None:
    directory = damaged(whole, tmp_path)
    (directory / "extra.bin").write_bytes(b"")
    assert problems(directory) == {"files": "there are pickled files: extra.bin"}
    (directory / "extra.bin").unlink()
    (directory / "modeling_prunec.py").unlink()
    assert set(problems(directory)) == {"files", "hashes"}


def test_a_stock_directory_without_a_record(tmp_path: Path) -> None:
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "stock")
    found = prunec.check(tmp_path / "stock")
    assert found.whole
    assert found.tests[1].detail == "none are recorded"
    assert {engine.opens for engine in found.engines} <= {"yes", "export"}
    with pytest.raises(ModelError):
        prunec.check(tmp_path)


def test_the_command_fails_on_a_damaged_directory(whole: Path, tmp_path: Path) -> None:
    (directory := damaged(whole, tmp_path)).joinpath("README.md").write_text("other")
    found = CliRunner().invoke(app, ["check", str(directory), "--json", "-"])
    assert found.exit_code == 1
    record = json.loads(found.stdout)
    assert record["whole"] is False
    assert record["tests"][1]["problem"] == "README.md is not the file that prunec wrote"


class Hub:
    """Stands in for HfApi."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo: str, **options: Any) -> None:
        if repo.count("/") > 1:
            from huggingface_hub.errors import HFValidationError

            raise HFValidationError("Repo id must be in the form 'repo_name' or 'namespace/name'")
        self.calls.append((repo, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        files = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append((repo_id, {"files": files}))
        return f"hub:{repo_id}"


def test_push(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    assert hub.push(whole, "someone/small", private=True) == "hub:someone/small"
    assert Hub.calls[0] == ("someone/small", {"private": True, "exist_ok": True})
    assert {"README.md", "model.safetensors", "plan.json"} <= set(Hub.calls[1][1]["files"])
    with pytest.raises(ExportError, match="the Hub does not take it"):
        hub.push(whole, "a/b/c")

"""`prunec export` and `prunec check` on what they cannot take: one error, exit code 2, no traces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import saved
from safetensors.torch import load_file, save_file
from slicing import ARCHITECTURES, shrunk
from typer.testing import CliRunner

import prunec
from prunec.cli.app import app

FORMS = ("pt2", "python", "onnx", "gguf", "padded", "deci")


def refused(*arguments: str | Path) -> str:
    """The error of a command that must fail cleanly."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    return str(result.stderr.partition("error: ")[2])


def export(directory: Path, form: str, out: Path, *more: str) -> str:
    return refused("export", directory, "--to", form, "-o", out, *more)


@pytest.fixture
def damaged(delivery: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a directory, to be damaged."""
    return Path(shutil.copytree(delivery("tiny, skipped"), tmp_path / "damaged"))


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_no_directory_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for name in ("absent", "file", "empty"):
        assert "no readable config.json" in export(tmp_path / name, "pt2", tmp_path / "out")
        assert "no readable config.json" in refused("check", tmp_path / name)
    assert "no JSON object" in export(tmp_path / "list", "pt2", tmp_path / "out")
    (tmp_path / "list" / "config.json").write_text("{}")
    assert "not a model directory" in export(tmp_path / "list", "pt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(prunec=3), "`prunec` has no tables"),
        (lambda c: c["prunec"].pop("shapes"), "`prunec` has no tables"),
        (lambda c: c["prunec"].update(format=9), "the directory has format 9"),
        (lambda c: c.update(architectures=["Nothing"]), "has no model class 'Nothing'"),
        (lambda c: c.update(architectures=["AutoConfig"]), "has no model class 'AutoConfig'"),
        (lambda c: c.update(architectures=[7]), "has no model class '7'"),
        (lambda c: c.update(hidden_size="wide"), "cannot open the model"),
        (lambda c: c["prunec"]["skip"].update({"model.nowhere": None}), "cannot open the model"),
    ],
)
def test_a_config_that_is_none(
    damaged: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    rewrite(damaged, change)
    assert said in export(damaged, "pt2", tmp_path / "out")
    found = CliRunner().invoke(app, ["check", str(damaged)])
    assert found.exit_code in (1, 2), found.output
    assert "Traceback" not in found.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_weights_that_are_none(damaged: Path, tmp_path: Path) -> None:
    weights = damaged / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    assert "cannot open the model" in export(damaged, "pt2", tmp_path / "out")
    weights.write_bytes(b"")
    assert "cannot open the model" in export(damaged, "gguf", tmp_path / "out.gguf")
    weights.write_bytes(content)
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    message = export(damaged, "pt2", tmp_path / "out")
    assert "not in the files, such as model.layers.1.mlp.up_proj.weight" in message


@pytest.mark.parametrize("form", FORMS)
def test_what_exists_stays(delivery: Callable[[str], Path], tmp_path: Path, form: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    assert "exists" in export(delivery("tiny"), form, tmp_path / "out")
    assert "something else" in export(delivery("tiny"), form, tmp_path / "out", "--overwrite")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("form", FORMS)
def test_the_model_itself_stays(delivery: Callable[[str], Path], tmp_path: Path, form: str) -> None:
    """By any name of it or of what holds it; a file of another form may lie inside."""
    model = Path(shutil.copytree(delivery("tiny"), tmp_path / "holds" / "model"))
    (tmp_path / "holds" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name in ("holds/model", "link", "holds/model/../model", "holds"):
        message = export(model, form, tmp_path / name, "--overwrite")
        assert "the output would replace the model itself" in message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert prunec.export(model, "pt2", model / "small.pt2").to == "pt2"


def test_a_file_of_another_form(delivery: Callable[[str], Path], tmp_path: Path) -> None:
    """Not a directory of that name."""
    for form, name in (("gguf", "a.pt2"), ("pt2", "a.onnx"), ("python", "a.gguf")):
        message = export(delivery("tiny"), form, tmp_path / name)
        assert f"{name} is no name for {form}" in message
    assert list(tmp_path.iterdir()) == []


# form -> what it says of each architecture that it cannot hold
CANNOT = {
    "gguf": {
        "bert": "that the LLaMA graph lacks",
        "t5": "that the LLaMA graph lacks",
        "mixtral": "that the LLaMA graph lacks",
        "vit": "that the LLaMA graph lacks",
    },
    "deci": {
        "qwen2": "FFN widths must be multiples of 256",
        "opt": "that the LLaMA graph lacks",
    },
}


@pytest.mark.parametrize(("form", "name"), [(f, n) for f, names in CANNOT.items() for n in names])
def test_architectures_that_a_form_cannot_hold(tmp_path: Path, form: str, name: str) -> None:
    ARCHITECTURES[name]().save_pretrained(tmp_path / name)
    message = export(tmp_path / name, form, tmp_path / "out")
    assert message.startswith(f"{form} cannot hold this model")
    assert CANNOT[form][name] in message
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["t5", "bert", "vit", "mixtral", "opt"])
@pytest.mark.parametrize("form", ["pt2", "padded"])
def test_the_rest_is_right_or_refused(tmp_path: Path, form: str, name: str) -> None:
    """Encoders, encoder-decoders, experts, biases: the file is compared before it is delivered."""
    kept = {"count": {"ffn_channel": 32}} if name == "mixtral" else {}
    *_, result = shrunk(name, **kept)
    saved(result, tmp_path / name)
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / name), "--to", form, "-o", str(tmp_path / "out"), "-q"]
    )
    assert "Traceback" not in done.output
    if done.exit_code == 0:
        assert (tmp_path / "out").is_dir()
    else:
        assert done.exit_code == 2, done.output
        assert "cannot hold this model" in done.stderr
        assert not (tmp_path / "out").exists()

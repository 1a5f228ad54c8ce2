"""Every calibration source from the command line: pruned, recorded, and refused where it is bad."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import TEXT, write_tiny_llama
from tiny_readers import bert, marking_tokenizer, t5, write_images, write_vit
from typer.testing import CliRunner

from prunec.cli.app import app

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.down(self.up(x).relu())

def net():
    return Net(), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))

def pairs():
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 4, generator=generator), torch.arange(8) % 3) for _ in range(3)]

def named():
    return [{"y": torch.randn(8, 4)}]

def nothing():
    return []

def loss(model, inputs):
    return nn.functional.cross_entropy(model(inputs["x"]), inputs["labels"])

def halves(model, inputs):
    return model(inputs["x"])

def own(model, inputs):
    logits = model(input_ids=inputs["input_ids"]).logits
    return -logits.log_softmax(-1)[..., 5].mean()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_llama(folder / "llama")
    for name, model in (("bert", bert()), ("t5", t5())):
        model.save_pretrained(folder / name)
        marking_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "my_code", raising=False)
    (tmp_path / "my_code.py").write_text(CODE)
    (tmp_path / "text.txt").write_text(TEXT * 40)
    write(
        tmp_path / "pairs.jsonl",
        *({"source": f"fox {i}", "target": TEXT[i : 9 * i + 9]} for i in range(9)),
    )
    write(tmp_path / "texts.jsonl", *({"body": TEXT[i:] * (1 + i % 3)} for i in range(9)))
    return tmp_path


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr if code else result.stdout


def pruned(model: Path | str, *arguments: str) -> dict[str, Any]:
    """The calibration that a run records, which prunec.json holds too."""
    small = ("--samples", "4", "--seq-len", "16", "--ratio", "0.2", "-q", "--json", "run.json")
    run("prune", model, "-o", "out", *small, *arguments)
    recorded = json.loads(Path("out/prunec.json").read_text())["report"]["calibration"]
    assert recorded == json.loads(Path("run.json").read_text())["calibration"]
    return recorded  # type: ignore[no-any-return]


def test_mixed_sources_and_their_record(models: Path) -> None:
    found = pruned(
        models / "llama", "--calibration", "text.txt=2", "--calibration", "texts.jsonl#body",
        "--calibration", "self",
    )  # fmt: skip
    assert found["samples"] == 4
    assert found["tokens"] == 64
    assert [(s["name"], s["kind"], s["weight"], s["samples"]) for s in found["sources"]] == [
        ("text.txt", "text", 2.0, 2),
        ("texts.jsonl#body", "rows", 1.0, 1),
        ("self", "self", 1.0, 1),
    ]
    assert all(len(s["digest"]) == 64 for s in found["sources"])
    page = run("report", "out", "-o", "page.html") or Path("page.html").read_text()
    assert "text.txt (2 samples, 32 tokens)" in Path("page.html").read_text(), page


def scored(model: Path | str, *arguments: str) -> dict[str, Any]:
    """What `prunec analyze` says of a model's groups and of the calibration."""
    small = ("--samples", "4", "--seq-len", "16", "--json", "-", "-q")
    return json.loads(run("analyze", model, *small, *arguments))  # type: ignore[no-any-return]


def test_a_masked_model(models: Path) -> None:
    told = scored(models / "bert", "--calibration", "texts.jsonl#body", "--importance", "taylor")
    assert [s["kind"] for s in told["calibration"]["sources"]] == ["rows"]
    assert 0 < told["calibration"]["tokens"] <= 64
    assert any("importance" in group for group in told["groups"])


def test_an_encoder_decoder(models: Path) -> None:
    mixed = ("--calibration", "pairs.jsonl", "--calibration", "text.txt")
    for importance in ("obs", "fisher"):
        told = scored(models / "t5", *mixed, "--importance", importance)
        assert [s["samples"] for s in told["calibration"]["sources"]] == [2, 2]
        assert any("importance" in group for group in told["groups"])


def test_images(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write_vit(tmp_path / "vit")
    write_images(tmp_path / "photos", *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)))
    found = pruned("vit", "--calibration", "photos", "--recipe", "llm-pruner")
    assert (found["samples"], found["tokens"]) == (4, 0)
    assert Path("out/preprocessor_config.json").exists()


def test_a_plain_module_and_a_loss_of_its_own(work: Path) -> None:
    arguments = ("--calibration", "my_code:pairs", "--importance", "taylor", "--json", "-", "-q")
    shown = json.loads(run("analyze", "my_code:net", *arguments, "--loss", "my_code:loss"))
    assert any("importance" in group for group in shown["groups"])
    wanda = ("--calibration", "my_code:pairs", "--importance", "wanda", "--json", "-", "-q")
    assert json.loads(run("analyze", "my_code:net", *wanda))["importance"] == "wanda"


LOSS = ("--loss", "my_code:own")


def test_a_loss_of_ones_own_ranks_otherwise(models: Path) -> None:
    taylor = ("--calibration", "text.txt", "--importance", "taylor")
    own, given = (scored(models / "llama", *taylor, *loss) for loss in ((), LOSS))
    assert own["calibration"] == given["calibration"]
    assert own["groups"] != given["groups"]


PRUNE = ("prune", "my_code:net", "-o", "out", "--recipe", "wanda-sp")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--calibration", "my_code:nothing"), "my_code:nothing gives no batches"),
        (("--calibration", "my_code:named"), "missing a required argument: 'x'"),
        (("--calibration", "my_code:absent"), "cannot import my_code:absent"),
        (("--calibration", "text.txt"), "has no tokenizer"),
        (("--calibration", "."), "the model reads no images"),
        (
            ("--calibration", "my_code:pairs", "--loss", "my_code:loss"),
            "wanda reads no gradients",
        ),
        (("--recipe", "llm-pruner", "--loss", "my_code"), "cannot import my_code"),
        (("--recipe", "llm-pruner", "--calibration", "my_code:pairs"), "no loss of its own"),
        (
            (
                "--recipe",
                "llm-pruner",
                "--calibration",
                "my_code:pairs",
                "--loss",
                "my_code:halves",
            ),
            "no floating-point scalar",
        ),
    ],
)
def test_what_is_refused(work: Path, arguments: tuple[str, ...], reason: str) -> None:
    message = run(*PRUNE, *arguments, code=2)
    assert message.count("error: ") == 1
    assert reason in message.replace("\n", " ")
    assert not (work / "out").exists()

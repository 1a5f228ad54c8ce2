"""prunec recover, report and compare on a tiny model, through the command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import TEXT, write_tiny_llama
from typer.testing import CliRunner, Result

import prunec
from prunec.cli.app import app

pytestmark = [pytest.mark.engine("peft"), pytest.mark.filterwarnings("ignore")]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAW = ("--calibration", "text.txt", "--samples", "2", "--seq-len", "32")
TRAIN = ("--steps", "4", "--set", "seq_len=32", "--set", "batch_size=2", "--set", "rank=2")


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert "\x1b" not in result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovered")
    write_tiny_llama(folder / "model")
    (folder / "text.txt").write_text(TEXT * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PRUNEC_CACHE", str(folder / "cache"))
        run("prune", "model", "-o", "small", "--ratio", "0.3", *DRAW)
        run("recover", "small", "-o", "mended", "--data", "text.txt", *TRAIN, "--keep-adapter",
            "--json", "mended.json")  # fmt: skip
        run("eval", "model", "mended", "--ppl", "text.txt", "--window", "32", "--max-windows", "4",
            "--kl", "--json", "eval.json", "--markdown", "eval.md")  # fmt: skip
        run("report", "mended", "--eval", "eval.json", "--prompt", "The quick brown <b>fox")
        run("compare", "small", "mended", "-o", "both.html", "--no-measure")
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PRUNEC_CACHE", str(folder / "cache"))


def test_the_directory_keeps_its_record_and_says_what_was_trained(folder: Path) -> None:
    old, new = (json.loads((folder / d / "prunec.json").read_text()) for d in ("small", "mended"))
    assert new["report"] == old["report"]
    assert new["base_model"] == "model"
    assert new["recovery"]["steps"] == 4
    assert json.loads((folder / "mended.json").read_text())["after"] == new["recovery"]["after"]
    plans = [(folder / d / "plan.json").read_text() for d in ("small", "mended")]
    assert plans[0] == plans[1]
    assert "## Recovery" in (folder / "mended" / "README.md").read_text()
    assert not [path for path in folder.iterdir() if path.name.endswith(".recovery")]


def test_the_adapter_on_the_pruned_directory_is_the_merged_model(folder: Path) -> None:
    from peft import PeftModel

    merged = prunec.load(folder / "mended")
    adapted = PeftModel.from_pretrained(prunec.load(folder / "small"), folder / "mended/adapter")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        wanted, found = merged(ids).logits, adapted.eval()(ids).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((folder / "mended/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "small"


def test_prune_trains_what_is_left_as_recover_does(folder: Path) -> None:
    changed = [option for option in TRAIN if option != "--set"]
    settings = [f"steps={changed[1]}", *changed[2:]]
    asked = [part for setting in settings for part in ("--recover-set", setting)]
    run("prune", "model", "-o", "chained", "--ratio", "0.3", *DRAW, "--recover", "lora", *asked,
        "--json", "chained.json")  # fmt: skip
    said = json.loads((folder / "chained.json").read_text())["recovery"]
    assert said["data"] == "text.txt"
    assert said["settings"]["steps"] == 4
    chained, mended, small = (
        prunec.load(folder / name).state_dict() for name in ("chained", "mended", "small")
    )
    assert all(torch.equal(chained[name], mended[name]) for name in mended)
    assert not all(torch.equal(chained[name], small[name]) for name in small)
    assert not [path for path in folder.iterdir() if path.name.startswith(".chained")]


def test_a_recovery_killed_before_it_tidied_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output has its name already, and the checkpoints are there."""
    again = ("recover", "small", "-o", "new/deep/again", "--data", "text.txt", *TRAIN)
    with monkeypatch.context() as patch:
        patch.setattr("prunec.passes.checkpoint.remove_progress", lambda _: None)
        run(*again)
    place = folder / "new" / "deep"
    assert {path.name for path in place.iterdir()} == {"again", ".again.recovery"}
    content = (place / "again" / "model.safetensors").read_bytes()
    said = " ".join(run(*again, "--resume").stderr.split())
    assert "From its progress the same is written again" in said
    assert [path.name for path in place.iterdir()] == ["again"]
    assert (place / "again" / "model.safetensors").read_bytes() == content
    shutil.rmtree(folder / "new")


def test_the_defaults_are_cut_to_what_the_model_reads(folder: Path) -> None:
    (folder / "long.txt").write_text(TEXT * 90)
    done = run("eval", "model", "small", "--ppl", "long.txt", "--kl", "--json", "cut.json")
    assert "The model reads at most 128 tokens: 128 at once, not 1024." in done.stderr
    for measured in json.loads((folder / "cut.json").read_text()):
        found = [*measured["perplexities"], *measured.get("divergences", ())]
        assert {figures["window"] for figures in found} == {128}
    steps = ("--steps", "1", "--set", "rank=2")
    done = run("recover", "small", "-o", "cut", "--data", "long.txt", *steps)
    assert "The model reads at most 128 tokens: 128 at once, not 256." in done.stderr
    record = json.loads((folder / "cut" / "prunec.json").read_text())
    assert record["recovery"]["settings"]["seq_len"] == 128


def test_eval_compares_with_the_first(folder: Path) -> None:
    dense, mended = json.loads((folder / "eval.json").read_text())
    assert "divergences" not in dense
    assert mended["divergences"][0]["kl"] > 0
    assert dense["perplexities"][0]["stderr"] > 0
    text = (folder / "eval.md").read_text()
    assert "| KL from the base |" in text
    assert "| mended | kept |" in text


def test_bad_input_is_one_message(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    for arguments, reason in (
        (("recover", "small"), "no output directory"),
        (("recover", "small", "-o", "mended"), "the output directory exists"),
        (("recover", "small", "-o", "x", "--set", "rnak=3"), "no setting 'rnak'"),
        (("recover", "small", "-o", "new/deep/x", "--data", "absent.txt", *TRAIN), "no such text"),
        (("recover", "small", "-o", "x", "--method", "lroa"), "no recovery method"),
        (
            ("recover", "small", "-o", "x", "--data", "text.txt", "--resume", *TRAIN),
            "no interrupted run",
        ),
        (
            ("recover", "small", "-o", "x", "--data", "text.txt", "--set", "seq_len=129"),
            "reads at most 128 tokens",
        ),
        (
            ("recover", "small", "-o", "x", "--data", "text.txt", "--trainer", "nosuch=1", *TRAIN),
            "Trainer refuses its arguments: ",
        ),
        (("recover", "small", "-o", "x", "--method", "full", "--keep-adapter"), "is no adapter"),
        (("recover", "small", "-o", "x", "--set", "rank=inf"), "must be a whole number"),
        (("recover", "small", "-o", "x", "--set", "weight_decay=-1"), "at least 0"),
        (("eval", "small", "--ppl", "text.txt", "--window", "129"), "reads at most 128 tokens"),
        (("recover", "absent", "-o", "x"), "absent is not a model directory"),
        (("report", "model"), "not a directory that prunec wrote"),
        (("eval", "model"), "nothing to measure"),
        (("eval", "model", "--kl", "--speed"), "--kl needs a text"),
        (
            ("eval", "model", "--ppl", "text.txt", "--protocol", "A", "--window", "9"),
            "a protocol says the window itself",
        ),
        (("eval", "model", "--tasks", "piqa", "--limit", "0"), "--limit 0 leaves no sample"),
    ):
        said = run(*arguments, code=2).stderr
        assert "error: " in said
        assert reason in said, said
    assert {path.name for path in folder.iterdir()} == before


def test_the_page_is_whole_and_needs_no_network(folder: Path) -> None:
    page = (folder / "mended" / "report.html").read_text()
    for heading in ("Asked and done", "Before and after", "What each layer kept", "Error per layer",
                    "Removal curves", "Recovery", "In their own words", "What goes together",
                    "How to open it", "Recipe and versions"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    assert "The quick brown <b>fox" not in page
    assert "<script" not in page
    namespaces = r"http://www\.w3\.org/(1999/xlink|2000/svg|XML/1998/namespace)"
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+", re.sub(namespaces, "", page)) == []
    both = (folder / "both.html").read_text()
    assert "2 pruned models compared" in both


DRIVER = """
<script>
const boxes = [...document.querySelectorAll("body *")].filter(e => !e.closest("svg") &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    const range = document.createRange(); range.selectNodeContents(e);
    return [e, [...range.getClientRects()].filter(r => r.width && r.height)];
  });
const overlaps = [];
for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
  const [a, ra] = boxes[i], [b, rb] = boxes[j];
  if (a.contains(b) || b.contains(a)) continue;
  for (const p of ra) for (const q of rb)
    if (Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
        Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 2)
      overlaps.push(a.textContent.slice(0, 30) + " | " + b.textContent.slice(0, 30));
}
const box = document.createElement("pre"); box.id = "seen";
box.textContent = JSON.stringify({overlaps, texts: boxes.length,
  wide: document.documentElement.scrollWidth, width: innerWidth,
  requests: performance.getEntriesByType("resource").map(r => r.name)});
parent.document.body.append(box);
</script>
"""


@pytest.mark.engine("chromium")
@pytest.mark.parametrize("name", ["mended/report.html", "both.html"])
@pytest.mark.parametrize("width", [360, 1440])
def test_no_text_overlaps_on_a_phone_or_a_desk(folder: Path, name: str, width: int) -> None:
    page = (folder / name).read_text()
    page = page.replace(
        "style-src 'unsafe-inline'",
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-src 'self' data:",
    )
    inner = escape(page.replace("</body>", DRIVER + "</body>"), quote=True)
    # A frame, as a window of a browser has a least width.
    outer = folder / f"driven-{width}.html"
    outer.write_text(
        f'<!doctype html><body style="margin:0"><iframe style="border:0;width:{width}px;'
        f'height:900px" srcdoc="{inner}"></iframe></body>'
    )
    seen = _seen(folder, outer)
    assert seen["texts"] > 40
    assert seen["width"] == width
    assert seen["requests"] == []
    assert seen["overlaps"] == []
    assert seen["wide"] <= seen["width"]


def _seen(folder: Path, file: Path) -> dict[str, Any]:
    browser = next(path for name in BROWSERS if (path := shutil.which(name)))
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--window-size=1600,1000", f"--user-data-dir={folder / 'profile'}"),
            *("--virtual-time-budget=5000", "--dump-dom", "--enable-logging=stderr"),
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    match = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(match.group(1)))
    return found


@pytest.fixture
def net(folder: Path) -> Path:
    """The directory of a plain module, pruned."""
    code = folder / "plain_net.py"
    code.write_text(
        "import torch\n"
        "from torch import nn\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))\n"
        "    return net, {'input': torch.randn(2, 4)}\n"
        "def labelled():\n"
        "    for n in (5, 2):\n"
        "        yield torch.randn(n, 4), torch.randint(3, (n,))\n"
    )
    if not (folder / "net").exists():
        run("prune", "plain_net:make", "-o", "net", "--ratio", "0.3", "--recipe", "magnitude")
    return folder / "net"


def test_a_plain_module_is_measured_by_its_program(net: Path) -> None:
    run("eval", "plain_net:make", "net", "--loader", "plain_net:labelled", "--speed",
        "--json", "net.json")  # fmt: skip
    dense, small = json.loads(Path("net.json").read_text())
    assert dense["accuracies"][0]["samples"] == small["accuracies"][0]["samples"] == 7
    record = json.loads((net / "prunec.json").read_text())
    assert [dense["parameters"], small["parameters"]] == record["report"]["parameters"]
    assert small["speed"][0]["batch"] == 2
    run("report", "net", "-o", "net.html")
    page = unescape(Path("net.html").read_text())
    assert 'model = torch.export.load("net/model.pt2").module()' in page
    assert "AutoModel" not in page
    said = run("recover", "net", "-o", "x", code=2).stderr
    assert "holds a plain PyTorch module" in said


@pytest.mark.parametrize(
    ("named", "files", "line"),
    [
        ("BertForMaskedLM", ["tokenizer_config.json"], "AutoModelForMaskedLM, AutoTokenizer"),
        (
            "ViTForImageClassification",
            ["preprocessor_config.json"],
            "AutoModelForImageClassification, AutoImageProcessor",
        ),
        ("PrunecT5ForConditionalGeneration", [], "AutoModelForSeq2SeqLM"),
    ],
)
def test_the_page_opens_each_model_with_its_own_class(
    tmp_path: Path, named: str, files: list[str], line: str
) -> None:
    from prunec.evaluation.page import read_case

    (tmp_path / "config.json").write_text(json.dumps({"architectures": [named]}))
    (tmp_path / "prunec.json").write_text(json.dumps({"report": {}}))
    for file in files:
        (tmp_path / file).write_text("{}")
    assert f"from transformers import {line}\n" in read_case(tmp_path).opening


def test_texts_end_where_the_model_stops_reading(folder: Path) -> None:
    from prunec.cli.compare import continuation
    from prunec.models import open_model

    source = open_model("model")  # reads 128 tokens
    assert continuation(source, "fox " * 40)
    assert continuation(source, "fox " * 200) is None
    assert continuation(source, "") is None

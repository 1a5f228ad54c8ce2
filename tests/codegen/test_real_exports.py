"""SmolLM2 pruned to 20 and to 50 %, exported and run in the real engines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from delivered import SMOLLM2, by_recipe
from transformers import AutoTokenizer

import prunec

pytestmark = pytest.mark.slow
WINDOW, WINDOWS = 512, 3
onnxruntime = pytest.mark.engine("onnxruntime")
llama_cpp = pytest.mark.engine("llama-cpp-python")


@pytest.fixture(scope="module", params=SMOLLM2)
def directory(request: pytest.FixtureRequest, delivery: Callable[[str], Path]) -> Path:
    return delivery(request.param)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        pytest.param("pt2", "within 0.0e+00", id="pt2"),
        pytest.param("python", "equal within", id="python"),
        pytest.param("onnx", "equal within", marks=onnxruntime, id="onnx"),
        pytest.param("gguf", "argmax equal at 100.0%", marks=llama_cpp, id="gguf"),
    ],
)
def test_forms(directory: Path, tmp_path: Path, form: str, said: str) -> None:
    """Each exporter refuses what it finds different: 1e-3 in onnxruntime, exact in torch."""
    done = prunec.export(directory, form, tmp_path / "out")
    assert done.finding.state == "measured"
    assert said in done.finding.detail
    if form == "gguf":
        assert "50 of 50 tokens the same" in done.finding.detail


@llama_cpp
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_q8_0_is_within_a_percent_of_f32(tmp_path: Path, ratio: float) -> None:
    """Perplexity in llama.cpp of text that was not calibrated on, by a model that can read it."""
    directory = by_recipe(ratio, data("calib/c4.utf8"), tmp_path)
    found = {}
    for kind in ("f32", "q8_0"):
        out = tmp_path / f"{kind}.gguf"
        prunec.export(directory, "gguf", out, settings={"type": kind})
        found[kind] = perplexity(out, directory)
    assert found["f32"] < 1000
    assert found["q8_0"] == pytest.approx(found["f32"], rel=0.01)


def perplexity(file: Path, directory: Path) -> float:
    import llama_cpp

    text = data("wikitext-2/valid.tokenised.txt").read_text(encoding="utf-8")[:20_000]
    tokens = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    engine = llama_cpp.Llama(
        str(file), n_ctx=WINDOW, n_batch=WINDOW, n_ubatch=WINDOW, logits_all=True, verbose=False
    )
    losses = []
    for start in range(0, WINDOW * WINDOWS, WINDOW):
        window = tokens[start : start + WINDOW]
        engine.reset()
        engine.eval(window)
        scores = torch.from_numpy(engine.scores[:WINDOW].copy()).log_softmax(-1)
        losses.append(-scores[:-1].gather(-1, torch.tensor(window)[1:, None]).mean())
    return float(torch.stack(losses).mean().exp())


def data(name: str) -> Path:
    folder = Path(os.environ.get("PRUNEC_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / "text" / name).is_file():
        pytest.skip("the shared test data is absent: set PRUNEC_DATA to its folder")
    return folder / "text" / name

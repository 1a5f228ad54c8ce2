"""Whatever a file holds: a result, or one of our errors; never a crash, never a file elsewhere."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_out_of_core import batches, module, vectors
from tiny_model import TEXT, tiny_llama, tiny_tokenizer, write_tiny_llama

import prunec
from prunec.calibration import calibrate
from prunec.errors import PrunecError
from prunec.evaluation.page.record import read_case
from prunec.events import silent
from prunec.graph.coupling import couple
from prunec.graph.selection import Selection
from prunec.graph.trace import trace
from prunec.models import open_model
from prunec.models.checkpoint import check_weights, safetensors_names
from prunec.models.dequantise import dequantised
from prunec.models.pretrained import open_tokenizer_in
from prunec.models.quiet import quiet
from prunec.passes.checkpoint import Decision, Journal, opened_journal
from prunec.passes.plan import GroupKeep, Plan
from prunec.passes.recipe import load_recipe, recipe_names
from prunec.passes.sites import find_sites
from prunec.passes.statistics.scores import Origin, Shelf

OTHERS = [None, True, 0, -1, 2**70, 1.5, float("nan"), "", "../../x", "/etc/passwd", [], {}, [[]]]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, lost, repeated, cut off, or a value of JSON replaced by another kind."""
    kind = draw.randrange(5)
    if kind == 0 and (changed := _another_value(content, draw)) is not None:
        return changed
    data = bytearray(content)
    at = draw.randrange(len(data))
    upto = min(len(data), at + draw.choice([1, 2, 8, 64]))
    if kind <= 1:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del data[at:upto]
    elif kind == 3:
        data[at:at] = data[at:upto]
    else:
        del data[at:]
    return bytes(data)


def _another_value(content: bytes, draw: random.Random) -> bytes | None:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            places.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    if isinstance(value, dict | list):
        walk(value)
    if not places:
        return None
    node, key = draw.choice(places)
    node[key] = draw.choice(OTHERS)
    return json.dumps(value).encode()


@contextmanager
def nothing_outside(folder: Path) -> Iterator[None]:
    before = {path for path in folder.parent.rglob("*") if folder not in path.parents}
    yield
    assert {path for path in folder.parent.rglob("*") if folder not in path.parents} == before


class Hangs(BaseException):
    """Nobody may take it for a failure of his own."""


@contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attack(file: Path, read: Callable[[], object], count: int, seed: int = 0) -> None:
    """Read a file mutated `count` times; each read may fail in our way only."""
    content, draw, refused = file.read_bytes(), random.Random(seed), 0
    with nothing_outside(file.parent):
        for number in range(count):
            bad = mutated(content, draw) if number else b"[" * 100_000
            file.write_bytes(bad)
            try:
                with no_hang(60):
                    read()
            except PrunecError:
                refused += 1
            except BaseException as error:  # a panic of Rust is no Exception
                raise AssertionError(f"mutation {number} of {file.name}: {bad[:400]!r}") from error
    file.write_bytes(content)
    assert refused


# Reader -> (mutations in the suite, in `make slow`); those of the latter are 10,000 and more.
COUNTS = {
    "header": (60, 4000),
    "index": (60, 2000),
    "plan": (60, 2000),
    "recipe": (40, 1500),
    "progress": (20, 500),
    "scores": (20, 500),
    "record": (20, 500),
    "rows": (20, 500),
    "tokenizer": (20, 500),
    "config": (15, 1000),
    "pruned": (10, 200),
    "gguf": (10, 300),
    "quantised": (40, 500),
}


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", COUNTS)
def test_no_mutation_crashes_a_reader(
    reader: str, long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    monkeypatch.setenv("PRUNEC_CACHE", str(folder / "cache"))
    attack(*READERS[reader](folder), COUNTS[reader][long], seed=int(long))


Case = tuple[Path, Callable[[], object]]


def _header(folder: Path) -> Case:
    with quiet():
        write_tiny_llama(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:6000])  # mostly header: that is what is attacked
    return file, lambda: safetensors_names(file)


def _index(folder: Path) -> Case:
    with quiet():
        write_tiny_llama(folder, max_shard_size="20KB")
    return folder / "model.safetensors.index.json", lambda: check_weights(folder)


def _plan(folder: Path) -> Case:
    coupling = couple(trace(module(), vectors()[0]))
    plan = folder / "plan.json"
    plan.write_text(json.dumps(Plan.of(coupling, Selection()).to_json()))

    return plan, lambda: Plan.read(plan).selection(coupling)


def _recipe(folder: Path) -> Case:
    file = folder / "mine.yaml"
    file.write_text(load_recipe(recipe_names()[0]).to_yaml())

    def read() -> None:
        recipe = load_recipe(str(file))
        for part in ("importance", "allocation", "compensation"):
            getattr(recipe, part).build(part)

    return file, read


def _progress(folder: Path) -> Case:
    with opened_journal(folder, {}, resume=False) as journal:
        assert journal is not None
        journal.record(0, Decision(3, (0.0, 3.0), 0.1, {}, {"weight": torch.ones(3)}))
    (file,) = folder.glob("0000-*")
    return file, lambda: Journal(folder).recall(0)


def _scores(folder: Path) -> Case:
    saved, recipe = folder / "scores", load_recipe("slimgpt")
    parts = recipe.importance.build("importance"), recipe.compensation.build("compensation")
    coupling = couple(trace(module(), vectors()[0]))
    sites, _ = find_sites(coupling, recipe.units)
    prunec.prune(module(), recipe=recipe, ratio=0.25, calibration=vectors(), scores=saved)
    origin = Origin.of(module(), *parts, None, [])

    def read() -> None:
        scores = Shelf(saved).saved
        assert scores is not None
        scores.check(origin, sites, ["input_gram"])
        scores.take(sites[0])
        scores.curve(sites[0])

    read()
    return saved / "scores.json", read


def _record(folder: Path) -> Case:
    coupling = couple(trace(module(), vectors()[0]))
    kept = {"0.up/ffn_channel": 8}
    record = {"report": {"sites": [{"name": "0.down", "kept": kept}]}, "recipe": None}
    (folder / "plan.json").write_text(json.dumps(Plan.of(coupling, Selection()).to_json()))
    file = folder / "prunec.json"
    file.write_text(json.dumps(record))
    return file, lambda: read_case(folder)


def _rows(folder: Path) -> Case:
    tokenizer = tiny_tokenizer()
    file = folder / "rows.jsonl"
    rows = [{"text": TEXT}, {"instruction": "Add.", "input": "1 2", "output": "3"}, {"text": "x"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file, lambda: calibrate([str(file)], tokenizer, samples=2, seq_len=8)


def _tokenizer(folder: Path) -> Case:
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    return file, lambda: open_tokenizer_in(folder, trust_remote_code=False)


def _pruned(folder: Path) -> Case:
    """The config of a directory whose class prunec generated."""
    with quiet():
        model = tiny_llama()
        sizes = {g.name: g.size for g in couple(trace(model, batches(1)[0])).groups}
        name = next(name for name in sizes if name.endswith("ffn_channel"))
        plan = Plan({name: GroupKeep(sizes[name], {(): tuple(range(40))})})
        prunec.apply_plan(model, plan, example=batches(1)[0]).model.save_pretrained(folder)
    file = folder / "config.json"
    assert "prunec" in json.loads(file.read_text())
    return file, lambda: open_model(str(folder), load_pruned=prunec.load)


def _config(folder: Path) -> Case:
    with quiet():
        write_tiny_llama(folder)
    file = folder / "config.json"
    return file, lambda: open_model(str(folder), weights="meta")


def _gguf(folder: Path) -> Case:
    """Header, metadata and one tensor; what is missing is an error of its own."""
    gguf = pytest.importorskip("gguf")
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_context_length(16)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("output_norm.weight", torch.ones(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, lambda: open_model(str(file))


def _quantised(folder: Path) -> Case:
    """A config that says how one packed weight is to be read."""
    parts = {
        "layer.qweight": torch.randint(-(2**31), 2**31 - 1, (4, 8), dtype=torch.int32),
        "layer.qzeros": torch.randint(0, 2**31 - 1, (2, 1), dtype=torch.int32),
        "layer.scales": torch.ones(2, 8, dtype=torch.float16),
        "norm.weight": torch.ones(8),
    }
    save_file(parts, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"}
    config = {"model_type": "llama", "dtype": "float16", "quantization_config": settings}
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file, lambda: dequantised(folder, silent)


READERS: dict[str, Callable[[Path], Case]] = {
    "header": _header,
    "index": _index,
    "plan": _plan,
    "recipe": _recipe,
    "progress": _progress,
    "scores": _scores,
    "record": _record,
    "rows": _rows,
    "tokenizer": _tokenizer,
    "pruned": _pruned,
    "config": _config,
    "gguf": _gguf,
    "quantised": _quantised,
}

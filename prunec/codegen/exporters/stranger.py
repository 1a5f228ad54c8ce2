"""Run as a file, in a process of its own: opens an exported file in its engine and runs it.

Imports nothing of prunec, and sees to it that nothing else can. argv: the folder of the job
(job.json, inputs.safetensors); what the engine computes goes to outputs.safetensors there.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[dict[str, Any]], Any]  # inputs by name -> logits, as torch tensors


class Without(importlib.abc.MetaPathFinder):
    """Hides packages, wherever they are installed."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def pt2(file: Path) -> Run:
    """A torch.export program."""
    import torch

    module = torch.export.load(file).module()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.data_ptr() % 64:  # a mapped file's addresses give other last bits
            tensor.data = tensor.data.clone()
    return lambda inputs: module(**inputs)


def python(file: Path) -> Run:
    """A module with a function `load`."""
    spec = importlib.util.spec_from_file_location("exported", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load()
    return lambda inputs: model(**inputs)


def onnx(file: Path) -> Run:
    """Onnxruntime on the CPU."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Any]) -> Any:
        fed = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(session.run(None, fed)[0])

    return run


def transformers(file: Path) -> Run:
    """A directory that the stock class opens, without code of its own; 16-bit weights widened."""
    import transformers as library

    config = json.loads(file.read_text(encoding="utf-8"))
    cls = getattr(library, config["architectures"][0])
    model, info = cls.from_pretrained(file.parent, output_loading_info=True)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        assert not info[kind], f"{kind}: {sorted(map(str, info[kind]))[:3]}"
    if all(p.is_floating_point() and p.itemsize == 2 for p in model.parameters()):
        model.float()
    model.eval()
    return lambda inputs: model(**inputs)[0]


def llama_cpp(file: Path) -> Run:
    """One sequence at a time; what continues the last one goes through its float32 KV cache."""
    import llama_cpp
    import torch

    engine = llama_cpp.Llama(
        str(file),
        n_ctx=1024,
        n_batch=1024,
        n_ubatch=1024,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=torch.get_num_threads(),
        verbose=False,
    )

    done: list[int] = []

    def run(inputs: dict[str, Any]) -> Any:
        rows = []
        for row in inputs["input_ids"].tolist():
            start = len(done) if row[: len(done)] == done and len(row) > len(done) else 0
            if not start:
                engine.reset()
            engine.eval(row[start:])
            done[:] = row
            rows.append(torch.from_numpy(engine.scores[: len(row)].copy()))
        return torch.stack(rows)

    return run


ENGINES = {f.__name__: f for f in (pt2, python, onnx, transformers, llama_cpp)}


def greedy(run: Run, ids: Any, count: int) -> Any:
    """The `count` likeliest tokens after `ids` [1, n], each appended in turn."""
    import torch

    for _ in range(count):
        last = run({"input_ids": ids})[:, -1:]
        ids = torch.cat([ids, last.argmax(-1)], 1)
    return ids[:, -count:]


def main(folder: Path) -> None:
    """Do the job in `folder`."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    import torch
    from safetensors.torch import load_file, save_file
    from torch.utils._pytree import tree_leaves

    sys.meta_path.insert(0, Without(job["hidden"]))
    torch.set_num_threads(job["threads"])
    tensors = load_file(folder / "inputs.safetensors")
    run = ENGINES[job["engine"]](Path(job["file"]))
    outputs = {}
    with torch.no_grad():
        for case, names in job["cases"].items():
            inputs = {name: tensors[f"{case}/{name}"] for name in names}
            outputs[case] = tree_leaves(run(inputs))[0].contiguous()
        if job["greedy"]:
            outputs["greedy"] = greedy(run, inputs["input_ids"][:1], job["greedy"])
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

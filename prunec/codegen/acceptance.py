"""Run as a file, in a process of its own, by prunec.codegen.gate: opens a directory as a stranger.

Imports nothing of prunec, and sees to it that nothing else can. argv: folders of one job each
(job.json, tensors.safetensors); the findings go to findings.json there.
"""

from __future__ import annotations

import importlib.abc
import inspect
import json
import sys
from pathlib import Path
from typing import Any


class WithoutPrunec(importlib.abc.MetaPathFinder):
    """Hides prunec, wherever it is installed."""

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname.partition(".")[0] == "prunec":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def tensors_of(output: Any) -> list[Any]:
    """The floating-point tensors of a model's output, in order."""
    import torch
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves(list(output.values()))
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def opened(job: dict[str, Any], auto: str, head: set[str] | None, problems: list[str]) -> Any:
    """The model as a user opens it; keys that do not fit are problems.

    The bare model (`head`: parameters of the whole one) has no use for the head, and may have a
    part, such as a pooler, that the whole one lacks.
    """
    import transformers

    # One block in memory at a time, as where it was written; two places make accelerate do it.
    disk = {"device_map": {"": "disk", "-": "cpu"}, "offload_folder": "offloaded"}
    model, info = getattr(transformers, auto).from_pretrained(
        job["directory"],
        **(disk if job["streamed"] else {}),
        trust_remote_code=job["custom"],
        attn_implementation=job["attention"],
        dtype=job["dtype"],
        output_loading_info=True,
    )
    for kind in ("missing_keys", "mismatched_keys", "error_msgs", "unexpected_keys"):
        keys = {str(key) for key in info.get(kind, ())}
        if head is not None:
            keys &= head | {name.partition(".")[2] for name in head}
            keys = set() if kind == "unexpected_keys" else keys
        if keys:
            problems.append(f"{auto}: {kind}: {sorted(keys)[:3]}")
    align(model)
    # torch multiplies by a weight that wants a gradient in another way, with other last bits
    return model.eval().requires_grad_(False)


def align(model: Any) -> None:
    """Move tensors to addresses that kernels like: a mapped file's give other last bits.

    The vector kernels of a one-token batch sum in another order where a row starts unaligned.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.data_ptr() % 64 or not tensor.is_contiguous():
            tensor.data = tensor.data.contiguous().clone()


def compare(model: Any, tensors: dict[str, Any], case: str, problems: list[str]) -> None:
    """The logits of one case against those of the model in memory, to the bit."""
    import torch

    parts = {k.removeprefix(case + "."): v for k, v in tensors.items() if k.startswith(case + ".")}
    inputs = {k.removeprefix("in."): v for k, v in parts.items() if k.startswith("in.")}
    accepts = inspect.signature(model.forward).parameters
    plain = {"use_cache": False} if "use_cache" in accepts else {}
    with torch.no_grad():
        found = tensors_of(model(**inputs, **plain))[0]
    wanted = parts["out"]
    if found.shape != wanted.shape:
        problems.append(f"{case}: output {list(found.shape)}, in memory {list(wanted.shape)}")
    elif not torch.equal(found, wanted):
        gap = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
        problems.append(f"{case}: logits differ by {gap:.1e} of the largest")


def generate(model: Any, inputs: dict[str, Any], job: dict[str, Any], problems: list[str]) -> None:
    """Greedy generation with the cache against generation without it; ties may fall either way."""
    import torch

    runs = [
        model.generate(
            **inputs,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=job["pad_token_id"],
        )
        for use_cache in (True, False)
    ]
    same = torch.ones(len(runs[0].sequences), dtype=torch.bool)
    for step, (a, b) in enumerate(zip(runs[0].logits, runs[1].logits, strict=True)):
        if not same.any():
            break
        gap = float((a - b)[same].abs().max() / b[same].abs().max())
        if not gap <= job["tolerance"]:
            problems.append(f"generate: with the cache, token {step} is off by {gap:.1e}")
            return
        tokens = [run.sequences[:, step - len(runs[0].logits)] for run in runs]
        same &= tokens[0] == tokens[1]


def problems_of(folder: Path) -> list[str]:
    """Do the job in `folder`: what is wrong with its directory."""
    import torch
    from safetensors.torch import load_file

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    tensors = load_file(folder / "tensors.safetensors")
    problems: list[str] = []
    model = opened(job, job["auto"], None, problems)
    for case in job["cases"]:
        compare(model, tensors, case, problems)
    if job["generates"] and not problems:
        case = job["cases"][-1]
        inputs = {
            k.removeprefix(f"{case}.in."): v for k, v in tensors.items() if f"{case}.in." in k
        }
        generate(model, inputs, job, problems)
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # by the class, not read
    head = {name for name, _ in model.named_parameters(remove_duplicate=False)} - computed
    del model
    if job["bare"] and not problems:
        opened(job, "AutoModel", head, problems)
    return problems


def main(folders: list[Path]) -> None:
    """Do the jobs one after the other; one that breaks does not stop the rest."""
    sys.meta_path.insert(0, WithoutPrunec())
    for folder in folders:
        try:
            problems = problems_of(folder)
        except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
            said = next(iter(str(error).splitlines()), "")
            problems = [f"it does not open: {type(error).__name__}: {said}"]
        (folder / "findings.json").write_text(json.dumps(problems), encoding="utf-8")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])

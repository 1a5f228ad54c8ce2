"""The parameters that train, found by the model's structure and not by its names; their merging."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunec.errors import PlanError, PluginError, VerifyError
from prunec.graph.paths import block_of
from prunec.graph.trace import trace
from prunec.recovery.settings import Recovery

_PRODUCTS = ("aten::linear", "aten::addmm", "aten::mm", "aten::matmul")


def linear_targets(model: nn.Module, example: Mapping[str, Tensor]) -> list[str]:
    """Paths of the linear layers whose product the traced graph computes, in its order.

    Those in repeated blocks, or all but the heads where the model repeats nothing: embeddings and
    heads are not trained.

    Raises:
        PlanError: there is none.
    """
    program = trace(model, example)
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if getattr(schema, "name", "") not in _PRODUCTS:
            continue
        for source in node.all_input_nodes:
            # the weight itself, or a view of it
            while source.op == "call_function" and len(source.all_input_nodes) == 1:
                source = source.all_input_nodes[0]
            name = program.bindings.get(source.name)
            if name is not None and name.endswith(".weight"):
                found[name.removesuffix(".weight")] = None
    linear = [path for path in found if isinstance(_module(model, path), nn.Linear | Conv1D)]
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    inner = [path for path in linear if block_of(f"{path}.weight") is not None]
    targets = inner or [path for path in linear if _module(model, path) is not head]
    if not targets:
        raise PlanError("no linear layer of this model can take LoRA", fix="--method full")
    return targets


def norms(model: nn.Module) -> list[str]:
    """Paths of the modules that hold vectors only: the norms, whatever they are called."""
    return [
        path
        for path, module in model.named_modules()
        if path
        and (own := list(module.parameters(recurse=False)))
        and all(parameter.dim() == 1 for parameter in own)
        and not list(module.children())
    ]


def attach(model: Any, settings: Recovery, example: Mapping[str, Tensor]) -> Any:
    """The model with what `settings.train` says made trainable, and nothing else.

    For "lora" and "scale" a peft model around this one, at the start equal to it.

    Raises:
        PluginError: peft is not installed.
    """
    model.requires_grad_(False)
    if settings.train == "full":
        return model.requires_grad_(True)
    peft = _peft()
    targets = linear_targets(model, example)
    if settings.train == "lora":
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
    else:
        config = peft.IA3Config(
            target_modules=targets,
            feedforward_modules=[],
            modules_to_save=norms(model) or None,
            task_type="CAUSAL_LM",
        )
    return peft.get_peft_model(model, config)


def merge(adapted: Any, probe: Mapping[str, Tensor]) -> Any:
    """The plain model with the trained update in its weights; it computes what the adapter did.

    Raises:
        VerifyError: it does not.
    """
    adapted.eval()
    with torch.no_grad():
        wanted = adapted(**probe, use_cache=False).logits
        merged = adapted.merge_and_unload()
        found = merged(**probe, use_cache=False).logits
    gap = float((found - wanted).abs().max() / wanted.abs().max())
    tolerance = 1e-3 if wanted.dtype == torch.float32 else 5e-2
    if not gap <= tolerance:
        raise VerifyError(
            "the merged model differs from the model with its adapter",
            where=f"logits differ by {gap:.1e} of the largest",
            so="nothing was written",
        )
    return merged.requires_grad_(False).eval()


def detach(adapted: Any) -> Any:
    """The plain model as it was before the adapter."""
    return adapted.unload().requires_grad_(False).eval()


def _peft() -> Any:
    try:
        return import_module("peft")
    except ImportError as error:
        raise PluginError(
            "peft is not installed: --method lora, scale and distill train by it",
            fix="pip install 'prunec[recovery]', or --method full",
        ) from error


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a parameter that is no module's weight
        return None

"""The parameters that train, found by the model's structure and not by its names; their merging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from prunec.errors import PlanError, PluginError, VerifyError
from prunec.graph.paths import block_of
from prunec.graph.sums import is_product, operator_name
from prunec.graph.trace import trace
from prunec.recovery.settings import Recovery


@dataclass(frozen=True)
class Targets:
    """What takes a low-rank update, by path, in the order of the graph.

    `layers` are linear layers; `stacks` parameters [experts, m, n] that hold a matrix an expert.
    """

    layers: tuple[str, ...]
    stacks: tuple[str, ...] = ()


def find_targets(model: nn.Module, example: Mapping[str, Tensor]) -> Targets:
    """The matrices whose product the traced graph computes.

    Those in repeated blocks, or all but the heads where the model repeats nothing: embeddings and
    heads are not trained.

    Raises:
        PlanError: there is none.
    """
    program = trace(model, example)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    layers: dict[str, None] = {}
    stacks: dict[str, None] = {}
    for node in filter(is_product, program.graph.nodes):
        for operand in node.all_input_nodes:
            name = program.bindings.get(_origin(operand).name, "")
            path = name.removesuffix(".weight")
            if isinstance(_module(model, path), nn.Linear | Conv1D):
                layers[path] = None
            elif len(shapes.get(name, ())) == 3 and "conv" not in operator_name(node):
                stacks[name] = None
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    inner = [path for path in layers if block_of(f"{path}.weight") is not None]
    chosen = inner or [path for path in layers if _module(model, path) is not head]
    if not chosen and not stacks:
        raise PlanError("no linear layer of this model can take LoRA", fix="--method full")
    return Targets(tuple(chosen), tuple(stacks))


def _origin(node: fx.Node) -> fx.Node:
    """What a node is a view or a choice of rows of, or the node itself."""
    while node.op == "call_function":
        chosen = operator_name(node) in ("index", "index_select")
        if len(node.all_input_nodes) != 1 and not chosen:
            break
        node = node.all_input_nodes[0]
    return node


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
        PlanError: a dropout where experts are trained, whose update is of the weight itself, or
            a layer that peft refuses.
    """
    model.requires_grad_(False)
    if settings.train == "full":
        return model.requires_grad_(True)
    peft = _peft()
    targets = find_targets(model, example)
    if settings.train == "lora":
        if targets.stacks and settings.dropout:
            raise PlanError(
                "the update of stacked experts takes no dropout",
                where=targets.stacks[0],
                fix="--set dropout=0",
            )
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(targets.layers),
            target_parameters=list(targets.stacks) or None,
            task_type="CAUSAL_LM",
        )
    else:
        config = peft.IA3Config(
            target_modules=list(targets.layers),
            feedforward_modules=[],
            modules_to_save=norms(model) or None,
            task_type="CAUSAL_LM",
        )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:  # as of layers whose weights a fused kernel reads past them
        raise PlanError(
            f"peft does not adapt this model: {error}", fix="--method full, or scale"
        ) from error


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

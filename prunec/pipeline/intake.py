"""The model that a run is given, made ready; what could not be delivered is refused first."""

from __future__ import annotations

from torch import nn

from prunec.codegen.remade import as_loaded
from prunec.errors import ModelError
from prunec.events import Progress
from prunec.graph.trace import unwrapped


def taken_in(model: nn.Module, progress: Progress) -> nn.Module:
    """The model out of its wrappers, with the buffers that it has when it is loaded; not mutated.

    Raises:
        ModelError: an adapter lies over its layers, or a tuned prompt before its inputs.
        TraceError: it is no nn.Module, or parts of it lie on disk.
    """
    model = unwrapped(model)
    adapted = [name for name, part in model.named_modules() if _is_adapted(part)]
    if adapted:
        raise ModelError(
            "the model's weights lie under an adapter (peft) that is not merged",
            where=adapted[0],
            so="no smaller directory could hold both; nothing was computed",
            fix="merge first: model = model.merge_and_unload()",
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            "the model reads a prompt or a prefix that was tuned (peft)",
            where=type(model).__name__,
            so="no smaller directory could hold both; nothing was computed",
            fix="prune model.get_base_model(), and tune a prompt for what comes out",
        )
    return as_loaded(model, progress)


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is one of peft's layers around another layer, whatever the method."""
    return hasattr(module, "base_layer") and hasattr(module, "unmerge")

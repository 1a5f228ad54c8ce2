"""A model as a torch.export program that holds for any batch and sequence, where it can."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from prunec.codegen.battery import FORWARD_ERRORS, difference, resized, tolerance
from prunec.errors import TraceError
from prunec.graph.trace import of_containers, result_tensors

log = logging.getLogger(__name__)

Inputs = dict[str, Tensor]
SHAPES = ((1, 1), (3, 17), (2, 11))  # (batch, sequence) that the program must hold for


@dataclass(frozen=True)
class Traced:
    """A program that takes the inputs by name and returns the logits (or hidden states).

    Attributes:
        program: without a cache; its inputs in the order of `example`.
        example: the inputs that it was traced with.
        dynamic: what may differ from the example: "batch", "sequence".
        cases: inputs that it was compared with the model on, by name.
    """

    program: ExportedProgram
    example: Inputs
    dynamic: tuple[str, ...]
    cases: Mapping[str, Inputs]

    @property
    def fixed(self) -> list[str]:
        """Notes on the sizes that are not free."""
        if "batch" in self.dynamic and ("sequence" in self.dynamic or not _tokens(self.example)):
            return []
        shapes = {name: list(tensor.shape) for name, tensor in self.example.items()}
        free = " and ".join(self.dynamic) or "nothing"
        return [f"{free} is dynamic; all other sizes are fixed: {shapes}"]


def trace_dynamic(
    model: nn.Module, example: Mapping[str, Tensor], *, whole: bool = False
) -> Traced:
    """Trace with a free batch and sequence; where the model does not allow it, with fewer.

    torch.export may specialise in silence: what it claims to hold for is run and compared.

    Args:
        whole: the program returns what the model does, and not its logits alone.

    Raises:
        TraceError: with fixed sizes it fails too.
    """
    inputs = dict(example)
    if "input_ids" in inputs and "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    wrapped, reason = named_forward(model, list(inputs), whole=whole), "no way of tracing was tried"
    choices = [("batch", "sequence"), ("batch",), ()] if _tokens(inputs) else [("batch",), ()]
    for dynamic in choices:
        cases = dict(_cases(model, inputs, dynamic))
        try:
            with _torch_operators(model):
                program = _export(wrapped, inputs, dynamic)
                wanted = dict(_applying(wrapped, cases))
                reason = _disagreement(program.module(), tolerance(wrapped), cases, wanted) or ""
        except FORWARD_ERRORS as error:  # export runs the model's own code
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if not reason:
            return Traced(program, inputs, dynamic, {name: cases[name] for name in wanted})
        log.info("not exported with dynamic %s: %s", dynamic, reason)
    raise TraceError(
        f"torch.export cannot take {type(model).__name__}: {reason}",
        fix="deliver the directory itself, which transformers opens",
    )


@contextmanager
def _torch_operators(model: Any) -> Iterator[None]:
    """Experts as batched products: transformers has an operator of its own, which others lack."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if before is None or not model._can_set_experts_implementation():
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def named_forward(model: nn.Module, names: list[str], *, whole: bool = False) -> nn.Module:
    """The model as a function of just these inputs, by name, that returns its first result.

    With `whole` it returns everything, as the model does; what comes in classes of the user's own
    as a tuple, since a program knows none.
    """
    accepts = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepts else {}

    def forward(self: Any, **inputs: Tensor) -> Any:
        output = self.model(**inputs, **extra)
        if whole:
            return output if of_containers(output) else tuple(_leaves(output))
        return result_tensors(output)[0]

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(n, kind) for n in ("self", *names)])
    vars(forward)["__signature__"] = signature
    wrapper: Any = type("Wrapper", (nn.Module,), {"forward": forward})()
    wrapper.model = model
    assert isinstance(wrapper, nn.Module)
    return wrapper.eval()


def _export(module: nn.Module, inputs: Inputs, dynamic: tuple[str, ...]) -> ExportedProgram:
    shapes = {name: _free(name, tensor, dynamic) for name, tensor in inputs.items()}
    with torch.no_grad():
        return torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False)


def _free(name: str, tensor: Tensor, dynamic: tuple[str, ...]) -> dict[int, Any]:
    axes = {0: Dim("batch")} if "batch" in dynamic else {}
    if "sequence" in dynamic and _is_tokens(tensor):
        axes[1] = Dim("target" if name.startswith("decoder") else "sequence")
    return axes


def _is_tokens(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_floating_point()


def _tokens(inputs: Mapping[str, Tensor]) -> bool:
    return any(_is_tokens(tensor) for tensor in inputs.values())


def _cases(
    model: nn.Module, example: Inputs, dynamic: tuple[str, ...]
) -> Iterator[tuple[str, Inputs]]:
    """The example, then what the program claims to hold for; the last with left padding."""
    yield "as traced", example
    first = next(iter(example.values()))
    for batch, length in SHAPES if "batch" in dynamic else ():
        if "sequence" not in dynamic:
            length = first.shape[1] if first.ndim > 1 else 1
        made = {
            name: tensor.to(example[name].dtype)
            for name, tensor in resized(model, example, batch, length).items()
        }
        yield f"{batch} x {length}" if _tokens(example) else f"batch {batch}", made
    if "attention_mask" in example and "decoder_input_ids" not in example:
        mask = torch.ones_like(example["attention_mask"])
        mask[0, : mask.shape[1] // 2] = 0
        yield "left padding", {**example, "attention_mask": mask}


def _applying(model: nn.Module, cases: Mapping[str, Inputs]) -> Iterator[tuple[str, list[Tensor]]]:
    """What the model gives for the inputs that it takes."""
    for name, inputs in cases.items():
        try:
            yield name, results(model, inputs)
        except FORWARD_ERRORS as error:
            log.info("case %r does not apply: %s", name, error)


def _disagreement(
    program: Any, limit: float, cases: Mapping[str, Inputs], wanted: Mapping[str, list[Tensor]]
) -> str | None:
    for name, tensors in wanted.items():
        gap = difference(results(program, cases[name]), tensors)
        if not gap <= limit:
            return f"{name}: the exported program is off by {gap:.1e}"
    return None


@torch.no_grad()
def results(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that the module gives, where there is no padding."""
    return [unpadded(leaf, inputs) for leaf in _leaves(module(**inputs))]


def _leaves(output: Any) -> list[Tensor]:
    plain = list(output.values()) if isinstance(output, Mapping) else output
    return [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]


@torch.no_grad()
def expected(module: nn.Module, inputs: Inputs) -> Tensor:
    """What the model gives, where there is no padding."""
    found = module(**inputs)
    assert isinstance(found, Tensor)
    return unpadded(found, inputs)


def unpadded(found: Tensor, inputs: Inputs) -> Tensor:
    """Without the positions that a decoder's mask hides: nothing is promised there."""
    mask = inputs.get("attention_mask")
    if mask is None or found.shape[:2] != mask.shape or found.ndim < 3:
        return found
    return found[mask.bool()]

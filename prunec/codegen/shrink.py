"""The dense module with smaller tensors and the numbers that fit them, proven equal to masking."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from prunec.codegen.battery import Check, attention_choices, checks, own_shape
from prunec.codegen.depth import without_branches
from prunec.codegen.fields import ConfigFields, config_fields
from prunec.codegen.fit import (
    Attributes,
    Fit,
    Outcomes,
    Reference,
    first_failure,
    fit,
    outcomes_of,
    usable,
)
from prunec.codegen.generated import adopt, auto_classes, opens_as_stock
from prunec.codegen.modeling_prunec import set_attributes
from prunec.codegen.streamed import Padded, at_hand, in_single, is_half
from prunec.codegen.twin import LazyTwin, assemble, padded, tensors_of
from prunec.errors import ExportError, PrunecError, VerifyError
from prunec.events import Progress, silent
from prunec.graph.selection import Sliced
from prunec.models.quiet import quiet

log = logging.getLogger(__name__)

Size = tuple[int, ...]
PROOF_SHAPES = ((2, 9),)  # (batch, sequence) at which the whole model is run once more


@dataclass(frozen=True)
class Shrunk:
    """A smaller module of the same class, and how its numbers were found.

    Attributes:
        model: the module, in eval mode; its parameters are the sliced tensors themselves. If the
            stock config cannot say its sizes, its class is a generated subclass of the stock one.
        attributes: module path -> attribute -> value; under "config", fields as that module reads
            them.
        config: what of the new sizes the stock config can say.
        trials: settings tried.
        checks: the comparisons that the module stood.
        added: names of parameters that the stock class lacks.
        sizes: parameter -> shape before and after, of those that changed.
        example: inputs by keyword, kept for the checks of what is written later.
        stored: where the weights are read if the module is on meta; None where it holds them.
    """

    model: nn.Module
    attributes: Attributes
    config: ConfigFields
    trials: int
    checks: tuple[str, ...]
    sizes: Mapping[str, tuple[Size, Size]] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    example: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    stored: Mapping[str, Tensor] | None = field(default=None, repr=False)


def shrink(
    model: nn.Module,
    sliced: Sliced,
    *,
    example: Mapping[str, Tensor],
    reference: Reference | None = None,
    progress: Progress = silent,
) -> Shrunk:
    """Give a model its sliced weights, find the numbers its forward needs, prove the result.

    Proof: the shrunk module equals its zero-padded twin (relative 1e-4 in fp32) at two batch sizes
    and three sequence lengths, with left padding, under each attention implementation and through
    its cache, on weights redrawn at unit gain; then as a whole on the real weights.

    Args:
        model: the dense module. Not mutated; its parameters may be on meta.
        sliced: what the slice pass made of it.
        example: minimal inputs by keyword.
        reference: (weights by name, inputs of the example's shape) -> first output, for slicings
            where masking is not the truth: a smaller hidden size changes the statistics of norms.
        progress: where steps are announced.

    Raises:
        ExportError: no setting of the module's numbers passes, or several distinct ones do.
        VerifyError: the whole module on its real weights differs from the reference.
    """
    _validate(model, sliced)
    with quiet():
        failure: PrunecError | None = None
        for base, part, origin in without_branches(model, sliced, example):
            try:
                with progress.task("fit the module to its new sizes"):
                    found = fit(base, part, example, _renaming(reference, origin))
                    small = assemble(base, part.weights, part.added).eval()
                    for path, values in found.attributes.items():
                        set_attributes(small.get_submodule(path), values)
                with (
                    progress.task("compare the whole module with the masked one"),
                    in_single(small, part.stored) as whole,
                ):
                    proven = _prove(model, sliced, whole, example, reference, caches=found.caches)
                with at_hand(small, part.stored):
                    fields = config_fields(base, small, part, example)
                return _finished(base, part, small, found, fields, proven, example)
            except (ExportError, VerifyError) as error:
                log.info("not delivered so: %s", error)
                failure = failure or error
        assert failure is not None
        raise failure


def _renaming(reference: Reference | None, origin: Mapping[str, str]) -> Reference | None:
    """The reference for a module whose parameters have other names."""
    if reference is None:
        return None

    def renamed(weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        named = {origin[name]: tensor for name, tensor in weights.items() if name in origin}
        return reference(named, inputs)

    return renamed


def _finished(
    model: nn.Module,
    sliced: Sliced,
    small: nn.Module,
    found: Fit,
    fields: ConfigFields,
    proven: tuple[str, ...],
    example: Mapping[str, Tensor],
) -> Shrunk:
    """The module under the config and class that say its sizes."""
    if fields.uniform is not None and not opens_as_stock(small):
        fields = replace(fields, uniform=None, reason="no Auto class opens its config")
    if auto_classes(small):
        adopt(small, found.attributes, fields)
    passed = (*(f"{check.name} (redrawn weights)" for check in found.checks), *proven)
    new = sliced.weights
    sizes = {
        name: (tuple(old.shape), tuple(new[name].shape))
        for name, old in tensors_of(model).items()
        if name in sliced.keep
    }
    added = tuple(sliced.added)
    return Shrunk(
        small,
        found.attributes,
        fields,
        found.trials,
        passed,
        sizes,
        added,
        dict(example),
        sliced.stored,
    )


def _validate(model: nn.Module, sliced: Sliced) -> None:
    old = tensors_of(model)
    assert sliced.keep.keys() <= sliced.weights.keys(), "kept indices without weights"
    for name, tensor in sliced.weights.items():
        if name not in old:
            raise ExportError(f"the model has no parameter {name}", where=type(model).__name__)
        keep = sliced.keep.get(name, (None,) * tensor.ndim)
        shape = [n if k is None else len(k) for n, k in zip(old[name].shape, keep, strict=True)]
        assert list(tensor.shape) == shape, f"{name}: {list(tensor.shape)}, kept {shape}"


def _prove(
    model: nn.Module,
    sliced: Sliced,
    small: nn.Module,
    example: Mapping[str, Tensor],
    reference: Reference | None,
    *,
    caches: bool,
) -> tuple[str, ...]:
    """The whole module on its real weights; the checks that it passed."""
    if reference is not None:
        wanted = [reference(sliced.weights, example)]
        names = attention_choices(small)
        outcomes = [(Check(f"as traced, {n}", dict(example), n), wanted) for n in names]
    else:
        outcomes = _twin_outcomes(model, sliced, example, caches or bool(sliced.skip))
    reason = first_failure(small, outcomes) if outcomes else "no check applies to this class"
    if reason is not None:
        raise VerifyError(
            "the shrunk module differs from the masked model on the real weights",
            where=reason,
            so="nothing was written",
        )
    return tuple(f"{check.name} (whole model)" for check, _ in outcomes)


def _twin_outcomes(
    model: nn.Module, sliced: Sliced, example: Mapping[str, Tensor], caches: bool
) -> Outcomes:
    """Few runs, as the whole model's take long: the rest is known from the search."""
    outcomes = _outcomes_at(PROOF_SHAPES, model, sliced, example, caches)
    return outcomes or _outcomes_at((own_shape(example),), model, sliced, example, caches)


def _outcomes_at(
    shapes: Sequence[tuple[int, int]],
    model: nn.Module,
    sliced: Sliced,
    example: Mapping[str, Tensor],
    caches: bool,
) -> Outcomes:
    battery = checks(model, example, shapes)
    last = {(check.decode, check.attention): check for check in battery}  # padded, if it can be
    first = battery[0].attention
    chosen = [c for c in last.values() if not c.decode or (caches and c.attention == first)]
    if sliced.stored is not None or is_half(model):
        base = model if is_half(model) else assemble(model, {})  # which is changed meanwhile
        with in_single(base, Padded(model, sliced), sliced.added) as twin:
            if sliced.stored is None:
                return usable(twin.eval(), chosen)
            return outcomes_of(twin.eval(), chosen[:1])  # each check reads all weights
    outcomes = usable(LazyTwin(model, sliced).module.eval(), chosen)
    if not outcomes:  # a module that reads a child's weight itself finds it empty
        twin = assemble(model, padded(model, sliced, sliced.weights), sliced.added).eval()
        outcomes = usable(twin, chosen)
    return outcomes


def is_transformers(model: nn.Module) -> bool:
    """Whether a module is one of transformers' own kind, with a config and directories."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")

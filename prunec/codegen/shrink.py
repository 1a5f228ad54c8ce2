"""The dense module with smaller tensors and the numbers that fit them, proven equal to masking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prunec.codegen.attributes import CONFIG, Candidate, Values, candidates
from prunec.codegen.battery import (
    FORWARD_ERRORS,
    Check,
    checks,
    difference,
    expected,
    outputs,
    tolerance,
)
from prunec.codegen.fields import ConfigFields, config_fields
from prunec.codegen.modeling_prunec import set_attributes
from prunec.codegen.observe import attribute_reads
from prunec.codegen.perturb import free_knobs, grown_together
from prunec.codegen.reduce import WHOLE, Layers, reduced, representative_layers
from prunec.codegen.search import Choice, search
from prunec.codegen.twin import LazyTwin, assemble, padded, redraw, tensors_of
from prunec.errors import ExportError, VerifyError
from prunec.events import Progress, silent
from prunec.graph.selection import Sliced

log = logging.getLogger(__name__)

Attributes = dict[str, dict[str, Any]]
Reference = Callable[[Mapping[str, Tensor]], Tensor]
PROOF_SHAPES = ((2, 9),)


@dataclass(frozen=True)
class Shrunk:
    """A smaller module of the same class, and how its numbers were found.

    Attributes:
        model: the module; its parameters are the sliced tensors themselves.
        attributes: module path -> attribute -> value; under "config", fields as that module reads
            them.
        config: what of the new sizes the stock config can say.
        trials: settings tried.
        checks: the comparisons that the module stood.
        added: names of parameters that the stock class lacks.
        example: inputs by keyword, kept for the checks of what is written later.
    """

    model: nn.Module
    attributes: Attributes
    config: ConfigFields
    trials: int
    checks: tuple[str, ...]
    added: tuple[str, ...] = ()
    example: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


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
        reference: outputs of the pruned program for `example`, where masking is not the truth
            (a smaller hidden size changes the statistics of norms).
        progress: where steps are announced.

    Raises:
        ExportError: no setting of the module's numbers passes, or several distinct ones do.
        VerifyError: the whole module on its real weights differs from the twin.
    """
    _validate(model, sliced)
    found = candidates(model, sliced)
    with progress.task("fit the module to its new sizes"):
        if reference is None:
            chosen, trials, names = _fit_to_twin(model, sliced, found, example)
        else:
            chosen, trials, names = _fit_to_reference(model, sliced, found, example, reference)
    attributes = _by_module(chosen)
    small = assemble(model, sliced.weights, sliced.added)
    for path, values in attributes.items():
        set_attributes(small.get_submodule(path), values)
    if reference is None:
        with progress.task("compare the whole module with its zero-padded twin"):
            names += _prove(model, sliced, small, example)
    fields = config_fields(model, small, sliced, example)
    return Shrunk(small, attributes, fields, trials, names, tuple(sliced.added), dict(example))


def _validate(model: nn.Module, sliced: Sliced) -> None:
    old = tensors_of(model)
    assert sliced.keep.keys() <= sliced.weights.keys(), "kept indices without weights"
    for name, tensor in sliced.weights.items():
        if name not in old:
            raise ExportError(f"the model has no parameter {name}", where=type(model).__name__)
        keep = sliced.keep.get(name, (None,) * tensor.ndim)
        shape = [n if k is None else len(k) for n, k in zip(old[name].shape, keep, strict=True)]
        assert list(tensor.shape) == shape, f"{name}: {list(tensor.shape)}, kept {shape}"


class _Bench:
    """A module under test with the expected outputs of every check. Trials set its numbers."""

    def __init__(self, module: nn.Module, layers: Layers, wanted: list[tuple[Check, list[Tensor]]]):
        self.module = module
        self.layers = layers
        self.wanted = wanted
        self._before: dict[tuple[str, str], Any] = {}

    def judge(self, choice: Choice) -> str | None:
        """None if the module passes with these numbers, else the first failure."""
        attributes = self.layers.only(_by_module(choice))
        before = [
            (self.module.get_submodule(path), name)
            for path, values in attributes.items()
            for name in values
        ]
        state = [(module, name, getattr(module, name)) for module, name in before]
        for path, values in attributes.items():
            set_attributes(self.module.get_submodule(path), values)
        try:
            return first_failure(self.module, self.wanted)
        finally:
            for module, name, value in state:
                setattr(module, name, value)


def first_failure(module: nn.Module, wanted: Iterable[tuple[Check, list[Tensor]]]) -> str | None:
    """Which check fails first, and how; None if all pass."""
    limit = tolerance(module)
    for check, outcome in wanted:
        try:
            gap = difference(outputs(module, check), outcome)
        except FORWARD_ERRORS as error:
            return f"{check.name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
        if gap > limit:
            return f"{check.name}: off by {gap:.1e} of the largest output"
    return None


def _fit_to_twin(
    model: nn.Module, sliced: Sliced, found: list[Candidate], example: Mapping[str, Tensor]
) -> tuple[Choice, int, tuple[str, ...]]:
    few = representative_layers(model, found)
    for layers in (few, WHOLE) if few.kept else (WHOLE,):
        short, part = reduced(model, sliced, layers)
        drawn = redraw(short, part)
        twin = assemble(short, padded(short, part, drawn.weights), drawn.added)
        with attribute_reads(twin) as reads:
            wanted = usable(twin, checks(twin, example))
        if wanted:
            break
    else:
        raise ExportError("the model itself does not run on its example inputs")
    bench = _Bench(assemble(short, drawn.weights, drawn.added), layers, wanted)
    read = [c for c in found if _is_read(c, layers, reads)]
    chosen, trials = _settle(model, read, bench)
    unread = [c for c in found if c not in chosen]
    chosen |= _implied(model, unread)
    names = tuple(f"{check.name} (redrawn weights)" for check, _ in wanted)
    return chosen, trials, names


def usable(twin: nn.Module, battery: Sequence[Check]) -> list[tuple[Check, list[Tensor]]]:
    """The checks that apply to this model, with the outputs that they must give.

    A class that cannot run at some length, or whose own cache does not reproduce its forward, says
    nothing about pruning there.
    """
    found = []
    for check in battery:
        try:
            outcome = expected(twin, check)
            sound = not check.decode or difference(outputs(twin, check), outcome) <= tolerance(twin)
        except FORWARD_ERRORS as error:
            log.info("check %r does not apply: %s", check.name, error)
            continue
        if sound and all(t.isfinite().all() for t in outcome):
            found.append((check, outcome))
        else:
            log.info("check %r does not apply: the stock class itself fails it", check.name)
    return found


def _is_read(candidate: Candidate, layers: Layers, reads: set[tuple[str, str]]) -> bool:
    paths = (layers.rename(path) for path in candidate.modules)
    return any((path, candidate.name) in reads for path in paths if path is not None)


def _settle(model: nn.Module, read: Sequence[Candidate], bench: _Bench) -> tuple[Choice, int]:
    """One accepted choice. Where several readings pass, the one that the class itself bears out.

    With a single KV head, for example, any repeat count gives the same numbers by broadcasting.
    """
    accepted = search(read, bench.judge)
    choice, without_effect = dict(accepted.choice), []
    for candidate, others in accepted.equivalents.items():
        passing = (choice[candidate], *others)
        changed = [values for values in passing if values != candidate.old]
        if len(changed) > 1:
            borne_out = [v for v in changed if v in grown_together(model, candidate)]
            if len(borne_out) != 1:
                raise _ambiguous(candidate, changed, accepted.trials)
            choice[candidate] = borne_out[0]
        elif others:
            choice[candidate] = candidate.old
            without_effect.append(candidate)
    choice |= _implied(model, without_effect)
    if choice != accepted.choice and (reason := bench.judge(choice)) is not None:
        raise VerifyError(f"settings that pass alone do not together: {reason}")
    return choice, accepted.trials


def _ambiguous(candidate: Candidate, changed: Sequence[Values], trials: int) -> ExportError:
    return ExportError(
        f"several settings of {candidate.name} pass every check ({trials} tried)",
        where="; or ".join(candidate.describe(values) for values in changed),
        so="the right one cannot be told",
        fix="choose other sizes for these groups, so that the readings differ",
    )


def _implied(model: nn.Module, unread: Sequence[Candidate]) -> Choice:
    """Numbers without effect that plainly describe a size: kept true for readers such as peft."""
    plain = [c for c in unread if c.implied not in (None, c.old) and CONFIG not in c.name]
    knobs = free_knobs(model, plain)
    return {c: c.implied for c in plain if c.implied is not None and c not in knobs}


def _by_module(choice: Choice) -> Attributes:
    """Only what changes: module path -> attribute -> value, config fields under "config"."""
    found: Attributes = {}
    for candidate, values in choice.items():
        for path, old, new in zip(candidate.modules, candidate.old, values, strict=True):
            if old == new:
                continue
            own = found.setdefault(path, {})
            if candidate.name.startswith(CONFIG):
                own.setdefault("config", {})[candidate.name.removeprefix(CONFIG)] = new
            else:
                own[candidate.name] = new
    return found


def _prove(
    model: nn.Module, sliced: Sliced, small: nn.Module, example: Mapping[str, Tensor]
) -> tuple[str, ...]:
    twin = LazyTwin(model, sliced).module
    wanted = usable(twin, checks(twin, example, PROOF_SHAPES))
    if not wanted:  # a module that reads its child's weight directly finds it empty
        twin = assemble(model, padded(model, sliced, sliced.weights), sliced.added)
        wanted = usable(twin, checks(twin, example, PROOF_SHAPES))
    if not wanted:
        raise VerifyError("no check of the shrunk module applies", where=type(model).__name__)
    reason = first_failure(small, wanted)
    if reason is not None:
        raise VerifyError(
            "the shrunk module differs from the masked model on the real weights",
            where=reason,
            so="nothing was written",
        )
    return tuple(f"{check.name} (whole model)" for check, _ in wanted)


def _fit_to_reference(
    model: nn.Module,
    sliced: Sliced,
    found: list[Candidate],
    example: Mapping[str, Tensor],
    reference: Reference,
) -> tuple[Choice, int, tuple[str, ...]]:
    """As above without a twin: the reference at the example's shape, then the module itself."""
    inputs = dict(example)
    wanted = [(c, [reference(inputs)]) for c in _as_traced(model, inputs)]
    bench = _Bench(assemble(model, sliced.weights, sliced.added), WHOLE, wanted)
    chosen, trials = _settle(model, found, bench)
    return chosen, trials, tuple(f"{check.name} (rewritten graph)" for check, _ in wanted)


def _as_traced(model: nn.Module, inputs: dict[str, Tensor]) -> list[Check]:
    from prunec.codegen.battery import attention_choices

    return [
        Check("as traced" + (f", {a} attention" if a else ""), inputs, a)
        for a in attention_choices(model)
    ]

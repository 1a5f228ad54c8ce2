"""Finding the numbers that a module with other tensors needs, by running it beside a reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunec.codegen.attributes import CONFIG, Candidate, Values, candidates
from prunec.codegen.battery import (
    FORWARD_ERRORS,
    Check,
    attention_choices,
    checks,
    difference,
    expected,
    outputs,
    own_shape,
    resized,
    tolerance,
    whole_outputs,
)
from prunec.codegen.modeling_prunec import set_attributes
from prunec.codegen.observe import Reads, attribute_reads
from prunec.codegen.perturb import free_knobs, grown_together
from prunec.codegen.reduce import WHOLE, Layers, reduced, representative_layers
from prunec.codegen.search import Choice, search
from prunec.codegen.twin import LazyTwin, assemble, padded, redraw
from prunec.errors import ExportError, VerifyError
from prunec.graph.memory import release_freed
from prunec.graph.selection import Sliced

log = logging.getLogger(__name__)

Attributes = dict[str, dict[str, Any]]
Reference = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
Outcomes = list[tuple[Check, list[Tensor]]]


@dataclass(frozen=True)
class Fit:
    """Module path -> attribute -> value, the settings tried, and the checks that they stood."""

    attributes: Attributes
    trials: int
    checks: tuple[Check, ...]

    @property
    def caches(self) -> bool:
        """Whether the class's own cache reproduces its forward."""
        return any(check.decode for check in self.checks)


def fit(
    model: nn.Module,
    sliced: Sliced,
    example: Mapping[str, Tensor],
    reference: Reference | None = None,
) -> Fit:
    """The numbers with which the module equals its reference, on weights redrawn at unit gain.

    The reference is the zero-padded twin, run on the first layer and those that tell the options
    apart; or the one given, at the example's shape only.

    Raises:
        ExportError: no setting passes, or several that differ.
    """
    if sliced.stored is not None:  # memory is short: begin without the holes of what came before
        release_freed()
    found = candidates(model, sliced)
    few = WHOLE if reference is not None else representative_layers(model, found)
    if few.kept:
        try:
            return _fit_on(few, found, model, sliced, example, None)
        except ExportError as error:
            # A layer with one KV head cannot tell two repeat counts apart; another one may.
            log.info("a few layers do not settle it, all are tried: %s", error)
    return _fit_on(WHOLE, found, model, sliced, example, reference)


def misfit(model: nn.Module, sliced: Sliced, example: Mapping[str, Tensor]) -> str | None:
    """Why no numbers make the module fit, as one check on a few layers shows; None where some may.

    A look ahead: what passes here can still fail in `fit`. Only shapes are read of the weights.
    """
    found = candidates(model, sliced)
    layers = representative_layers(model, found)
    short, part = reduced(model, sliced, layers)
    drawn = redraw(short, part)
    twin = _twin(short, drawn, lazily=any(p.is_meta for p in model.parameters())).eval()
    with attribute_reads(twin) as reads:
        wanted = usable(twin, checks(twin, example, (own_shape(example),))[:1])
    bench = Bench(assemble(short, drawn.weights, drawn.added).eval(), layers, wanted)
    try:
        search([c for c in found if _is_read(c, layers, reads)], bench.judge)
    except ExportError as error:
        return error.so
    return None


def _fit_on(
    layers: Layers,
    found: Sequence[Candidate],
    model: nn.Module,
    sliced: Sliced,
    example: Mapping[str, Tensor],
    reference: Reference | None,
) -> Fit:
    short, part = reduced(model, sliced, layers)
    drawn = redraw(short, part)
    twin = _twin(short, drawn, lazily=sliced.stored is not None).eval()
    with attribute_reads(twin) as reads:
        wanted = usable(twin, checks(twin, example))
        wanted = wanted or usable(twin, checks(twin, example, (own_shape(example),)))
    if reference is not None:  # also where zeros leave the twin without numbers
        wanted = _referred(model, example, lambda inputs: reference(drawn.weights, inputs))
    if not wanted:
        raise ExportError(
            "the model gives no finite numbers on its example inputs",
            where=type(model).__name__,
        )
    module = assemble(short, drawn.weights, drawn.added).eval()
    bench = Bench(module, layers, wanted)
    read = [c for c in found if _is_read(c, layers, reads)]
    choice, trials = _settle(model, read, bench, whole=layers is WHOLE)
    if reference is not None:
        with bench.set(choice):
            wanted += consistent(module, twin, example)
    choice |= _implied(model, [c for c in found if c not in choice])
    return Fit(by_module(choice), trials, tuple(check for check, _ in wanted))


def _twin(model: nn.Module, drawn: Sliced, *, lazily: bool) -> nn.Module:
    """The zero-padded twin; `lazily` one module's weights at a time, where memory is short."""
    if lazily:
        return LazyTwin(model, drawn).module
    return assemble(model, padded(model, drawn, drawn.weights), drawn.added)


class Bench:
    """A module under test beside the outputs that every check must give."""

    def __init__(self, module: nn.Module, layers: Layers, wanted: Outcomes) -> None:
        self._module, self._layers, self._wanted = module, layers, list(wanted)

    def set(self, choice: Choice) -> _Setting:
        return _Setting(self._module, self._layers.only(by_module(choice)))

    def judge(self, choice: Choice) -> str | None:
        """None if the module passes with these numbers, else a failure.

        The check that failed comes first the next time: what is wrong shows there again.
        """
        with self.set(choice):
            for index, entry in enumerate(self._wanted):
                reason = first_failure(self._module, [entry])
                if reason is not None:
                    self._wanted.insert(0, self._wanted.pop(index))
                    return reason
        return None


class _Setting:
    """Numbers of a module, for the time of a context."""

    def __init__(self, module: nn.Module, attributes: Attributes) -> None:
        self._values = [(module.get_submodule(path), own) for path, own in attributes.items()]
        self._before = [(m, name, getattr(m, name)) for m, own in self._values for name in own]

    def __enter__(self) -> None:
        for module, own in self._values:
            set_attributes(module, own)

    def __exit__(self, *_: object) -> None:
        for module, name, value in self._before:
            setattr(module, name, value)


def usable(twin: nn.Module, battery: Sequence[Check]) -> Outcomes:
    """The checks that apply to this model, with the outputs that they must give.

    A class that cannot run at some length, or whose own cache does not reproduce its forward, says
    nothing about pruning there.
    """
    found = []
    for check, outcome in outcomes_of(twin, battery):
        if check.decode and first_failure(twin, [(check, outcome)]) is not None:
            log.info("check %r does not apply: the class itself fails it", check.name)
        else:
            found.append((check, outcome))
    return found


def outcomes_of(twin: nn.Module, battery: Sequence[Check]) -> Outcomes:
    """What each check must give; those left out at which the reference itself does not run."""
    found: Outcomes = []
    whole: dict[object, list[Tensor]] = {}
    for check in battery:
        key = id(check.inputs), check.attention  # a check through the cache shares its inputs
        try:
            if key not in whole:
                whole[key] = whole_outputs(twin, check)
        except FORWARD_ERRORS as error:
            log.info("check %r does not apply: %s", check.name, error)
            continue
        if whole[key] and all(t.isfinite().all() for t in whole[key]):
            found.append((check, expected(whole[key], check)))
    return found


def first_failure(module: nn.Module, wanted: Iterable[tuple[Check, list[Tensor]]]) -> str | None:
    """Which check fails first, and how; None if all pass.

    A reference may tell the first outputs alone.
    """
    limit = tolerance(module)
    for check, outcome in wanted:
        try:
            gap = difference(outputs(module, check)[: len(outcome)], outcome)
        except FORWARD_ERRORS as error:
            said = next(iter(str(error).splitlines()), "")
            return f"{check.name}: {type(error).__name__}: {said[:160]}"
        if gap > limit:
            return f"{check.name}: off by {gap:.1e} of the largest output"
    return None


def _is_read(candidate: Candidate, layers: Layers, reads: Reads) -> bool:
    paths = (layers.rename(path) for path in candidate.modules)
    return any((path, candidate.name) in reads for path in paths if path is not None)


def _settle(
    model: nn.Module, read: Sequence[Candidate], bench: Bench, *, whole: bool
) -> tuple[Choice, int]:
    """One accepted choice. Where several readings pass, the one that the class itself bears out.

    With a single KV head, for example, any repeat count gives the same numbers by broadcasting.
    Where the class does not say either, a part of the model (not `whole`) does not settle it; of
    the whole a number that may stay does, and the likeliest reading is as good as the others.
    """
    accepted = search(read, bench.judge)
    choice, without_effect = dict(accepted.choice), []
    for candidate, others in accepted.equivalents.items():
        passing = (choice[candidate], *others)
        changed = [values for values in passing if values != candidate.old]
        several = len(changed) > 1
        borne_out = grown_together(model, candidate).intersection(changed) if several else ()
        if len(borne_out) == 1:
            (choice[candidate],) = borne_out
        elif several and not whole:
            raise _ambiguous(candidate, changed, accepted.trials)
        elif others and candidate.old in passing:
            choice[candidate] = candidate.old
            without_effect.append(candidate)
    choice |= _implied(model, without_effect)
    if choice != accepted.choice and (reason := bench.judge(choice)) is not None:
        raise VerifyError(f"numbers that pass one by one do not pass together: {reason}")
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


def by_module(choice: Choice) -> Attributes:
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


def _referred(
    model: nn.Module,
    example: Mapping[str, Tensor],
    reference: Callable[[Mapping[str, Tensor]], Tensor],
) -> Outcomes:
    """The reference at the shapes that it holds for, under every attention implementation."""
    inputs = {n: (t.float() if t.is_floating_point() else t).cpu() for n, t in example.items()}
    wanted = [reference(inputs)]
    return [
        (Check("as traced" + (f", {name} attention" if name else ""), inputs, name), wanted)
        for name in attention_choices(model)
    ]


@torch.no_grad()
def consistent(module: nn.Module, twin: nn.Module, example: Mapping[str, Tensor]) -> Outcomes:
    """Checks of a module against itself, at other shapes and through its cache, all passed.

    Rows of a batch do not depend on each other, and a causal model's positions not on later ones
    (where the twin shows that it is one).

    Raises:
        ExportError: naming the first that fails.
    """
    wanted: Outcomes = []
    for name in attention_choices(module):
        inputs = resized(module, example, 3, 12)
        whole = Check("3 x 12", inputs, name)
        for rows, length in ((3, 12), (2, 7), (1, 1)):
            part = {k: _corner(v, rows, length) for k, v in inputs.items()}
            check = Check(f"{rows} x {length} as in 3 x 12, {name or ''} attention", part, name)
            if first_failure(twin, [(check, _corners(outputs(twin, whole), rows, length))]) is None:
                wanted.append((check, _corners(outputs(module, whole), rows, length)))
    decoding = [check for check in checks(module, example) if check.decode]
    sound = {check.name for check, _ in usable(twin, decoding)}
    wanted += [
        (check, expected(whole_outputs(module, check), check))
        for check in decoding
        if check.name in sound
    ]
    reason = first_failure(module, wanted)
    if reason is not None:
        raise ExportError("the shrunk module contradicts itself", where=reason)
    return wanted


def _corner(tensor: Tensor, rows: int, length: int) -> Tensor:
    cut = tensor[:rows]
    return cut[:, :length] if tensor.ndim == 2 and not tensor.is_floating_point() else cut


def _corners(found: Sequence[Tensor], rows: int, length: int) -> list[Tensor]:
    return [t[:rows, :length] if t.ndim > 2 and t.shape[1] == 12 else t[:rows] for t in found]

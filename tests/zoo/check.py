"""Everything that is asked of one architecture: trace, couple, both oracles, wrong slices."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunec.errors import PrunecError, TraceError
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.program import Program
from prunec.graph.retarget import retarget
from prunec.graph.rules import RULES
from prunec.graph.trace import trace
from prunec.passes.oracles import oracle
from prunec.passes.oracles.mask import relative_difference

TOLERANCE = 1e-9
SINGLE = 1e-4
Record = dict[str, Any]


def examine(model: nn.Module, inputs: dict[str, Tensor], *, controls: int = 24) -> Record:
    """A JSON-able record of one model; never raises for what the model or a rule does wrong."""
    record: Record = {"parameters": sum(p.numel() for p in model.parameters()), "failures": []}
    start = time.perf_counter()
    try:
        program = trace(model, inputs)
    except TraceError as error:
        return {**record, "status": "untraceable", "reason": str(error.message)[:300]}
    record["trace_s"] = round(time.perf_counter() - start, 2)
    record["nodes"] = len(program.graph.nodes)
    try:
        _equal_to_eager(model, program, inputs, record)
        program = _usable(program)
        start = time.perf_counter()
        coupling = couple(program)
        record["couple_s"] = round(time.perf_counter() - start, 2)
    except Exception as error:  # noqa: BLE001 - a crash of the analysis is a finding
        record["failures"].append(_failure("couple", "crash", error))
        return {**record, "status": "crashed"}
    record.update(_described(coupling))
    record["checks"] = _checked(coupling, record["failures"])
    record["controls"] = _controlled(coupling, controls, record["failures"])
    record["status"] = "exact" if not record["failures"] else "wrong"
    return record


def _equal_to_eager(
    model: nn.Module, program: Program, inputs: dict[str, Tensor], record: Record
) -> None:
    """The traced graph is the model: without this nothing else means anything."""
    from prunec.graph.trace import _Positional  # the one definition of 'the first output'

    with torch.no_grad():
        eager = _Positional(model, list(inputs))(*inputs.values())[0]
    difference = relative_difference(program.run(None, **inputs), eager)
    record["eager"] = difference
    if not difference < SINGLE:
        record["failures"].append({"subject": "trace", "way": "eager", "difference": difference})


def _usable(program: Program) -> Program:
    """In double precision, on weights of unit gain, unless those overflow in this model."""
    double = retarget(program, torch.float64)
    for candidate in (oracle.redraw(double), double):
        if bool(torch.isfinite(candidate.run(None, **candidate.example)).all()):
            return candidate
    return double


def _described(coupling: CouplingGraph) -> Record:
    layout = coupling.layout
    operators: Counter[str] = Counter()
    for node in coupling.program.graph.nodes:
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            operators[str(node.target) if schema is None else schema.name] += 1
    bare = {
        name
        for name in coupling.program.parameters
        if coupling.program.state[name].ndim > 1
        and not any(member.parameter == name for g in coupling.groups for member in g.members)
    }
    return {
        "groups": len(coupling.groups),
        "kinds": dict(Counter(group.kind for group in coupling.groups)),
        "missing": dict(layout.missing),
        "problems": dict(Counter(layout.problems.values()).most_common(12)),
        "operators": dict(operators),
        "pinned_parameters": {
            p.parameter: f"{p.reason} | {p.where}"[:160]
            for p in reversed(coupling.pinned)
            if p.parameter in bare
        },
    }


def _checked(coupling: CouplingGraph, failures: list[Record]) -> Record:
    counts: Counter[str] = Counter()
    worst = 0.0
    for check in _every_check(coupling, failures):
        counts[check.way] += 1
        counts[check.reference] += 1
        if check.vacuous:
            counts["vacuous"] += 1
        if check.exact(TOLERANCE):
            counts["exact"] += 1
            worst = max(worst, check.difference)
        else:
            failures.append(
                {
                    "subject": check.subject,
                    "way": check.way,
                    "difference": check.difference,
                    "effect": check.effect,
                }
            )
    return {**counts, "worst": worst}


def _every_check(coupling: CouplingGraph, failures: list[Record]) -> Iterator[oracle.Check]:
    """As oracle.check_groups, but one crash does not hide the rest."""
    program = coupling.program
    dense = program.run(None, **program.example)
    plans = [("permuted", g.name, [g]) for g in coupling.groups if not oracle.ordered(g.dim)]
    plans += [("uniform", g.name, [g]) for g in coupling.groups]
    plans += [("ragged", g.name, [g]) for g in coupling.groups if g.companions]
    if coupling.groups:
        plans += [(way, "all groups", list(coupling.groups)) for way in ("uniform", "ragged")]
    for way, subject, groups in plans:
        try:
            if way == "permuted":
                yield oracle.check_permutation(coupling, groups[0], dense)
                continue
            selection = oracle.choose(groups, ragged=way == "ragged", by_name=coupling)
            if selection:
                yield oracle.check_selection(coupling, selection, subject, way, dense, TOLERANCE)
        except Exception as error:  # noqa: BLE001 - a crash is a finding
            failures.append(_failure(subject, way, error))


def _controlled(coupling: CouplingGraph, limit: int, failures: list[Record]) -> Record:
    counts: Counter[str] = Counter(made=0, caught=0, inert=0)
    missed = []
    try:
        for control in oracle.wrong_slices(coupling, limit=limit):
            counts["inert" if control.inert else "made"] += 1
            if control.inert:
                continue
            if control.caught(TOLERANCE):
                counts["caught"] += 1
            else:
                missed.append(f"{control.group}: {control.parameter}[{control.axis}]")
    except (PrunecError, RuntimeError, AssertionError) as error:
        failures.append(_failure("controls", "crash", error))
    return {**counts, "missed": missed}


def _failure(subject: str, way: str, error: BaseException) -> Record:
    lines = str(error).strip().splitlines() or [""]
    return {"subject": subject, "way": way, "error": f"{type(error).__name__}: {lines[0]}"[:240]}


def has_rule(operator: str) -> bool:
    """Whether an operator (``aten::linear``) has a rule of its own or by its pointwise tag."""
    if operator in RULES.names:
        return True
    namespace, _, name = operator.partition("::")
    try:
        packet = getattr(getattr(torch.ops, namespace), name)
    except (AttributeError, RuntimeError):
        return False
    return any(getattr(packet, overload) in RULES for overload in packet.overloads())

"""Recurrent layers and cells: what they carry from step to step are units, gates are not.

A unit whose weights are zero stays zero at every step, so removing it and silencing it are the
same: its gate of an LSTM adds tanh(0), a GRU moves it towards tanh(0).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from prunec.errors import DimError
from prunec.graph.dims import Dim, as_product, product_of
from prunec.graph.rules.registry import RULES, Call, Result, Value

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@RULES.register(*(f"aten::{name}" for name in _GATES))
def recurrence(call: Call) -> Result:
    """[n, t, c] or [t, n, c] and states [layers, n, h]: all layers share their hidden units."""
    weights, layers = list(call.arg("params")), int(call.arg("num_layers"))
    directions = 2 if call.arg("bidirectional") else 1
    each = 4 if call.arg("has_biases") else 2
    if call.arg("input") is None or len(weights) != layers * directions * each:
        raise DimError("a recurrence over packed sequences, or with projections")
    states = _states(call)
    features, time, rows = _axes(call)
    depth, _, hidden = call.dims(states[0])
    call.pin(time, "a step of a recurrence")
    for state in states:
        first, second, third = call.dims(state)
        call.pin(first, "a layer of a recurrence")
        call.unify(second, rows)
        call.unify(third, hidden)
    for layer in range(layers):
        for direction in range(directions):
            start = (layer * directions + direction) * each
            _gated(call, weights[start : start + each], features, hidden)
        features = _beside(call, hidden, directions)
    _note(call, hidden)
    made = [rows, time] if call.arg("batch_first") else [time, rows]
    return [Value((*made, features)), *(Value((depth, rows, hidden)) for _ in states)]


@RULES.register(*(f"aten::{name}_cell" for name in _GATES))
def cell(call: Call) -> Result:
    """One step: [n, c] and states [n, h]."""
    states = _states(call)
    rows, features = call.dims("input")
    hidden = call.dims(states[0])[1]
    for state in states:
        call.unify(call.dims(state)[0], rows)
        call.unify(call.dims(state)[1], hidden)
    weights = [call.arg(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    _gated(call, [node for node in weights if node is not None], features, hidden)
    _note(call, hidden)
    return [Value((rows, hidden)) for _ in states]


def _states(call: Call) -> list[fx.Node]:
    given = call.arg("hx")
    return list(given) if isinstance(given, list | tuple) else [given]


def _axes(call: Call) -> tuple[Dim, Dim, Dim]:
    """Features, steps and rows of the input."""
    first, second, features = call.dims("input")
    return (features, second, first) if call.arg("batch_first") else (features, first, second)


def _gated(call: Call, weights: Sequence[fx.Node], features: Dim, hidden: Dim) -> None:
    """Weights of the input and of the state, then their biases: rows are gates x hidden."""
    gates = _GATES[call.name.removeprefix("aten::").removesuffix("_cell")]
    for node in weights:
        gate, units = as_product(call.dims(node)[0], [gates, hidden.size])
        call.pin(gate, "a gate")
        call.unify(units, hidden)
    call.unify(call.dims(weights[0])[1], features)
    call.unify(call.dims(weights[1])[1], hidden)


def _beside(call: Call, hidden: Dim, directions: int) -> Dim:
    """The features of a layer's result: one direction after the other."""
    if directions == 1:
        return hidden
    direction = call.fresh(directions)
    call.pin(direction, "a direction of a recurrence")
    return product_of([direction, hidden])


def _note(call: Call, hidden: Dim) -> None:
    """What a removed unit told the others at earlier steps has to be computed anew."""
    call.note(hidden, "recurrent")

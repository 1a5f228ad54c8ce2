"""Places for a fitted bias: what a site adds to its product, or could add."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx

from prunec.graph.program import Program
from prunec.passes.sites import Reading, Site


def with_biases(program: Program, sites: Sequence[Site]) -> Program:
    """The same program, with a bias of zeros at every site whose layer has an empty place for one.

    From here on such a bias is a tensor of the program like any other: the stream adds it, slicing
    carries it along, the oracle sees it. `Program.added` names those that the model lacks.
    """
    names = {
        node.name: name
        for site in sites
        for given in site.inputs
        for reading in given.readings
        if (name := _vacancy(program, reading))
        for node in _calls(program, reading.parameter)
    }
    if not names:
        return program
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    made: dict[str, fx.Node] = {}
    zeros: dict[str, Tensor] = {}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.name not in names:
            continue
        name, (value, weight, *_) = names[node.name], node.args
        if name not in made:
            first = next(iter(graph.nodes))
            with graph.inserting_before(first):
                made[name] = graph.placeholder(name.replace(".", "_"))
            made[name].meta = {**weight.meta, "val": weight.meta["val"][:, 0]}
            zeros[name] = torch.zeros(made[name].meta["val"].shape, dtype=weight.meta["val"].dtype)
        copies[node].args = (copies[value], copies[weight], made[name])
        copies[node].kwargs = {}
    graph.lint()
    return replace(
        program,
        graph_module=fx.GraphModule(program.graph_module, graph),
        bindings={**program.bindings, **{node.name: name for name, node in made.items()}},
        state=ChainMap(zeros, cast(dict[str, Tensor], program.state)),  # which may lie on disk
    )


def _vacancy(program: Program, reading: Reading) -> str | None:
    """The name of the bias that the weight's module has an empty place for, if it has one."""
    name = f"{reading.parameter.removesuffix('.weight')}.bias"
    linear = torch.ops.aten.linear.default
    fits = all(node.target is linear for node in _calls(program, reading.parameter))
    return name if fits and reading.bias is None and name in program.vacant else None


def _calls(program: Program, parameter: str) -> list[fx.Node]:
    """The calls that are given a parameter."""
    return [
        user
        for node in program.graph.nodes
        if node.op == "placeholder" and program.bindings.get(node.name) == parameter
        for user in node.users
    ]

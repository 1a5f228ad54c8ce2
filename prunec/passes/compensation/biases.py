"""Places for a fitted bias: what a site adds to its product, or could add."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx

from prunec.graph.program import Program
from prunec.passes.sites import Site


def with_biases(program: Program, sites: Sequence[Site]) -> Program:
    """The same program, with a bias of zeros at every site whose layer has an empty place for one.

    From here on such a bias is a tensor of the program like any other: the stream adds it, slicing
    carries it along, the oracle sees it. `Program.added` names those that the model lacks.
    """
    names = {
        node.name: name
        for site in sites
        if (name := _vacancy(program, site))
        for node in site.nodes
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


def _vacancy(program: Program, site: Site) -> str | None:
    """The name under which the site's module would hold a bias; None if it has one, or no place."""
    name = f"{site.name}.bias"
    linear = all(node.target is torch.ops.aten.linear.default for node in site.nodes)
    return name if linear and site.bias is None and name in program.vacant else None

"""A few layers that stand for all: where the search for a module's numbers is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from prunec.codegen.attributes import Candidate, role_of
from prunec.codegen.twin import assemble
from prunec.graph.selection import Extent, Sliced

T = TypeVar("T")
FEW = 4  # layers, from which on leaving some out pays


@dataclass(frozen=True)
class Layers:
    """Which children of the model's module lists stay. Empty: all."""

    kept: Mapping[str, tuple[int, ...]]

    def rename(self, name: str) -> str | None:
        """A name of the whole model as it is in the reduced one; None if it is left out."""
        for path, kept in self.kept.items():
            if name.startswith(path + "."):
                index, dot, rest = name[len(path) + 1 :].partition(".")
                if int(index) not in kept:
                    return None
                return f"{path}.{kept.index(int(index))}{dot}{rest}"
        return name

    def only(self, named: Mapping[str, T]) -> dict[str, T]:
        renamed = ((self.rename(name), value) for name, value in named.items())
        return {name: value for name, value in renamed if name is not None}


WHOLE = Layers({})


def representative_layers(model: nn.Module, candidates: Sequence[Candidate]) -> Layers:
    """The first layer, one of every class, and enough to tell the candidates' options apart."""
    kept: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in kept)
        if isinstance(module, nn.ModuleList) and len(module) >= FEW and not inside:
            chosen = _chosen(path, module, candidates)
            if len(chosen) < len(module):
                kept[path] = chosen
    return Layers(kept)


def _chosen(path: str, layers: nn.ModuleList, candidates: Sequence[Candidate]) -> tuple[int, ...]:
    facts: list[set[object]] = []
    for index, layer in enumerate(layers):
        prefix = f"{path}.{index}"
        shows: set[object] = {role_of(f"{prefix}.{p}", m) for p, m in layer.named_modules() if p}
        for candidate in candidates:
            for at, where in enumerate(candidate.modules):
                if where == prefix or where.startswith(prefix + "."):
                    options = candidate.options
                    shows |= {
                        (candidate.role, candidate.name, i, j)
                        for i in range(len(options))
                        for j in range(i)
                        if options[i][at] != options[j][at]
                    }
        facts.append(shows)
    chosen, known = [0], set(facts[0])
    while missing := [len(f - known) for f in facts]:
        if not max(missing):
            break
        chosen.append(missing.index(max(missing)))
        known |= facts[chosen[-1]]
    if len(chosen) == 1:
        chosen.append(1)
    return tuple(sorted(chosen))


def reduced(model: nn.Module, sliced: Sliced, layers: Layers) -> tuple[nn.Module, Sliced]:
    """Model and selection with only those layers, around the same tensors."""
    if not layers.kept:
        return model, sliced
    parameters = dict(model.named_parameters(remove_duplicate=False))
    short = assemble(model, parameters, keep_layers=layers.kept)
    extents = tuple(
        Extent(e.old, e.new, frozenset(names))
        for e in sliced.extents
        if (names := {n for p in e.parameters if (n := layers.rename(p)) is not None})
    )
    only = layers.only
    return short, Sliced(only(sliced.weights), only(sliced.keep), extents, only(sliced.added))

"""The stock class with every layer as wide as the widest: zeros where a layer has less.

It opens anywhere without code, and saves nothing at run time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from prunec.codegen.battery import difference, resized, tolerance
from prunec.codegen.exporters.compare import Engine, measure
from prunec.codegen.exporters.exporter import Finding
from prunec.codegen.exporters.source import ModelDirectory
from prunec.codegen.exporters.traced import SHAPES, expected, named_forward
from prunec.codegen.fields import overrides
from prunec.codegen.perturb import meta_model
from prunec.codegen.streamed import in_single
from prunec.codegen.twin import assemble, stock_class, tensors_of
from prunec.graph.coupling import CouplingGraph, couple
from prunec.graph.dims import Dim, extent
from prunec.graph.selection import Keep, Selection
from prunec.graph.trace import trace
from prunec.passes.slice import pad_state

_ENGINE = Engine("transformers", "transformers", single=True)
_TRIALS = 100_000  # sets of counts tried for groups that share all their axes


@dataclass(frozen=True)
class Padded:
    """Zero units up to the widest layer."""

    file: ClassVar[str] = "config.json"
    alone: ClassVar[bool] = False

    def can_express(self, source: ModelDirectory) -> Sequence[str]:
        if "prunec" not in source.config:
            return ["its layers are alike: the directory is a stock one already"]
        if skipped := source.table["skip"]:
            return [f"a removed sub-layer is no layer of zeros: {next(iter(skipped))}"]
        if added := source.table["added"]:
            return [f"the stock class has no place for {next(iter(added))}"]
        return [] if source.once(_widened) else ["no sizes of the stock class hold every layer"]

    def needed_bytes(self, source: ModelDirectory) -> int:
        stock: Any = source.once(_widened)
        return sum(parameter.nbytes for parameter in stock.parameters())

    def write(self, source: ModelDirectory, folder: Path) -> Sequence[str]:
        stock: Any = source.once(_widened)
        assert stock is not None
        stock.save_pretrained(folder)
        source.copy_tokenizer(folder)
        before, after = (_count(model.parameters()) for model in (source.model, stock))
        return [f"padding costs {after - before:,} parameters: {before:,} become {after:,}"]

    def check(self, source: ModelDirectory, folder: Path) -> Finding:
        shapes = {f"{batch} x {length}": (batch, length) for batch, length in SHAPES}
        cases = {n: resized(source.model, source.example, *size) for n, size in shapes.items()}
        return measure(_ENGINE, source, folder / self.file, cases)


def _count(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _widened(source: ModelDirectory) -> nn.Module | None:
    """The stock model at the least sizes that hold every layer, equal to the source's; or None.

    Shapes alone may be read in several ways, 24 rows as 3 heads of 8 or 4 of 6: the model tells.
    """
    shapes = {name: tuple(t.shape) for name, t in tensors_of(source.model).items()}
    for fields in _choices(source.model.config):
        stock = _stock(source, fields)
        if stock is not None:
            coupling = couple(trace(stock, source.example))
            for counts in solutions(coupling, shapes):
                made = _filled(source, stock, coupling, counts)
                if _equal(source, made):
                    return made
    return None


def _filled(
    source: ModelDirectory, stock: nn.Module, coupling: CouplingGraph, counts: Mapping[Dim, int]
) -> nn.Module:
    """The stock model with the source's weights among zeros: the first units of each group."""
    keeps = {d: Keep(np.arange(d.size) < n) for d, n in counts.items() if n < d.size}
    state = tensors_of(source.model)
    small = {name: state[name].detach() for name in coupling.program.parameters}
    wide = pad_state(coupling, Selection(keeps), small)
    names = {**dict.fromkeys(wide), **coupling.program.tied}
    return assemble(stock, {name: wide[first or name] for name, first in names.items()}).eval()


def _equal(source: ModelDirectory, made: nn.Module) -> bool:
    inputs = resized(source.model, source.example, *SHAPES[-1])
    with in_single(made, None) as wide, in_single(source.model, None) as model:
        pair = [expected(named_forward(m, list(inputs)), inputs) for m in (wide, model)]
        return difference(pair[:1], pair[1:]) <= tolerance(model)


def _choices(config: Any) -> Iterator[dict[str, int]]:
    """The largest value of every field that differs by layer; then the sizes before pruning."""
    rows = list(overrides(config).values())
    count = int(getattr(config, "num_hidden_layers", len(rows)))
    names = dict.fromkeys(name for row in rows for name in row)
    rows += [{}] * (count - len(rows))
    most = {name: max(int(row.get(name, getattr(config, name))) for row in rows) for name in names}
    if most:
        yield most
    heads, groups = "num_attention_heads", "num_key_value_heads"
    if heads in most or groups in most:  # a layer of few KV heads may have more queries for each
        pairs = [
            [int(row.get(name, getattr(config, name, 1))) for name in (heads, groups)]
            for row in rows
        ]
        per_group = max(-(-query // max(group, 1)) for query, group in pairs)
        yield {**most, heads: per_group * max(group for _, group in pairs)}
    yield {}


def _stock(source: ModelDirectory, fields: Mapping[str, int]) -> nn.Module | None:
    """The stock class on meta, its buffers real; None where its config refuses the fields."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    model: Any = source.model
    cls = stock_class(model)
    dropped = ("prunec", "auto_map", "per_layer_config", "allow_global_per_layer_attribute_access")
    plain = {name: value for name, value in source.config.items() if name not in dropped}
    config = type(model.config).from_dict({**plain, "architectures": [cls.__name__]})
    built: Any = meta_model(cls, config, dict(fields))
    if built is None:
        return None
    with init_empty_weights(include_buffers=False):
        stock: Any = cls(built.config)
    stock.tie_weights()
    for parameter in stock.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(model.dtype)
    return stock.eval().requires_grad_(False)  # type: ignore[no-any-return]


def solutions(
    coupling: CouplingGraph, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[Dim, int]]:
    """Every way to read shapes as numbers of units, those first that touch fewer kinds of units."""
    kinds = sorted({group.kind for group in coupling.groups})
    known: list[dict[Dim, int]] = []
    for held in range(len(kinds), -1, -1):
        for whole in itertools.combinations(kinds, held):
            counts = solve(coupling, shapes, whole)
            if counts is not None and counts not in known:
                known.append(counts)
                yield counts


def solve(
    coupling: CouplingGraph, shapes: Mapping[str, tuple[int, ...]], whole: Sequence[str] = ()
) -> dict[Dim, int] | None:
    """How many units every group must keep for the parameters to have these shapes; None if none.

    Groups of the kinds `whole` stay so, as do those whose units a zero cannot stand for (experts
    under a top-k, normalised features).
    """
    equations = []
    for name in coupling.program.parameters:
        dims = coupling.layout.parameters[name]
        if len(shapes.get(name, ())) != len(dims):
            return None
        equations += list(zip(dims, shapes[name], strict=True))
    fixed = {g.dim.root for g in coupling.groups if g.normalised or g.kind in whole}
    sizes = {g.dim.root: g.size for g in coupling.groups}
    counts = {leaf: size for leaf, size in sizes.items() if leaf in fixed}
    free = {leaf: size for leaf, size in sizes.items() if leaf not in fixed}
    while free:
        unknown = [(_free_leaves(dim, free), dim, size) for dim, size in equations]
        least = min((leaves for leaves, _, _ in unknown if leaves), key=len, default=None)
        if least is None:
            break  # leaves of no parameter
        own = [(dim, size) for leaves, dim, size in unknown if leaves and leaves <= least]
        found = _fitting(sorted(least, key=lambda d: d.label), own, free, counts)
        if found is None:
            return None
        counts |= found
        free = {leaf: size for leaf, size in free.items() if leaf not in found}
    right = all(extent(dim, counts) == size for dim, size in equations)
    return counts if right else None


def _free_leaves(dim: Dim, free: Mapping[Dim, int]) -> frozenset[Dim]:
    return frozenset(leaf.root for leaf in dim.leaves() if leaf.root in free)


def _fitting(
    leaves: Sequence[Dim],
    equations: Sequence[tuple[Dim, int]],
    free: Mapping[Dim, int],
    known: Mapping[Dim, int],
) -> dict[Dim, int] | None:
    """The first counts of these leaves that satisfy the equations about them alone."""
    if math.prod(free[leaf] for leaf in leaves) > _TRIALS:
        return None
    for counts in itertools.product(*(range(1, free[leaf] + 1) for leaf in leaves)):
        tried = dict(zip(leaves, counts, strict=True))
        if all(extent(dim, {**known, **tried}) == size for dim, size in equations):
            return tried
    return None

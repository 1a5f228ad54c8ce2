"""The slice pass: the only place where a tensor of a model changes its size."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from prunec.errors import ModelError
from prunec.graph.coupling import CouplingGraph
from prunec.graph.dims import Dim
from prunec.graph.interpreter import Stream
from prunec.graph.program import Program
from prunec.graph.resize import ResizedCall, resized_call
from prunec.graph.selection import Extent, Selection, Sliced
from prunec.graph.waiting import Place

# Out of core, what a stream may hold at a wide site rather than compute it twice.
_HELD_BYTES = 1 << 30


class Weights(Mapping[str, Tensor]):
    """The present tensors of a program: dense at first, sliced as units are removed.

    One is sliced when it is asked for, and kept until the next `release`; so no more than what is
    used between two sites is held. The tensors given are never changed.

    Args:
        state: the dense tensors by name, which may be read from disk as they are asked for; by
            default the program's own.
        selection: the units that are gone from the start.
        device: where tensors are wanted; by default where they are.
        stored: whether the dense tensors lie on disk, those of the program being on meta.
        place: where the values of streamed batches wait (see `Stream`).
    """

    def __init__(
        self,
        coupling: CouplingGraph,
        state: Mapping[str, Tensor] | None = None,
        *,
        selection: Selection | None = None,
        device: torch.device | None = None,
        stored: bool = False,
        place: Place | None = None,
    ):
        self.stored = stored
        self.place = place
        self.selection = selection or Selection()
        self._coupling = coupling
        self._dense = coupling.program.state if state is None else state
        self.device = device or self._dense[next(iter(coupling.program.parameters))].device
        self._changed: dict[str, tuple[Mapping[str, Tensor], Selection]] = {}
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = self.read(name).to(self.device)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._coupling.program.state)

    def __len__(self) -> int:
        return len(self._coupling.program.state)

    def read(self, name: str) -> Tensor:
        """One tensor at its present size, not kept; on the device where it is stored."""
        dims = self._coupling.layout.parameters.get(name)
        tensors, before = self._changed.get(name, (self._dense, None))
        return tensors[name] if dims is None else self.selection.take(tensors[name], dims, before)

    def dense(self) -> Weights:
        """The tensors as they were given, for a stream of the dense program."""
        return Weights(
            self._coupling, self._dense, device=self.device, stored=self.stored, place=self.place
        )

    def stream(self, batches: Sequence[Mapping[str, Tensor]]) -> Stream:
        """Batches on their way through the program with these tensors."""
        return Stream(
            self._coupling.program,
            self._coupling.layout,
            batches,
            self.__getitem__,
            device=self.device,
            place=self.place,
            hold_bytes=_HELD_BYTES if self.stored else None,
            selection=self.selection,
        )

    def shapes(self) -> Weights:
        """The same sizes around the program's own tensors, none of which is read."""
        return Weights(self._coupling, selection=self.selection)

    def select(self, selection: Selection, updated: Mapping[str, Tensor]) -> None:
        """Remove units; ``updated`` tensors have the size that the selection leaves.

        They too may lie on disk: `updated` is read when one of them is asked for.
        """
        self.selection = selection
        self._changed |= dict.fromkeys(updated, (updated, selection))
        self.release()

    def release(self) -> None:
        """Keep nothing that can be had again."""
        self._held.clear()


def weights_of(
    coupling: CouplingGraph,
    stored: Mapping[str, Tensor] | None = None,
    device: str | None = None,
    selection: Selection | None = None,
    place: Place | None = None,
) -> Weights:
    """The tensors to begin with: the program's own, or in their place what is read from a store.

    Raises:
        ModelError: there are none: the model is on meta.
    """
    state = coupling.program.state
    if stored is None:
        if any(state[name].is_meta for name in coupling.program.parameters):
            raise ModelError(
                "the model has no weights: its parameters are on the meta device",
                fix="load it, or give `weights` (open_model(..., out_of_core=True) has them)",
            )
        return Weights(coupling, state, selection=selection, place=place)
    present: ChainMap[str, Tensor] = ChainMap(cast(Any, stored), cast(Any, state))
    return Weights(
        coupling,
        present,
        selection=selection,
        device=torch.device(device or "cpu"),
        stored=True,
        place=place,
    )


def slice_state(
    coupling: CouplingGraph, selection: Selection, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Every tensor of a program at the size that the selection leaves."""
    parameters = coupling.layout.parameters
    return {
        name: selection.take(tensor, parameters[name]) if name in parameters else tensor
        for name, tensor in state.items()
    }


def pad_state(
    coupling: CouplingGraph, selection: Selection, sliced: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Sliced tensors scattered back to full size, zero where units went: the oracle's model."""
    padded: dict[str, Tensor] = {}
    for name, tensor in sliced.items():
        dims = coupling.layout.parameters.get(name, ())
        mask = selection.joint_mask(dims)
        if mask is None:
            padded[name] = tensor
        else:
            full = tensor.new_zeros([dim.size for dim in dims])
            full[mask.to(tensor.device)] = tensor.flatten()
            padded[name] = full
    return padded


def slice_program(
    coupling: CouplingGraph, selection: Selection, state: Mapping[str, Tensor]
) -> Program:
    """A program that computes with what is left.

    Args:
        state: the program's tensors, already sliced (see `slice_state`).
    """
    program, layout = coupling.program, coupling.layout
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    tables: dict[str, Tensor] = {}
    for node in program.graph.nodes:
        copy = graph.node_copy(node, lambda n: copies[n])
        copies[node] = copy
        if node.op != "call_function":
            continue
        call = resized_call(node, layout, selection)
        copy.target = call.target
        copy.args = fx.map_arg(call.args, lambda n: copies[n])
        copy.kwargs = fx.map_arg(dict(call.kwargs), lambda n: copies[n])
        if call.select:
            copies[node] = _select(graph, call, copy, coupling, selection, tables)
    graph.lint()
    real = (tensor.device for tensor in state.values() if not tensor.is_meta)
    place = next(real, torch.device("cpu"))
    held = {name: table.to(place) for name, table in tables.items()}
    return replace(program, graph_module=fx.GraphModule(held, graph), state=dict(state))


def _select(
    graph: fx.Graph,
    call: ResizedCall,
    copy: fx.Node,
    coupling: CouplingGraph,
    selection: Selection,
    tables: dict[str, Tensor],
) -> fx.Node:
    """Take the kept positions from a computed table, one index_select an axis."""
    for axis, dim in enumerate(coupling.layout.dims(call.node)):
        mask = selection.mask(dim)
        if mask is not None:
            name = f"_kept_{call.node.name}_{axis}"
            tables[name] = torch.from_numpy(np.flatnonzero(mask))
            index = graph.get_attr(name)
            copy = graph.call_function(torch.ops.aten.index_select.default, (copy, axis, index))
    return copy


def bound_module(program: Program) -> fx.GraphModule:
    """A program as a module of its own: called with the user's inputs, its tensors registered."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    names = {name: name.replace(".", "_") for name in program.state}
    for node in program.graph.nodes:
        bound = program.bindings.get(node.name) if node.op == "placeholder" else None
        if bound is not None:
            copies[node] = graph.get_attr(names[bound])
        elif node.op == "placeholder":
            copies[node] = graph.placeholder(program.inputs[node.name])
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    root = torch.nn.Module()
    for name, tensor in program.state.items():
        if name in program.parameters | program.added:
            root.register_parameter(names[name], torch.nn.Parameter(tensor, requires_grad=False))
        else:
            root.register_buffer(names[name], tensor)
    for name, table in program.graph_module.named_buffers():
        root.register_buffer(name, table)
    return fx.GraphModule(root, graph)


def added_parameters(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that the model lacks; a place where nothing was fitted is zero and left out."""
    return {name: tensors[name] for name in sorted(program.added) if tensors[name].any()}


class _Renamed(Mapping[str, Tensor]):
    """Weights by every name that they have, each read when it is asked for."""

    def __init__(self, weights: Weights, names: Mapping[str, str]):
        self._weights, self._names = weights, names

    def __getitem__(self, name: str) -> Tensor:
        return self._weights.read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def sliced_parameters(
    coupling: CouplingGraph,
    selection: Selection,
    tensors: Mapping[str, Tensor],
    stored: Weights | None = None,
) -> Sliced:
    """What codegen needs to know of a selection: weights by name, kept indices, changed extents.

    Args:
        stored: where the values are read, if ``tensors`` are on meta.
    """
    program, layout = coupling.program, coupling.layout
    touched = {n for n in program.buffers if any(map(selection.touches, layout.parameters[n]))}
    owned = program.parameters | touched
    names = {name: name for name in owned} | {
        alias: name for alias, name in program.tied.items() if name in owned
    }
    keep = {}
    carriers: dict[tuple[tuple[Dim, ...], int, int], set[str]] = {}
    for alias, name in names.items():
        dims = layout.parameters[name]
        masks = [selection.mask(dim) for dim in dims]
        if any(mask is not None for mask in masks):
            keep[alias] = tuple(None if mask is None else np.flatnonzero(mask) for mask in masks)
        for dim in dims:
            for extent in selection.extents(dim):
                carriers.setdefault(extent, set()).add(alias)
    weights = {alias: tensors[name] for alias, name in names.items()}
    added = added_parameters(program, tensors)
    reader = None if stored is None else _Renamed(stored, {**names, **{n: n for n in added}})
    return Sliced(weights=weights, keep=keep, extents=_merged(carriers), added=added, stored=reader)


def _merged(carriers: Mapping[tuple[tuple[Dim, ...], int, int], set[str]]) -> tuple[Extent, ...]:
    """One extent for what is alike in many layers: the same sizes, in the same parameters."""
    alike: dict[tuple[int, int, frozenset[str]], set[str]] = {}
    for (_, old, new), names in carriers.items():
        if old != new:
            role = frozenset(re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name) for name in names)
            alike.setdefault((old, new, role), set()).update(names)
    ordered = sorted(alike.items(), key=lambda item: (*item[0][:2], sorted(item[0][2])))
    return tuple(Extent(old, new, frozenset(names)) for (old, new, _), names in ordered)

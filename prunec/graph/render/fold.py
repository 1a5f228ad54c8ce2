"""Repeated blocks, found and folded: a model of 80 equal layers is drawn as one layer, 80 times."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prunec.graph.coupling import CouplingGraph, Group
from prunec.graph.dims import Dim
from prunec.graph.render.flow import Flow, Step

LONGEST_PERIOD = 12


@dataclass(frozen=True)
class Block:
    """Modules that repeat (or one that stands alone), and what the first of them holds.

    Attributes:
        modules: per repetition, the paths of its modules; several where a pattern repeats.
        items: what the first repetition holds: indices of steps, or blocks.
    """

    modules: tuple[tuple[str, ...], ...]
    items: tuple[Item, ...]

    @property
    def times(self) -> int:
        return len(self.modules)

    @property
    def module(self) -> str:
        return self.modules[0][0]

    def steps(self) -> Iterator[int]:
        """The steps of the first repetition, nested ones included."""
        for item in self.items:
            if isinstance(item, Block):
                yield from item.steps()
            else:
                yield item


Item: TypeAlias = int | Block


@dataclass(frozen=True)
class Folding:
    """A flow with its repetitions folded.

    Attributes:
        items: steps and blocks in the order of the program.
        shown: every step -> the step of the first repetition that stands for it.
    """

    items: tuple[Item, ...]
    shown: dict[int, int]

    def blocks(self) -> Iterator[Block]:
        """Every innermost block, each once."""
        yield from _innermost(self.items)


def _innermost(items: Sequence[Item]) -> Iterator[Block]:
    for item in items:
        if isinstance(item, Block):
            nested = list(_innermost(item.items))
            yield from nested or [item]


@dataclass(frozen=True)
class _Run:
    """One execution of an indexed module."""

    module: str
    steps: tuple[int, ...]


def fold(coupling: CouplingGraph, flow: Flow) -> Folding:
    """Find the repeated blocks of a program.

    Two blocks are equal if they hold the same modules, tied in the same way to each other and to
    the same groups outside; the sizes of what is prunable inside may differ.
    """
    folder = _Folder(coupling, flow)
    # Inputs and tables first: a table is read in the middle of a block, but lies in none.
    ordered = sorted(flow.steps, key=lambda step: step.kind not in ("input", "table"))
    items = folder.fold([step.index for step in ordered], "")
    return Folding(tuple(items), folder.shown)


class _Folder:
    def __init__(self, coupling: CouplingGraph, flow: Flow):
        self.coupling = coupling
        self.flow = flow
        self.shown = {step.index: step.index for step in flow.steps}
        self._inputs: dict[int, list[int]] = {}
        for source, target in flow.edges:
            self._inputs.setdefault(target, []).append(source)

    def fold(self, indices: Sequence[int], prefix: str) -> list[Item]:
        entries = self._runs(indices, prefix)
        items: list[Item] = []
        position = 0
        keys = [self._signature(entry) if isinstance(entry, _Run) else entry for entry in entries]
        while position < len(entries):
            entry = entries[position]
            if isinstance(entry, int):
                items.append(entry)
                position += 1
                continue
            period, times = _repetition(keys[position:])
            found = entries[position : position + period * times]
            items.append(self._block([run for run in found if isinstance(run, _Run)], period))
            position += period * times
        return items

    def _runs(self, indices: Sequence[int], prefix: str) -> list[int | _Run]:
        """Steps outside any indexed module, and executions of indexed modules, in order."""
        passes: list[tuple[str, list[int]]] = []
        latest: dict[str, int] = {}
        for index in indices:
            step = self.flow.steps[index]
            module = indexed_module(step.module, prefix) or f"#{index}"
            at = latest.get(module)
            if at is None or self._recurs(step, passes[at][1]):
                latest[module] = at = len(passes)
                passes.append((module, []))
            passes[at][1].append(index)
        runs = [_Run(module, tuple(steps)) for module, steps in passes]
        entries: list[int | _Run] = []
        for run in self._whole(runs):
            weights = sum(self.flow.steps[i].kind == "weights" for i in run.steps)
            entries += [run] if weights > 1 else run.steps
        return entries

    def _whole(self, runs: Sequence[_Run]) -> list[_Run]:
        """Runs of one module that are not all alike are one run of it, with a loop inside."""
        alike: dict[str, list[_Run]] = {}
        for run in runs:
            alike.setdefault(run.module, []).append(run)
        whole: list[_Run] = []
        for run in runs:
            same = alike[run.module]
            if len(same) == 1 or len({self._signature(other) for other in same}) == 1:
                whole.append(run)
            elif run is same[0]:
                whole.append(_Run(run.module, tuple(i for other in same for i in other.steps)))
        return whole

    def _recurs(self, step: Step, earlier: Sequence[int]) -> bool:
        """Whether a shared module is being run once more."""
        return step.kind == "weights" and any(
            self.flow.steps[i].kind == "weights"
            and self.flow.steps[i].tensors == step.tensors
            and self.flow.steps[i].nodes[0].target == step.nodes[0].target
            for i in earlier
        )

    def _block(self, runs: Sequence[_Run], period: int) -> Block:
        first = runs[:period]
        for position, run in enumerate(runs):
            for ours, theirs in zip(first[position % period].steps, run.steps, strict=True):
                self.shown[theirs] = ours
        modules = tuple(
            tuple(run.module for run in runs[i : i + period]) for i in range(0, len(runs), period)
        )
        if period > 1:
            inner = [Block(((run.module,),), run.steps) for run in first]
            return Block(modules, tuple(inner))
        items: Sequence[Item] = first[0].steps
        if len(runs) == 1 and self._holds_blocks(first[0]):
            items = self.fold(first[0].steps, first[0].module)
        return Block(modules, tuple(items))

    def _holds_blocks(self, run: _Run) -> bool:
        """Whether its parts are blocks of their own: indexed, with residual sums in them."""
        nested = {
            indexed_module(self.flow.steps[i].module, run.module)
            for i in run.steps
            if is_sum(self.flow.steps[i])
        }
        return len(nested - {None}) > 1

    def _signature(self, run: _Run) -> tuple[object, ...]:
        local: dict[Dim, int] = {}
        position = {index: i for i, index in enumerate(run.steps)}
        described: list[object] = []
        for index in run.steps:
            step = self.flow.steps[index]
            inputs = sorted(position.get(source, -1) for source in self._inputs.get(index, []))
            tensors = [
                (
                    name.removeprefix(run.module),
                    tuple(
                        self._shape(dim, run.module, local)
                        for dim in self.coupling.layout.parameters[name]
                    ),
                )
                for name in step.tensors
            ]
            relative = step.module.removeprefix(run.module)
            described.append((relative, step.kind, tuple(tensors), tuple(inputs)))
        return (run.module.rpartition(".")[0], *described)

    def _shape(self, dim: Dim, module: str, local: dict[Dim, int]) -> object:
        root = dim.root
        if root.form != "leaf":
            return root.form, tuple(self._shape(part, module, local) for part in root.parts)
        group = self.coupling.by_dim.get(root)
        if group is None:
            return root.size
        if lies_in(group, module):
            return "inside", local.setdefault(root, len(local))
        return group.name


def lies_in(group: Group, module: str) -> bool:
    """Whether every parameter of the group belongs to this module."""
    return all(member.parameter.startswith(module + ".") for member in group.members)


def is_sum(step: Step) -> bool:
    """Whether a step only adds: a residual sum, or branches added up."""
    return step.kind == "sum" or (step.kind == "join" and step.operators == ["add"])


def indexed_module(path: str, below: str = "") -> str | None:
    """The outermost indexed module on a path below another: ``model.layers.3``."""
    start = len(below) + 1 if below else 0
    if below and not path.startswith(below + "."):
        return None
    match = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path[start:])
    return path[: start + match.end()] if match else None


def _repetition(keys: Sequence[object]) -> tuple[int, int]:
    """The period and count of the longest repetition at the start; the shortest period of it."""
    best = (1, 1)
    for period in range(1, min(LONGEST_PERIOD, len(keys) // 2) + 1):
        pattern = keys[:period]
        if any(isinstance(key, int) for key in pattern):
            break
        times = 1
        while keys[times * period : (times + 1) * period] == pattern:
            times += 1
        if times > 1 and times * period > best[0] * best[1]:
            best = (period, times)
    return best


def quotient(inputs: Mapping[int, Collection[int]], key: Callable[[int], str]) -> dict[int, int]:
    """Merge nodes of one key, as long as nothing that leaves a merged box comes back to it.

    Args:
        inputs: what every node depends on, in an order in which that comes first.

    Returns:
        every node -> the first node of its box.
    """
    box: dict[int, int] = {}
    above: dict[int, set[int]] = {}  # boxes that a box depends on
    latest: dict[str, int] = {}
    for node, sources in inputs.items():
        before = {box[source] for source in sources if source in box}
        last = latest.get(key(node))
        if last is None or any(last in above[other] for other in before - {last}):
            last = latest[key(node)] = node
            above[node] = set()
        box[node] = last
        for other in before - {last}:
            added = {other} | above[other]
            above[last] |= added
            for later in above.values():
                if last in later:
                    later |= added
    return box

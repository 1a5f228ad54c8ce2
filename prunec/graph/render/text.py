"""What can be pruned and what cannot, in words: the rows of ``prunec analyze``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunec.graph.coupling import CouplingGraph
from prunec.graph.render.depth import BranchFigures, branch_figures
from prunec.graph.render.figures import (
    Alike,
    Figures,
    PinnedAlike,
    alike,
    fold_groups,
    fold_pinned,
    pattern,
    short,
    span,
)
from prunec.graph.render.labels import remarks

MAX_PLACES = 10
COLUMNS = ("group", "times", "units", "parameters a unit", "FLOPs a unit", "sits in")
BRANCH_COLUMNS = ("branch", "times", "parameters", "FLOPs", "leaves out")
PINNED_COLUMNS = ("reason", "times", "size", "source line", "sits in")


@dataclass(frozen=True)
class Section:
    """A titled table of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def describe_groups(coupling: CouplingGraph) -> list[Section]:
    """What can be pruned: a table for what couples blocks, and one a kind of block.

    Layers that differ in nothing but their number and sizes share a row.
    """
    figures = Figures(coupling)
    sections: list[Section] = []
    found = figures.all()
    for together in alike(found, lambda f: pattern(f.group.block or "")):
        block = together[0].group.block
        blocks = {f.group.block for f in together}
        rows = [_row(figures, line) for line in fold_groups(together)]
        title = pattern(block) if block else "Across blocks, or outside any"
        if len(blocks) > 1:
            title += f" ({len(blocks)} blocks)"
        sections.append(Section(title, COLUMNS, tuple(rows)))
    return sections


def _row(figures: Figures, line: Alike) -> tuple[str, ...]:
    groups = [found.group for found in line.figures]
    notes = dict.fromkeys(note for group in groups for note in remarks(figures, group))
    module = line.pattern.rpartition("/")[0] + "."
    names = (f"{pattern(m.parameter)}[{m.axis}]" for m in groups[0].members)
    places = dict.fromkeys(name.removeprefix(module) for name in names)
    return (
        "\n  ".join([line.pattern, *notes]),
        f"{len(groups):,}",
        span(group.size for group in groups),
        span(found.parameters_per_unit for found in line.figures),
        span((found.flops_per_unit for found in line.figures), brief=True),
        _several(list(places)),
    )


def describe_branches(coupling: CouplingGraph) -> list[Section]:
    """What can be left out whole: a table for each kind of block, its last row the block itself."""
    sections: list[Section] = []
    for together in alike(branch_figures(coupling), lambda f: pattern(f.branch.block or "")):
        folded = alike(together, lambda f: pattern(f.branch.name))
        rows = [_branch_row(pattern(row[0].branch.name), [[f] for f in row]) for row in folded]
        whole = alike(together, lambda f: f.branch.block)
        block = together[0].branch.block
        if block and len(folded) > 1:
            rows.append(_branch_row(f"{pattern(block)}/block", whole))
        title = f"Depth: {pattern(block) if block else 'outside any block'}"
        if block and len(whole) > 1:
            title += f" ({len(whole)} blocks)"
        sections.append(Section(title, BRANCH_COLUMNS, tuple(rows)))
    return sections


def _branch_row(name: str, units: Sequence[Sequence[BranchFigures]]) -> tuple[str, ...]:
    """A row of units that are alike: branches one by one, or all of each block."""
    modules = (pattern(path) for unit in units for f in unit for path in f.branch.modules)
    return (
        name,
        f"{len(units):,}",
        span(sum(f.parameters for f in unit) for unit in units),
        span((sum(f.flops for f in unit) for unit in units), brief=True),
        _several(list(dict.fromkeys(modules))),
    )


def _several(places: Sequence[str]) -> str:
    more = len(places) - MAX_PLACES
    return "\n".join([*places[:MAX_PLACES], *([f"and {more} more"] if more > 0 else [])])


def describe_pinned(coupling: CouplingGraph) -> Section:
    """What is pinned: a row a reason and source line, however many axes it holds for."""
    folded = fold_pinned(coupling.pinned)
    rows = tuple(_pinned_row(found) for found in folded)
    return Section(f"Pinned axes: {len(coupling.pinned):,}", PINNED_COLUMNS, rows)


def _pinned_row(found: PinnedAlike) -> tuple[str, ...]:
    times, places = f"{found.times:,}", _several(found.places)
    return (found.reason, times, span(found.sizes), found.where, places)


def describe(coupling: CouplingGraph, *, why: bool = False) -> str:
    """The whole analysis as plain text.

    Args:
        why: list what is pinned, and the reasons.
    """
    sections = [*describe_groups(coupling), *describe_branches(coupling)]
    if why and coupling.pinned:
        sections.append(describe_pinned(coupling))
    return "\n\n".join([headline(coupling), *map(_format, sections)]) + "\n"


def headline(coupling: CouplingGraph) -> str:
    """The size of the model and of what was found, in one line."""
    program = coupling.program
    total = sum(program.state[name].numel() for name in program.parameters)
    shapes = ", ".join(f"{name} {list(v.shape)}" for name, v in program.example.items())
    return (
        f"{short(total, 'kMBT')} parameters, {len(coupling.groups):,} groups, "
        f"pinned axes: {len(coupling.pinned):,}; FLOPs are of one pass over {shapes}"
    )


def _format(section: Section) -> str:
    lines: list[Sequence[str]] = [section.columns]
    for row in section.rows:
        height = max(cell.count("\n") for cell in row) + 1
        split = [[*cell.split("\n"), *[""] * height][:height] for cell in row]
        lines += [list(line) for line in zip(*split, strict=True)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(section.columns))]
    numeric = [_is_numeric([row[i] for row in section.rows]) for i in range(len(widths))]
    body = (
        "  ".join(
            word.rjust(width) if right else word.ljust(width)
            for word, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )
    return "\n".join([section.title, *(f"  {line}" for line in body)])


def _is_numeric(words: Sequence[str]) -> bool:
    return all(word[:1].isdigit() for word in words)

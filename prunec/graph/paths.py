"""Module paths and parameter names: the repeated block in them, and what several share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

_BLOCK = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")


def block_of(name: str) -> str | None:
    """The outermost indexed module on a path: ``model.layers.3.mlp`` -> ``model.layers.3``."""
    match = _BLOCK.match(name)
    return match.group() if match else None


def blocks_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Parameter names by repeated block, in model order; names outside any block are left out."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        block = block_of(name)
        if block is not None:
            blocks.setdefault(block, []).append(name)
    return blocks


def enclosing(path: str) -> list[str]:
    """A module and those around it, outermost first: ``a.0.b`` -> ``a``, ``a.0``, ``a.0.b``."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def indexed_modules(path: str) -> list[str]:
    """Every indexed module on a path, outermost first: ``a.0.b.1.c`` -> ``a.0``, ``a.0.b.1``."""
    return [module for module in enclosing(path) if module.rpartition(".")[2].isdigit()]


def common_path(parameters: Sequence[str]) -> str:
    """The innermost module that holds all these parameters."""
    return common_module([name.rpartition(".")[0] for name in parameters])


def common_module(paths: Sequence[str]) -> str:
    """The innermost module that all these modules lie in, or are."""
    first, *others = [path.split(".") if path else [] for path in paths]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(first, *others, strict=False))
    return ".".join(parts[0] for parts in same)

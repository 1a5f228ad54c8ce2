"""``package.module:factory``: any nn.Module, with its example inputs."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunec.errors import ModelError

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_factory(spec: str) -> bool:
    """Whether a spec has the form package.module:factory."""
    return _SPEC.fullmatch(spec) is not None


def call_factory(spec: str) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """Import and call a factory; returns its module and example inputs by keyword, if it has any.

    The factory takes no arguments and returns an nn.Module, or (nn.Module, example) with the
    example a tensor, a tuple of tensors, or a dict by keyword. The current directory is searched
    first.

    Raises:
        ModelError: it cannot be imported, raises, or returns something else.
    """
    factory = import_object(spec)
    try:
        made = factory()
    except Exception as error:
        # The factory is the user's code: anything may come out of it.
        raise raised_by(spec, error) from error
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{spec} returned {type(module).__name__}, not an nn.Module",
            fix="return the module, or (module, example inputs)",
        )
    return module, None if example is None else _by_keyword(spec, module, example)


def import_object(spec: str) -> Any:
    """Import the callable that ``package.module:name`` stands for; the current directory is first.

    Raises:
        ModelError: it cannot be imported, or is no callable.
    """
    path, _, attribute = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(path)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ModelError(f"cannot import {spec}: {error}", fix="check the names") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise ModelError(f"{spec} is no function: {type(found).__name__}")
    return found


def _by_keyword(spec: str, module: nn.Module, example: Any) -> dict[str, Tensor]:
    """Example inputs under the names of the module's forward parameters."""
    if isinstance(example, Mapping):
        named = dict(example)
    else:
        values = example if isinstance(example, tuple | list) else (example,)
        names = [
            name
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if len(values) > len(names):
            raise ModelError(
                f"{spec} gave {len(values)} example inputs, but forward takes {len(names)}",
                fix="give them by name: a dict",
            )
        named = dict(zip(names, values, strict=False))
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"{spec}: example input {name} is a {type(value).__name__}, no tensor")
    return named


def raised_by(spec: str, error: Exception) -> ModelError:
    """The error of the user's own code, with the line where it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return ModelError(
        f"{spec} raised {type(error).__name__}: {error}",
        where=f"{frame.filename}:{frame.lineno}  {frame.line or ''}".rstrip(),
    )

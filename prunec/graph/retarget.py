"""A traced program in another floating-point type: the types written into its calls follow."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from prunec.graph.program import Program

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)


def retarget(program: Program, dtype: torch.dtype) -> Program:
    """The program with every floating-point tensor and literal type replaced by ``dtype``.

    Casts that a model makes (to float32 in its norms) are retargeted too, so that in float64 a
    whole program computes in double precision.
    """
    return replace(
        retarget_calls(program, dtype),
        state={name: as_float(value, dtype) for name, value in program.state.items()},
        example={name: as_float(value, dtype) for name, value in program.example.items()},
    )


def retarget_calls(program: Program, dtype: torch.dtype) -> Program:
    """Only the types written into the calls; the tensors stay as they are (see `as_float`)."""
    module = copy.deepcopy(program.graph_module)
    for node in module.graph.nodes:
        node.args = pytree.tree_map(lambda value: _literal(value, dtype), node.args)
        node.kwargs = pytree.tree_map(lambda value: _literal(value, dtype), node.kwargs)
    module.recompile()
    return replace(program, graph_module=module)


def on_device(program: Program, device: torch.device) -> Program:
    """The program with every device written into its calls replaced; the tensors stay."""
    module = copy.deepcopy(program.graph_module)

    def there(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in module.graph.nodes:
        node.args = pytree.tree_map(there, node.args)
        node.kwargs = pytree.tree_map(there, node.kwargs)
    module.recompile()
    return replace(program, graph_module=module)


def _literal(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, fx.Node) or not isinstance(value, torch.dtype):
        return value
    if value in _COMPLEX:
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if value in _FLOATS else value


def as_float(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in ``dtype`` where it is floating-point (complex: in that precision)."""
    if value.is_complex():
        return value.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return value.to(dtype) if value.is_floating_point() else value

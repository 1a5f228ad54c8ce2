"""Batches that the user gives: any Python iterable of inputs, or the function that returns one."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunec.errors import CalibrationError, PrunecError
from prunec.models.factory import import_object, raised_by

Batch = dict[str, Tensor]
LABELS = "labels"
_REMEDIES: dict[type, str] = {
    str: "prunec.calibration.calibrate([...], tokenizer, model=model) reads text and files",
    dict: "put a module around the model whose forward takes tensors",
}


def call_loader(spec: str) -> Iterable[Any]:
    """The batches that the function ``package.module:loader`` returns, to be read by `guarded`.

    Raises:
        ModelError: it cannot be imported, or raises.
        CalibrationError: it returns no batches.
    """
    loader = import_object(spec)
    try:
        batches = loader()
    except Exception as error:
        # The loader is the user's code: anything may come out of it.
        raise raised_by(spec, error) from error
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | Mapping | Tensor):
        raise CalibrationError(
            f"{spec} gave {type(batches).__name__}, not batches",
            fix="return an iterable of dicts by input name, or of tuples of tensors",
        )
    return batches


def guarded(batches: Iterable[Any], spec: str) -> Iterator[Any]:
    """The batches of a loader; an error in it while they are read is a ModelError."""
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except PrunecError:
            raise
        except Exception as error:
            raise raised_by(spec, error) from error
        yield batch


def read_batches(
    given: Iterable[Any], model: nn.Module | None, name: str, most: int | None = None
) -> list[Batch]:
    """Batches by input name, at most `most` samples of them in all.

    A batch is a dict; or a tuple that fills forward's required arguments in order, one value more
    being the labels; or (dict, labels); or one tensor. Axis 0 is the sample axis.

    Raises:
        CalibrationError: there are none, or a batch has another form.
    """
    found: list[Batch] = []
    left = most
    for number, item in enumerate(given):
        batch = _by_name(item, model, f"{name}, batch {number}")
        size = samples_in(batch, f"{name}, batch {number}")
        if left is not None and size > left:
            batch = {key: v[:left] if _is_sampled(v, size) else v for key, v in batch.items()}
        found.append(batch)
        left = None if left is None else left - size
        if left is not None and left <= 0:
            break
    if not found:
        raise CalibrationError(
            f"{name} gives no batches", fix="look whether it was read to its end before"
        )
    return found


def samples_in(batch: Batch, where: str) -> int:
    """Samples of a batch: the length of the first input that has an axis.

    Raises:
        CalibrationError: no sample.
    """
    size = next((len(value) for value in batch.values() if value.ndim), 0)
    if not size:
        raise CalibrationError("a batch without a sample", where=where)
    return size


def rows_of(batch: Batch, name: str) -> list[Batch]:
    """Each sample by itself, without its sample axis.

    Raises:
        CalibrationError: an input without a sample axis.
    """
    size = samples_in(batch, name)
    for key, value in batch.items():
        if not _is_sampled(value, size):
            raise CalibrationError(
                f"{key} {list(value.shape)} has not the {size} samples of its batch on axis 0",
                where=name,
                so="batches that differ in shape, or are mixed with others, are cut into samples",
                fix="give batches that are all alike, from this source alone",
            )
    return [{key: value[i] for key, value in batch.items()} for i in range(size)]


def _is_sampled(value: Tensor, size: int) -> bool:
    return value.ndim > 0 and len(value) == size


def _by_name(item: Any, model: nn.Module | None, where: str) -> Batch:
    if isinstance(item, tuple | list) and len(item) == 2 and not _is_value(item[0]):
        return _by_name(item[0], model, where) | {LABELS: _tensor(item[1], LABELS, where)}
    if isinstance(item, Mapping):
        named = dict(item)
    else:
        values = list(item) if isinstance(item, tuple | list) else [item]
        names = _required(model)
        if not values or len(values) > len(names) + 1:
            raise CalibrationError(
                f"a batch has {len(values)} values, and forward takes {', '.join(names) or 'none'}",
                where=where,
                fix="give a dict by input name",
            )
        named = dict(zip([*names, LABELS], values, strict=False))
    return {str(name): _tensor(value, str(name), where) for name, value in named.items()}


def _required(model: nn.Module | None) -> list[str]:
    """The arguments that forward cannot do without; its first where it could do without all."""
    if model is None:
        return []
    parameters = inspect.signature(model.forward).parameters.values()
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [p.name for p in placed if p.default is p.empty] or [p.name for p in placed[:1]]


def _is_value(item: Any) -> bool:
    return isinstance(item, Tensor | np.ndarray)


def _tensor(value: Any, name: str, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value)
    raise CalibrationError(
        f"{name} is of type {type(value).__name__}, not a tensor",
        where=where,
        fix=_REMEDIES.get(type(value), "torch.as_tensor"),
    )


def forward_inputs(model: nn.Module, batch: Mapping[str, Tensor], *, loss: bool) -> Batch:
    """The inputs of a batch that the model itself reads; the rest is its loss's.

    `labels` are for the loss, unless forward cannot do without them: an encoder-decoder that makes
    its decoder's inputs of them. With a loss of the user's own, so is what forward does not take.

    Raises:
        CalibrationError: forward lacks an input, or does not take one.
    """
    parameters = inspect.signature(model.forward).parameters
    required = {n for n, p in parameters.items() if p.default is p.empty}
    config: Any = getattr(model, "config", None)
    makes_decoder = getattr(config, "is_encoder_decoder", False)
    given = {
        name: value
        for name, value in batch.items()
        if (name in parameters or not loss)
        and (
            name != LABELS
            or name in required
            or (makes_decoder and "decoder_input_ids" not in batch)
        )
    }
    if not given:
        raise CalibrationError(
            f"a batch holds {', '.join(batch)}, and no input of {type(model).__name__}",
            so=f"forward takes {', '.join(parameters)}",
            fix="give inputs by the names of forward's arguments",
        )
    try:
        inspect.signature(model.forward).bind(**given)
    except TypeError as error:
        raise CalibrationError(
            f"a batch does not fit {type(model).__name__}: {error}",
            so=f"a batch has {', '.join(batch)}; forward takes {', '.join(parameters)}",
            fix="give inputs by the names of forward's arguments",
        ) from error
    return given

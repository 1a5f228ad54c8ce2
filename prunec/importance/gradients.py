"""Statistics of the loss's gradients: by parameter, reduced to what a criterion reads at once.

They are taken once, on the dense model. A full gradient lives as long as its block is being
differentiated; what is kept of it is a number per position on an axis, unless a criterion asks
for the gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunec.events import Progress, silent
from prunec.graph.backward import differentiate
from prunec.graph.program import Program
from prunec.graph.retarget import as_float, retarget_calls
from prunec.importance.problem import Axis
from prunec.importance.statistics import statistic_of

_Element = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of a weight w, its batch-mean gradient g and the mean f of its squared per-sample gradients:
# one number per element, summed over everything at a position.
_ELEMENTS: dict[str, _Element] = {
    "taylor_vector": lambda w, g, f: w * g,
    "taylor_element1": lambda w, g, f: (w * g).abs(),
    "taylor_element2": lambda w, g, f: (w * f * w).abs(),
    "taylor_mixed": lambda w, g, f: (w * g - 0.5 * w * f * w).abs(),
}
_WHOLE = ("weight_grad", "fisher_diag")
_MASK = "mask_grad"
_SQUARED = frozenset({"taylor_element2", "taylor_mixed", "fisher_diag"})

GRADIENT_STATISTICS = (*_WHOLE, _MASK, *_ELEMENTS)
"""What a criterion may declare, beside the statistics of activations.

    weight_grad      gradient of the mean loss, in the shape of the parameter
    fisher_diag      mean over samples of the squared gradient of each sample's loss, same shape
    mask_grad        [samples, positions]: sum of weight x gradient over everything at a position
                     of an axis, the gradient by a mask on that position, per sample
    taylor_*         [positions]: LLM-Pruner's terms (METHODS 3.2) summed over a position
"""


@dataclass(frozen=True)
class Part:
    """Which of the samples of all processes these are.

    Attributes:
        places: of these samples, in order, among all.
        count: of all; by default there are no others.
        total: the sum of a tensor over the processes.
    """

    places: range
    count: int = 0
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def samples(self) -> int:
        return self.count or len(self.places)


def gradient_statistics(
    loss: Program,
    samples: Sequence[Mapping[str, Tensor]],
    names: Collection[str],
    axes: Iterable[Axis],
    *,
    weight: Callable[[str], Tensor] | None = None,
    device: torch.device | str = "cpu",
    part: Part | None = None,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Take statistics of the gradients of a loss, in fp32 or better whatever the model's dtype.

    A half-precision model is differentiated in fp32, as small gradients are zero in fp16; its
    weights are widened one block at a time.

    Args:
        loss: a program with a scalar output.
        samples: inputs of the traced shapes; each counts the same.
        names: of GRADIENT_STATISTICS.
        axes: the members to take them of.
        weight: a tensor of the program by name; by default its own state.
        part: where these are not all samples; by default they are.

    Returns:
        By :func:`statistic_of`. A parameter that the loss does not depend on has zeros.

    Raises:
        VerifyError: a loss is NaN or infinite.
        TraceError: the program cannot be differentiated.
    """
    wide = _precision(loss)
    read = loss.state.__getitem__ if weight is None else weight
    by_parameter: dict[str, list[int]] = {}
    for parameter, axis in axes:
        by_parameter.setdefault(parameter, []).append(axis)

    def widened(name: str) -> Tensor:
        return as_float(read(name), wide)

    reduction = _Reduction(widened, by_parameter, names, part or Part(range(len(samples))))
    differentiate(
        retarget_calls(loss, wide),
        [{name: as_float(value, wide) for name, value in sample.items()} for sample in samples],
        widened,
        by_parameter.keys() & loss.parameters,
        reduction,
        device=device,
        progress=progress,
    )
    for parameter in by_parameter:
        if parameter not in reduction.finished:
            reduction.finish(parameter)
    return reduction.results


def _precision(program: Program) -> torch.dtype:
    double = any(program.state[name].dtype == torch.float64 for name in program.parameters)
    return torch.float64 if double else torch.float32


class _Reduction:
    """Sums of one block's gradients, reduced and dropped when the block is done."""

    def __init__(
        self,
        weight: Callable[[str], Tensor],
        axes: Mapping[str, Sequence[int]],
        names: Collection[str],
        part: Part,
    ):
        self._weight = weight
        self._axes = axes
        self._names = sorted(names)
        self._part = part
        self._sum: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._masks: dict[tuple[str, int], list[Tensor]] = {}
        self.results: dict[str, Tensor] = {}
        self.finished: set[str] = set()

    def update(self, parameter: str, gradient: Tensor) -> None:
        _accumulate(self._sum, parameter, gradient)
        if not _SQUARED.isdisjoint(self._names):
            _accumulate(self._squares, parameter, gradient.square())
        if _MASK in self._names:
            product = self._weight(parameter).to(gradient.device) * gradient
            for axis in self._axes[parameter]:
                dots = _sum_at(product, axis)
                self._masks.setdefault((parameter, axis), []).append(dots.cpu())

    def finish(self, parameter: str) -> None:
        weight = self._weight(parameter)
        mean = self._mean(self._sum, parameter, weight)
        squares = self._mean(self._squares, parameter, mean)
        weight = weight.to(mean.device)
        self.finished.add(parameter)
        for name in self._names:
            if name in _WHOLE:
                whole = mean if name == "weight_grad" else squares
                self.results[statistic_of(name, parameter)] = whole.cpu()
                continue
            element = _ELEMENTS[name](weight, mean, squares) if name in _ELEMENTS else None
            for axis in self._axes[parameter]:
                if element is not None:
                    reduced = _sum_at(element, axis).cpu()
                else:
                    reduced = self._by_sample(self._masks.pop((parameter, axis), []), weight, axis)
                self.results[statistic_of(name, parameter, axis)] = reduced

    def _mean(self, sums: dict[str, Tensor], parameter: str, like: Tensor) -> Tensor:
        """Over the samples of all processes; zeros where nothing was summed up."""
        found = sums.pop(parameter, None)
        found = torch.zeros_like(like) if found is None else found
        return self._part.total(found) / self._part.samples

    def _by_sample(self, dots: Sequence[Tensor], weight: Tensor, axis: int) -> Tensor:
        """``[samples, positions]`` of all processes; zeros where there is no gradient."""
        rows = torch.zeros(self._part.samples, weight.shape[axis], dtype=torch.float64)
        for place, row in zip(self._part.places, dots, strict=False):
            rows[place] = row
        return self._part.total(rows)


def _accumulate(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    if name in sums:
        sums[name] += term
    else:
        sums[name] = term.clone()


def _sum_at(tensor: Tensor, axis: int) -> Tensor:
    """Sums over all axes but one, fp64."""
    others = [other for other in range(tensor.ndim) if other != axis]
    return tensor.sum(dim=others, dtype=torch.float64) if others else tensor.double()

"""What a site is mended towards: its own output, the dense model's, or the dense residual stream.

A regression of the target t on the site's input x needs the second moments of both, and nothing
else. They are taken as one Gram matrix of ``z = (x, 1, t)``, over the windows that are fitted and,
by itself, over windows held out to judge the fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from prunec.errors import PlanError
from prunec.graph.interpreter import Reader, Stream
from prunec.graph.program import source_line
from prunec.graph.propagate import Layout
from prunec.graph.residual import ancestors
from prunec.graph.rows import Chunk
from prunec.importance.statistics import InputGram
from prunec.passes.distributed import processes
from prunec.passes.sites import Input

Target = Literal["own", "dense", "residual"]
Tokens = Literal["alike", "capped"]


@dataclass(frozen=True)
class Regression:
    """Which moments a compensation asks for; they come as statistics of the names below.

    ``fit_gram`` and, where windows are held out, ``held_gram``: fp64 ``E[z z^T]``. For the target
    ``own``, z is ``(x, 1)``: the rest follows from the weight. Else it is ``(x, 1, t)``, with t
    what the product (without its bias) should be.

    Attributes:
        target: ``own``: what the site's own full weight makes of x. ``dense``: what the site puts
            out in the dense model. ``residual``: what would bring the residual stream to where it
            is in the dense model.
        tokens: ``alike``, or ``capped``: a token whose target has more than the median squared norm
            of its batch counts in inverse proportion, so that a massive activation is one token
            among others (METHODS 6).
        holdout: part of the windows that judge and are never fitted.
    """

    target: Target = "own"
    tokens: Tokens = "alike"
    holdout: float = 0.0

    def __post_init__(self) -> None:
        for value, kind in ((self.target, Target), (self.tokens, Tokens)):
            if value not in get_args(kind):
                raise PlanError(
                    f"no regression on {value!r}", fix=f"there are: {', '.join(get_args(kind))}"
                )
        if not 0 <= self.holdout < 1:
            raise PlanError(
                f"a holdout of {self.holdout:g} is not possible", fix="use 0 to 1, such as 0.25"
            )

    @property
    def needs_dense(self) -> bool:
        return self.target != "own"

    def holds_out(self, window: int) -> bool:
        """Whether a window is held out: evenly spread, the first never."""
        return int((window + 1) * self.holdout) > int(window * self.holdout)


class Moments:
    """The moments of one input of a site while the batches stream by, for each matrix of it.

    The target of rows that a router shares out is always the site's own output: the dense model
    may have sent other tokens there.

    Args:
        regression: which.
        given: the rows and the weights that read them.
        name: the site's, for messages.
        stream: the pruned program's, that is about to reach the site.
        dense: the dense program's, which walks beside it; None where the target does not need it.

    Raises:
        PlanError: the site's output does not reach a residual sum as it is, or there are too few
            windows to hold one out.
    """

    def __init__(
        self,
        regression: Regression,
        given: Input,
        name: str,
        stream: Stream,
        dense: Stream | None,
    ) -> None:
        self._regression, self._given, self._name = regression, given, name
        self._rows = dict(given.calls)
        self._stream, self._dense = stream, dense
        self._own = dense is None or given.calls[0][1].shared_out
        self._windows = next(iter(stream.program.example.values())).shape[0]
        self._fit = [InputGram(name) for _ in range(given.parts)]
        self._held = [InputGram(name) for _ in range(given.parts)] if regression.holdout else []
        if regression.holdout and processes().size > 1:
            raise PlanError(
                "windows are held out in one process only",
                fix="set compensation.holdout to 0, or run without torchrun",
            )
        held = int(stream.batches * self._windows * regression.holdout)
        if regression.holdout and not held:
            raise PlanError(
                f"{stream.batches * self._windows} calibration windows leave none to hold out",
                fix="give more windows, or set compensation.holdout to 0",
            )
        self._offsets: dict[fx.Node, list[Offset]] = {}
        if regression.target == "residual" and not self._own:
            self._offsets = {
                node: list(residual_offsets(stream.layout, node)) for node, _ in given.calls
            }

    def update(self, number: int, node: fx.Node, read: Reader, read_dense: Reader | None) -> None:
        """Take in one batch at one call of the site."""
        rows = self._rows[node]
        real = partial(self._stream.real_tokens, number)
        beside = None
        if read_dense is not None and not self._own:
            beside = rows.chunks(read_dense, real)
        for chunk in rows.chunks(read, real):
            x = _wide(chunk.rows)
            parts = [x, x.new_ones(len(x), 1)]
            if beside is not None and read_dense is not None:
                parts.append(self._target(next(beside), node, read, read_dense))
            z = torch.cat(parts, dim=1)
            counts = z.new_ones(len(z)) if chunk.counts is None else chunk.counts.to(z.dtype)
            if self._regression.tokens == "capped":
                made = x @ self._reading(self._stream, chunk.part).T if self._own else parts[-1]
                counts = counts * _cap(made, counts)
            held = self._is_held(number, len(z)).to(z.device)
            self._fit[chunk.part].update(z, counts * ~held)
            if self._held:
                self._held[chunk.part].update(z, counts * held)

    def statistics(self) -> list[dict[str, Tensor]]:
        """`fit_gram` and `held_gram`, for each matrix.

        Raises:
            VerifyError: no token counted.
        """
        kinds = {"fit_gram": self._fit} | ({"held_gram": self._held} if self._held else {})
        found: list[dict[str, Tensor]] = [{} for _ in self._fit]
        for name, grams in kinds.items():
            for gram in grams:
                gram.merge(processes().total)
            idle = any(gram.tokens > 0 for gram in grams)
            for taken, gram in zip(found, grams, strict=True):
                taken[name] = gram.finish(idle=idle)
        return found

    def _target(self, dense: Chunk, node: fx.Node, read: Reader, read_dense: Reader) -> Tensor:
        assert self._dense is not None
        target = _wide(dense.rows) @ self._reading(self._dense, dense.part).T
        for offset in self._offsets.get(node, ()):
            gap = _wide(read_dense(offset.node)) - _wide(read(offset.node))
            target = target + gap / offset.scale
        return target

    def _reading(self, stream: Stream, part: int) -> Tensor:
        """What the site's weights are in that stream, ``[out, columns]``."""
        stacks = [
            reading.matrix.split(stream.weight(reading.parameter))[part]
            for reading in self._given.readings
        ]
        return _wide(torch.cat(stacks))

    def _is_held(self, number: int, tokens: int) -> Tensor:
        """Bool ``[tokens]``; windows are the first axis of a batch.

        Of rows that a router shares out, which come from all windows, one in so many is held out.
        """
        windows = range(number * self._windows, (number + 1) * self._windows)
        held = torch.tensor([self._regression.holds_out(window) for window in windows])
        if not bool(held.any()):
            return torch.zeros(tokens, dtype=torch.bool)
        if tokens % self._windows and self._given.calls[0][1].shared_out:
            rows = [self._regression.holds_out(row) for row in range(tokens)]
            return torch.tensor(rows, dtype=torch.bool)
        if tokens % self._windows:
            raise PlanError(
                f"{tokens} tokens of {self._windows} windows cannot be told apart",
                where=self._name,
                fix="set compensation.holdout to 0",
            )
        return held.repeat_interleave(tokens // self._windows)


@dataclass(frozen=True)
class Offset:
    """A value that is added to a site's output further on.

    Attributes:
        node: the value.
        scale: what the site's output has been multiplied with when it meets it.
    """

    node: fx.Node
    scale: float


def residual_offsets(layout: Layout, product: fx.Node) -> Iterator[Offset]:
    """What a product meets on its way to the residual stream: ``r`` in ``r + scale * product``.

    The way leads through reshapes, dropout, multiplication by numbers and additions, up to the
    first addition of something that the product was itself computed from. What is added before that
    (attention beside an FFN) counts where it is known when the product is due.

    Raises:
        PlanError: there is no such way; a norm lies between, for example.
    """
    before = ancestors(product)
    order = {node: i for i, node in enumerate(product.graph.nodes)}
    value, scale = product, 1.0
    while True:
        users = [user for user in value.users if user.op == "call_function"]
        step = _step(layout, value, users[0]) if len(users) == 1 else None
        if step is None:
            raise PlanError(
                "its output does not reach a sum with the residual stream as it is",
                where=source_line(product),
                fix="set compensation.target to dense or own",
            )
        if isinstance(step, fx.Node):
            if order[step] < order[product]:
                yield Offset(step, scale)
            if step in before:
                return
        else:
            scale *= step
        value = users[0]


_SAME = ("view", "reshape", "_unsafe_view", "contiguous", "clone", "dropout", "to", "_to_copy")


def _step(layout: Layout, value: fx.Node, user: fx.Node) -> float | fx.Node | None:
    """What a call does to a value: multiplies it, adds a node to it, or (None) something else."""
    name = getattr(getattr(user.target, "_schema", None), "name", "").removeprefix("aten::")
    name = name.removesuffix("_")
    others = [argument for argument in user.args[:2] if argument is not value]
    if name in _SAME and layout.dims(user)[-1].root is layout.dims(value)[-1].root:
        return 1.0
    if len(others) != 1:
        return None
    (other,) = others
    if name in ("mul", "div") and isinstance(other, int | float) and user.args[0] is value:
        return float(other) if name == "mul" else 1 / float(other)
    if name == "add" and isinstance(other, fx.Node) and user.kwargs.get("alpha", 1) == 1:
        return other if other in layout.data else 1.0
    return None


def _cap(target: Tensor, counts: Tensor) -> Tensor:
    """``[tokens]``: the median squared norm over the token's own, where that is more."""
    energy = target.double().square().sum(dim=1)
    known = energy[counts > 0]
    median = known.median() if len(known) else energy.new_zeros(())
    return torch.where(energy > median, median / energy, 1.0)


def _wide(value: Tensor) -> Tensor:
    """``[tokens, columns]``, in fp32 or fp64."""
    flat = value.flatten(0, -2)
    return flat if flat.dtype == torch.float64 else flat.float()

"""Targets as users think: what is left of parameters, FLOPs, KV cache, memory or latency."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prunec.errors import PlanError

KINDS = ("ratio", "params", "flops", "kv-cache", "memory", "latency")

_SCALES = {
    **{"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12},
    **{"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    **{"ms": 1e-3, "s": 1.0},
}
_UNITS = {
    "params": ("", "k", "m", "b", "g"),
    "flops": ("", "k", "m", "g", "t"),
    "kv-cache": ("", "b", "kb", "mb", "gb", "kib", "mib", "gib"),
    "memory": ("", "b", "kb", "mb", "gb", "kib", "mib", "gib"),
    "latency": ("ms", "s"),
}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]*)")


@dataclass(frozen=True)
class Target:
    """What should be left.

    Attributes:
        kind: of :data:`KINDS`. ``ratio`` is the part of the repeated blocks' parameters to remove;
            every other kind says what is left.
        value: in parameters, FLOPs of one pass at the traced shape, bytes (of the KV cache: a
            token), seconds; a fraction of the dense model's where `relative`.
        relative: whether `value` is a fraction.
    """

    kind: str
    value: float
    relative: bool

    @classmethod
    def of_ratio(cls, ratio: float) -> Target:
        """Remove that part of the repeated blocks' parameters.

        Raises:
            PlanError: it is not between 0 and 1.
        """
        number = isinstance(ratio, int | float)
        if not number or not 0 < ratio < 1:
            raise PlanError(
                f"a ratio of {f'{ratio:g}' if number else ratio} is not possible",
                fix="use a ratio between 0 and 1, such as 0.2",
            )
        return cls("ratio", ratio, relative=True)

    @classmethod
    def parse(cls, text: str) -> Target:
        """``params=100M``, ``flops=70%``, ``kv-cache=50%``, ``memory=250MB``, ``latency=0.8x``.

        >>> Target.parse("flops=70%")
        Target(kind='flops', value=0.7, relative=True)

        Raises:
            PlanError: it is none of these.
        """
        kind, _, amount = text.partition("=")
        kind = kind.strip()
        match = _NUMBER.fullmatch(amount.strip())
        if kind not in KINDS or match is None:
            raise _unreadable(text)
        number, unit = float(match[1]), match[2].lower()
        if kind == "ratio" and unit in ("", "%"):
            return cls.of_ratio(number / 100 if unit == "%" else number)
        if unit in ("%", "x"):
            fraction = number / 100 if unit == "%" else number
            if not 0 < fraction < 1:
                raise PlanError(
                    f"{text}: nothing between nothing and all of it",
                    fix="a percentage, or a factor with x, is of the dense model: 70%, 0.7x",
                )
            return cls(kind, fraction, relative=True)
        if unit not in _UNITS.get(kind, ()) or number <= 0:
            raise _unreadable(text)
        bytes_alone = unit == "b" and kind in ("memory", "kv-cache")
        return cls(kind, number * (1.0 if bytes_alone else _SCALES[unit]), relative=False)

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.kind == "ratio":
            return f"ratio={self.value:g}"
        if self.relative:
            return f"{self.kind}={100 * self.value:g}%"
        unit = "s" if self.kind == "latency" else ""
        return f"{self.kind}={self.value:.12g}{unit}"


def chosen_target(ratio: float | None, target: str | Target | None) -> Target:
    """The target of a call that takes either; 20 % of the blocks where it takes neither.

    Raises:
        PlanError: both are given, or the one given is not possible.
    """
    if ratio is not None and target is not None:
        raise PlanError("a ratio and a target were both given", fix="give one of them")
    if target is None:
        return Target.of_ratio(0.2 if ratio is None else ratio)
    return target if isinstance(target, Target) else Target.parse(target)


def _unreadable(text: str) -> PlanError:
    return PlanError(
        f"not a target: {text}",
        fix="params=100M, flops=70%, kv-cache=50%, memory=250MB, latency=0.8x or ratio=0.2",
    )

"""Calibration sources as users name them, and how samples are shared among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunec.errors import CalibrationError

SELF = "self"


@dataclass(frozen=True)
class TextSource:
    """A text file, or ``self``: text that the dense model samples. `weight` is relative."""

    name: str
    weight: float = 1.0


def parse_source(spec: str) -> TextSource:
    """Read ``PATH``, ``PATH=WEIGHT``, ``self`` or ``self=WEIGHT``.

    A file whose name has the form PATH=WEIGHT is taken as that file.

    >>> parse_source("wiki.txt=0.5")
    TextSource(name='wiki.txt', weight=0.5)

    Raises:
        CalibrationError: a weight that is not a positive number.
    """
    name, equals, number = spec.rpartition("=")
    if not equals or Path(spec).exists():
        return TextSource(spec)
    try:
        weight = float(number)
    except ValueError:
        if "/" in number or "\\" in number or Path(number).suffix:
            return TextSource(spec)  # the = is part of a path
        weight = math.nan
    if not name or not math.isfinite(weight) or weight <= 0:
        raise CalibrationError(
            f"the weight of a calibration source must be a positive number: {spec}",
            fix="for example c4.txt=0.5",
        )
    return TextSource(name, weight)


def share_samples(sources: Sequence[TextSource], samples: int) -> list[int]:
    """How many samples each source gives: by weight, the largest remainders first, ties in order.

    >>> share_samples([TextSource("a", 2), TextSource("b", 1)], 8)
    [5, 3]

    Raises:
        CalibrationError: a source would give none.
    """
    total = math.fsum(source.weight for source in sources)
    exact = [samples * source.weight / total for source in sources]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise CalibrationError(
                f"{source.name} would give none of the {samples} samples",
                fix="take more samples, a larger weight, or fewer sources",
            )
    return counts

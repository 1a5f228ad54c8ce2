"""Calibration sources as users name them, and how samples are shared among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from prunec.errors import CalibrationError
from prunec.models.factory import is_factory

Kind = Literal["text", "rows", "hub", "self", "images", "loader", "given"]
SELF = "self"
_HUB = "hub:"
_ROWS = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class DataSource:
    """Where samples come from.

    Attributes:
        name: as the user wrote it, without its weight.
        kind: what stands there.
        place: a path, a data set's name or package.module:loader.
        fields: of each row, what is read: a text, or a source and its target; () for the
            fields that every row of a known form has.
        weight: relative to that of other sources.
    """

    name: str
    kind: Kind
    place: str
    fields: tuple[str, ...] = ()
    weight: float = 1.0

    @property
    def path(self) -> Path:
        return Path(self.place).expanduser()


def parse_source(spec: str) -> DataSource:
    """Read ``PATH``, ``ROWS.jsonl[#FIELD]``, ``hub:NAME[#FIELD]``, ``self`` or
    ``package.module:loader``, each with an optional ``=WEIGHT``.

    A directory is a folder of images. A file whose name has the form of another source, or of one
    with a weight, is taken as that file.

    >>> parse_source("a.jsonl#body=0.5")
    DataSource(name='a.jsonl#body', kind='rows', place='a.jsonl', fields=('body',), weight=0.5)

    Raises:
        CalibrationError: a weight that is not a positive number, or more than two fields.
    """
    name, weight = _weighted(spec)
    if not name.strip():
        raise CalibrationError("a calibration source without a name", fix="name a file, or self")
    place, mark, fragment = name.partition("#")
    if mark and Path(name).expanduser().exists():
        place, fragment = name, ""
    fields = tuple(fragment.split(",")) if mark and place != name else ()
    if len(fields) > 2 or not all(fields):
        raise CalibrationError(
            f"a row has one field of text, or a source and its target: {name}",
            fix="for example rows.jsonl#body, or rows.jsonl#question,answer",
        )
    kind = _kind(place)
    if fields and kind not in ("rows", "hub"):
        raise CalibrationError(f"only rows have fields: {name}", fix=f"name {place} itself")
    return DataSource(
        name, kind, place.removeprefix(_HUB) if kind == "hub" else place, fields, weight
    )


def _kind(place: str) -> Kind:
    if place == SELF:
        return "self"
    path = Path(place).expanduser()
    if path.is_dir():
        return "images"
    if not path.exists() and place.startswith(_HUB):
        return "hub"
    if path.suffix in _ROWS:
        return "rows"
    return "loader" if is_factory(place) and not path.exists() else "text"


def _weighted(spec: str) -> tuple[str, float]:
    name, equals, number = spec.rpartition("=")
    if not equals or Path(spec).expanduser().exists():
        return spec, 1.0
    try:
        weight = float(number)
    except ValueError:
        if "/" in number or "\\" in number or Path(number).suffix:
            return spec, 1.0  # the = is part of a path
        weight = math.nan
    if not name or not math.isfinite(weight) or weight <= 0:
        raise CalibrationError(
            f"the weight of a calibration source must be a positive number: {spec}",
            fix="for example c4.txt=0.5",
        )
    return name, weight


def merged(sources: Sequence[DataSource]) -> list[DataSource]:
    """Each name once, with the sum of its weights: else its samples would be drawn twice.

    Raises:
        CalibrationError: there is none.
    """
    if not sources:
        raise CalibrationError("no calibration source", fix="name a text file, or self")
    weights: dict[str, float] = {}
    for source in sources:
        weights[source.name] = weights.get(source.name, 0.0) + source.weight
    by_name = {source.name: source for source in sources}
    return [replace(by_name[name], weight=weight) for name, weight in weights.items()]


def share_samples(sources: Sequence[DataSource], samples: int) -> list[int]:
    """How many samples each source gives: by weight, the largest remainders first, ties in order.

    >>> share_samples([parse_source("a=2"), parse_source("b=1")], 8)
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

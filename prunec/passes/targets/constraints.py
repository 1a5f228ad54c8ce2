"""What a result must obey: multiples, bounds, divisibility, layers that stay whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from prunec.errors import PlanError
from prunec.graph.coupling import Group
from prunec.graph.kinds import KINDS
from prunec.importance.curves import RemovalCurve
from prunec.importance.problem import BoolArray, IntArray
from prunec.passes.sites import Site
from prunec.registry import nearest

PRESETS: Mapping[str, int] = {"gpu": 64, "vllm": 128, "gguf-k": 256}
"""FFN widths that the kernels of an engine take whole: tensor cores, vLLM, k-quant blocks."""

_WIDE = 32  # steps of `align` that a group must have
_SPLIT = ("ffn_channel", "head", "kv_group")


@dataclass(frozen=True)
class Constraints:
    """Which numbers of units may stay.

    Attributes:
        multiple_of: by kind of unit, what the number kept is a multiple of. A group that is
            smaller than one multiple stays whole.
        minimum, maximum: least and most that each layer (an attention, an FFN: the groups of one
            site) gives, as a ratio of the parameters that they hold.
        tensor_parallel: heads, KV groups and FFN widths are divisible by it.
        align: groups of 32 times this many units or more keep a multiple of it where the target
            is still met: kernels are slow at odd widths. A wish, where the others are rules.
        protect: layers that stay whole: a block by index (negative from the end) or a module path.
    """

    multiple_of: Mapping[str, int] = field(default_factory=dict)
    minimum: float = 0.0
    maximum: float = 1.0
    tensor_parallel: int = 1
    protect: tuple[str, ...] = ()
    align: int = 1

    def __post_init__(self) -> None:
        for name, bound in (("minimum", self.minimum), ("maximum", self.maximum)):
            if type(bound) not in (int, float):
                raise PlanError(
                    f"constraints: {name}={bound!r} is not possible", fix="use a ratio from 0 to 1"
                )
        if not 0 <= self.minimum <= self.maximum <= 1:
            raise PlanError(
                f"constraints: minimum {self.minimum:g} and maximum {self.maximum:g}"
                " are not possible",
                fix="use ratios with 0 <= minimum <= maximum <= 1",
            )
        for kind in self.multiple_of:
            if kind not in KINDS:
                raise PlanError(
                    f"constraints: multiple_of {kind!r} is no kind of unit",
                    fix=f"there are: {', '.join(KINDS)}",
                )
        whole = {"tensor_parallel": self.tensor_parallel, "align": self.align}
        for name, value in {**self.multiple_of, **whole}.items():
            if type(value) is not int or value < 1:
                raise PlanError(
                    f"constraints: {name}={value!r} is not possible",
                    fix="use a whole number, 1 or more",
                )

    def rounds(self, groups: Iterable[Group]) -> bool:
        """Whether some numbers of units of these groups are not allowed."""
        return any(self.step(group) > 1 for group in groups)

    def combined(self, other: Constraints) -> Constraints:
        """Both at once: least common multiples, the narrower bounds, all protected layers."""
        kinds = dict.fromkeys([*self.multiple_of, *other.multiple_of])
        both = {k: math.lcm(self.multiple_of.get(k, 1), other.multiple_of.get(k, 1)) for k in kinds}
        return Constraints(
            {kind: multiple for kind, multiple in both.items() if multiple > 1},
            max(self.minimum, other.minimum),
            min(self.maximum, other.maximum),
            math.lcm(self.tensor_parallel, other.tensor_parallel),
            tuple(dict.fromkeys([*self.protect, *other.protect])),
            math.lcm(self.align, other.align),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, defaults left out; `from_dict` reads it."""
        default = Constraints()
        plain = {**vars(self), "multiple_of": dict(self.multiple_of), "protect": list(self.protect)}
        return {
            f.name: plain[f.name]
            for f in fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        }

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "constraints") -> Constraints:
        """Raises PlanError for anything but the fields above."""
        known = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping):
            raise PlanError(
                "constraints are a mapping of settings", where=where, fix=", ".join(known)
            )
        for key in data:
            if key not in known:
                raise PlanError(
                    f"constraints have no setting {key!r}", where=where, fix=nearest(key, known)
                )
        values = dict(data)
        multiples = values.get("multiple_of", {})
        if not isinstance(multiples, Mapping):
            multiples = {"ffn_channel": multiples}
        given = values.get("protect", ())
        layers = given if isinstance(given, list | tuple) else [given]
        if not all(type(layer) in (str, int) for layer in layers):
            raise PlanError(
                f"constraints: protect={given!r} is not possible",
                where=where,
                fix="give blocks by index and modules by path: [0, -1, model.layers.2.mlp]",
            )
        protect = tuple(name.strip() for layer in layers for name in str(layer).split(","))
        return replace(cls(), **values | {"multiple_of": multiples, "protect": protect})

    def protected(self, blocks: Sequence[str], parameters: Mapping[str, str]) -> set[str]:
        """The canonical names of the parameters that stay whole.

        Args:
            blocks: all repeated blocks, in order; one of no name where there are none.
            parameters: every name of a parameter -> its canonical one.

        Raises:
            PlanError: the model has no such block or module.
        """
        whole: set[str] = set()
        for path in (_path(name, blocks) for name in self.protect):
            inside = [n for n in parameters if path in ("", n) or n.startswith(f"{path}.")]
            if not inside:
                raise PlanError(
                    f"cannot protect {path}: the model has no parameter of that path",
                    fix="name a module as in model.named_modules(), or a block by its index",
                )
            whole |= {parameters[name] for name in inside}
        return whole

    def step(self, group: Group) -> int:
        """What the number of units kept of a group is a multiple of; its size: it stays whole.

        Raises:
            PlanError: the group has fewer units than devices.
        """
        split = self.tensor_parallel
        if not (group.kind in _SPLIT or (group.kind == "query_head" and not group.companions)):
            split = 1
        if split > group.size:
            raise PlanError(
                f"{group.name} has {group.size} units, too few for tensor parallelism over {split}",
                fix=f"use at most {group.size}",
            )
        multiple = math.lcm(self.multiple_of.get(group.kind, 1), group.multiple)
        both = math.lcm(split, multiple)
        if both <= group.size:
            return both
        return split if group.size % split else group.size

    def free(self, sites: Sequence[Site]) -> list[Site]:
        """The sites, with those of their groups alone of which some units, not all, may go.

        A KV group that tensor parallelism keeps whole must not be ranked among the query heads: a
        curve that begins with it would reach no number that is allowed. If there are none, all.
        """
        reduced = [
            replace(site, groups=tuple(g for g in site.groups if not self._stays_whole(g)))
            for site in sites
        ]
        return [site for site in reduced if site.groups] or list(sites)

    def _stays_whole(self, group: Group) -> bool:
        if group.size < self.tensor_parallel:  # an error, but of a protected layer
            return False
        step = self.step(group)
        return group.size % step == 0 and group.size - step < self.least(group)

    def wish(self, group: Group) -> int:
        """What the number of units kept of a group is a multiple of if nothing speaks against it.

        One such step of a wide group is at most 3 % of it. What `step` says is not made coarser.
        """
        step = self.step(group)
        return self.align if step == 1 and group.size >= _WIDE * self.align else step

    def least(self, group: Group) -> int:
        """The fewest units of a group that may stay."""
        step = self.step(group)
        return math.ceil(group.minimum / step) * step

    def counts(self, group: Group) -> range:
        """The numbers of units of a group that may stay, the largest first."""
        step = self.step(group)
        return range(group.size // step * step, self.least(group) - 1, -step)

    def bounds(self, held: float) -> tuple[float, float]:
        """Least and most that a layer of so many parameters gives, rounding of floats included."""
        slack = 1e-9 * held
        return self.minimum * held - slack, self.maximum * held + slack

    def wished(self, site: Site, curve: RemovalCurve) -> BoolArray:
        """Which points of a curve, its beginning included, have the numbers of units wished for."""
        return _multiples(site, curve, {group.name: self.wish(group) for group in site.groups})

    def allowed(self, site: Site, curve: RemovalCurve, held: int) -> BoolArray:
        """Which points of a curve, its beginning included, obey the multiples and bounds.

        Args:
            held: parameters of the site's groups before.
        """
        removed = np.concatenate(([0], curve.parameters))
        fine = _multiples(site, curve, {group.name: self.step(group) for group in site.groups})
        least, most = self.bounds(held)
        within: BoolArray = fine & (removed >= least) & (removed <= most)
        return within


def counts_along(site: Site, curve: RemovalCurve) -> dict[str, IntArray]:
    """Units kept per group at every point of a curve, its beginning included: int [steps + 1]."""
    names = np.array([removal.group for removal in curve.removals], dtype=object)
    return {
        group.name: group.size - np.concatenate(([0], np.cumsum(names == group.name)))
        for group in site.groups
    }


def _multiples(site: Site, curve: RemovalCurve, steps: Mapping[str, int]) -> BoolArray:
    """Where along a curve every group keeps a multiple of its step."""
    fine = np.ones(len(curve.removals) + 1, dtype=bool)
    for name, counts in counts_along(site, curve).items():
        fine &= counts % steps[name] == 0
    return fine


def hardware(text: str) -> Constraints:
    """The constraints of a target machine: ``gpu``, ``vllm``, ``gguf-k``, ``tp=N``, or several.

    >>> hardware("vllm,tp=2").to_dict()
    {'multiple_of': {'ffn_channel': 128}, 'tensor_parallel': 2}

    Raises:
        PlanError: for another name.
    """
    result = Constraints()
    for name in text.split(","):
        key, _, number = name.strip().partition("=")
        if key == "tp" and number.isdigit() and int(number) > 0:
            found = Constraints(tensor_parallel=int(number))
        elif key in PRESETS and not number:
            found = Constraints({"ffn_channel": PRESETS[key]})
        else:
            raise PlanError(
                f"no hardware preset {name.strip()!r}",
                fix=f"there are: {', '.join(PRESETS)}, tp=N; several with commas",
            )
        result = result.combined(found)
    return result


def _path(name: str, blocks: Sequence[str]) -> str:
    """A protected layer as a module path."""
    try:
        index = int(name)
    except ValueError:
        return name
    if not -len(blocks) <= index < len(blocks):
        raise PlanError(
            f"cannot protect block {index}: the model has {len(blocks)}",
            fix=f"use an index from {-len(blocks)} to {len(blocks) - 1}",
        )
    return blocks[index]

"""What a criterion is asked: which units of one site go first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

Axis = tuple[str, int]
"""A member of a group: a parameter's name and one of its axes."""


@dataclass(frozen=True, eq=False)
class UnitSet:
    """The units of one group, seen from one site.

    A group with companions has one row of units per companion index: which units go may differ
    from row to row, how many may not. A group without companions has one row.

    Attributes:
        group: Stable name of the group.
        companions: Groups that are major to this one everywhere, outermost first.
        columns: ``[C, U, width]``: the columns of the site's weight that read unit ``u`` under the
            companion index ``c`` (flattened, row-major). No column occurs twice.
        positions: Per member, ``[C, U, width']`` positions of each unit on that axis.
        minimum: Units that must stay in every row, at least 1.
    """

    group: str
    companions: tuple[str, ...]
    columns: IntArray
    positions: Mapping[Axis, IntArray]
    minimum: int

    def __post_init__(self) -> None:
        assert self.columns.ndim == 3, f"{self.group}: columns are [C, U, width]"
        assert self.columns.size, f"{self.group}: no columns"
        assert self.companions or self.rows == 1, f"{self.group}: rows without companions"
        assert 1 <= self.minimum <= self.units, f"{self.group}: minimum {self.minimum}"
        assert len(np.unique(self.columns)) == self.columns.size, f"{self.group}: column twice"
        for member, positions in self.positions.items():
            assert positions.shape[:2] == self.columns.shape[:2], f"{self.group}: {member}"

    @property
    def rows(self) -> int:
        """C, the number of companion indices."""
        return int(self.columns.shape[0])

    @property
    def units(self) -> int:
        """U, the number of units in each row."""
        return int(self.columns.shape[1])


@dataclass(frozen=True, eq=False)
class SiteProblem:
    """One site: the place where the units of its groups are last read.

    Attributes:
        name: Where it is, in the user's words; errors and log lines name it.
        weight: ``[out, columns]``, the weight that reads the units, input axis last.
        unit_sets: The groups to choose from, such as a single ``ffn_channel``, or ``kv_group``
            and ``query_head`` with companion ``kv_group``.
        parameters: Every member parameter of these groups by name, for scores from weights.
        size: Parameters that the site's groups hold at the given numbers of units, one number per
            group; exact, and never less for more units.
        readers: The members that `weight` is made of: a parameter and an axis that is summed over,
            or along which one matrix lies beside another.
        producers: The members that make the units: a weight and its output axis, in the order of
            the graph, such as gate and up of an FFN, or q, k and v of a head.
        blocks: The numbers of columns that lie in blocks, one after another; empty for one block.
            A row of the input has columns of one block only (a token has one expert at a time),
            or what the blocks add up to lies apart (several layers read the units). So their
            second moments across blocks are zero. A block with fewer outputs than others ends in
            rows of zeros.
    """

    name: str
    weight: Tensor
    unit_sets: tuple[UnitSet, ...]
    parameters: Mapping[str, Tensor]
    size: Callable[[Mapping[str, int]], int]
    readers: tuple[Axis, ...] = ()
    producers: tuple[Axis, ...] = ()
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.weight.ndim == 2, f"{self.name}: the weight is [out, columns]"
        assert sum(self.blocks or self.weight.shape[1:]) == self.weight.shape[1], self.name
        for unit_set in self.unit_sets:
            assert unit_set.columns.max() < self.weight.shape[1], f"{self.name}: {unit_set.group}"

    @property
    def spans(self) -> list[slice]:
        """The columns of each block."""
        ends = list(accumulate(self.blocks or (self.weight.shape[1],)))
        return [slice(first, end) for first, end in pairwise([0, *ends])]

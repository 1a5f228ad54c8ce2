"""Sites whose columns come in blocks: one an expert, a group of a convolution, or a reader.

No row of the input has columns of two blocks, so the Gram matrix of all columns is block-diagonal,
and is never made: what works on it works block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prunec.importance.gram import SecondMoment, second_moment
from prunec.importance.problem import SiteProblem

_SHARE = "input_share"
# What grows with the square of the input; a mean grows with the input itself.
_LINEAR = frozenset({"input_mean"})


def block_key(name: str, block: int) -> str:
    """The key of a statistic of one block.

    >>> block_key("input_gram", 3)
    'input_gram[3]'
    """
    return f"{name}[{block}]"


def plain_name(key: str) -> str:
    """The name of the statistic that a key is of.

    >>> plain_name("input_gram[3]"), plain_name("mask_grad up.weight 0")
    ('input_gram', 'mask_grad')
    """
    return key.split(" ")[0].split("[")[0]


def by_block(found: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The statistics of a site from those of its blocks; of a single block they are the site's.

    Args:
        found: per block, over its own rows.
        shares: the part of the site's rows that each block has.
    """
    if len(found) == 1:
        return dict(found[0])
    taken = {
        block_key(name, block): value
        for block, statistics in enumerate(found)
        for name, value in statistics.items()
    }
    for block, share in enumerate(shares):
        taken[block_key(_SHARE, block)] = torch.tensor(share, dtype=torch.float64)
    return taken


def of_block(statistics: Mapping[str, Tensor], block: int, blocks: int) -> Mapping[str, Tensor]:
    """The statistics of one block over its own rows, by plain name."""
    if blocks == 1:
        return statistics
    ending = block_key("", block)
    return {
        key.removesuffix(ending): value for key, value in statistics.items() if key.endswith(ending)
    }


class Joined(Mapping[str, Tensor]):
    """The statistics of all columns of a site, from those of its blocks.

    A block counts by its share of the rows: its inputs are taken times the root of that share, so
    that losses of blocks add up to the loss per row of the site. A matrix is put together only for
    a criterion that asks for it; `parts` gives the blocks themselves.
    """

    def __init__(self, statistics: Mapping[str, Tensor], blocks: int):
        self._flat = statistics
        self._blocks = blocks

    def __getitem__(self, name: str) -> Tensor:
        if name in self._flat:
            return self._flat[name]
        parts = self.parts(name)
        if parts[0].ndim == 1:
            return torch.cat(parts)
        whole: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key.split("[")[0] for key in self._flat))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def parts(self, name: str) -> list[Tensor]:
        """That statistic of each block."""
        scaled = []
        for block in range(self._blocks):
            share = float(self._flat[block_key(_SHARE, block)])
            value = self._flat[block_key(name, block)]
            scaled.append(value * (share**0.5 if name in _LINEAR else share))
        return scaled


def joined(problem: SiteProblem, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a criterion is given: the statistics of all columns of the site."""
    blocks = len(problem.spans)
    return statistics if blocks == 1 else Joined(statistics, blocks)


def blocks_of(
    problem: SiteProblem, statistics: Mapping[str, Tensor], name: str
) -> list[tuple[slice, Tensor]]:
    """The columns of each block and its own part of a statistic."""
    spans = problem.spans
    if len(spans) == 1:
        return [(spans[0], statistics[name])]
    if isinstance(statistics, Joined):
        return list(zip(spans, statistics.parts(name), strict=True))
    whole = statistics[name]
    return [(span, whole[span] if whole.ndim == 1 else whole[span, span]) for span in spans]


def moments_of(
    problem: SiteProblem, statistics: Mapping[str, Tensor]
) -> list[tuple[slice, SecondMoment]]:
    """The columns of each block and the second moment of its input."""
    spans = problem.spans
    if len(spans) == 1:
        return [(spans[0], second_moment(statistics))]
    return list(blocks_of(problem, statistics, "input_gram"))


def within(columns: Tensor, span: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """The units that have columns in a block.

    Args:
        columns: ``[N, width]``, -1 for none.

    Yields:
        Indices ``[n]`` of units that have equally many, and these columns ``[n, width']``, counted
        from the block's first.
    """
    inside = (columns >= span.start) & (columns < span.stop)
    counts = inside.sum(dim=1)
    for count in counts.unique().tolist():
        if count:
            units = (counts == count).nonzero()[:, 0]
            yield units, (columns[units][inside[units]] - span.start).view(len(units), count)

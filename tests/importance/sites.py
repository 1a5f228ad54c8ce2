"""Small sites with known answers, and the brute force that criteria are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from prunec.importance.curves import RemovalCurve
from prunec.importance.problem import SiteProblem, UnitSet


def gram_of(columns: int, *, seed: int = 0, rank: int | None = None) -> Tensor:
    """A Gram matrix of strongly correlated columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    rank = columns if rank is None else rank
    mix = torch.randn(columns, rank, generator=generator, dtype=torch.float64)
    mix[:, : rank // 4] *= 4
    scale = torch.exp(0.5 * torch.randn(columns, generator=generator, dtype=torch.float64))
    x = (mix @ torch.randn(rank, 3 * columns, generator=generator, dtype=torch.float64)).T * scale
    return x.T @ x / len(x)


def weight_of(out: int, columns: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(out, columns, generator=generator, dtype=torch.float64)


def channels(units: int, *, out: int = 5, width: int = 1, minimum: int = 1, seed: int = 0):
    """One group of channels: `up` rows and `down` columns, `width` columns a channel."""
    weight = weight_of(out, units * width, seed=seed)
    up = weight_of(units, 3, seed=seed + 1)
    columns = np.arange(units * width).reshape(1, units, width)
    unit_set = UnitSet(
        group="mlp/ffn_channel",
        companions=(),
        columns=columns,
        positions={("up", 0): np.arange(units).reshape(1, units, 1), ("down", 1): columns},
        minimum=minimum,
    )
    return SiteProblem(
        name="mlp.down",
        weight=weight,
        unit_sets=(unit_set,),
        parameters={"up": up, "down": weight},
        size=lambda counts: counts["mlp/ffn_channel"] * (3 + out * width),
    )


def attention(kv: int = 3, per: int = 3, dim: int = 2, *, out: int = 5, hidden: int = 7, seed=0):
    """Grouped-query attention: KV groups, and query heads with the KV groups as companions."""
    heads = kv * per
    weight = weight_of(out, heads * dim, seed=seed)
    query = np.arange(heads * dim).reshape(kv, per, dim)
    whole = np.arange(heads * dim).reshape(1, kv, per * dim)
    keys = np.arange(kv * dim).reshape(1, kv, dim)

    def size(counts: Mapping[str, int]) -> int:
        groups, queries = counts["attn/kv_group"], counts["attn/query_head"]
        return groups * dim * (2 * hidden + queries * (hidden + out))

    parameters = {
        "q": weight_of(heads * dim, hidden, seed=seed + 1),
        "k": weight_of(kv * dim, hidden, seed=seed + 2),
        "v": weight_of(kv * dim, hidden, seed=seed + 3),
        "o": weight,
    }
    kv_group = UnitSet(
        "attn/kv_group",
        (),
        whole,
        {("q", 0): whole, ("k", 0): keys, ("v", 0): keys, ("o", 1): whole},
        1,
    )
    query_head = UnitSet(
        "attn/query_head", ("attn/kv_group",), query, {("q", 0): query, ("o", 1): query}, 1
    )
    return SiteProblem("attn.o", weight, (kv_group, query_head), parameters, size)


def crossing(kv: int = 2, per: int = 3, dim: int = 4, *, out: int = 5, hidden: int = 7, seed=0):
    """Attention whose value dims can go too, under each KV group: three sets that cross."""
    site = attention(kv, per, dim, out=out, hidden=hidden, seed=seed)
    by_head = np.arange(kv * per * dim).reshape(kv, per, dim)
    values = np.arange(kv * dim).reshape(kv, dim, 1)
    columns = by_head.transpose(0, 2, 1)
    value_dim = UnitSet(
        "attn/value_dim", ("attn/kv_group",), columns, {("v", 0): values, ("o", 1): columns}, 2
    )

    def size(counts: Mapping[str, int]) -> int:
        groups, queries = counts["attn/kv_group"], counts["attn/query_head"]
        keys = groups * dim * hidden * (1 + queries)
        return keys + groups * counts["attn/value_dim"] * (hidden + queries * out)

    return replace(site, unit_sets=(*site.unit_sets, value_dim), size=size)


def residual(weight: Tensor, gram: Tensor, removed: Sequence[int]) -> tuple[float, Tensor]:
    """``min tr((W - V) C (W - V)^T)`` over V without the removed columns, by least squares on a
    square root of C: nothing in common with the elimination that it checks."""
    size = gram.diagonal().double().clamp_min(1e-300).sqrt()  # eigh is only absolutely accurate
    values, vectors = torch.linalg.eigh(gram.double() / size / size[:, None])
    root = size[:, None] * vectors * values.clamp_min(0).sqrt()
    stay = [c for c in range(weight.shape[1]) if c not in set(removed)]
    target = (weight.double() @ root).T
    solution = torch.linalg.lstsq(root[stay].T, target, driver="gelsd").solution
    best = torch.zeros_like(weight.double())
    best[:, stay] = solution.T
    return float(((weight.double() - best) @ root).square().sum()), best


def removed_columns(problem: SiteProblem, curve: RemovalCurve, steps: int) -> list[int]:
    """Columns that the first steps of a curve remove."""
    sets = {s.group: s for s in problem.unit_sets}
    gone: set[int] = set()
    for removal in curve.removals[:steps]:
        for row, unit in enumerate(removal.units):
            if unit >= 0:
                gone.update(sets[removal.group].columns[row, unit].tolist())
    return sorted(gone)


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)

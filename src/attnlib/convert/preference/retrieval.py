"""Another image that looks alike: the nearest neighbour by features, never the image itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_int, check_name, check_rank, check_real, check_whole
from .batches import SEQUENCES, Preference


def retrieve(
    queries: Tensor, pool: Tensor | None = None, count: int = 1, own: Tensor | None = None, apart: float | None = None
) -> Tensor:
    """Indices (Q, count) of the most similar entries of a pool, by the cosine of features, best first.

    Args:
        queries: (Q, D) features.
        pool: (N, D); ``None`` is the queries themselves, each of which is left out for itself.
        count: how many.
        own: (Q,) the place of each query in ``pool``, -1 for none; it is left out.
        apart: leave out what is at least so similar, copies of the same picture.

    Equal similarities go to the earlier entry.

    Raises:
        ValueError: an empty pool, or one with too few other entries.

    >>> retrieve(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])).flatten().tolist()
    [1, 0, 1]
    """
    check_rank("queries", queries, 2, "(Q, features)")
    check_int("count", count, least=1)
    if pool is None:
        if own is not None:
            raise ValueError("own says where queries stand in pool, but no pool is given")
        pool, own = queries, torch.arange(len(queries), device=queries.device)
    check_rank("pool", pool, 2, "(N, features)")
    if not len(pool):
        raise ValueError("pool is empty: there is nothing to retrieve")
    if pool.shape[1] != queries.shape[1]:
        raise ValueError(f"queries and pool must have equal widths, got {queries.shape[1]} and {pool.shape[1]}")
    for name, value in (("queries", queries), ("pool", pool)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite")
    # Summed in double, so that equal entries are equally similar wherever they stand.
    a, b = (F.normalize(t.double(), dim=1) for t in (queries, pool))
    similar = (a[:, None] * b[None]).sum(-1) if a.shape[0] * b.numel() <= 1 << 24 else a @ b.T
    if apart is not None:
        check_real("apart", apart, above=0)
        similar = similar.masked_fill(similar >= apart, -torch.inf)
    if own is not None:
        check_whole("own", own)
        if own.shape != queries.shape[:1] or bool((own < -1).any()) or bool((own >= len(pool)).any()):
            raise ValueError(f"own must hold {len(queries)} places from -1 to {len(pool) - 1}, got {own.tolist()[:8]}")
        rows = (own >= 0).nonzero().squeeze(1)
        similar[rows, own[rows]] = -torch.inf
    left = (similar > -torch.inf).sum(1)
    if len(queries) and int(left.min()) < count:
        raise ValueError(
            f"pool of {len(pool)} has {int(left.min())} entries besides the query itself; count={count} are asked"
        )
    return similar.sort(dim=1, descending=True, stable=True).indices[:, :count]


def with_neighbours(
    pairs: Sequence[Preference], features: Tensor, name: str = "retrieved", apart: float | None = None
) -> list[Preference]:
    """Pairs that hold, as image ``name``, the image of the pair whose features are nearest.

    Args:
        pairs: with one image each.
        features: (pairs, D), of any image encoder.
        apart: as of :func:`retrieve`; of several questions on one picture it leaves out the picture itself.

    Raises:
        ValueError: neighbours whose image takes another number of tokens; resize images first.
    """
    check_name("name", name)
    if len(pairs) != len(features):
        raise ValueError(f"features must have a row per pair, {len(pairs)}, got {len(features)}")
    places = retrieve(features, apart=apart)[:, 0].tolist()
    out = []
    for i, (pair, place) in enumerate(zip(pairs, places, strict=True)):
        found = {k: v for k, v in pairs[place].inputs.items() if k not in SEQUENCES and v is not None}
        mine = {k: v for k, v in pair.inputs.items() if k not in SEQUENCES and v is not None}
        unlike = [
            k for k in sorted({*found, *mine})
            if k not in found or k not in mine or found[k].shape != mine[k].shape
            or (k.endswith("_thw") and not found[k].equal(mine[k]))
        ]  # fmt: skip
        if unlike:
            raise ValueError(f"pairs[{i}] and its neighbour pairs[{place}] differ in {unlike}: give images of one size")
        out.append(replace(pair, images={**pair.images, name: found}))
    return out

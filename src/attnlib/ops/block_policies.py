"""Policies of engine C: from affinities between blocks to a :class:`~attnlib.ops.block_sparse.BlockPlan`.

All choices are made without gradient. Scores are (B or 1, H or 1, nq, nk): one number for each pair of blocks. The
budget may hold for each row, for each head, or for all heads of a sample together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_batch,
    check_choice,
    check_device,
    check_divides,
    check_float,
    check_int,
    check_place,
    check_rank,
    check_real,
    check_tensor,
    check_valid,
    check_width,
)
from ..types import stats_dtype
from ._call import expand_heads
from .block_sparse import BlockPlan

SCOPES = ("row", "block", "head", "all")


def pool_blocks(x: Tensor, block: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of each block of tokens that exist.

    Args:
        x: (B, H, N, D); the last block may be short and gets its true mean.
        block: tokens per block.
        valid: (B, N) boolean.

    Returns:
        (B, H, blocks, D) means in the statistics dtype, zero for blocks without tokens, and (B, blocks) boolean: which
        blocks have any.

    >>> pool_blocks(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), 2)[0].flatten().tolist()
    [2.0, 5.0]
    """
    check_float("x", x)
    check_rank("x", x, 4, "(B, H, N, D)")
    check_int("block", block, least=1)
    check_valid("valid", valid, (x.shape[0], x.shape[2]))
    check_device(x=x, valid=valid)
    batch, heads, n, d = x.shape
    blocks = -(-n // block)
    exists = torch.ones(batch, n, dtype=torch.bool, device=x.device) if valid is None else valid
    missing = blocks * block - n
    exists = F.pad(exists, (0, missing)).view(batch, blocks, block)
    x = F.pad(x.to(stats_dtype(x.dtype)), (0, 0, 0, missing)).view(batch, heads, blocks, block, d)
    size = exists.sum(-1)
    x = x.masked_fill(~exists[:, None, :, :, None], 0.0)
    return x.sum(3) / size.clamp(min=1)[:, None, :, None], size > 0


def block_affinity(
    q: Tensor,
    k: Tensor,
    q_block: int,
    k_block: int,
    *,
    scale: float = 1.0,
    q_valid: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """``scale * mean(q of a block) . mean(k of a block)``, ``-inf`` where the key block has no token that exists.

    Args:
        q: (B, Hq, N, D) queries; with ``q_block=1`` every query stands for itself.
        k: (B, Hk, M, D) keys.
        q_valid: (B, N) boolean, which queries exist.
        valid: (B, M) boolean, which keys exist.

    Returns:
        (B, Hq, nq, nk) in the statistics dtype, without gradient.

    Reference: Zhu et al., 2023, arXiv 2303.08810 (regions); Wu et al., 2025, arXiv 2506.23858 (single queries).
    """
    check_rank("q", q, 4, "(B, Hq, N, D)")
    check_rank("k", k, 4, "(B, Hk, M, D)")
    check_batch(q=q, k=k)
    check_device(q=q, k=k, q_valid=q_valid, valid=valid)
    check_width("k", k, q.shape[3], "the width of q")
    check_divides("heads of k", k.shape[1], "heads of q", q.shape[1])
    check_real("scale", scale)
    for name, block in (("q_block", q_block), ("k_block", k_block)):
        check_int(name, block, least=1)
    for name, x in (("q", q), ("k", k)):
        check_float(name, x)
    check_valid("q_valid", q_valid, (q.shape[0], q.shape[2]))
    check_valid("valid", valid, (k.shape[0], k.shape[2]))
    with torch.no_grad():
        q_mean, _ = pool_blocks(q, q_block, q_valid)
        k_mean, exists = pool_blocks(k, k_block, valid)
        scores = (q_mean * scale) @ expand_heads(k_mean, q.shape[1]).transpose(-2, -1)
        return scores if valid is None else scores.masked_fill(~exists[:, None, None], float("-inf"))


def own_blocks(n: int, q_block: int, k_block: int, device: torch.device | str | None = None) -> Tensor:
    """(nq, nk) boolean: key blocks that hold a token of the query block itself (self-attention).

    >>> own_blocks(4, 1, 2).long().tolist()
    [[1, 0], [1, 0], [0, 1], [0, 1]]
    """
    check_int("n", n, least=0)
    for name, block in (("q_block", q_block), ("k_block", k_block)):
        check_int(name, block, least=1)
    device = check_place("device", device)
    first = torch.arange(-(-n // q_block), device=device) * q_block
    last = (first + q_block - 1).clamp(max=n - 1)
    blocks = torch.arange(-(-n // k_block), device=device)
    return (blocks >= (first // k_block)[:, None]) & (blocks <= (last // k_block)[:, None])


def topk_blocks(
    scores: Tensor,
    topk: int,
    q_block: int,
    k_block: int,
    n: int,
    m: int | None = None,
    *,
    forced: Tensor | None = None,
    allowed: Tensor | None = None,
    per: str = "row",
) -> BlockPlan:
    """The key blocks with the largest scores.

    Args:
        scores: (B or 1, H or 1, nq, nk).
        topk: blocks per row; with ``per="head"`` the budget of a head is ``topk * nq``, freely spread over its rows,
            with ``per="all"`` that of a sample is ``topk * nq * H``.
        n: queries, and ``m`` keys, of the problem that the plan is for.
        forced: boolean, broadcast to the scores: blocks that are chosen first, out of the same budget.
        allowed: boolean, broadcast to the scores: all others are never chosen, so that rows may stay short.
        per: ``"row"``, ``"head"`` or ``"all"``.

    Returns:
        A plan with ``min(topk, nk)`` blocks in each row, fewer where not allowed.

    >>> topk_blocks(torch.tensor([[[[0.1, 0.9, 0.5]]]]), 2, 4, 4, 4, 12).index.tolist()
    [[[[1, 2]]]]
    """
    m = check_scores(scores, q_block, k_block, n, m, forced, allowed)
    check_choice("per", per, ("row", "head", "all"))
    check_int("topk", topk, least=1)
    with torch.no_grad():
        if forced is not None:
            scores = scores.masked_fill(forced, float("inf"))
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        batch, heads, nq, nk = scores.shape
        if per == "row":
            best, index = scores.topk(min(topk, nk), -1)
            count = None if allowed is None else (best != float("-inf")).sum(-1)
            return BlockPlan._made(index, q_block, k_block, n, m, count)
        flat = scores.reshape(batch, heads, nq * nk) if per == "head" else scores.reshape(batch, 1, heads * nq * nk)
        budget = min(topk * (nq if per == "head" else heads * nq), flat.shape[-1])
        best, index = flat.topk(budget, -1)
        chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, index, best != float("-inf"))
        return BlockPlan.from_mask(chosen.view(batch, heads, nq, nk), q_block, k_block, n, m, _width(scores))


def threshold_blocks(
    scores: Tensor,
    threshold: float,
    q_block: int,
    k_block: int,
    n: int,
    m: int | None = None,
    *,
    forced: Tensor | None = None,
    allowed: Tensor | None = None,
    per: str = "head",
    weigh: str = "minmax",
    at_least: int = 0,
) -> BlockPlan:
    """The fewest key blocks whose weights make up ``threshold`` of all weight in their scope.

    Forced blocks come first and count towards the threshold; then the others in descending order until it is met. With
    ``weigh="minmax"`` a weight is ``(score - min) / (max - min)`` over the scope, so that the lowest block weighs
    nothing and equal scores choose every block; with ``"softmax"`` it is the softmax over the scope.

    Args:
        scores: (B or 1, H or 1, nq, nk).
        threshold: in (0, 1]; 1 chooses everything that is allowed.
        forced: boolean, broadcast to the scores.
        allowed: boolean, broadcast to the scores: all others are never chosen and weigh nothing.
        per: the scope: ``"row"`` (blocks of one query block), ``"block"`` (query blocks and heads of one key block),
            ``"head"`` or ``"all"`` (heads of a sample together).
        weigh: ``"minmax"`` or ``"softmax"``.
        at_least: unforced blocks chosen in each scope even when the forced ones meet the threshold; the authors of
            VMoBA choose 1.

    Returns:
        A plan; its rows have as many blocks as they need.

    Reference: Wu et al., 2025, arXiv 2506.23858, threshold selection.
    """
    m = check_scores(scores, q_block, k_block, n, m, forced, allowed)
    check_choice("per", per, SCOPES)
    check_choice("weigh", weigh, ("minmax", "softmax"))
    check_real("threshold", threshold, above=0, most=1)
    check_int("at_least", at_least, least=0)
    with torch.no_grad():
        batch, heads, nq, nk = scores.shape
        shape = scores.shape
        every = torch.ones(shape, dtype=torch.bool, device=scores.device)
        allowed = every if allowed is None else allowed.expand(shape)
        first = (torch.zeros_like(every) if forced is None else forced.expand(shape)) & allowed
        if threshold == 1.0:
            return BlockPlan.from_mask(allowed.contiguous(), q_block, k_block, n, m, _width(scores))

        def scope(x: Tensor) -> Tensor:
            if per == "row":
                return x
            if per == "block":
                return x.permute(0, 3, 1, 2).reshape(batch, nk, heads * nq)
            return x.reshape(batch, heads, nq * nk) if per == "head" else x.reshape(batch, heads * nq * nk)

        s, may, must = scope(scores), scope(allowed), scope(first)
        high = s.masked_fill(~may, float("-inf")).amax(-1, keepdim=True)
        if weigh == "minmax":
            low = s.masked_fill(~may, float("inf")).amin(-1, keepdim=True)
            span = high - low
            weight = (s - low) / torch.where(span <= 1e-6, torch.ones_like(span), span)
        else:
            weight = (s - high).exp()
        weight = weight.masked_fill(~may, 0.0)
        total = weight.sum(-1, keepdim=True) + 1e-6 * (weigh == "minmax")
        remain = (threshold - weight.masked_fill(~must, 0.0).sum(-1, keepdim=True) / total).clamp(min=0.0)
        # Others in descending order; what is forced or not allowed sorts behind everything.
        ranked, order = weight.masked_fill(must | ~may, -1.0).sort(-1, descending=True)
        share = ranked.clamp(min=0.0).cumsum(-1) / total
        # An entry is taken while the ones before it do not meet the threshold.
        before = F.pad(share, (1, 0))[..., :-1]
        take = (before < remain) | (torch.arange(s.shape[-1], device=s.device) < at_least)
        taken = torch.zeros_like(may).scatter(-1, order, take & (ranked >= 0)) | must
        if per == "block":
            chosen = taken.view(batch, nk, heads, nq).permute(0, 2, 3, 1).contiguous()
        else:
            chosen = taken.view(shape)
        return BlockPlan.from_mask(chosen, q_block, k_block, n, m, _width(scores))


def check_scores(
    scores: Tensor,
    q_block: int,
    k_block: int,
    n: int,
    m: int | None,
    forced: Tensor | None = None,
    allowed: Tensor | None = None,
    name: str = "scores",
) -> int:
    """The number of keys; an error unless there is a score for each pair of blocks."""
    check_float(name, scores)
    m = check_int("n", n, least=0) if m is None else check_int("m", m, least=0)
    check_int("n", n, least=0)
    for what, block in (("q_block", q_block), ("k_block", k_block)):
        check_int(what, block, least=1)
    blocks = -(-n // q_block), -(-m // k_block)
    if scores.dim() != 4 or tuple(scores.shape[-2:]) != blocks:
        raise ValueError(
            f"{name} must be (B, H, nq={blocks[0]}, nk={blocks[1]}) for n={n}, m={m} in blocks of {q_block} and "
            f"{k_block}, got {tuple(scores.shape)}"
        )
    for what, chosen in (("forced", forced), ("allowed", allowed)):
        if chosen is None:
            continue
        check_tensor(what, chosen)
        fits = chosen.dim() <= 4 and all(
            a in (1, b) for a, b in zip(reversed(chosen.shape), reversed(scores.shape), strict=False)
        )
        if chosen.dtype != torch.bool or not fits:
            raise ValueError(
                f"{what} must be boolean and broadcast to the {name} {tuple(scores.shape)}, got {chosen.dtype} "
                f"{tuple(chosen.shape)}"
            )
        check_device(**{name: scores, what: chosen})
    return m


def _width(scores: Tensor) -> int | None:
    """Width of a ragged plan: the longest row where values can be read, otherwise the most there can be."""
    return scores.shape[-1] if torch.compiler.is_compiling() or scores.is_meta else None

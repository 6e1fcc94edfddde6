"""How much attention every pair of blocks holds, exactly, and plans that keep the most of it.

:func:`block_mass` adds up the softmax map over blocks without holding the map: some rows of scores at a time. Given the
log-sum-exp of an earlier call, it is one product. From a mass, :func:`heaviest_blocks` keeps the largest blocks under a
sparsity per head, :func:`adapted_sparsity` moves the budget from heads that need few blocks to those that need many,
and :func:`frame_tiles` needs no mass at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_choice,
    check_device,
    check_float,
    check_int,
    check_ints,
    check_rank,
    check_real,
    check_valid,
    describe,
)
from ..normalizers import exp_
from ..types import stats_dtype
from ._call import check_qkv, expand_heads
from .block_policies import check_scores
from .block_sparse import BlockPlan

#: Scores that are held at once.
HELD = 1 << 18


class BlockMass(NamedTuple):
    """Sums of a softmax map over blocks.

    Args:
        mass: (B, H, nq, nk), in the statistics dtype: the weights of all queries of a block on all keys of a block. A
            row of blocks adds up to the queries of its block that exist and may attend.
        lse: (B, H, N): the log-sum-exp of the scores of every query that the mass was taken with.
    """

    mass: Tensor
    lse: Tensor


@torch.no_grad()
def block_mass(
    q: Tensor,
    k: Tensor,
    q_block: int,
    k_block: int,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    q_valid: Tensor | None = None,
    valid: Tensor | None = None,
) -> BlockMass:
    """``W[p, r] = sum_{i in p, j in r} exp(scale q_i . k_j - lse_i)``, without gradient and without the N x M map.

    Args:
        q: (B, Hq, N, D) queries.
        k: (B, Hk, M, D) keys.
        q_block: queries per block; the last block may be short.
        k_block: keys per block.
        scale: of the scores; ``D ** -0.5`` by default.
        lse: (B, Hq, N) log-sum-exp of an earlier call, which is cheaper and, where queries and keys have changed since,
            approximate: rows need not add up to one then.
        q_valid: (B, N) boolean, which queries count; all by default.
        valid: (B, M) boolean, which keys exist.

    Returns:
        The mass (B, Hq, nq, nk), and the log-sum-exp that was used: ``-inf`` for queries without a key, which weigh 0.

    Reference: Xia et al., 2025, arXiv 2502.21079, algorithms 1 and 2.

    >>> mass, lse = block_mass(torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2), 4, 3)
    >>> mass.round().tolist()
    [[[[2.0, 2.0], [1.0, 1.0]]]]
    """
    check_rank("q", q, 4, "(B, H, N, D)")
    check_qkv(q, k, k)
    for name, block in (("q_block", q_block), ("k_block", k_block)):
        check_int(name, block, least=1)
    batch, heads, n, width = q.shape
    m = k.shape[2]
    check_valid("q_valid", q_valid, (batch, n))
    check_valid("valid", valid, (batch, m))
    check_device(q=q, k=k, lse=lse, q_valid=q_valid, valid=valid)
    if lse is not None:
        check_float("lse", lse)
        if tuple(lse.shape) != (batch, heads, n):
            raise ValueError(f"lse must be {(batch, heads, n)}, one number for every query, got {tuple(lse.shape)}")
    scale = width**-0.5 if scale is None else check_real("scale", scale)
    dtype = stats_dtype(q.dtype)
    rows, blocks = -(-n // q_block), -(-m // k_block)
    mass = q.new_zeros(batch, heads, rows, blocks, dtype=dtype)
    used = q.new_empty(batch, heads, n, dtype=dtype)
    if not mass.numel():
        return BlockMass(mass, used.fill_(float("-inf")))
    per = max(1, HELD // max(1, q_block * m * batch * heads)) * q_block
    if per == q_block:  # one row of blocks of all heads is too much already
        groups = max(1, min(heads, HELD // max(1, q_block * m * batch)))
    else:
        groups = heads
    for first in range(0, heads, groups):
        some = slice(first, first + groups)
        keys = expand_heads(k, heads)[:, some].to(dtype).transpose(-2, -1)
        for start in range(0, n, per):
            stop = min(start + per, n)
            scores = (q[:, some, start:stop].to(dtype) * scale) @ keys
            if valid is not None:
                scores.masked_fill_(~valid[:, None, None], float("-inf"))
            # With the sum over keys still to come, the largest score stands in for it: one exponential either way.
            shift = scores.amax(-1) if lse is None else lse[:, some, start:stop].to(dtype)
            shift = shift.masked_fill(shift == float("-inf"), 0.0)
            weights = exp_(scores.sub_(shift.unsqueeze(-1)))
            if blocks * k_block > m:
                weights = F.pad(weights, (0, blocks * k_block - m))
            by_key = weights.unflatten(-1, (blocks, k_block)).sum(-1)
            if lse is None:
                total = by_key.sum(-1)
                used[:, some, start:stop] = shift + total.log()
                by_key /= total.masked_fill(total == 0, 1.0).unsqueeze(-1)
            else:
                used[:, some, start:stop] = lse[:, some, start:stop]
            if q_valid is not None:
                by_key.masked_fill_(~q_valid[:, None, start:stop, None], 0.0)
            if (stop - start) % q_block:
                by_key = F.pad(by_key, (0, 0, 0, -(stop - start) % q_block))
            mass[:, some, start // q_block : -(-stop // q_block)] = by_key.unflatten(-2, (-1, q_block)).sum(-2)
    return BlockMass(mass, used)


class BlockProfile(NamedTuple):
    """What the blocks of a softmax map are like.

    Args:
        sparse: (B, H): share of blocks that are nearly empty.
        incoherence: (B, H): mean over blocks of the largest weight over the mean weight; 1 for even blocks.
        mass: (B, H, nq, nk): sums of weights, as of :func:`block_mass`.
    """

    sparse: Tensor
    incoherence: Tensor
    mass: Tensor


@torch.no_grad()
def block_profile(
    q: Tensor, k: Tensor, block: int, *, scale: float | None = None, small: float = 1e-3, share: float = 0.9
) -> BlockProfile:
    """How many blocks of a map are nearly empty, and how uneven the blocks are, without holding the map.

    A block is nearly empty when at least ``share`` of its weights are below ``small``.

    Args:
        q: (B, H, N, D), k: (B, Hk, M, D).
        block: sides of a block; the last ones may be short and count by their real size.
        scale: of the scores; ``D ** -0.5`` by default.
        small, share: see above.

    Reference: Zhao et al., 2025, arXiv 2506.16054, section 3.2.
    """
    check_rank("q", q, 4, "(B, H, N, D)")
    check_qkv(q, k, k)
    check_int("block", block, least=1)
    check_real("small", small, above=0)
    check_real("share", share, above=0, most=1)
    check_device(q=q, k=k)
    batch, heads, n, width = q.shape
    m = k.shape[2]
    scale = width**-0.5 if scale is None else check_real("scale", scale)
    dtype = stats_dtype(q.dtype)
    rows, columns = -(-n // block), -(-m // block)
    mass = q.new_zeros(batch, heads, rows, columns, dtype=dtype)
    empty, uneven = torch.zeros_like(mass), torch.zeros_like(mass)
    keys = expand_heads(k, heads).to(dtype).transpose(-2, -1)
    per = max(1, HELD // max(1, block * m * batch * heads))
    for first in range(0, rows, per):
        part = q[:, :, first * block : (first + per) * block].to(dtype) * scale
        count = part.shape[2]
        weights = (part @ keys).softmax(-1)
        short = -count % block
        weights = F.pad(weights, (0, columns * block - m, 0, short))
        tiles = weights.unflatten(-1, (columns, block)).unflatten(2, (-1, block))  # (B, H, r, block, columns, block)
        real_q = torch.full((tiles.shape[2],), block, device=q.device)
        real_q[-1] -= short
        real_k = torch.full((columns,), block, device=q.device)
        real_k[-1] -= columns * block - m
        size = real_q[:, None] * real_k
        here = slice(first, first + tiles.shape[2])
        mass[:, :, here] = tiles.sum((3, 5))
        padded = block * block - size
        empty[:, :, here] = (((tiles < small).sum((3, 5)) - padded) >= share * size).to(dtype)
        mean = mass[:, :, here] / size
        uneven[:, :, here] = tiles.amax((3, 5)) / mean.clamp(min=torch.finfo(dtype).tiny)
    return BlockProfile(empty.mean((-2, -1)), uneven.mean((-2, -1)), mass)


def _check_mass(mass: Tensor) -> None:
    check_float("mass", mass)
    check_rank("mass", mass, 4, "(B, H, nq, nk)")


@torch.no_grad()
def heaviest_blocks(
    mass: Tensor,
    sparsity: float | Tensor,
    q_block: int,
    k_block: int,
    n: int,
    m: int | None = None,
    *,
    forced: Tensor | None = None,
    per: str = "head",
) -> BlockPlan:
    """The blocks with the largest mass: ``1 - sparsity`` of all of a head, and at least one in every row.

    Args:
        mass: (B, H, nq, nk), as of :func:`block_mass`.
        sparsity: in [0, 1): the share of blocks that is not read; one number, or (H,) or (B, H) of them.
        q_block, k_block, n, m: of the problem, as of :class:`~attnlib.ops.block_sparse.BlockPlan`.
        forced: boolean, broadcast to the mass: blocks that are always read, out of the same budget as far as it goes.
        per: ``"head"``: the largest of the whole head; ``"row"``: as many in every row of blocks.

    Returns:
        A plan. Per head ``round((1 - sparsity) nq nk)`` blocks, more where rows would be empty or more are forced; per
        row ``max(1, round((1 - sparsity) nk))``.

    Raises:
        ValueError: a sparsity outside [0, 1).
    """
    check_scores(mass, q_block, k_block, n, m, forced, name="mass")
    check_choice("per", per, ("head", "row"))
    batch, heads, nq, nk = mass.shape
    keep = 1.0 - _per_head(sparsity, batch, heads, mass.device)
    score = mass
    if forced is not None:
        score = score.masked_fill(forced, float("inf"))
    if per == "row":
        budget = (keep * nk).round().clamp(min=1)
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        chosen = rank < budget[..., None, None]
    else:
        budget = (keep * (nq * nk)).round()
        best = score.argmax(-1, keepdim=True)  # of every row, which comes first
        flat = score.scatter(-1, best, float("inf")).flatten(-2)
        rank = flat.argsort(dim=-1, descending=True, stable=True).argsort(-1).view(score.shape)
        chosen = (rank < budget[..., None, None]).scatter(-1, best, True)
    if forced is not None:
        chosen = chosen | forced
    return BlockPlan.from_mask(chosen, q_block, k_block, n, m)


def _per_head(sparsity: float | Tensor, batch: int, heads: int, device: torch.device) -> Tensor:
    """(B, H) or (1, 1), each checked to lie in [0, 1)."""
    if isinstance(sparsity, Tensor):
        check_float("sparsity", sparsity)
        if tuple(sparsity.shape) not in ((heads,), (batch, heads), (1, heads)):
            raise ValueError(f"sparsity must be a number, ({heads},) or ({batch}, {heads}), got {describe(sparsity)}")
        if not bool(((sparsity >= 0) & (sparsity < 1)).all()):
            raise ValueError(f"sparsity must lie in [0, 1), got {sparsity.tolist()}")
        return sparsity.to(device, torch.float64).view(-1, heads)
    check_real("sparsity", sparsity, least=0, below=1)
    return torch.full((1, 1), sparsity, dtype=torch.float64, device=device)


@torch.no_grad()
def plan_recall(mass: Tensor, plan: BlockPlan) -> Tensor:
    """(B, H): the share of a head's mass that lies on the blocks of a plan.

    Raises:
        ValueError: a plan for another number of blocks or heads.
    """
    _check_mass(mass)
    chosen = plan.chosen()
    if chosen.shape[-2:] != mass.shape[-2:] or any(
        a not in (1, b) for a, b in zip(chosen.shape[:2], mass.shape[:2], strict=True)
    ):
        raise ValueError(f"plan chooses among {tuple(chosen.shape)} blocks, but mass is {tuple(mass.shape)}")
    total = mass.sum((-2, -1))
    return torch.where(total == 0, 1.0, (mass * chosen).sum((-2, -1)) / total.masked_fill(total == 0, 1.0))


@torch.no_grad()
def adapted_sparsity(recall: Tensor, sparsity: float, threshold: float = 0.8) -> Tensor:
    """Sparsity per head with the same mean: heads of high recall give up blocks for heads of low recall.

    With n heads whose recall is above the threshold (at most half of all), the n best get ``(1 + s) / 2``, the n worst
    ``(3 s - 1) / 2``, the others ``s``. Below ``s = 1/3`` the lower one would be negative: it is 0, and the upper one
    ``2 s``, so that the mean stays.

    Args:
        recall: (B, H) or (H,), under a plan of this sparsity.
        sparsity: in [0, 1).
        threshold: recall above which a head is called easy.

    Returns:
        Of the same shape.

    Reference: Xia et al., 2025, arXiv 2502.21079, section 4.3.

    >>> [round(s, 3) for s in adapted_sparsity(torch.tensor([0.9, 0.5, 0.7, 0.6]), 0.8).tolist()]
    [0.9, 0.7, 0.8, 0.8]
    """
    check_float("recall", recall)
    check_rank("recall", recall, (1, 2), "(B, H) or (H,)")
    check_real("sparsity", sparsity, least=0, below=1)
    check_real("threshold", threshold, least=0, most=1)
    heads = recall.shape[-1]
    easy = (recall > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    shift = min((1 - sparsity) / 2, sparsity)
    change = (rank < easy).to(torch.float64) - (rank >= heads - easy).to(torch.float64)
    return sparsity + shift * change


def frame_tiles(
    frames: int,
    tokens: int,
    references: int,
    q_block: int = 64,
    k_block: int = 64,
    *,
    dense: int = 0,
    device: torch.device | str | None = None,
) -> BlockPlan:
    """Every frame reads itself and some reference frames; reference frames read and are read by all.

    Of ``F^2`` tiles ``F^2 - (F - k)(F - k - 1)`` are kept. A block that touches a kept tile is read whole, so that the
    density is higher where blocks do not divide ``tokens``: with blocks that divide it, it is exact.

    Args:
        frames: F.
        tokens: per frame.
        references: k, evenly spaced, the first frame among them; 0 for none, F for dense attention.
        q_block, k_block: of the plan.
        dense: tokens behind the frames, such as those of a text, that read and are read by all.

    Reference: Ding et al., 2025, arXiv 2502.06155, section 3.2 (spacing and count reconstructed).

    >>> float(frame_tiles(4, 2, 1, q_block=2, k_block=2).density) == (16 - 3 * 2) / 16
    True
    """
    check_int("frames", frames, least=1)
    check_int("tokens", tokens, least=1)
    check_int("references", references, least=0, most=frames)
    check_int("dense", dense, least=0)
    check_ints("blocks", (q_block, k_block), least=1)
    n = frames * tokens + dense
    chosen_frames = {math.floor(i * frames / references) for i in range(references)}
    kept = torch.eye(frames, dtype=torch.bool, device="cpu")
    for i in chosen_frames:
        kept[i], kept[:, i] = True, True
    kept = F.pad(kept, (0, 1, 0, 1), value=True)  # what stands behind the frames counts as one frame more

    def span(block: int) -> Tensor:
        """(blocks, F + 1): which frames a block touches."""
        number = torch.arange(n, device="cpu")
        out = torch.zeros(-(-n // block), frames + 1, device="cpu")
        out[number // block, (number // tokens).clamp(max=frames)] = 1.0
        return out

    chosen = (span(q_block) @ kept.float() @ span(k_block).t()) > 0
    return BlockPlan.from_mask(chosen.to(device) if device is not None else chosen, q_block, k_block, n)

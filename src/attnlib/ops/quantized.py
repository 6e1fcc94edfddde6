"""Attention whose products are of small integers: queries, keys, weights and values rounded to few bits.

Every operand is scaled so that its largest entry, of a block, a row or all, becomes the largest integer, and rounded
(symmetric quantization). The result is what integer products give; they are computed here in floating point, where
products of integers of 8 bits are exact, so that it tells what quantization costs in accuracy, not in time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_device, check_float, check_int, check_rank, check_real, check_valid
from ..types import stats_dtype
from ._call import check_qkv, expand_heads
from .block_sparse import BlockPlan

GRAINS = ("block", "row", "tensor")


class Quantized(NamedTuple):
    """Whole numbers and what they are multiples of: ``values * scale`` is nearly what was quantized."""

    values: Tensor
    scale: Tensor


def quantize(x: Tensor, bits: int = 8, grain: str = "block", block: int | tuple[int, int] = 64) -> Quantized:
    """The nearest whole numbers from ``1 - 2^(bits-1)`` to ``2^(bits-1) - 1``, times a scale.

    Args:
        x: (..., N, M).
        bits: 2 to 8.
        grain: what shares a scale: ``"block"``: sides ``block`` of the last two axes; ``"row"``; ``"tensor"``: the last
            two axes.
        block: sides of a block, one for both or (rows, columns); the last ones may be short.

    Returns:
        ``values``, whole numbers in the type of ``x``, and ``scale`` broadcastable to them.

    >>> quantize(torch.tensor([[1.0, -2.0], [0.5, 127.0]]), block=2).values.tolist()
    [[1.0, -2.0], [0.0, 127.0]]
    """
    check_float("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (..., N, M), got {tuple(x.shape)}")
    check_int("bits", bits, least=2, most=8)
    check_choice("grain", grain, GRAINS)
    rows, columns = (block, block) if isinstance(block, int) else block
    check_int("block", rows, least=1)
    check_int("block", columns, least=1)
    most = 2 ** (bits - 1) - 1
    size = x.detach().abs()
    if grain == "row":
        high = size.amax(-1, keepdim=True)
    elif grain == "tensor":
        high = size.amax((-2, -1), keepdim=True)
    else:
        n, m = x.shape[-2:]
        size = F.pad(size, (0, -m % columns, 0, -n % rows))
        tiles = size.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))
        high = tiles.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :n, :m]
    scale = torch.where(high == 0, torch.ones_like(high), high / most)
    return Quantized((x / scale).round().clamp(-most, most), scale)


def _rounded(x: Tensor, bits: int | None, grain: str, block: int | tuple[int, int]) -> Tensor:
    if bits is None:
        return x
    held = quantize(x, bits, grain, block)
    return held.values * held.scale


@torch.no_grad()
def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk_bits: int | None = 8,
    pv_bits: int | None = 8,
    grain: str = "block",
    block: int = 64,
    plan: BlockPlan | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention with rounded operands, of some blocks where a plan says so; without gradient.

    Args:
        q: (B, H, N, D), k: (B, Hk, M, D), v: (B, Hv, M, Dv).
        qk_bits: of queries and keys; ``None`` leaves them as they are.
        pv_bits: of weights and values.
        grain: what shares a scale. Queries, keys and values: ``"block"`` tokens, a token or all of a head; weights:
            tiles of ``block`` x ``block``, a row, or the rows of a block together.
        block: tokens per block.
        plan: which blocks are read, of the same size; every one by default.
        valid: (B, M) boolean, which keys exist.
        scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        (B, H, N, Dv); rows without keys are zero.

    Reference: Zhao et al., 2025, arXiv 2506.16054, section 3.4.
    """
    check_rank("q", q, 4, "(B, H, N, D)")
    check_qkv(q, k, v)
    check_choice("grain", grain, GRAINS)
    check_int("block", block, least=1)
    check_valid("valid", valid, (k.shape[0], k.shape[2]))
    check_device(q=q, k=k, v=v, valid=valid)
    n, m, heads, width = q.shape[2], k.shape[2], q.shape[1], q.shape[3]
    scale = width**-0.5 if scale is None else check_real("scale", scale)
    chosen = None
    if plan is not None:
        plan.expect("blocks", N=n, M=m, q_block=block, k_block=block)
        chosen = plan.chosen()
    dtype = stats_dtype(q.dtype)
    q_r = _rounded(q.to(dtype), qk_bits, grain, (block, width))
    k_r = expand_heads(_rounded(k.to(dtype), qk_bits, grain, (block, width)), heads)
    v_r = expand_heads(_rounded(v.to(dtype), pv_bits, grain, (block, v.shape[3])), heads)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for at, start in enumerate(range(0, n, block)):
        rows = slice(start, min(start + block, n))
        scores = (q_r[:, :, rows] @ k_r.transpose(-2, -1)) * scale
        if chosen is not None:
            read = chosen[:, :, at].repeat_interleave(block, -1)[..., None, :m]
            scores = scores.masked_fill(~read, float("-inf"))
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
        weights = _rounded(scores.softmax(-1).nan_to_num(0.0), pv_bits, grain, block)
        out[:, :, rows] = (weights @ v_r).to(out.dtype)
    return out

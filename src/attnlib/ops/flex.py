"""Softmax with structured masks through compiled ``torch.nn.attention.flex_attention``.

It compiles a kernel for every new kind of problem, which takes many seconds, and has no backward pass on the CPU, so
nothing chooses it there by itself. Force it (``backend="flex"``) for inference on many inputs of one kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..masks import Mask
from . import eager
from ._call import AttentionCall, expand_heads
from ._dispatch import Operator, twice


def register(operator: Operator) -> None:
    operator.register(
        "flex", run, supports=supports, prefers=prefers, first="right; refused on the CPU, where it has none",
        second="the specification", transforms="it compiles its kernels",
    )  # fmt: skip


def supports(call: AttentionCall) -> str | None:
    """Why FlexAttention cannot serve the call; ``None`` when it can."""
    if not call.plain_softmax:
        return f"its normalizer is {call.normalizer.name}, FlexAttention only knows softmax"
    if call.want == "weights":
        return "FlexAttention does not return weights"
    if call.want == "partial":
        return "the row statistics of FlexAttention are served by tiled instead"
    if call.dropout_p:
        return "FlexAttention has no dropout"
    if call.bias is not None:
        return "biases are not lowered to a score_mod; tiled takes them"
    if call.q.dtype == torch.float64:
        return "FlexAttention has no float64 kernel"
    tensors = (call.q, call.k, call.v)
    if call.q.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "FlexAttention has no backward pass on the CPU; call it under torch.no_grad()"
    if any(0 in t.shape for t in tensors):
        return "FlexAttention takes no empty tensors"
    return None


def prefers(call: AttentionCall) -> str | None:
    """Why the automatic choice passes over this backend: it always does."""
    return "it compiles a kernel for every new kind of problem, so it runs only when forced"


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _mask_mod(call: AttentionCall) -> Callable[..., Tensor] | None:
    """The mask, the validity of keys and the positions as one function of indices."""
    mask, valid, q_pos, k_pos = call.mask, call.valid, call.q_pos, call.k_pos
    if mask is None and valid is None:
        return None

    def look(pos: Tensor | None, b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        if pos is None:
            return i
        if pos.dim() == 1:
            return pos[i]
        b = b if pos.shape[0] > 1 else torch.zeros_like(b)
        if pos.dim() == 2:
            return pos[b, i]
        return pos[b, h if pos.shape[1] > 1 else torch.zeros_like(h), i]

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        exists = None if valid is None else valid[b, k]
        if mask is None:
            assert exists is not None
            return exists
        meet = mask.pair(b, h, look(q_pos, b, h, q), look(k_pos, b, h, k))
        return meet if exists is None else meet & exists

    return mod


@functools.lru_cache(maxsize=32)
def _known_blocks(mask: Mask, n: int, m: int, heads: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(mask.mask_mod(), None, heads, n, m, device=device)


def _blocks(call: AttentionCall) -> Any:
    """The call's ``BlockMask``; remembered for masks that are plain values."""
    mod = _mask_mod(call)
    if mod is None:
        return None
    n, m, device = call.q.shape[2], call.k.shape[2], call.q.device
    mask, positions = call.mask, [p for p in (call.q_pos, call.k_pos) if p is not None]
    by_head = any(p.dim() > 2 and p.shape[1] > 1 for p in positions) or (mask is not None and mask.heads() > 1)
    heads = call.heads if by_head else None
    if mask is not None and call.valid is None and not positions and not mask.lower()[1]:
        return _known_blocks(mask, n, m, heads, device)
    by_sample = call.valid is not None or any(p.dim() > 1 and p.shape[0] > 1 for p in positions)
    by_sample = by_sample or (mask is not None and mask.batch() > 1)
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(mod, call.q.shape[0] if by_sample else None, heads, n, m, device=device)


def run(call: AttentionCall) -> Tensor:
    """(B, H, N, Dv). Rows that may attend to nothing give zeros."""
    q, k, v = call.q, call.k, call.v
    if q.device.type == "cpu":  # there it refuses tensors that want gradients even where none are recorded
        q, k, v = q.detach(), k.detach(), v.detach()
    if k.shape[1] != v.shape[1]:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    out = _compiled()(q, k, v, block_mask=_blocks(call), scale=call.scale, enable_gqa=k.shape[1] != q.shape[1])
    return twice((out,), call.inputs(), lambda *inputs: eager.outputs(call.replaced(inputs)))[0]

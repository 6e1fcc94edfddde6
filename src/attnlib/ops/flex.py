"""Softmax with structured masks through compiled ``torch.nn.attention.flex_attention``.

A kernel is compiled once for every structure of masks (:func:`structure`: what is left of a mask without its tensors)
and serves whatever tensors come with it; that first call takes many seconds. On CUDA, where it has a backward pass, it
is what masked softmax runs on by itself. On the CPU it has none, so that nothing chooses it there: force it
(``backend="flex"``) for inference on many inputs of one kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..masks import Mask, holds_dense
from . import eager
from ._call import AttentionCall, expand_heads
from ._dispatch import Operator, device_kind, twice

#: The narrowest heads that its kernels for CUDA take.
NARROWEST = 16
#: Structures whose kernels are kept, and sizes of one structure that get kernels of their own before it refuses.
STRUCTURES, SIZES = 64, 64


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
    if any(0 in t.shape for t in tensors):
        return "FlexAttention takes no empty tensors"
    if device_kind(call.q) == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "FlexAttention has no backward pass on the CPU; call it under torch.no_grad()"
    if device_kind(call.q) != "cpu" and min(call.q.shape[3], call.v.shape[3]) < NARROWEST:
        return f"FlexAttention takes heads from D={NARROWEST} on, got D={call.q.shape[3]} and Dv={call.v.shape[3]}"
    return None


def prefers(call: AttentionCall) -> str | None:
    """Why the automatic choice passes over this backend; ``None`` for structured masks on CUDA."""
    kind = device_kind(call.q)
    if kind != "cuda":
        return f"it compiles a kernel for every new kind of problem, so on {kind} it runs only when forced"
    if torch.compiler.is_compiling():
        return "its block masks are made outside of graphs"
    if call.mask is None and call.valid is None:
        return "nothing is masked, and it pays by what a mask forbids"
    if call.mask is not None and holds_dense(call.mask):
        return "the mask is a table of pairs, which has no structure to skip by"
    return call.smaller_than(1 << 18)


def structure(call: AttentionCall) -> tuple[Any, ...]:
    """What one kernel is compiled for: the mask without its tensors, which tensors decide beside it, types, heads."""
    spec, tensors = ("", []) if call.mask is None else call.mask.lower()
    ranks = [None if t is None else t.dim() for t in (call.valid, call.q_pos, call.k_pos, *tensors)]
    heads = tuple(t.shape[1] for t in (call.q, call.k, call.v))
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v))
    return (spec, *ranks, call.q.dtype, call.q.device, *heads, call.scale, wants)


@functools.lru_cache(maxsize=STRUCTURES)
def _kernel(of: tuple[Any, ...]) -> Callable[..., Any]:
    """FlexAttention for one structure. Each counts the sizes it meets by itself, and at too many says so."""
    from torch.nn.attention.flex_attention import flex_attention

    settings: dict[str, Any] = dict(fullgraph=True, isolate_recompiles=True, recompile_limit=SIZES)
    return torch.compile(flex_attention, **settings)


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
    if device_kind(q) == "cpu":  # there it refuses tensors that want gradients even where none are recorded
        q, k, v = q.detach(), k.detach(), v.detach()
    if k.shape[1] != v.shape[1]:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    kernel, grouped = _kernel(structure(call)), k.shape[1] != q.shape[1]
    out = kernel(q, k, v, block_mask=_blocks(call), scale=call.scale, enable_gqa=grouped)
    return twice((out,), call.inputs(), lambda *inputs: eager.outputs(call.replaced(inputs)))[0]

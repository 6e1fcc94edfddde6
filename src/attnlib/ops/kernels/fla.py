"""Causal linear attention with decays through flash-linear-attention (``fla.ops``), on CUDA.

Without a decay, or with one per head or token, it is ``chunk_simple_gla``; with one per channel, ``chunk_gla``. Both
mean what :func:`attnlib.ops.linear_attention` means, ``S_t = exp(g_t) S_{t-1} + k_t v_t^T`` and ``o_t = q_t S_t``, on
tensors (B, N, H, D), in natural logarithms, with a ``scale`` that is ``D ** -0.5`` unless it is said to be 1, and with
states (B, H, D, Dv) in float32. Packed sequences are one sample there, with a state for each. A constant decay
(``g_gamma``) gets no gradient there: where one is wanted it is given as a decay per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...extras import need
from .._dispatch import Operator, twice, wants_gradient
from . import absent, exact

#: The narrowest heads that its products take without filling up.
NARROWEST = 16

Spec = Callable[[Any], "tuple[Tensor, Tensor]"]


def register(operator: Operator, spec: Spec) -> None:
    """
    Args:
        spec: computes a call by plain operations, for second derivatives.
    """
    operator.register(
        "fla", lambda call: run(call, spec), supports=supports, prefers=prefers, second="the chunks of chunkwise",
        transforms="its kernels' backward is written by hand",
    )  # fmt: skip


def supports(call: Any) -> str | None:
    """Why fla cannot serve the call; ``None`` when it can."""
    if why := absent("fla", call.q, "its kernels break graphs"):
        return why
    if call.q.dtype == torch.float64:
        return "it has no float64 kernel"
    if not call.causal:
        return "it is causal only"
    if min(call.q.shape[3], call.v.shape[3]) < NARROWEST:
        return f"it takes heads from D={NARROWEST} on, got D={call.q.shape[3]} and Dv={call.v.shape[3]}"
    if call.q.numel() == 0:
        return "it takes no empty tensors"
    return None


def prefers(call: Any) -> str | None:
    """Why the automatic choice passes over fla although it could serve."""
    if call.q.shape[2] == 1:
        return "a single token needs no chunks"
    return exact(call.working)


def run(call: Any, spec: Spec) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, Dv) and the state (B, H, D, Dv) after the last token."""
    need("fla", "the backend 'fla'")
    ops = need("fla.ops", "the backend 'fla'")
    working = call.working if call.working in (torch.float16, torch.bfloat16) else torch.float32
    q, k, v = (t.to(working).transpose(1, 2).contiguous() for t in (call.q, call.k, call.v))
    batch, n, heads, _ = q.shape
    state, packed, ends = call.state, {}, None
    if call.bounds is not None:
        bounds = call.bounds.unique_consecutive()  # empty segments have no state of their own here
        count = bounds.numel() - 1
        starts = torch.arange(batch, device=q.device)[:, None] * n + bounds[:-1]
        packed["cu_seqlens"] = torch.cat([starts.flatten(), starts.new_tensor([batch * n])])
        q, k, v = (t.flatten(0, 1)[None] for t in (q, k, v))
        ends = torch.arange(1, batch + 1, device=q.device) * count - 1
        if state is not None:  # continues the first segment of each sample
            whole = state.new_zeros(batch * count, *state.shape[1:])
            state = whole.index_copy(0, ends - count + 1, state)
    settings = dict(scale=1.0, initial_state=state, output_final_state=True, **packed)
    decay = call.decay
    if decay is not None and decay.dim() == 4:
        g = decay.transpose(1, 2).contiguous()
        out, final = ops.chunk_gla(q, k, v, g if ends is None else g.flatten(0, 1)[None], **settings)
    else:
        if decay is None:
            given = {}
        elif decay.shape[2] == 1 and n > 1 and not wants_gradient([decay]):
            given = dict(g_gamma=decay.flatten())
        else:
            g = decay.expand(batch, heads, n).transpose(1, 2).contiguous()
            given = dict(g=g if ends is None else g.flatten(0, 1)[None])
        out, final = ops.chunk_simple_gla(q, k, v, **given, **settings)
    if ends is not None:
        out, final = out[0].unflatten(0, (batch, n)), final.index_select(0, ends)
    out = out.transpose(1, 2).to(call.q.dtype)
    out, final = twice((out, final), call.inputs(), lambda *tensors: spec(call.replaced(tensors)))
    return out, final

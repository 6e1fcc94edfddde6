"""Reversed attention: every key deals out one message among the queries that read it, instead of being collected.

Plain attention is normalised over what a token reads. Here the softmax runs over the readers ("receivers") of a token
("sender"), so that the columns of the map have a given sum and its rows any. Two passes over the scores compute it
without holding the map: the log-sum-exp of every sender over its receivers, then a sum in which this and the logarithm
of the sender's message are a bias of its column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_device, check_flag, check_float, check_valid
from ..masks import Mask, Transposed, as_mask
from ..types import exactly, stats_dtype
from ._call import AttentionCall, expand_heads, prepare
from ._dispatch import AUTO, Operator
from .attention import attention_partial

#: Logarithm of a message that is none: finite, since products with it have gradients.
SILENT = -1e9


@dataclass(frozen=True)
class _Call:
    """Senders choose receivers: their softmax as a checked problem, what they send, and how much of it."""

    choice: AttentionCall
    v: Tensor
    log_message: Tensor
    valid: Tensor | None

    def inputs(self) -> list[Tensor]:
        return [self.choice.q, self.choice.k, self.v, self.log_message]

    def deciding(self) -> list[Tensor]:
        return [*self.choice.deciding(), *([] if self.valid is None else [self.valid])]


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, *, log_message: Tensor | None = None, mask: Mask | Tensor | None = None,
    valid: Tensor | None = None, receiver_valid: Tensor | None = None, scale: float | None = None,
    dropout_p: float = 0.0, q_pos: Tensor | None = None, k_pos: Tensor | None = None, return_weights: bool = False,
) -> _Call:  # fmt: skip
    want = "weights" if check_flag("return_weights", return_weights) else "out"
    given: dict[str, Any] = dict(scale=scale, dropout_p=dropout_p, q_pos=q_pos, k_pos=k_pos, want=want)
    choice = prepare(q, k, k, valid=receiver_valid, **given)
    check_float("v", v)
    check_device(q=q, v=v, log_message=log_message, valid=valid)
    (batch, heads, senders, _), receivers = q.shape, k.shape[2]
    check_valid("valid", valid, (batch, senders))
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be (B, H, M, Dv) with B, H, M = {(batch, heads, senders)}, got {tuple(v.shape)}")
    if v.dtype != q.dtype:
        raise TypeError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if mask is not None:
        plain = q_pos is None and k_pos is None
        pairs = as_mask(mask, receivers, senders) if plain else as_mask(mask)
        assert pairs is not None
        pairs.check(receivers, senders, batch=batch, heads=heads, device=q.device, q_pos=k_pos, k_pos=q_pos)
        choice = replace(choice, mask=Transposed(pairs))
    high = stats_dtype(choice.q.dtype)
    if log_message is None:
        message = choice.q.new_zeros(batch, heads, senders, dtype=high)
    else:
        check_float("log_message", log_message)
        if log_message.shape != q.shape[:3]:
            raise ValueError(
                f"log_message must be (B, H, M) = {(batch, heads, senders)}, got {tuple(log_message.shape)}"
            )
        message = log_message.to(high)
    v = v.to(choice.q.dtype)
    if valid is not None:  # whatever absent tokens hold
        gone = ~valid[:, None, :, None]
        message, v = message.masked_fill(gone.squeeze(-1), float("-inf")), v.masked_fill(gone, 0.0)
        choice = replace(choice, q=choice.q.masked_fill(gone, 0.0))
    if receiver_valid is not None:
        choice = replace(choice, k=choice.k.masked_fill(~receiver_valid[:, None, :, None], 0.0))
    return _Call(choice, v, message, valid)


def reversed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_message: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    valid: Tensor | None = None,
    receiver_valid: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    backend: str | None = None,
    return_weights: bool = False,
) -> Any:
    """``out_j = sum_i A[j, i] v_i`` with ``A[j, i] = m_i softmax_j(scale k_j . q_i)``: columns of ``A`` sum to ``m``.

    Args:
        q: (B, H, M, D) of the senders, which choose their receivers.
        k: (B, H, N, D) of the receivers.
        v: (B, H, M, Dv) of the senders.
        log_message: (B, H, M) logarithm of ``m``, how much a sender sends; 0 by default, ``-inf`` for nothing.
        mask: which receivers (rows, N) may be reached by which senders (columns, M).
        valid: (B, M) boolean, which senders exist.
        receiver_valid: (B, N) boolean, which receivers exist.
        scale: ``D ** -0.5`` by default.
        dropout_p: dropout of entries of ``A``. With it, or with weights, the whole map is held.
        q_pos, k_pos: (M,), (B, M) or (B, H, M) positions of senders, and (N,), ... of receivers, that the mask sees.
        backend: ``"passes"``, twice over the scores with memory that grows with N + M, by whatever serves
            :func:`attnlib.ops.attention_partial`; ``"eager"``, the map itself (the specification), faster where it is
            small.
        return_weights: also return ``A`` (B, H, N, M).

    Returns:
        (B, H, N, Dv), or a pair of it and the weights. A receiver that nobody sends to gives zeros; a sender that
        reaches nobody sends nothing.

    Raises:
        ValueError: shapes that do not fit.

    Reference: Ding et al., 2023, arXiv 2304.03282, section 3.1.

    >>> q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.ones(1, 2, 3, 1)
    >>> reversed_attention(q, k, v).sum(2).flatten().round(decimals=4).tolist()
    [3.0, 3.0]
    """
    call = _prepare(
        q, k, v, log_message=log_message, mask=mask, valid=valid, receiver_valid=receiver_valid, scale=scale,
        dropout_p=dropout_p, q_pos=q_pos, k_pos=k_pos, return_weights=return_weights,
    )  # fmt: skip
    return _OPERATOR.run(call, backend)


def _passes(call: _Call) -> Tensor:
    choice, high = call.choice, call.log_message.dtype
    with exactly(choice.q):
        q, k, v = (t.to(high) for t in (choice.q, choice.k, call.v))
        mask = choice.mask
        inner = mask.inner if isinstance(mask, Transposed) else None
        given: dict[str, Any] = dict(scale=choice.scale, backend=AUTO)
        nothing = q.new_zeros(q.shape[0], 1, k.shape[2], 1)
        sums = attention_partial(
            q, k, nothing, mask=mask, valid=choice.valid, q_pos=choice.q_pos, k_pos=choice.k_pos, **given
        ).lse()
        reached = sums != float("-inf")
        column = torch.where(reached, call.log_message - torch.where(reached, sums, 0.0), SILENT)
        column = torch.where(column > SILENT, column, SILENT)
        # As one more channel of the product: a bias tensor would get a gradient of the size of the map.
        q = torch.cat([q * choice.scale, column.unsqueeze(-1)], -1)
        k = torch.cat([k, torch.ones_like(k[..., :1])], -1)
        part = attention_partial(
            k, q, v, mask=inner, valid=call.valid, scale=1.0, q_pos=choice.k_pos, k_pos=choice.q_pos, backend=AUTO
        )
        size = part.lse().exp()  # the sum of a row, which may be anything
        out = part.finish() * size.unsqueeze(-1)
    if choice.valid is not None:
        out = out.masked_fill(~choice.valid[:, None, :, None], 0.0)
    return out.to(choice.q.dtype)


def _whole(call: _Call) -> Any:
    """The map itself, receivers by senders; its softmax runs down the columns."""
    choice, message = call.choice, call.log_message
    with exactly(choice.q):
        keys = expand_heads(choice.k, choice.heads).to(message.dtype)
        scores = (keys @ choice.q.to(message.dtype).mT) * choice.scale
        allowed = choice.allowed()
        if allowed is not None:
            allowed = allowed.mT
            # A sender that reaches nobody spreads evenly and is zeroed: no NaN enters, its gradient is exactly zero.
            scores = scores.masked_fill(~allowed & allowed.any(-2, keepdim=True), float("-inf"))
        weights = scores.softmax(-2) * message.exp().unsqueeze(-2)
        if allowed is not None:
            weights = weights.masked_fill(~allowed, 0.0)
        used = F.dropout(weights, choice.dropout_p) if choice.dropout_p else weights
        out = (used @ call.v.to(message.dtype)).to(choice.q.dtype)
    return (out, weights) if choice.want == "weights" else out


def _why_not(call: _Call) -> str | None:
    if call.choice.dropout_p:
        return "it has no dropout"
    if call.choice.want == "weights":
        return "it never holds the whole map of weights, so it cannot return them"
    return None


_OPERATOR = Operator("reversed_attention", _prepare)
_OPERATOR.register(
    "passes", _passes, supports=_why_not, prefers=lambda call: call.choice.smaller_than(1 << 16),
    second="what serves attention",
)  # fmt: skip
_OPERATOR.register("eager", _whole)

"""One attention problem, checked and brought to one form; every backend reads this and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..masks import Causal, Mask, as_mask
from ..normalizers import Normalizer, Softmax, as_normalizer
from ..positions import Bias, as_bias
from ..types import check_rank, check_valid, stats_dtype


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of ``attention``, checked. ``q`` (B, Hq, N, D), ``k`` (B, Hk, M, D), ``v`` (B, Hv, M, Dv)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None
    valid: Tensor | None
    bias: Bias | None
    scale: float
    normalizer: Normalizer
    dropout_p: float
    q_pos: Tensor | None
    k_pos: Tensor | None
    want: str  # "out", "weights" (out and weights) or "partial"

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def plain_softmax(self) -> bool:
        return isinstance(self.normalizer, Softmax)

    @property
    def standard_positions(self) -> bool:
        return self.q_pos is None and self.k_pos is None

    @property
    def is_causal(self) -> bool:
        """Causal and nothing else, from position 0, on a square problem: what fused kernels call ``is_causal``."""
        if not isinstance(self.mask, Causal) or not self.standard_positions or self.valid is not None:
            return False
        return self.q.shape[2] == self.k.shape[2]

    def inputs(self) -> list[Tensor]:
        """The tensors that derivatives may be taken in."""
        extra = [] if self.bias is None else [t for t in self.bias.tensors() if t.is_floating_point()]
        return [self.q, self.k, self.v, *extra]

    def replaced(self, inputs: Sequence[Tensor]) -> AttentionCall:
        """The same problem on other tensors in place of :meth:`inputs`."""
        q, k, v, *rest = inputs
        bias = self.bias
        if bias is not None:
            left = list(rest)
            tensors = [left.pop(0) if t.is_floating_point() else t for t in bias.tensors()]
            bias = type(bias).rebuild(tensors, bias.settings())
        return replace(self, q=q, k=k, v=v, bias=bias)

    def smaller_than(self, pairs: int) -> str | None:
        """Says so when the map has fewer than ``pairs`` pairs; ``None`` otherwise, and whenever sizes may be symbols.

        While ``torch.compile`` or ``torch.export`` trace, a choice by size would tie the graph to one size.
        """
        if torch.compiler.is_compiling():
            return None
        area = self.q.shape[2] * self.k.shape[2]
        return f"N * M = {area} is below {pairs}, from where it pays" if area < pairs else None

    def positions(self) -> tuple[Tensor, Tensor]:
        """Positions of queries and keys, defaulting to ``0..N-1`` and ``0..M-1``."""
        q_pos, k_pos = self.q_pos, self.k_pos
        if q_pos is None:
            q_pos = torch.arange(self.q.shape[2], device=self.q.device)
        if k_pos is None:
            k_pos = torch.arange(self.k.shape[2], device=self.q.device)
        return q_pos, k_pos

    def allowed(self) -> Tensor | None:
        """Boolean (B or 1, H or 1, N, M) of pairs that may meet, or ``None`` when all may."""
        out = None
        if self.mask is not None:
            if self.standard_positions:
                out = self.mask.dense(self.q.shape[2], self.k.shape[2], self.q.device)
            else:
                out = self.mask.at(*self.positions())
            out = out.reshape((1,) * (4 - out.dim()) + tuple(out.shape))
        if self.valid is not None:
            valid = self.valid[:, None, None, :]
            out = valid if out is None else out & valid
        return out

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Keys and values repeated to the number of query heads."""
        return expand_heads(self.k, self.heads), expand_heads(self.v, self.heads)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat (B, Hk, M, D) to (B, heads, M, D), neighbours together."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    valid: Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    normalizer: str | Normalizer = "softmax",
    dropout_p: float = 0.0,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    want: str = "out",
) -> AttentionCall:
    """Check everything once, apply the autocast rule, and return the :class:`AttentionCall`."""
    check_rank("q", q, 4, "(B, Hq, N, D)")
    check_rank("k", k, 4, "(B, Hk, M, D)")
    check_rank("v", v, 4, "(B, Hv, M, Dv)")
    if not (q.shape[0] == k.shape[0] == v.shape[0]):
        raise ValueError(f"q, k and v must share the batch, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head_dim={q.shape[3]}, k has head_dim={k.shape[3]}; they must agree")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k has {k.shape[2]} tokens, v has {v.shape[2]}; they must agree")
    for name, other in (("k", k), ("v", v)):
        if other.shape[1] == 0 or q.shape[1] % other.shape[1]:
            raise ValueError(
                f"{name} has {other.shape[1]} heads, which do not divide the {q.shape[1]} heads of q; "
                "for other maps select the heads first (index_select)"
            )
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t.to(dtype) if t.dtype != torch.float64 else t for t in (q, k, v))
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise TypeError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    batch, heads, n, m = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    check_valid("valid", valid, (batch, m))
    mask, bias = as_mask(mask), as_bias(bias)
    explicit = getattr(mask, "allowed", None)
    if q_pos is None and k_pos is None and isinstance(explicit, Tensor) and tuple(explicit.shape[-2:]) != (n, m):
        raise ValueError(f"mask must be (..., {n}, {m}) for N={n} queries and M={m} keys, got {tuple(explicit.shape)}")
    if mask is not None:
        if mask.batch() not in (1, batch):
            raise ValueError(f"mask knows {mask.batch()} samples, but the batch is {batch}")
        if mask.heads() not in (1, heads):
            raise ValueError(f"mask knows {mask.heads()} heads, but q has {heads}")
    if bias is not None and bias.shape() != (n, m):
        raise ValueError(f"bias is for N, M = {bias.shape()}, but q and k have N={n}, M={m}")
    for name, pos, size in (("q_pos", q_pos, n), ("k_pos", k_pos, m)):
        if pos is not None and (pos.dim() not in (1, 2, 3) or pos.shape[-1] != size):
            raise ValueError(f"{name} must be ({size},), (B, {size}) or (B, H, {size}), got {tuple(pos.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    return AttentionCall(
        q, k, v, mask, valid, bias, q.shape[3] ** -0.5 if scale is None else float(scale),
        as_normalizer(normalizer), float(dropout_p), q_pos, k_pos, want,
    )  # fmt: skip


def with_stats(fn: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """Run ``fn`` in the statistics dtype of ``dtype``."""
    high = stats_dtype(dtype)
    return lambda *tensors: fn(*(t.to(high) for t in tensors))

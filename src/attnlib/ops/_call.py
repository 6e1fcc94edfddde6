"""One attention problem, checked and brought to one form; every backend reads this and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    REAL,
    check_device,
    check_float,
    check_rank,
    check_real,
    check_type,
    check_valid,
    check_whole,
    describe,
)
from ..masks import Causal, Mask, as_mask
from ..normalizers import Normalizer, Softmax, as_normalizer
from ..positions import Bias, RelativeBias, as_bias
from ..types import stats_dtype


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

    def deciding(self) -> list[Tensor]:
        """Further tensors, which say which pairs meet."""
        own = [t for t in (self.valid, self.q_pos, self.k_pos) if t is not None]
        return own if self.mask is None else [*own, *self.mask.lower()[1]]

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
                out = self.mask._block((0, self.q.shape[2]), (0, self.k.shape[2]), self.q.device)
            else:
                out = self.mask._at(*self.positions())
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
    bias_name: str = "bias",
) -> AttentionCall:
    """Check everything once, apply the autocast rule, and return the :class:`AttentionCall`."""
    check_qkv(q, k, v)
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t.to(dtype) if t.dtype != torch.float64 else t for t in (q, k, v))
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in REAL:
        if q.is_floating_point():
            check_float("q", q)
        raise TypeError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    (batch, heads, n, _), m = q.shape, k.shape[2]
    check_valid("valid", valid, (batch, m))
    mask = as_mask(mask, n, m) if q_pos is k_pos is None else as_mask(mask)  # else sides are positions
    bias = as_bias(bias, bias_name, n, m)
    check_positions("q_pos", q_pos, batch, heads, n)
    check_positions("k_pos", k_pos, batch, heads, m)
    given = (k, v) if valid is q_pos is k_pos is None else (k, v, valid, q_pos, k_pos)
    if any([t is not None and t.device != q.device for t in given]):
        check_device(q=q, k=k, v=v, valid=valid, q_pos=q_pos, k_pos=k_pos)
    if mask is not None:
        mask.check(n, m, batch=batch, heads=heads, device=q.device, q_pos=q_pos, k_pos=k_pos)
    if bias is not None:
        check_bias(bias_name, bias, batch, heads, n, m, q.device)
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else check_scale(scale)
    if dropout_p.__class__ is not float or not 0 <= dropout_p < 1:
        check_real("dropout_p", dropout_p, least=0, below=1)
    return AttentionCall(
        q, k, v, mask, valid, bias, scale, as_normalizer(normalizer), float(dropout_p), q_pos, k_pos, want
    )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes of queries, keys and values that belong together."""
    check_rank("q", q, 4, "(B, Hq, N, D)")
    check_rank("k", k, 4, "(B, Hk, M, D)")
    check_rank("v", v, 4, "(B, Hv, M, Dv)")
    (qb, qh, _, qd), (kb, kh, km, kd), (vb, vh, vm, _) = q.shape, k.shape, v.shape
    if not (qb == kb == vb):
        raise ValueError(f"q, k and v must share the batch, got {qb}, {kb} and {vb}")
    if qd != kd:
        raise ValueError(f"q has head_dim={qd}, k has head_dim={kd}; they must agree")
    if km != vm:
        raise ValueError(f"k has {km} tokens, v has {vm}; they must agree")
    if qh == 0:
        raise ValueError(f"q must have at least one head, got {describe(q)}")
    for name, heads in (("k", kh), ("v", vh)):
        if heads == 0 or qh % heads:
            raise ValueError(
                f"{name} has {heads} heads, which do not divide the {qh} heads of q; "
                "for other maps select the heads first (index_select)"
            )


def check_scale(scale: Any) -> float:
    """A finite number of at least 0; a learned scale belongs to the queries, where it gets its gradient."""
    if isinstance(scale, Tensor):
        raise TypeError(
            f"scale must be a finite number of at least 0, got {describe(scale)}; a tensor goes to the queries: "
            "q * scale, with scale=1.0"
        )
    return float(check_real("scale", scale, least=0))


def check_positions(name: str, pos: Tensor | None, batch: int, heads: int, size: int) -> None:
    """Raise unless ``pos`` is ``None`` or integer positions (size,), (B or 1, size) or (B or 1, H or 1, size)."""
    if pos is None:
        return
    check_whole(name, pos, f"an integer tensor ({size},), (B, {size}) or (B, H, {size})")
    lead = tuple(pos.shape[:-1])
    if (
        pos.dim() not in (1, 2, 3)
        or pos.shape[-1] != size
        or any(given not in (1, serves) for given, serves in zip(lead, (batch, heads), strict=False))
    ):
        raise ValueError(
            f"{name} must be ({size},), (B, {size}) or (B, H, {size}) with B={batch} or 1 and H={heads} or 1, "
            f"got {tuple(pos.shape)}"
        )


def check_bias(name: str, bias: Bias, batch: int, heads: int, n: int, m: int, device: torch.device) -> None:
    """Raise unless a bias is for this problem: its pairs, its samples and heads (or one for all), its device."""
    check_type(name, bias, Bias, "a float tensor or a Bias")
    if bias.shape() != (n, m):
        raise ValueError(f"{name} is for N, M = {bias.shape()}, but q and k have N={n}, M={m}")
    for samples, groups in _planes(bias):
        if samples not in (1, batch) or groups not in (1, heads):
            raise ValueError(
                f"{name} is for {samples} samples and {groups} heads, but q has {batch} and {heads}; "
                "possible: as many, or 1"
            )
    for t in bias.tensors():
        if t.device != device:
            raise ValueError(f"{name} lies on {t.device}, q on {device}; they must lie on one device")


def _planes(bias: Bias) -> list[tuple[int, int]]:
    """Samples and heads that each tensor of a bias tells apart."""
    if isinstance(bias, RelativeBias):
        return [(1, bias.table.shape[0])]
    return [(t.shape[0], t.shape[1]) for t in bias.tensors() if t.is_floating_point()]


def with_stats(fn: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """Run ``fn`` in the statistics dtype of ``dtype``."""
    high = stats_dtype(dtype)
    return lambda *tensors: fn(*(t.to(high) for t in tensors))

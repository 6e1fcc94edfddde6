"""Which keys stay, given what each is worth and how many may."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_within, checked, shaped
from ..types import check_choice


@checked
@dataclass(frozen=True)
class TopK:
    """The best keys of every head; optionally with their neighbours, and with first and last keys in any case.

    Args:
        kernel_size: odd; scores are pooled over so many keys first, so that a good key brings its neighbours along.
        pooling: ``"max"`` or ``"avg"`` (of the keys there are).
        sinks: first keys that always stay.
        recent: last keys that always stay.

    >>> TopK(sinks=1)(torch.tensor([[[0.0, 5.0, 1.0, 4.0]]]), torch.tensor([[2]]))
    tensor([[[0, 1]]])
    """

    kernel_size: int = 1
    pooling: str = "max"
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that every key keeps its place; got {self.kernel_size}")
        check_choice("pooling", self.pooling, ("max", "avg"))
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @shaped(scores="float (B, Hk, M)")
    def ready(self, scores: Tensor) -> Tensor:
        """Scores (B, Hk, M) after pooling, ``+inf`` for keys that stay in any case; ``-inf`` keys stay ``-inf``."""
        there = scores > -torch.inf
        out = scores
        if self.kernel_size > 1 and scores.numel():
            size, finite = self.kernel_size, scores.isfinite()
            if self.pooling == "max":
                out = F.max_pool1d(scores.masked_fill(~finite, -torch.inf), size, stride=1, padding=size // 2)
            else:
                sums, number = (
                    F.avg_pool1d(t, size, stride=1, padding=size // 2)
                    for t in (scores.masked_fill(~finite, 0.0), finite.to(scores.dtype))
                )
                out = sums / number.clamp(min=0.5 / size)
            out = torch.where(finite, out, scores)
        if self.sinks:
            out = out.masked_fill(there & (there.cumsum(-1) <= self.sinks), torch.inf)
        if self.recent:
            out = out.masked_fill(there & (there.flip(-1).cumsum(-1).flip(-1) <= self.recent), torch.inf)
        return out

    @shaped(scores="float (B, Hk, M)", counts="whole (B, Hk)")
    def pick(self, scores: Tensor, counts: Tensor) -> Tensor:
        """The ``counts`` (B, Hk) best of ready scores (B, Hk, M): (B, Hk, K) ascending, -1 before shorter rows."""
        check_within("counts", counts, scores.shape[-1] + 1, "key")
        most = int(counts.max()) if counts.numel() else 0
        best = scores.topk(most, dim=-1).indices
        short = torch.arange(most, device=scores.device) >= counts.unsqueeze(-1)
        return best.masked_fill(short, -1).sort(-1).values

    def __call__(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Both steps: (B, Hk, M) scores and (B, Hk) counts to (B, Hk, K) ascending indices."""
        return self.pick(self.ready(scores), counts)

"""Long-short attention (Zhu et al., 2021): a window around each token, and landmarks that tokens are projected to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import attention
from ...types import Output, Traits, exactly, stats_dtype
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads, to_front, to_places
from ..registry import register
from ..released import Released, Rule


@register("long-short", "longshort", "transformer-ls")
class LongShort(Mechanism):
    """One softmax over the keys of a window and ``r`` landmarks per head.

    Tokens lie in blocks of ``window_size``; a query reads its block and half a block on both sides. Landmarks are
    ``P^T K`` and ``P^T V`` with ``P = softmax over tokens (x W_P)`` (N, r) per head. Keys and values go through one
    LayerNorm over all heads, landmarks through another (DualLN), so that both kinds are of one size.

    Differs from the authors' code: statistics in float32 whatever the input; tokens that do not exist are left out of
    windows, which then hold runs of tokens that exist (theirs masks them in place).

    Args:
        dim: width of ``x``.
        num_heads: heads.
        num_landmarks: landmarks r of each head; 0 for the window alone.
        window_size: tokens of a block.
        attn_drop: dropout of the weights in training.
        qkv_bias: biases of the query, key and value projections.
        proj_bias: bias of the output projection.

    Reference: Zhu et al., 2021, arXiv 2107.02192; Zhang et al., 2022, arXiv 2210.07661 (the benchmark's class).

    >>> LongShort(dim=16, num_heads=2, num_landmarks=3, window_size=4)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1}),
        work={"N": 1},
        memory={"N": 1},
    )
    zero_is_off = ("num_landmarks",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_landmarks: int = 16,
        window_size: int = 15,
        attn_drop: float = 0.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
    ):
        super().__init__(dim)
        if num_landmarks < 0:
            raise ValueError(f"num_landmarks must be at least 0, got {num_landmarks}")
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.num_heads, self.num_landmarks, self.window_size = num_heads, num_landmarks, window_size
        self.scale, self.attn_drop = head_dim_of(dim, num_heads) ** -0.5, attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.norm_short, self.norm_long = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.landmarks = nn.Linear(dim, num_heads * num_landmarks) if num_landmarks else None

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Output:  # type: ignore[override]
        x, now, order = to_front(x, flat_valid(valid))
        q = split_heads(self.q(x), self.num_heads)
        k, v = self.norm_short(self.k(x)), self.norm_short(self.v(x))
        far = None if self.landmarks is None else self._projected(self.landmarks(x), k, v, now)
        k, v = split_heads(k, self.num_heads), split_heads(v, self.num_heads)
        out = self._read(q, k, v, now, far)
        return Output(to_places(self.proj(merge_heads(out)), order))

    def _projected(self, scores: Tensor, k: Tensor, v: Tensor, now: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, H, r, D) keys and values of the landmarks."""
        shares = scores.unflatten(2, (self.num_heads, self.num_landmarks)).permute(0, 2, 3, 1)  # (B, H, r, N)
        with exactly(k):
            shares = shares.to(stats_dtype(k.dtype))
            if now is not None:
                gone = ~now[:, None, None]
                # Where nothing exists there is nothing to share out.
                shares = shares.masked_fill(gone, torch.finfo(shares.dtype).min).softmax(-1).masked_fill(gone, 0.0)
            else:
                shares = shares.softmax(-1)
            sums = [shares @ split_heads(t, self.num_heads).to(shares.dtype) for t in (k, v)]
        normed = [self.norm_long(merge_heads(t).to(k.dtype)) for t in sums]
        return split_heads(normed[0], self.num_heads), split_heads(normed[1], self.num_heads)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, now: Tensor | None, far: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, H, N, D): every block of queries with its window and the landmarks, blocks laid into the batch."""
        batch, heads, n, _ = q.shape
        block, beside = self.window_size, max(self.window_size // 2, 1)
        count = -(-n // block)
        pad = count * block - n
        there = torch.ones(batch, n, dtype=torch.bool, device=q.device) if now is None else now
        seen = F.pad(there, (beside, beside + pad)).unfold(1, block + 2 * beside, block)  # (B, T, W)
        q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (count, block)).transpose(1, 2)
        window = [
            F.pad(t, (0, 0, beside, beside + pad)).unfold(2, block + 2 * beside, block).permute(0, 2, 1, 4, 3)
            for t in (k, v)
        ]  # (B, T, H, W, D)
        if far is not None:
            window = [
                torch.cat([near, t.unsqueeze(1).expand(-1, count, -1, -1, -1).to(near.dtype)], 3)
                for near, t in zip(window, far, strict=True)
            ]
            some = there.any(1)[:, None, None].expand(-1, count, self.num_landmarks)
            seen = torch.cat([seen, some], 2)
        out = attention(
            q.flatten(0, 1), window[0].flatten(0, 1), window[1].flatten(0, 1), valid=seen.flatten(0, 1),
            scale=self.scale, dropout_p=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        return out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :n]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``AttentionLS`` of the benchmark: ``W_q``, ``dconv_fc``, ``dual_ln_l`` (of tokens), ``dual_ln_s``."""
        theirs = Released(state_dict, "AttentionLS of the Comprehensive Attention Benchmark")
        rules: dict[str, Rule] = {
            r"W_([qkv])\.(weight|bias)": r"\1.\2",
            r"W_o\.(weight|bias)": r"proj.\1",
            # Theirs names the norm of the tokens long and that of the landmarks short.
            r"dual_ln_l\.(weight|bias)": r"norm_short.\1",
            r"dual_ln_s\.(weight|bias)": r"norm_long.\1",
            r"dconv_fc\.(weight|bias)": r"landmarks.\1",
        }
        return theirs.close(theirs.renamed(rules))

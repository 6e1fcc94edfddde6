"""Long-short attention (Zhu et al., 2021): a window around each token, and landmarks that tokens are projected to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import attention
from ...types import Output, Traits, check_choice, exactly, stats_dtype
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


@register("causal-long-short", "causal-ls")
class CausalLongShort(Mechanism):
    """One softmax over the last ``window_size`` tokens and ``chunk_rank`` landmarks of every earlier chunk.

    A token reads itself and the tokens before it in a sliding window, with the positions of Transformer-XL:
    ``(q + u) . k + (q + w) . r(distance)``. Every chunk of ``chunk_size`` tokens projects its keys and values to
    ``chunk_rank`` landmarks per head by a softmax over its own tokens; the chunks behind read them,
    ``q . k + q . r'(landmarks in between)``. Keys and values of both kinds go through LayerNorms (DualLN).

    ``compat="authors"`` starts as their class does, from a memory of ``mem_len`` tokens that are zeros: the window
    reaches into it, and its landmarks are read by all, so that early tokens mix in the norms' biases. Otherwise there
    is nothing before the first token.

    Cost grows with ``N^2 / chunk_size``. Sequences of any length are prefixes of longer ones, and tokens that do not
    exist take no place (theirs ignores masks).

    Args:
        dim: width of ``x``.
        num_heads: heads.
        chunk_size: tokens of a chunk.
        window_size: tokens of the window, the query's own included.
        chunk_rank: landmarks of a chunk.
        qkv_bias: biases of the query, key, value and output projections.
        attn_drop: dropout of the weights in training.
        proj_drop: dropout of the output in training.
        mem_len: tokens of the memory with ``compat="authors"``; a multiple of ``chunk_size``, and no fewer than
            ``window_size``.
        causal: must be True.
        compat: ``"authors"``, see above.

    Reference: Zhu et al., 2021, arXiv 2107.02192; Zhang et al., 2022, arXiv 2210.07661 (the benchmark's class).

    >>> CausalLongShort(dim=16, num_heads=2, chunk_size=4, window_size=3)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"causal-self"}),
        grid_ranks=frozenset({1}),
        work={"N": 2},
        memory={"N": 2},
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        chunk_size: int = 32,
        window_size: int = 256,
        chunk_rank: int = 1,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mem_len: int = 1024,
        causal: bool = True,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        if not causal:
            raise ValueError("causal=False is not possible: its window looks back; use long-short")
        for name, value in (("chunk_size", chunk_size), ("window_size", window_size), ("chunk_rank", chunk_rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dim % 2:
            raise ValueError(f"dim must be even, for sines and cosines of positions, got {dim}")
        if compat is not None and (mem_len % chunk_size or mem_len < window_size):
            raise ValueError(
                f"mem_len={mem_len} must be a multiple of chunk_size={chunk_size} and at least "
                f"window_size={window_size}"
            )
        head_dim = head_dim_of(dim, num_heads)
        self.num_heads, self.scale, self.compat = num_heads, head_dim**-0.5, compat
        self.chunk_size, self.window_size, self.chunk_rank = chunk_size, window_size, chunk_rank
        self.mem_len = mem_len if compat is not None else 0
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.landmarks = nn.Linear(dim, num_heads * chunk_rank)
        self.window_positions = nn.Linear(dim, dim, bias=False)
        self.chunk_positions = nn.Linear(dim, dim)
        self.position_bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.content_bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        for layer in (self.q, self.proj, self.v, self.k):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.norm_long, self.norm_short = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def _positions(self, count: int, like: Tensor) -> Tensor:
        """(count, dim) sines, then cosines, of distances from ``count - 1`` down to 0."""
        at = torch.arange(count - 1, -1, -1, device=like.device, dtype=torch.float32)
        rates = 10000 ** (torch.arange(0, self.dim, 2, device=like.device, dtype=torch.float32) / -self.dim)
        angles = at[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], -1).to(like.dtype)

    def _of_heads(self, x: Tensor) -> Tensor:
        """(n, dim) to (H, n, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Output:  # type: ignore[override]
        x, now, order = to_front(x, flat_valid(valid))
        batch, n, _ = x.shape
        q = split_heads(self.q(x), self.num_heads) * self.scale
        k, v = self.k(x), self.v(x)
        far, far_values = self._far(x, q, k, v)
        near, near_values = self._near(q, k, v)
        count = far.shape[-1]
        weights = torch.cat([far, near], -1)
        empty = torch.isinf(weights).all(-1, keepdim=True)
        weights = weights.masked_fill(empty, 0.0).to(stats_dtype(x.dtype)).softmax(-1).to(x.dtype)
        weights = self.attn_drop(weights)
        out = weights[..., :count] @ far_values + self._near_read(weights[..., count:], near_values)
        return Output(to_places(self.proj_drop(self.proj(merge_heads(out[:, :, :n]))), order))

    # ---- earlier chunks

    def _far(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, H, n, L) of landmarks, ``-inf`` for those of the own chunk and later, and their values."""
        n, size, rank = x.shape[1], self.chunk_size, self.chunk_rank
        full = n // size
        before = self.mem_len // size
        parts = []
        if full:
            shares = self.landmarks(x[:, : full * size]).unflatten(1, (full, size))
            shares = shares.unflatten(-1, (self.num_heads, rank)).permute(0, 3, 1, 4, 2)  # (B, H, T, rank, size)
            shares = shares.to(stats_dtype(x.dtype)).softmax(-1).to(x.dtype)
            for t in (k, v):
                chunks = split_heads(t[:, : full * size], self.num_heads).unflatten(2, (full, size))
                parts.append(self.norm_long(merge_heads((shares @ chunks).flatten(2, 3))))
        else:
            parts = [k[:, :0], v[:, :0]]
        if before:  # what a memory of zeros projects to
            empty = x.new_zeros(x.shape[0], before * rank, x.shape[2])
            parts = [
                torch.cat([self.norm_long(layer(empty)), part], 1)
                for layer, part in zip((self.k, self.v), parts, strict=True)
            ]
        keys, values = (split_heads(part, self.num_heads) for part in parts)
        number = torch.arange(keys.shape[2], device=x.device)
        chunk = torch.arange(n, device=x.device) // size
        # Landmarks between a query's chunk and one
        apart = (before + chunk[:, None]) * rank - 1 - number
        reach = (before + -(-n // size)) * rank
        table = self._of_heads(self.chunk_positions(self._positions(reach, x)))  # distances from reach - 1 down
        index = (reach - 1 - apart).clamp(0, max(reach - 1, 0))
        scores = q @ keys.mT
        if keys.shape[2]:
            scores = scores + (q @ table.mT).gather(3, index.expand(*scores.shape[:2], -1, -1))
        return scores.masked_fill(apart < 0, float("-inf")), values

    # ---- the window

    def _tiles(self, n: int) -> tuple[int, int]:
        size = max(min(self.window_size, n), 1)
        return size, max(-(-n // size), 1)

    def _near(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, H, n, W) of the window, oldest first, and values (B, H, T, size + W - 1, D) of blocks."""
        n, width = q.shape[2], self.window_size
        size, count = self._tiles(n)
        pad = count * size - n
        before = k.new_zeros(k.shape[0], width - 1, k.shape[2])
        if self.mem_len:
            k, v = torch.cat([self.k(before), k], 1), torch.cat([self.v(before), v], 1)
        else:
            k, v = torch.cat([before, k], 1), torch.cat([before, v], 1)
        keys, values = (
            F.pad(split_heads(self.norm_short(t), self.num_heads), (0, 0, 0, pad)).unfold(2, size + width - 1, size)
            for t in (k, v)
        )  # (B, H, T, D, size + W - 1)
        tiles = F.pad(q, (0, 0, 0, pad)).unflatten(2, (count, size))
        scores = (tiles + self.content_bias[:, None, None]) @ keys
        scores = scores.gather(4, self._diagonals(q).expand(*scores.shape[:3], -1, -1)).flatten(2, 3)[:, :, :n]
        table = self._of_heads(self.window_positions(self._positions(width, q)))
        scores = scores + (q + self.position_bias[:, None]) @ table.mT
        if not self.mem_len:
            there = torch.arange(n, device=q.device)[:, None] + torch.arange(width, device=q.device) >= width - 1
            scores = scores.masked_fill(~there, float("-inf"))
        return scores, values.mT

    def _diagonals(self, q: Tensor) -> Tensor:
        """(size, W) places in a block's keys of what each query reads."""
        size, _ = self._tiles(q.shape[2])
        return torch.arange(size, device=q.device)[:, None] + torch.arange(self.window_size, device=q.device)

    def _near_read(self, weights: Tensor, values: Tensor) -> Tensor:
        n, (count, keys) = weights.shape[2], values.shape[2:4]
        size, _ = self._tiles(n)
        tiles = F.pad(weights, (0, 0, 0, count * size - n)).unflatten(2, (count, size))
        wide = tiles.new_zeros(*tiles.shape[:4], keys).scatter(4, self._diagonals(weights).expand_as(tiles), tiles)
        return (wide @ values).flatten(2, 3)[:, :, :n]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``CausalLS`` of the benchmark: ``proj_query``, ``dconv_1``, ``r_net``, ``r_w_bias`` and so on."""
        theirs = Released(state_dict, "CausalLS of the Comprehensive Attention Benchmark")
        theirs.leave(r"pos_emb\.inv_freq", because="follows from the width")

        rules: dict[str, Rule] = {
            r"proj_query\.(weight|bias)": r"q.\1",
            r"proj_key\.(weight|bias)": r"k.\1",
            r"proj_val\.(weight|bias)": r"v.\1",
            r"proj_out\.(weight|bias)": r"proj.\1",
            r"dconv_1\.(weight|bias)": r"landmarks.\1",
            r"r_net\.weight": r"window_positions.weight",
            r"r_net_chunk\.(weight|bias)": r"chunk_positions.\1",
            r"dual_ln_dproj\.(weight|bias)": r"norm_long.\1",
            r"dual_ln_win\.(weight|bias)": r"norm_short.\1",
            r"r_r_bias": lambda match, value: {"position_bias": value.reshape(value.shape[1], -1)},
            r"r_w_bias": lambda match, value: {"content_bias": value.reshape(value.shape[1], -1)},
        }
        return theirs.close(theirs.renamed(rules))

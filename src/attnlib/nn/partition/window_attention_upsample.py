"""Window attention upsampling: the fine map asks the coarse one, window by window, what stands between its tokens.

Li, Cai, Gao, Li, Hu, 2021, "More than Encoder: Introducing Transformer Decoder to Upsample", arXiv 2106.10637. In the
decoder of a U-Net a coarse map ``L`` becomes as fine as its lateral map ``S``. The abstract says: ``S`` is the query of
a transformer decoder that reads ``L``, a bilinear upsampling stands beside it as the residual, and the window version
asks within corresponding windows. With ``U`` the linear map of ``L``, resized,

    ``y = U + W_o softmax(q k^T D^-1/2 + B) v``,  ``q = W_q LN(S)``,  ``k, v = W_kv LN(L)``

    ``y <- y + MLP(LN(y))``

where windows of ``P x P`` queries read the ``P/2 x P/2`` keys of the same part of the image, and ``B`` is a table by
displacement, counted in fine tokens. One window over all of the map is the plain form (AU).

No code was released, and the abstract is all that could be read: everything beyond its sentence is ours and a setting
where the sentence leaves a choice. What queries (``query_source``), what is read (``kv_source``), attention among
queries before it (``self_attention``), moved windows (``shift``), the table, the norms and the MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_flag, check_int
from ...grids import coordinates
from ...ops.halo import halo_attention
from ...positions import RelativeBias
from ...types import Traits
from ..base import Mechanism
from ..layers import Mlp, flat_valid, head_dim_of, merge_heads, resize_map, split_heads, zero_invalid
from ..registry import register
from .maxvit import PartitionAttention

QUERIES = ("lateral", "both")
SOURCES = ("low", "upsampled")


def resize_existing(x: Tensor, size: tuple[int, int], valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(B, H, W, C) at another size, from those tokens alone that exist, and which of the new ones have any."""
    if valid is None or tuple(x.shape[1:3]) == size:
        return resize_map(zero_invalid(x, valid), size), valid
    share = resize_map(valid.unsqueeze(-1).to(x.dtype), size)
    some = share > 0
    return resize_map(zero_invalid(x, valid), size) / torch.where(some, share, 1), some.squeeze(-1)


@register("window-attention-upsample", "wau", "attention-upsample")
class WindowAttentionUpsample(Mechanism):
    """A coarse map made as fine as its lateral map, which queries it in windows.

    Args:
        dim: width of ``x``, the lateral map, and of the output.
        context_dim: width of ``context``, the coarse map; ``dim`` by default.
        num_heads: heads; must divide ``dim``.
        window_size: fine tokens a side of a window, a multiple of ``factor``; ``None``: one window, without a table.
        factor: fine tokens a side for one coarse token.
        query_source: ``"lateral"``: ``x`` asks; ``"both"``: the sum of ``x`` and the resized coarse map.
        kv_source: ``"low"``: coarse tokens are read, ``(P / factor)^2`` a window; ``"upsampled"``: the resized ones,
            ``P^2`` a window.
        self_attention: attention in windows among the tokens of ``x`` before they ask.
        shift: how far windows are moved towards the end of both axes; less than ``window_size``.
        rel_bias: learn a table by displacement.
        mlp_ratio: hidden width of the MLP behind it over ``dim``; 0 for none.
        attn_drop: dropout of attention weights in training.

    Shapes: x and y (B, H, W, C), context (B, ceil(H / factor), ceil(W / factor), C'); a context of another size is
    resized to that first.

    Reference: Li et al., 2021, arXiv 2106.10637, abstract.

    >>> up = WindowAttentionUpsample(dim=16, context_dim=32, num_heads=2, window_size=4)
    >>> up(torch.randn(2, 8, 10, 16), torch.randn(2, 4, 5, 32)).shape
    torch.Size([2, 8, 10, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-cross"}), grid_ranks=frozenset({2}), work={"N": 2}, memory={"N": 1}
    )
    zero_is_off = ("mlp_ratio",)

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        num_heads: int = 4,
        window_size: int | None = 8,
        factor: int = 2,
        query_source: str = "lateral",
        kv_source: str = "low",
        self_attention: bool = False,
        shift: int = 0,
        rel_bias: bool = True,
        mlp_ratio: float = 2.0,
        attn_drop: float = 0.0,
    ):
        super().__init__(dim, context_dim)
        check_choice("query_source", query_source, QUERIES)
        check_choice("kv_source", kv_source, SOURCES)
        check_flag("self_attention", self_attention)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.factor, self.window_size = check_int("factor", factor, least=1), window_size
        if window_size is not None:
            check_divides("factor", factor, "window_size", check_int("window_size", window_size, least=1))
        self.shift = check_int("shift", shift, least=0)
        if shift and (window_size is None or shift >= window_size):
            raise ValueError(f"shift={shift} must be less than window_size={window_size}")
        if shift % factor:
            raise ValueError(f"shift={shift} must be a multiple of factor={factor}: it moves whole coarse tokens")
        self.query_source, self.kv_source, self.attn_drop = query_source, kv_source, attn_drop
        self.low = nn.Linear(self.context_dim, dim)
        self.self_norm: nn.Module | None = None
        self.self_attention: PartitionAttention | None = None
        if self_attention:
            if window_size is None:
                raise ValueError("self_attention needs a window_size")
            self.self_norm = nn.LayerNorm(dim)
            self.self_attention = PartitionAttention(dim, num_heads, window_size, rank=2, shift=shift)
        self.norm_q, self.norm_kv = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if mlp_ratio else None
        self.mlp = Mlp(dim, mlp_ratio) if mlp_ratio else None
        if rel_bias and window_size is not None:
            side = window_size + self.key_step * (window_size // self.key_step - 1)
            self.rel_bias = nn.Parameter(torch.empty(num_heads, side, side))
            nn.init.trunc_normal_(self.rel_bias, std=0.02)
        else:
            self.register_parameter("rel_bias", None)

    @property
    def key_step(self) -> int:
        """Fine tokens a side for one key."""
        return self.factor if self.kv_source == "low" else 1

    @property
    def traits(self) -> Traits:
        return self.class_traits if self.window_size is None else self.class_traits.but(work={"N": 1})

    @property
    def tables(self) -> dict[str, int]:
        """Tables of places, by how many of their last axes are places."""
        return {} if self.rel_bias is None else {"rel_bias": 2}

    def _bias(self) -> Tensor | None:
        """(H, P P, keys) of a window."""
        if self.rel_bias is None or self.window_size is None:
            return None
        window, keys = self.window_size, self.window_size // self.key_step
        places = coordinates((window,) * 2, self.rel_bias.device)
        of_keys = coordinates((keys,) * 2, self.rel_bias.device) * self.key_step
        sides = self.rel_bias.shape[1:]
        return RelativeBias(self.rel_bias.flatten(1), places, of_keys, (window - 1,) * 2, sides).dense()[0]

    def upsampled(
        self, context: Tensor, grid: tuple[int, int], context_valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The coarse map in the width of the fine one, and it resized to ``grid``; and which tokens of each exist."""
        height, width = (-(-n // self.factor) for n in grid)
        low, exists = resize_existing(self.low(context), (height, width), context_valid)
        fine = (height * self.factor, width * self.factor)
        up, some = resize_existing(low, fine, exists)
        up = zero_invalid(up, some)[:, : grid[0], : grid[1]]
        return low, exists, up, None if some is None else some[:, : grid[0], : grid[1]]

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        context: Tensor,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> Tensor:
        if context.dim() != 4:
            raise ValueError(f"context must be a map (B, h, w, C), got shape {tuple(context.shape)}")
        if 0 in context.shape[1:3]:
            raise ValueError(f"context must hold at least one token, got shape {tuple(context.shape)}")
        grid = (x.shape[1], x.shape[2])
        low, exists, up, some = self.upsampled(context, grid, context_valid)
        query = x
        if self.self_attention is not None and self.self_norm is not None:
            query = query + self.self_attention(self.self_norm(query), valid=valid)
        if self.query_source == "both":
            query = query + up
        source, exists = (low, exists) if self.kv_source == "low" else (up, some)
        q, kv = self.q(self.norm_q(query)), self.kv(self.norm_kv(source))
        y = up + self.proj(self._in_windows(q, kv, exists))
        return y if self.mlp is None or self.norm is None else y + self.mlp(self.norm(y))

    def _in_windows(self, q: Tensor, kv: Tensor, exists: Tensor | None) -> Tensor:
        """(B, H, W, C) of queries (B, H, W, C) and keys and values (B, h, w, 2 C) in corresponding windows."""
        grid, step = q.shape[1:3], self.key_step
        least = [step * n for n in kv.shape[1:3]]  # of the fine grid that the keys lie on
        side = self.window_size
        front = 0 if not self.shift or side is None else side - self.shift
        if side is None:
            sides = [max(n, m) for n, m in zip(grid, least, strict=True)]
            full = sides
        else:
            sides = [side, side]
            full = [-(-(max(n, m) + front) // side) * side for n, m in zip(grid, least, strict=True)]
        keys = [n // step for n in full]
        before = front // step
        if [*full, *keys] != [*grid, *kv.shape[1:3]]:
            q = _padded(q, front, full)
            if exists is None and keys != list(kv.shape[1:3]):
                exists = torch.ones(kv.shape[:-1], dtype=torch.bool, device=kv.device)
            if exists is not None:
                exists = _padded(exists.unsqueeze(-1), before, keys).squeeze(-1)
            kv = _padded(kv, before, keys)
        k, v = kv.chunk(2, -1)
        out = halo_attention(
            split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads), full,
            sides, 0, k_grid=keys, k_block=[n // step for n in sides], bias=self._bias(), valid=flat_valid(exists),
            dropout_p=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        return merge_heads(out, full)[:, front : front + grid[0], front : front + grid[1]]


def _padded(x: Tensor, front: int, full: list[int]) -> Tensor:
    """(B, H, W, C) with ``front`` tokens before both axes, and as many behind as ``full`` needs."""
    height, width = x.shape[1:3]
    return F.pad(x, [0, 0, front, full[1] - width - front, front, full[0] - height - front])

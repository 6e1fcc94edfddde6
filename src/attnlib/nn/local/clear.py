"""CLEAR: image tokens of a diffusion transformer read a circle around themselves and all text; text reads everything.

Liu et al., 2024, "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", arXiv 2412.16112. Text
and image stand in one sequence. Softmax, weights and features stay as they were trained; pairs of image tokens meet
where ``dy^2 + dx^2 < r^2``: r = 8 leaves 193 keys, r = 16 793, r = 32 3205, whatever the size of the image. With
``down_factor`` image tokens also read one key for every ``f x f`` cell, whose key and value are a learned weighted sum
of the cell's, at first their mean; text does not. ``proportional`` scales scores by ``sqrt(log_t(n) / D)`` instead of
``sqrt(1 / D)``, with n keys (ten times as many beside pooled keys) and t those of training.

Differs from the authors' code: the number of text tokens, the sides of the image and their order are arguments, where
theirs keeps a mask for one size in the module and cuts 512 text tokens off; cells at the border of an image that ``f``
does not divide hold fewer tokens, and their sums are scaled up to a whole cell's, as where tokens do not exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import masks
from ...checks import check_flag, check_int, check_rank, check_real, check_type
from ...grids import Layout
from ...masks import Mask
from ...ops import attention
from ...types import Output, Traits, stats_dtype
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, head_norm, merge_heads, split_heads, through
from ..registry import register
from ..released import Released

#: Keys of FLUX's training: 64 x 64 image tokens and 512 of text.
TRAINED = 64**2 + 512


def clear_mask(layout: Layout, window_size: float) -> Mask:
    """Which tokens meet; keys behind those of ``layout`` are read by all.

    >>> print(clear_mask(Layout((("text", 1), ("image", (2, 2)))), 1).picture(5, 5))
    #####
    ##...
    #.#..
    #..#.
    #...#
    """
    return masks.on_segment(layout, "image", masks.circular_window(image_of(layout), window_size))


def image_of(layout: Layout) -> tuple[int, int]:
    """The sides of the segment ``"image"``."""
    if "image" not in layout.names or len(grid := layout.grid("image")) != 2:
        raise ValueError(f"layout must have a segment 'image' of height and width, got {layout.segments}")
    return grid[0], grid[1]


def pooled(x: Tensor, weight: Tensor, grid: tuple[int, int], valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted sums of cells: (B, H, h * w, D) by (f, f) -> (B, H, cells, D), and which cells hold a token (B, cells).

    Sums over fewer than ``f * f`` tokens are scaled up to as many.
    """
    f = weight.shape[-1]
    exists = torch.ones(1, *grid, dtype=torch.bool, device=x.device) if valid is None else valid.unflatten(1, grid)
    more = (0, -grid[1] % f, 0, -grid[0] % f)
    exists = F.pad(exists, more).unflatten(2, (-1, f)).unflatten(1, (-1, f))  # (B, h', f, w', f)
    count = exists.sum((2, 4))
    if valid is not None:
        x = x.masked_fill(~valid[:, None, :, None], 0.0)
    cells = F.pad(x.unflatten(2, grid), (0, 0, *more)).unflatten(3, (-1, f)).unflatten(2, (-1, f))
    sums = torch.einsum("bhyixjd,ij->bhyxd", cells, weight.to(x.dtype))
    scale = (f * f / count.clamp(min=1).to(stats_dtype(x.dtype))).to(x.dtype)
    return (sums * scale[:, None, ..., None]).flatten(2, 3), (count > 0).flatten(1).expand(x.shape[0], -1)


def clear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    window_size: float,
    weight: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    proportional: bool = False,
    trained_tokens: int = TRAINED,
    return_weights: bool = False,
) -> Any:
    """Joint attention in which image tokens read a circle, text, and pooled keys.

    Args:
        q, k, v: (B, H, N, D), normed and rotated, in the order of ``layout``.
        layout: text and other tokens as runs, the image as the segment ``"image"`` of height and width.
        window_size: radius of the circle, its boundary excluded.
        weight: (f, f) of the pooled keys; ``None`` for none.
        valid: (B, N) boolean, which tokens exist.
        mask: which pairs may meet besides, on token numbers; without pooled keys.
        scale: of the scores; ``D ** -0.5`` by default.
        proportional: multiply the scale by ``sqrt(log_t(n))``, with n keys, ten times as many beside pooled ones, and t
            ``trained_tokens``.
        return_weights: return ``(out, weights)``.

    >>> q, k, v = torch.randn(3, 1, 2, 18, 4)
    >>> clear_attention(q, k, v, Layout((("text", 2), ("image", (4, 4)))), 2, torch.full((2, 2), 0.25)).shape
    torch.Size([1, 2, 18, 4])
    """
    check_type("layout", layout, Layout)
    check_rank("q", q, 4, "(B, H, N, D)")
    check_real("window_size", window_size, above=0)
    layout.check(q.shape[2])
    grid = image_of(layout)
    n, scale = k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    if proportional:
        scale = scale * math.sqrt(math.log(n if weight is None else 10 * n, trained_tokens))
    near = clear_mask(layout, float(window_size))
    if weight is None:
        allowed = near if mask is None else near & mask
        return attention(q, k, v, mask=allowed, valid=valid, scale=scale, return_weights=return_weights)
    if mask is not None or return_weights:
        raise ValueError("mask and weights are of tokens; a pooled key is made of several that they tell apart")
    start, stop = layout.span("image")
    own = None if valid is None else valid[:, start:stop]
    k_more, some = pooled(k[:, :, start:stop], weight, grid, own)
    v_more, _ = pooled(v[:, :, start:stop], weight, grid, own)
    every = None if valid is None else torch.cat([valid, some], 1)
    image = attention(
        q[:, :, start:stop], torch.cat([k, k_more], 2), torch.cat([v, v_more], 2), mask=near, valid=every, scale=scale,
        q_pos=torch.arange(start, stop, device=q.device),
    )  # fmt: skip
    beside = torch.cat([q[:, :, :start], q[:, :, stop:]], 2)
    if not beside.shape[2]:
        return image
    text = attention(beside, k, v, valid=valid, scale=scale)
    return torch.cat([text[:, :, :start], image, text[:, :, start:]], 2)


@register("clear", "clear-attention")
class ClearAttention(Mechanism):
    """Attention of text and image in which image tokens read a circle around themselves.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        window_size: radius of the circle, its boundary excluded: 8, 16 and 32 in the release.
        down_factor: side of the cells that make pooled keys; 1 for none, 4 in the release.
        proportional: scores grow with the number of keys.
        trained_tokens: keys at training, for that.
        qkv_bias: biases of the query, key and value projections.
        qk_norm: of heads of queries and keys: False, True (LayerNorm) or ``"rms"``.
        proj_drop: dropout of the output in training.

    Shapes: x and y (B, H, W, C), or (B, N, C) with a layout that has an ``"image"``.

    Reference: Liu et al., 2024, arXiv 2412.16112.

    >>> x = torch.randn(2, 2 + 48, 16)
    >>> ClearAttention(dim=16, num_heads=2, window_size=3)(x, layout=Layout((("text", 2), ("image", (6, 8))))).shape
    torch.Size([2, 50, 16])
    """

    class_traits = Traits(
        grid_ranks=frozenset({2}), layout=True, mask=True, weights=True, work={"N": 2}, memory={"N": 1}
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: float = 16,
        down_factor: int = 1,
        proportional: bool = False,
        trained_tokens: int = TRAINED,
        qkv_bias: bool = True,
        qk_norm: bool | str = "rms",
        proj_drop: float = 0.0,
    ):
        super().__init__(dim)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.window_size = check_real("window_size", window_size, above=0)
        self.down_factor = check_int("down_factor", down_factor, least=1)
        self.proportional = check_flag("proportional", proportional)
        self.trained_tokens = check_int("trained_tokens", trained_tokens, least=2)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.q_norm, self.k_norm = head_norm(qk_norm, self.head_dim), head_norm(qk_norm, self.head_dim)
        cell = torch.full((down_factor, down_factor), 1 / down_factor**2)
        self.spatial_weight = nn.Parameter(cell) if down_factor > 1 else None
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        plain = self.spatial_weight is None
        return self.class_traits.but(mask=plain, weights=plain, work={"N": 1 if plain else 2})

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        mask: Mask | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        shown = "weights" in returns
        if layout is None:
            layout = Layout((("image", tuple(x.shape[1:-1])),))
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x), self.k(x), self.v(x)))
        out = clear_attention(
            through(self.q_norm, q), through(self.k_norm, k), v, layout, self.window_size, self.spatial_weight,
            valid=flat_valid(valid), mask=mask, proportional=self.proportional, trained_tokens=self.trained_tokens,
            return_weights=shown,
        )  # fmt: skip
        out, weights = out if shown else (out, None)
        return Output(through(self.proj_drop, self.proj(merge_heads(out, x.shape[1:-1]))), weights=weights)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the attention of FLUX's single blocks, with ``processor.spatial_weight``."""
        theirs = Released(state_dict, "FLUX's attention")
        return theirs.close(
            theirs.renamed(
                {
                    r"to_([qkv])\.(weight|bias)": r"\1.\2",
                    r"norm_([qk])\.weight": r"\1_norm.weight",
                    r"(?:to_out\.0|proj)\.(weight|bias)": r"proj.\1",
                    r"(?:processor\.)?spatial_weight": lambda match, value: {
                        "spatial_weight": value.reshape(value.shape[3], value.shape[5])
                    },
                }
            )
        )

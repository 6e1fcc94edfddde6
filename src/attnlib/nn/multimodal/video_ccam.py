"""Causal cross-attention from learned queries to the frames of a video (Video-CCAM, Fei et al., 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import masks
from ...types import Output, Traits, check_rank, check_valid, check_width
from ..dense.softmax_attention import SoftmaxAttention
from ..frame import HeadFrame, Notes
from ..layers import Mlp, zero_invalid
from ..registry import register


@register("video-ccam", "causal-frames-attention")
class CausalFrameAttention(HeadFrame[Notes]):
    """Cross-attention in which query ``i`` of N reads frames ``0 .. floor(i T / N)`` of T.

    The order of queries carries time, so frames need no position of their own, and a video of any length becomes the
    same number of tokens. Where there are more frames than queries they come several at a time, and the last query
    reads all of them; an image (one frame) is read whole by every query. See :func:`attnlib.masks.causal_frames`.

    ``context`` is (B, T, C') with one token per frame, (B, T, P, C'), or (B, T, H, W, C'). Frames that only fill up
    a batch are named by ``context_valid``: T of a sample counts up to its last frame that holds a token.

    Args:
        dim, num_heads, num_kv_heads, head_dim, context_dim, qkv_bias, proj_bias, qk_norm, attn_drop: as in
            :class:`~attnlib.nn.frame.HeadFrame`.

    The paper's rounding is not known (its modelling code is not public): ``floor`` is the choice made here. That
    repeating every frame changes nothing, as the paper's argument for longer videos goes, then holds for the queries
    with ``i T / N mod 1 >= 1/2``; the others see the newest frame once and all earlier ones twice.

    Reference: Fei et al., 2024, arXiv 2408.14023, section 3.2.

    >>> attend = CausalFrameAttention(dim=16, num_heads=2, context_dim=8)
    >>> attend(torch.randn(2, 6, 16), torch.randn(2, 3, 4, 4, 8)).shape
    torch.Size([2, 6, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-cross"}),
        grid_ranks=frozenset({1}),
        mask=True,
        work={"N": 2},
        memory={"N": 1},
        weights=True,
    )

    def __init__(self, dim: int, num_heads: int = 8, num_kv_heads: int | None = None, **settings: Any):
        for name in ("causal", "rotary", "alibi"):
            if settings.get(name):
                raise ValueError(f"{name}={settings[name]!r} is not possible: the order of frames is in the mask")
        super().__init__(dim, num_heads, num_kv_heads, **settings)

    @property
    def traits(self) -> Traits:
        return self.class_traits

    @staticmethod
    def _order(queries: int, context: Tensor, valid: Tensor | None) -> masks.Mask | None:
        """The causal mask over the frames of each sample."""
        frames, size = context.shape[1], math.prod(context.shape[2:-1])
        counts: Tensor | None = None
        if valid is not None:
            there = valid.flatten(2).any(-1) if valid.dim() > 2 else valid
            counts = (there * torch.arange(1, frames + 1, device=there.device)).amax(1).clamp(min=1) if frames else None
        if torch.compiler.is_compiling():
            # A trace may leave the sizes open, and they stand in the text that a mask becomes: so a dense one here.
            t = torch.tensor([frames], device=context.device) if counts is None else counts
            i = torch.arange(queries, device=context.device)
            last = torch.maximum(i * t[:, None] // queries, (i + 1) * t[:, None] // queries - 1)
            frame = torch.arange(frames * size, device=context.device) // size
            return masks.explicit(frame <= last[..., None])
        if not (queries and frames and size):
            return None
        return masks.causal_frames(queries, frames if counts is None else counts, size)

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        mask: masks.Mask | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        order = self._order(x.shape[1], context, context_valid)
        mask = mask if order is None else order if mask is None else order & mask
        return super().mix(x, context, valid=valid, context_valid=context_valid, mask=mask, returns=returns)

    convert_state_dict = staticmethod(SoftmaxAttention.convert_state_dict)


class VideoProjector(nn.Module):
    """Frames of a video as a fixed number of tokens for a language model.

    Learned queries go through ``num_layers`` blocks of :class:`CausalFrameAttention` and feed-forward, both with norms
    before and residuals, then through a two-layer network to the width of the language model.

    Args:
        dim: width of the queries.
        out_dim: width of the language model.
        context_dim: width of the frames' tokens; ``dim`` by default.
        num_queries: N, tokens a video becomes (1024 in the paper's models).
        num_layers: blocks.
        num_heads: heads.
        mlp_ratio: hidden width of the feed-forward over ``dim``.

    Returns of ``forward``:
        (B, N, out_dim).

    Reference: Fei et al., 2024, arXiv 2408.14023, section 3.1. Norms, widths and the number of blocks are choices made
    here: the authors' modelling code is not public.

    >>> VideoProjector(16, 32, num_queries=6, num_heads=2)(torch.randn(2, 5, 3, 3, 16)).shape
    torch.Size([2, 6, 32])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        context_dim: int | None = None,
        num_queries: int = 1024,
        num_layers: int = 1,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        for name, value in (("num_queries", num_queries), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.context_dim = dim if context_dim is None else context_dim
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.context_norm = nn.LayerNorm(self.context_dim)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(dim),
                    "attn": CausalFrameAttention(dim, num_heads, context_dim=self.context_dim),
                    "norm2": nn.LayerNorm(dim),
                    "mlp": Mlp(dim, mlp_ratio),
                }
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Sequential(nn.Linear(dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))

    def forward(self, video: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, T, [H, W | P,] C') tokens of T frames, with ``valid`` (B, T, [H, W | P]) boolean, to (B, N, out_dim).

        Raises:
            ValueError: another rank or width, or a video without frames.
        """
        check_rank("video", video, (3, 4, 5), "(B, T, C), (B, T, P, C) or (B, T, H, W, C)")
        check_width("video", video, self.context_dim, "context_dim")
        if 0 in video.shape[1:-1]:
            raise ValueError(f"video has no tokens: {tuple(video.shape)}; give at least one frame")
        check_valid("valid", valid, video.shape[:-1])
        context = self.context_norm(zero_invalid(video, valid))
        x = self.queries.expand(video.shape[0], -1, -1)
        for block in self.blocks:
            x = x + block["attn"](block["norm1"](x), context, context_valid=valid)  # type: ignore[index]
            x = x + block["mlp"](block["norm2"](x))  # type: ignore[index]
        return self.out(self.norm(x))

"""Perceiver resampler: learned latents read images and become their tokens (AKI-4B's projector, Flamingo's)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import attention
from ...types import check_rank, check_valid, check_width
from ..layers import merge_heads, split_heads, zero_invalid
from ..released import Released, Rule


class LatentAttention(nn.Module):
    """Latents attend to the tokens of an image *and* to themselves, each side behind a norm of its own.

    ``q = W_q n(z)``, ``k, v = W_kv [n'(x) ; n(z)]``, without biases.

    Args:
        dim: width.
        num_heads, head_dim: heads; their whole width may be another than ``dim``.

    >>> LatentAttention(8, 2, 4)(torch.randn(1, 3, 8), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, dim: int, num_heads: int = 8, head_dim: int = 64):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.proj = nn.Linear(inner, dim, bias=False)

    def forward(self, z: Tensor, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, n, C) latents and (B, M, C) tokens, with ``valid`` (B, M) boolean, to (B, n, C)."""
        z = self.norm(z)
        both = torch.cat([self.context_norm(x), z], 1)
        if valid is not None:
            valid = F.pad(valid, (0, z.shape[1]), value=True)
        q, k, v = (split_heads(f(t), self.num_heads) for f, t in ((self.q, z), (self.k, both), (self.v, both)))
        return self.proj(merge_heads(attention(q, k, v, valid=valid)))


class PerceiverResampler(nn.Module):
    """Any number of image tokens to ``num_latents``, through blocks of :class:`LatentAttention` and a feed-forward.

    Every medium of a sample (an image, or a video of several frames) is read by itself; its frames are read together.

    Args:
        dim: width of image tokens and latents.
        out_dim: width of what comes out; without one there is no projection.
        depth: blocks.
        num_heads, head_dim: of :class:`LatentAttention`.
        num_latents: tokens that an image becomes (144 in AKI-4B).
        max_media, max_frames: learned positions for so many media of a sample, and frames of a medium; none by default.
        mlp_ratio: hidden width of the feed-forward in units of ``dim``.

    Reference: Wang et al., 2025, arXiv 2503.02597 (AKI); Alayrac et al., 2022, arXiv 2204.14198, section 3.1.1.

    >>> PerceiverResampler(8, out_dim=12, depth=1, num_heads=2, head_dim=4, num_latents=5)(torch.randn(1, 9, 8)).shape
    torch.Size([1, 5, 12])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        num_latents: int = 64,
        max_media: int | None = None,
        max_frames: int | None = None,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        for name, value in (
            ("num_latents", num_latents), ("depth", depth), ("max_media", max_media), ("max_frames", max_frames)
        ):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.dim = dim
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frames = None if max_frames is None else nn.Parameter(torch.randn(max_frames, dim))
        self.media = None if max_media is None else nn.Parameter(torch.randn(max_media, dim))
        hidden = int(dim * mlp_ratio)
        self.attention = nn.ModuleList(LatentAttention(dim, num_heads, head_dim) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Identity() if out_dim is None else nn.Linear(dim, out_dim)

    def _positions(self, x: Tensor) -> Tensor:
        for name, table, axis, what in (
            ("max_frames", self.frames, 2, "frames"),
            ("max_media", self.media, 1, "media"),
        ):
            if table is None:
                continue
            if x.shape[axis] > len(table):
                raise ValueError(f"x has {x.shape[axis]} {what}, there are positions for {name}={len(table)}")
            shape = [1] * x.dim()
            shape[axis], shape[-1] = x.shape[axis], x.shape[-1]
            x = x + table[: x.shape[axis]].to(x.dtype).view(shape)
        return x

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Image tokens to latents.

        Args:
            x: (B, P, C), (B, T, P, C) for T media, or (B, T, F, P, C) for media of F frames.
            valid: boolean, ``x`` without its last axis: which tokens exist.

        Returns:
            (B, n, C'), or (B, T, n, C') where media are told apart.

        Raises:
            ValueError: another rank or width, more media or frames than there are positions.
        """
        check_rank("x", x, (3, 4, 5), "(B, P, C), (B, T, P, C) or (B, T, F, P, C)")
        check_width("x", x, self.dim)
        check_valid("valid", valid, x.shape[:-1])
        x = zero_invalid(x, valid)
        single = x.dim() == 3
        while x.dim() < 5:
            at = 1 if x.dim() == 3 else 2
            x, valid = x.unsqueeze(at), None if valid is None else valid.unsqueeze(at)
        batch, media = x.shape[:2]
        x = self._positions(x).flatten(2, 3).flatten(0, 1)
        valid = None if valid is None else valid.flatten(2, 3).flatten(0, 1)
        z = self.latents.to(x.dtype).expand(len(x), -1, -1)
        for attend, feed in zip(self.attention, self.mlp, strict=True):
            z = z + attend(z, x, valid)
            z = z + feed(z)
        out = self.proj(self.norm(z)).unflatten(0, (batch, media))
        return out[:, 0] if single else out

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From AKI's or OpenFlamingo's ``PerceiverResampler`` (``vision_tokenizer.*``, ``perceiver.*`` of a model)."""
        theirs = Released(state_dict, "PerceiverResampler", wrappers=("vision_tokenizer.", "perceiver."))
        names = {"norm_media": "context_norm", "norm_latents": "norm", "to_q": "q", "to_out": "proj"}
        rules: dict[str, Rule] = {
            rf"layers\.(\d+)\.0\.{name}\.(weight|bias)": rf"attention.\1.{ours}.\2" for name, ours in names.items()
        }
        rules |= {
            r"layers\.(\d+)\.0\.to_kv\.(weight)": lambda match, value: {
                f"attention.{match[1]}.{n}.weight": part for n, part in zip("kv", value.chunk(2), strict=True)
            },
            r"layers\.(\d+)\.1\.([013])\.(weight|bias)": r"mlp.\1.\2.\3",
            r"media_time_embs": lambda match, value: {"media": value.flatten(1)},
            r"frame_embs": "frames",
            r"latents": "latents",
            r"norm\.(weight|bias)": r"norm.\1",
            r"projection\.(weight|bias)": r"proj.\1",
        }
        return theirs.close(theirs.renamed(rules))

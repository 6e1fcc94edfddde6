"""The two halves of a masked autoencoder: an encoder of what is seen, and a decoder of all places, maybe with a memory.

Encoder: ``x <- x + attention(norm x)``, ``x <- x + mlp(norm x)`` on tokens that are seen. Decoder: a narrower map of
them, a learned token at every hidden place, and blocks of the same kind; with a memory (another picture) there is a
cross-attention between the two steps, ``x <- x + attention(norm x, norm memory)``, and all blocks read the same memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checks import check_divides, check_int, check_real
from ...nn.layers import Mlp, merge_heads, split_heads
from ...ops import attention
from ...positions import rotate_grid
from .masks import take, visible_first


class PlacedAttention(nn.Module):
    """Multi-head attention of tokens or to a memory, with rotary positions where ``base`` is given.

    Args:
        dim: width.
        num_heads: heads.
        cross: keys and values are a memory's.
        base: of rotary wavelengths.
    """

    def __init__(self, dim: int, num_heads: int, cross: bool = False, base: float | None = None):
        super().__init__()
        check_divides("num_heads", check_int("num_heads", num_heads, least=1), "dim", dim)
        self.num_heads, self.base = num_heads, base
        self.q = nn.Linear(dim, dim) if cross else None
        self.kv = nn.Linear(dim, 2 * dim) if cross else None
        self.qkv = None if cross else nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, coords: Tensor | None, memory: Tensor | None = None, memory_coords: Tensor | None = None
    ) -> Tensor:
        if self.q is None:
            q, k, v = self.qkv(x).chunk(3, -1)  # type: ignore[misc]
            memory_coords = coords
        else:
            q, (k, v) = self.q(x), self.kv(memory).chunk(2, -1)  # type: ignore[misc]
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        if self.base is not None:
            assert coords is not None and memory_coords is not None
            q, k = rotate_grid(q, coords, self.base), rotate_grid(k, memory_coords, self.base)
        return self.proj(merge_heads(attention(q, k, v)))


class EncoderBlock(nn.Module):
    """Attention and MLP behind norms.

    Args:
        dim, num_heads, base: as of :class:`PlacedAttention`.
        mlp_ratio: width of the MLP in widths.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, base: float | None = None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = PlacedAttention(dim, num_heads, base=base)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(self, x: Tensor, coords: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), coords)
        return x + self.mlp(self.norm2(x))


class MemoryBlock(nn.Module):
    """Attention, cross-attention to a memory, MLP, each behind a norm.

    Args:
        dim, num_heads, base, mlp_ratio: as of :class:`EncoderBlock`.
        norm_memory: a norm of the memory, in every block.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, base: float | None = None, norm_memory: bool = True
    ):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.norm_memory = nn.LayerNorm(dim, eps=1e-6) if norm_memory else nn.Identity()
        self.attn = PlacedAttention(dim, num_heads, base=base)
        self.cross = PlacedAttention(dim, num_heads, cross=True, base=base)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(
        self, x: Tensor, memory: Tensor, coords: Tensor | None = None, memory_coords: Tensor | None = None
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), coords)
        x = x + self.cross(self.norm2(x), coords, self.norm_memory(memory), memory_coords)
        return x + self.mlp(self.norm3(x))


class TokenEncoder(nn.Module):
    """Blocks and a norm on tokens.

    Args:
        dim, num_heads, mlp_ratio, base: as of :class:`EncoderBlock`.
        depth: blocks.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0, base: float | None = None):
        super().__init__()
        check_int("depth", depth, least=1)
        check_real("mlp_ratio", mlp_ratio, above=0)
        self.blocks = nn.ModuleList(EncoderBlock(dim, num_heads, mlp_ratio, base) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, coords: Tensor | None = None) -> list[Tensor]:
        """What stands behind every block; the last is normed."""
        found = []
        for block in self.blocks:
            x = block(x, coords)
            found.append(x)
        return [*found[:-1], self.norm(x)]


class AsymmetricDecoder(nn.Module):
    """Seen tokens and a token for the hidden ones, at all places.

    Args:
        in_dim: width of the encoder.
        dim, depth, num_heads, mlp_ratio, base: of the blocks.
        memory: blocks read a memory.
        norm_memory: as of :class:`MemoryBlock`.
    """

    def __init__(
        self, in_dim: int, dim: int = 512, depth: int = 8, num_heads: int = 16, mlp_ratio: float = 4.0,
        base: float | None = None, memory: bool = False, norm_memory: bool = True,
    ):  # fmt: skip
        super().__init__()
        check_int("decoder_depth", depth, least=1)
        self.dim = check_int("decoder_dim", dim, least=1)
        check_divides("decoder_heads", check_int("decoder_heads", num_heads, least=1), "decoder_dim", dim)
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token: nn.Parameter | None = nn.Parameter(0.02 * torch.randn(dim))
        self.blocks = nn.ModuleList(
            MemoryBlock(dim, num_heads, mlp_ratio, base, norm_memory)
            if memory
            else EncoderBlock(dim, num_heads, mlp_ratio, base)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def placed(self, seen: Tensor, mask: Tensor | None, prefix: int = 0) -> Tensor:
        """(B, prefix + N, dim): seen tokens (B, prefix + V, in_dim) at their places, the mask token elsewhere."""
        x = self.embed(seen)
        if mask is None:
            return x
        if self.mask_token is None:
            raise ValueError("mask was given, but this decoder has no mask token: it reads whole pictures")
        first, x = x[:, :prefix], x[:, prefix:]
        hidden = self.mask_token.to(x.dtype).expand(len(x), mask.shape[1] - x.shape[1], -1)
        return torch.cat([first, take(torch.cat([x, hidden], 1), visible_first(mask).argsort(1))], 1)

    def forward(
        self, x: Tensor, coords: Tensor | None = None, memory: Tensor | None = None, memory_coords: Tensor | None = None
    ) -> list[Tensor]:
        """What stands behind every block, of tokens from :meth:`placed` with their positions; the last is normed."""
        found = []
        for block in self.blocks:
            x = block(x, coords) if memory is None else block(x, memory, coords, memory_coords)
            found.append(x)
        return [*found[:-1], self.norm(x)]


def init_like_mae(model: nn.Module) -> None:
    """Linear maps and kernels of patches Xavier uniform, their biases zero; kernels keep theirs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
    # Keys and values are one map here and two in the release: each half has the bounds of a square map.
    for module in model.modules():
        if isinstance(module, PlacedAttention) and module.kv is not None:
            for part in module.kv.weight.data.chunk(2):
                nn.init.xavier_uniform_(part)

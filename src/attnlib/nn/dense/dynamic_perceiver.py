"""Dynamic Perceiver's exchange: a map of features and a few latents read one another by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_ints, check_real
from ...ops.reduced import adaptive_pool_tokens
from ..base import Fusion
from ..layers import DepthwiseConv, Mlp, zero_invalid
from ..released import Released
from .softmax_attention import SoftmaxAttention


class PlacedKeys(SoftmaxAttention):
    """Cross-attention with learned vectors on the keys: ``k_j = W_k c_j + p_j``.

    Args:
        places: number of keys that a context has.
        settings: of :class:`attnlib.nn.dense.softmax_attention.SoftmaxAttention`.
    """

    def __init__(self, places: int, **settings: Any):
        super().__init__(**settings)
        self.pos_embed = nn.Parameter(torch.zeros(places, self.num_kv_heads * self.head_dim))

    def _parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._parts(x, source)
        return q, k + self.pos_embed.to(k.dtype), v


class CrossLayer(nn.Module):
    """``x + attention(norm(x), norm(context))``, then an MLP: both residual.

    Args:
        dim: width of ``x``.
        context_dim: width of what is read.
        head_dim: width of queries, keys and values; ``dim`` by default.
        places: learned vectors on so many keys; 0 for none.
        mlp_ratio: hidden width of the MLP over ``dim``.
    """

    def __init__(
        self, dim: int, context_dim: int, head_dim: int | None = None, places: int = 0, mlp_ratio: float = 1.0
    ):
        super().__init__()
        self.norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(context_dim)
        settings: dict[str, Any] = dict(
            dim=dim, num_heads=1, head_dim=head_dim, context_dim=context_dim, qkv_bias=False
        )  # fmt: skip
        self.attn = PlacedKeys(places, **settings) if places else SoftmaxAttention(**settings)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), Mlp(dim, mlp_ratio)

    def forward(
        self, x: Tensor, context: Tensor, valid: Tensor | None = None, context_valid: Tensor | None = None
    ) -> Tensor:
        """(B, *grid, dim) and (B, M, context_dim) -> (B, *grid, dim)."""
        x = x + self.attn(self.norm(x), self.context_norm(context), valid=valid, context_valid=context_valid)
        return x + self.mlp(self.mlp_norm(x))


class LatentExchange(Fusion):
    """Features read latents, then latents read the new features: the two-way cross-attention of Dynamic Perceiver.

        x <- x + W_o attention(norm(x), norm(z)),                x <- x + MLP(norm(x))
        c  = pool(x + depthwise(x))
        z <- z + W_o attention(norm(z), norm(c); keys + p),      z <- z + MLP(norm(z))

    One head each way; features read in an eighth of their width. ``pool`` takes means over ``grid`` x ``grid`` cells of
    a map of any size, so that the cost grows linearly with tokens, and ``p`` is learned for each cell.

    Args:
        dims: width of the features and of the latents.
        grid: cells a side that latents read.
        features_read: whether features read latents.
        latents_read: whether latents read features.
        kernel_size: side of the depthwise convolution; 0 for none.
        mlp_ratio: hidden width of MLPs over the width.

    Shapes: features (B, H, W, C), latents (B, n, C') -> the same. ``valid`` has a (B, H, W) and a (B, n); what does not
    exist is not read.

    Raises:
        ValueError: not two widths, an even ``kernel_size``, nobody who reads; streams of other widths or batches.

    Reference: Han et al., 2023, "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248.

    >>> x, z = LatentExchange((16, 24), grid=3)(torch.randn(2, 9, 7, 16), torch.randn(2, 5, 24))
    >>> x.shape, z.shape
    (torch.Size([2, 9, 7, 16]), torch.Size([2, 5, 24]))
    """

    slug = "dynamic-perceiver"
    example = {"streams": ((6, 5, 16), (4, 8))}

    def __init__(
        self,
        dims: Sequence[int],
        grid: int = 7,
        features_read: bool = True,
        latents_read: bool = True,
        kernel_size: int = 7,
        mlp_ratio: float = 1.0,
    ):
        super().__init__()
        self.dims, self.grid = check_ints("dims", dims, least=1), check_int("grid", grid, least=1)
        if len(self.dims) != 2:
            raise ValueError(f"dims={self.dims} must be the width of the features and that of the latents")
        if check_int("kernel_size", kernel_size, least=0) and not kernel_size % 2:
            raise ValueError(f"kernel_size={kernel_size} must be odd, or 0 for no convolution")
        check_real("mlp_ratio", mlp_ratio, above=0)
        check_flag("features_read", features_read)
        if not check_flag("latents_read", latents_read) and not features_read:
            raise ValueError("features_read=False and latents_read=False leave nobody who reads")
        dim, latent_dim = self.dims
        self.to_features = CrossLayer(dim, latent_dim, max(1, dim // 8), 0, mlp_ratio) if features_read else None
        self.depthwise = DepthwiseConv(dim, kernel_size) if latents_read and kernel_size else None
        self.to_latents = CrossLayer(latent_dim, dim, None, grid * grid, mlp_ratio) if latents_read else None

    def forward(self, *streams: Tensor, valid: Sequence[Tensor | None] | None = None) -> tuple[Tensor, ...]:
        """Features and latents, each with what the other told it."""
        shapes = [tuple(t.shape) for t in streams]
        fit = [len(s) for s in shapes] == [4, 3] and shapes[0][0] == shapes[1][0]
        if not fit or tuple(s[-1] for s in shapes) != self.dims:
            raise ValueError(
                f"streams must be features (B, H, W, {self.dims[0]}) and latents (B, n, {self.dims[1]}) of one batch, "
                f"got {shapes}"
            )
        exists, known = (None, None) if valid is None else valid
        x, z = zero_invalid(streams[0], exists), zero_invalid(streams[1], known)
        if self.to_features is not None:
            x = zero_invalid(self.to_features(x, z, exists, known), exists)
        if self.to_latents is not None:
            c = x if self.depthwise is None else x + self.depthwise(x)
            cells, some = adaptive_pool_tokens(c, self.grid, exists)
            some = None if some is None else some.flatten(1)
            z = zero_invalid(self.to_latents(z, cells.flatten(1, 2), known, some), known)
        return x, z

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' modules of one stage, named ``dwc``, ``x2z`` and ``z2x``."""
        theirs = Released(state_dict, "the authors' cross-attention of one stage")
        to = {"x2z": "to_latents", "z2x": "to_features"}
        norms = {"q_norm": "norm", "kv_norm": "context_norm"}
        return theirs.close(
            theirs.renamed(
                {
                    r"dwc\.(weight|bias)": r"depthwise.\1",
                    r"(x2z|z2x)\.cross_attn\.(q_norm|kv_norm)\.(weight|bias)": lambda m, value: {
                        f"{to[m[1]]}.{norms[m[2]]}.{m[3]}": value
                    },
                    r"(x2z|z2x)\.cross_attn\.attention\.([qkvo])_proj\.(weight|bias)": lambda m, value: {
                        f"{to[m[1]]}.attn.{'proj' if m[2] == 'o' else m[2]}.{m[3]}": value
                    },
                    r"x2z\.cross_attn\.attention\.relative_position_bias": lambda m, value: {
                        "to_latents.attn.pos_embed": value[0]
                    },
                    r"(x2z|z2x)\.mlp\.layernorm\.(weight|bias)": lambda m, value: {
                        f"{to[m[1]]}.mlp_norm.{m[2]}": value
                    },
                    r"(x2z|z2x)\.mlp\.(fc[12])\.(weight|bias)": lambda m, value: {
                        f"{to[m[1]]}.mlp.{m[2]}.{m[3]}": value
                    },
                }
            )
        )

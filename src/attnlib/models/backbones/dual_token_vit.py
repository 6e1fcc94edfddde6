"""DualToken-ViT: three stages in which a grid of global tokens goes along with the map, place by place.

Chu et al., 2023, "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion", arXiv 2309.12424.
The skeleton is LightViT's (Huang et al., 2022, arXiv 2207.05557): a stem of stride 8 with depthwise convolutions, three
stages, mergings with a shortcut, MLPs that are gated by a bi-dimensional attention. Blocks are

    x, G <- fusion(x, G),    x <- x + gate(mlp(norm(x))),

with :class:`attnlib.nn.reduced.dual_token_vit.DualTokenFusion`; ``G``, 7 x 7 learned tokens at first, goes through all
stages, by a norm and a linear map to the width of the next.

Our reading (see the mechanism, too): no code is published and the paper's table of widths and depths is not known here,
so that no size bears its names. ``dual_token_vit_lightvit_t`` has the widths, depths, heads and MLP ratios of
LightViT-T. Differs from LightViT's skeleton: any size, where a missing row or column takes no part in means and maxima.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_ints, check_real
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import ConvNorm, DropPath, Mlp, Patchify, PatchMerging, masked_mean, zero_invalid
from ...nn.reduced.dual_token_vit import DualTokenFusion
from ..blocks import Chain, ConvStem, Make, Place, Residual, add_losses, check_stages, init_weights, mix, places
from ..build import register_models
from .stages import Backbone, Head, Stage

Norm = functools.partial(nn.LayerNorm, eps=1e-6)


class BiDimensional(nn.Module):
    """Bi-dimensional attention: ``x * sigmoid(W_c g) * sigmoid(W_s [l; g])``, a gate per channel and one per token.

    ``g = gelu(W_g mean(norm(x)))`` and ``l = gelu(W_l norm(x))``.

    Args:
        dim: width.
        ratio: width of ``g`` and ``l`` over ``dim``.
    """

    def __init__(self, dim: int, ratio: float = 0.25):
        super().__init__()
        hidden = max(1, int(dim * ratio))
        self.norm = nn.LayerNorm(dim)
        self.global_reduce, self.local_reduce = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.channel_select, self.spatial_select = nn.Linear(hidden, dim), nn.Linear(2 * hidden, 1)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        z = self.norm(x)
        whole = F.gelu(self.global_reduce(masked_mean(z, valid)))[:, None, None]
        local = F.gelu(self.local_reduce(z))
        place = self.spatial_select(torch.cat([local, whole.expand_as(local)], -1))
        return x * torch.sigmoid(self.channel_select(whole)) * torch.sigmoid(place)


class GatedMlp(nn.Module):
    """An MLP with bi-dimensional attention behind it.

    Args:
        dim: width.
        ratio: hidden width over ``dim``.
    """

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.mlp, self.gate = Mlp(dim, ratio), BiDimensional(dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        return self.gate(self.mlp(x), valid)


class ResidualMerging(nn.Module):
    """Four neighbouring tokens to one, as Swin merges them, and a linear map of the largest of each channel beside it.

    Args:
        dim: width.
        out_dim: width of the output.
    """

    stride = 2

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.merge, self.shortcut = PatchMerging(dim, out_dim), nn.Linear(dim, out_dim, bias=False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim), and which of these exist."""
        least = torch.finfo(x.dtype).min
        held = x if valid is None else x.masked_fill(~valid.unsqueeze(-1), least)
        largest = F.max_pool2d(held.permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)
        x, valid = self.merge(x, valid)
        return x + self.shortcut(zero_invalid(largest, valid)), valid


class DualTokenBlock(nn.Module):
    """``x, G <- mixer(x, G)``, then a gated MLP with a shortcut.

    Args:
        dim: width.
        mixer: whose shortcut is its own; another mechanism gets one, and a norm before it.
        mlp_ratio: hidden width of the MLP over ``dim``.
        drop_path: stochastic depth.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.own = isinstance(mixer, DualTokenFusion)
        self.mixer = mixer if self.own else Residual(dim, mixer, Norm, drop_path)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = Residual(dim, GatedMlp(dim, mlp_ratio), Norm, drop_path)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """(B, H, W, dim) -> the same, and the global tokens."""
        if self.own:
            y, carry, own = mix(self.mixer, x, None, carry, valid)
            add_losses(losses, own)
            x = x + self.drop_path(y - x) if self.training else y
        else:
            x, _ = self.mixer(x, valid, None, losses)
        return self.mlp(x, valid)[0], carry


class DualTokenViT(Backbone):
    """A backbone in which global tokens go from stage to stage.

    Args:
        projections: of the global tokens before every stage but the first.
        tokens: (C, g, g) of the first stage, learned.
        settings: of :class:`attnlib.models.backbones.stages.Backbone`.
    """

    tables = {"global_token": 2}

    def __init__(self, projections: Sequence[nn.Module], tokens: Tensor, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.projections, self.global_token = nn.ModuleList(projections), nn.Parameter(tokens)

    def _maps(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterable[tuple[Tensor, Tensor | None]]:
        self._check_images(x, valid)
        x, valid = self.stem(x.movedim(1, -1).contiguous(), valid)
        tokens: Any = self.global_token.permute(1, 2, 0).expand(x.shape[0], -1, -1, -1).to(x.dtype)
        for number, stage in enumerate(self.stages[: None if last is None else last + 1]):  # type: ignore[arg-type]
            if number and tokens is not None:
                tokens = self.projections[number - 1](tokens)
            x, valid, tokens = stage.carried(x, valid, losses, tokens)  # type: ignore[operator]
            yield x, valid


def dual_token_vit(
    embed_dims: Sequence[int] = (64, 128, 256),
    depths: Sequence[int] = (2, 6, 6),
    num_heads: Sequence[int] = (2, 4, 8),
    mlp_ratios: Sequence[float] = (8, 4, 4),
    steps: Sequence[int] = (2, 1, 0),
    grid: int = 7,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
    **settings: Any,
) -> DualTokenViT:
    """A DualToken-ViT.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratios: hidden width of MLPs over the width, per stage.
        steps: ``M`` per stage: how often its map is halved before it is brought to the grid of global tokens. By
            default as often as a map of 224 pixels needs.
        grid: side of the grid of global tokens.
        mechanism: takes the place of the fusion, which then hands no global tokens on.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.
        settings: of :class:`attnlib.nn.reduced.dual_token_vit.DualTokenFusion` in all blocks.

    Raises:
        ValueError: not one number per stage.
    """
    check_ints("embed_dims", embed_dims, least=1)
    check_stages(len(embed_dims), depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, steps=steps)
    check_ints("steps", steps, least=0)
    check_int("grid", grid, least=1)
    for i, ratio in enumerate(mlp_ratios):
        check_real(f"mlp_ratios[{i}]", ratio, above=0)
    check_choice("global_pool", global_pool, Head.pools)

    def own(place: Place) -> nn.Module:
        return DualTokenFusion(place.dim, place.num_heads, grid, steps[place.stage], **settings)

    make = mechanism or own
    half = max(1, embed_dims[0] // 2)
    conv = functools.partial(ConvNorm, activation=nn.GELU)
    depthwise = functools.partial(conv, half, half, 3, groups=half)
    stem = Chain(
        ConvStem(conv(in_chans, half, 3, 2), depthwise(), depthwise(), depthwise(stride=2)),
        Patchify(half, embed_dims[0], 3, 2, 1),
    )
    reductions = [8 * 2**i for i in range(len(embed_dims))]
    stages, projections = [], []
    for i, row in enumerate(places(embed_dims, depths, num_heads, reductions, drop_path_rate)):
        between = ResidualMerging(embed_dims[i - 1], embed_dims[i]) if i else None
        if i:
            projections.append(nn.Sequential(Norm(embed_dims[i - 1]), nn.Linear(embed_dims[i - 1], embed_dims[i])))
        stages.append(Stage([DualTokenBlock(p.dim, make(p), mlp_ratios[i], p.drop_path) for p in row], between))
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate)
    tokens = nn.init.trunc_normal_(torch.empty(embed_dims[0], grid, grid), std=0.02)
    model = DualTokenViT(
        projections, tokens, stem, stages, embed_dims, reductions, Norm(embed_dims[-1]), head, num_classes, in_chans,
        img_size,
    )  # fmt: skip
    model.input_name = "stem.0.0.conv.weight"
    init_weights(model, also=(DualTokenFusion, SoftmaxAttention))
    return model


register_models("dual-token-vit", dual_token_vit, {"dual_token_vit_lightvit_t": dict()})

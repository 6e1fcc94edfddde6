"""ViTAEv2 with varied-size window attention: in every cell, attention and convolutions side by side.

Zhang et al., 2022, "VSA: Learning Varied-Size Window Attention in Vision Transformers", arXiv 2204.08446, on the
backbone of arXiv 2202.10108. A stage begins with a reduction cell, also the first one, which reads the image: dilated
convolutions of one stride, each followed by a GELU, side by side make a pyramid ``p``;
``z = attention(norm(p + conv(p))) + convs(x)`` has the width of the stage, and ``z + MLP(norm(z))`` is what it gives.
Normal cells follow: ``z = x + attention(norm(x + conv(x))) + convs(x)``, then ``z + MLP(norm(z))``. ``convs`` are three
3 x 3 convolutions in groups, the first two with a BatchNorm and a SiLU. No norm stands before the pool.

Differs from the authors' code: any size, where theirs wants squares of the side it was built for; regressors of windows
start at zero (``zero_init=False`` for theirs). Their rates of stochastic depth in a stage go on from the number of
blocks of the stage before, not of all stages before: ``drop_path_start="stage"``, which the released sizes have.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_ints
from ...nn.layers import ConvNorm, DropPath, Mlp, PositionalConv, conv_any_size, strided_valid, zero_invalid
from ...nn.released import Released, Rule
from ...nn.sampled.vsa_varied_size_window import VariedSizeWindowAttention
from ..blocks import ConvStem, Make, Place, Residual, add_losses, init_weights, mix, places
from ..build import register_models
from .stages import Backbone, Head, Stage

STARTS = ("depth", "stage")
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def _convs(widths: Sequence[int], strides: Sequence[int], groups: int) -> ConvStem:
    """3 x 3 convolutions, each but the last with a BatchNorm and a SiLU."""
    for width in widths:
        check_divides("groups", groups, "channels of a convolution", width)
    last = len(strides) - 1
    return ConvStem(
        *(
            ConvNorm(a, b, 3, s, groups=groups, bias=True, norm=i < last, activation=nn.SiLU if i < last else None)
            for i, (a, b, s) in enumerate(zip(widths, widths[1:], strides, strict=False))
        )
    )


class DilatedPyramid(nn.Module):
    """Convolutions of one stride and several dilations, each followed by a GELU, side by side.

    Args:
        dim: channels in.
        out_dim: channels of each.
        kernel_size: side of the kernels.
        stride: of all.
        dilations: one per convolution.
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: int, stride: int, dilations: Sequence[int]):
        super().__init__()
        self.stride = stride
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, out_dim, kernel_size, stride, max(0, -(-((kernel_size - 1) * d + 1 - stride) // 2)), d)
            for d in check_ints("dilations", dilations, least=1)
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), len(dilations) * out_dim)."""
        x = zero_invalid(x, valid)
        return torch.cat([F.gelu(conv_any_size(c, x, c.weight, c.bias)) for c in self.convs], -1)  # type: ignore[arg-type]


class ReductionCell(nn.Module):
    """Fewer, wider tokens: varied-size windows on a pyramid of dilated convolutions, convolutions beside, an MLP.

    Args:
        out_dim: width of the tokens.
        pyramid: the dilated convolutions.
        width: channels that they give.
        convs: the convolutions beside.
        attention: from ``width`` to ``out_dim`` channels.
    """

    def __init__(self, out_dim: int, pyramid: DilatedPyramid, width: int, convs: ConvStem, attention: nn.Module):
        super().__init__()
        self.pyramid, self.convs = pyramid, convs
        self.position, self.norm, self.attention = PositionalConv(width, 7), nn.LayerNorm(width), attention
        self.mlp = Residual(out_dim, Mlp(out_dim, 1.0))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / s), ceil(W / s), out_dim), and which of these exist."""
        local, _ = self.convs(x, valid)
        y = self.pyramid(x, valid)
        valid = strided_valid(valid, self.pyramid.stride)
        y, _, _ = mix(self.attention, self.norm(self.position(y, valid)), valid=valid)
        return self.mlp(y + local, valid)[0], valid


class NormalCell(nn.Module):
    """``z = x + mixer(norm(x + conv(x))) + convs(x)``, then ``z + MLP(norm(z))``.

    Args:
        dim: width.
        mixer: the mechanism.
        convs: the convolutions beside it.
        mlp_ratio: hidden width of the MLP over ``dim``.
        drop_path: stochastic depth, of attention, convolutions and MLP each on its own.
    """

    def __init__(self, dim: int, mixer: nn.Module, convs: ConvStem, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.position, self.norm, self.mixer, self.convs = PositionalConv(dim, 7), norm(dim), mixer, convs
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = Residual(dim, Mlp(dim, mlp_ratio), norm, drop_path)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """(B, H, W, dim) -> the same, and the carry for the next block."""
        y, carry, own = mix(self.mixer, self.norm(self.position(x, valid)), None, carry, valid)
        add_losses(losses, own)
        local, _ = self.convs(x, valid)
        x = x + self.drop_path(y) + self.drop_path(local)
        return self.mlp(x, valid)[0], carry


def vitaev2(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 8, 2),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    pyramid_dims: Sequence[int] = (64, 64, 128, 256),
    reduction_heads: Sequence[int] = (2, 4, 8, 16),
    ratios: Sequence[int] = (4, 2, 2, 2),
    kernel_sizes: Sequence[int] = (7, 3, 3, 3),
    dilations: Sequence[Sequence[int]] = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2)),
    groups: Sequence[int] = (1, 32, 64, 128),
    reduction_groups: Sequence[int] = (1, 16, 32, 64),
    wide: bool = True,
    window_size: int | Sequence[int] = 7,
    mlp_ratio: float = 4.0,
    border: str = "zeros",
    zero_init: bool = True,
    drop_path_start: str = "depth",
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A ViTAEv2 with varied-size windows.

    Args:
        embed_dims: width per stage.
        depths: normal cells per stage.
        num_heads: heads of normal cells per stage.
        pyramid_dims: channels of each dilated convolution per stage.
        reduction_heads: heads of reduction cells per stage.
        ratios: stride of reduction cells per stage, 2 or 4.
        kernel_sizes: side of dilated convolutions per stage.
        dilations: of the convolutions of a pyramid, per stage.
        groups: of the convolutions beside attention in normal cells, per stage.
        reduction_groups: the same in reduction cells.
        wide: convolutions of reduction cells have twice the width of the stage inside, not that of ``pyramid_dims``.
        window_size: of :class:`attnlib.nn.sampled.vsa_varied_size_window.VariedSizeWindowAttention`, as ``border`` and
            ``zero_init``.
        mlp_ratio: hidden width of MLPs of normal cells, and of the convolutions beside, over the width.
        border: see ``window_size``.
        zero_init: see ``window_size``.
        drop_path_start: where in the line of rates a stage starts: ``"depth"``, behind all blocks before it, or
            ``"stage"``, behind as many as the stage before has, as in the authors' models.
        mechanism: of normal cells; reduction cells, whose attention changes the width, keep theirs.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.
    """
    count = len(embed_dims)
    check_choice("drop_path_start", drop_path_start, STARTS)
    per_stage = dict(
        pyramid_dims=pyramid_dims, reduction_heads=reduction_heads, ratios=ratios, kernel_sizes=kernel_sizes,
        groups=groups, reduction_groups=reduction_groups,
    )  # fmt: skip
    for name, given in per_stage.items():
        check_ints(name, given, least=1)
    for name, rows in {**per_stage, "dilations": dilations}.items():
        if len(rows) != count:
            raise ValueError(f"{name}={tuple(rows)} must have one entry for each of {count} stages")
    if set(ratios) - {2, 4}:
        raise ValueError(f"ratios={tuple(ratios)} must be 2 or 4")
    reductions = [ratios[0]]
    for ratio in ratios[1:]:
        reductions.append(reductions[-1] * ratio)

    def own(place: Place) -> nn.Module:
        return VariedSizeWindowAttention(place.dim, place.num_heads, window_size, border=border, zero_init=zero_init)

    make = mechanism or own

    def reduction(stage: int) -> ReductionCell:
        dim, each, out = embed_dims[stage - 1] if stage else in_chans, pyramid_dims[stage], embed_dims[stage]
        inner = 2 * out if wide else each
        width = each * len(dilations[stage])
        strides = (2, 2, 1) if ratios[stage] == 4 else (2, 1, 1)
        return ReductionCell(
            out,
            DilatedPyramid(dim, each, kernel_sizes[stage], ratios[stage], dilations[stage]),
            width,
            _convs((dim, inner, inner, out), strides, reduction_groups[stage]),
            VariedSizeWindowAttention(
                width, reduction_heads[stage], window_size, border=border, zero_init=zero_init, out_dim=out
            ),
        )

    def cell(place: Place) -> NormalCell:
        dim, rate = place.dim, place.drop_path
        if drop_path_start == "stage":
            at = place.block + (depths[place.stage - 1] if place.stage else 0)
            rate = drop_path_rate * at / max(1, sum(depths) - 1)
        convs = _convs((dim, int(dim * mlp_ratio), dim, dim), (1, 1, 1), groups[place.stage])
        return NormalCell(dim, make(place), convs, mlp_ratio, rate)

    rows = places(embed_dims, depths, num_heads, reductions, drop_path_rate)
    stages = [Stage([cell(p) for p in row], reduction(i) if i else None) for i, row in enumerate(rows)]
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate)
    model = Backbone(reduction(0), stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    model.input_name = "stem.convs.0.conv.weight"
    model.more_inputs = tuple(f"stem.pyramid.convs.{i}.weight" for i in range(len(dilations[0])))
    init_weights(model)
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``ViTAE_VSA_basic``."""
    theirs = Released(state_dict, "ViTAE_VSA_basic")
    window = None if model is None else model.stem.attention.window_size
    attention = functools.partial(VariedSizeWindowAttention.convert_state_dict, window_size=window)
    cell, ours = r"layers\.(\d+)\.NC\.(\d+)", r"stages.\1.blocks.\2"
    out = theirs.parts(rf"{cell}\.attn\.(.+)", f"{ours}.mixer", attention)
    out |= theirs.parts(r"layers\.0\.RC\.attn\.(.+)", "stem.attention", attention)
    out |= theirs.parts(r"layers\.(\d+)\.RC\.attn\.(.+)", r"stages.\1.downsample.attention", attention)

    def conv(to: str) -> Rule:
        def rule(match: Any, value: Tensor) -> dict[str, Tensor]:
            layer, part = divmod(int(match[match.re.groups - 1]), 3)
            return {f"{match.expand(to)}.{layer}.{('conv', 'norm')[part]}.{match[match.re.groups]}": value}

        return rule

    rules: dict[str, Rule] = {
        rf"{cell}\.PCM\.([01346])\.{NORM}": conv(f"{ours}.convs"),
        rf"{cell}\.pos\.(weight|bias)": rf"{ours}.position.conv.\3",
        rf"{cell}\.norm1\.(weight|bias)": rf"{ours}.norm.\3",
        rf"{cell}\.norm2\.(weight|bias)": rf"{ours}.mlp.norm.\3",
        rf"{cell}\.mlp\.(fc[12]\.(?:weight|bias))": rf"{ours}.mlp.inner.\3",
        r"head\.(weight|bias)": r"head.fc.\1",
    }
    for start, to in ((r"layers\.(0)\.RC", "stem"), (r"layers\.(\d+)\.RC", r"stages.\1.downsample")):
        rules |= {
            rf"{start}\.PCM\.([01346])\.{NORM}": conv(f"{to}.convs"),
            rf"{start}\.PRM\.convs\.(\d+)\.0\.(weight|bias)": rf"{to}.pyramid.convs.\2.\3",
            rf"{start}\.pos\.(weight|bias)": rf"{to}.position.conv.\2",
            rf"{start}\.norm1\.(weight|bias)": rf"{to}.norm.\2",
            rf"{start}\.norm2\.(weight|bias)": rf"{to}.mlp.norm.\2",
            rf"{start}\.mlp\.(fc[12]\.(?:weight|bias))": rf"{to}.mlp.inner.\2",
        }
    return theirs.close(out | theirs.renamed(rules))


def _size(first: int, depth: int = 8, **more: Any) -> dict[str, Any]:
    heads = tuple(first // 32 * 2**i for i in range(4))
    return dict(
        embed_dims=tuple(first * 2**i for i in range(4)), depths=(2, 2, depth, 2), num_heads=heads,
        pyramid_dims=(first, first, 2 * first, 4 * first), reduction_heads=heads, drop_path_start="stage",
        drop_path_rate=0.1,
    ) | more  # fmt: skip


register_models(
    "vsa-varied-size-window",
    vitaev2,
    {
        "vitaev2_vsa_s": _size(64, reduction_heads=(2, 2, 4, 8), wide=False),
        "vitaev2_vsa_widepcm_s": _size(64),
        "vitaev2_vsa_widepcm_48m": _size(96, 11, drop_path_rate=0.25),
        "vitaev2_vsa_widepcm_b": _size(128, 12),
        "vitaev2_vsa_widepcm_b_ws12": _size(128, 12, window_size=12),
    },
    params={
        "vitaev2_vsa_s": 19_773_300, "vitaev2_vsa_widepcm_s": 20_342_442, "vitaev2_vsa_widepcm_48m": 51_089_119,
        "vitaev2_vsa_widepcm_b": 93_711_532, "vitaev2_vsa_widepcm_b_ws12": 93_833_932,
    },
    source="ViTAE-Transformer/ViTAE-VSA",
    convert=convert,
)  # fmt: skip

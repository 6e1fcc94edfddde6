"""OverLoCK: an overview of the image first, then a closer look that the overview guides.

Lou and Yu, 2025, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", arXiv
2502.20087. Three stages of large-kernel convolutions make a map of 16 pixels a token. A short fourth one makes
the overview of it. The focus then goes over the third stage's map again, and on to a fourth: beside its tokens every
block carries the overview, updates it, and makes its kernels from it (ContMix).

In training with ``auxiliary`` the model gives a pair: logits, and those of a classifier on the overview.

Differs from the authors' code: any size; tokens that do not exist enter no convolution, mean or statistic; their option
``res_scale=False``, which no released model has, is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_ints, check_real
from ...nn.layers import (
    ConvNorm,
    DropPath,
    GlobalResponseNorm,
    LayerScale,
    MapNorm,
    PositionalConv,
    SqueezeExcite,
    masked_mean,
    resize_map,
    strided_valid,
    zero_invalid,
)
from ...nn.local.overlock_contmix import NORM, ContMix, contmix_rules, flattened, large_kernel, large_kernel_rules
from ...nn.recompute import checkpointed
from ...nn.released import Released, Rule
from ..blocks import ConvStem, Place, check_stages, places
from ..build import register_models
from .stages import Backbone, Head, Stage

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


class ResponseMlp(nn.Module):
    """1 x 1 to more channels, GELU, residual depthwise convolution, global response norm, 1 x 1 back."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.conv = nn.Linear(dim, hidden), nn.GELU(), PositionalConv(hidden)
        self.norm, self.fc2 = GlobalResponseNorm(hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        return self.fc2(self.norm(self.conv(self.act(self.fc1(x)), valid), valid))


def scale_of(dim: int, init: float | None) -> nn.Module:
    return nn.Identity() if init is None else LayerScale(dim, init, bias=True)


class RepConvBlock(nn.Module):
    """Residual convolution; then ``scale(x) + branch(x)`` with norm, large kernel, squeeze-and-excitation and MLP."""

    def __init__(self, place: Place, kernel_size: int, mlp_ratio: float, scale: float | None, merged: bool):
        super().__init__()
        dim = place.dim
        self.position, self.norm = PositionalConv(dim), LayerNorm(dim)
        self.conv = large_kernel(dim, kernel_size, merged)
        self.squeeze = SqueezeExcite(dim, max(16, dim // 8), nn.GELU)
        self.mlp = ResponseMlp(dim, int(dim * mlp_ratio))
        self.scale, self.drop_path = scale_of(dim, scale), DropPath(place.drop_path)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        x = self.position(x, valid)
        y = self.squeeze(self.conv(self.norm(x), valid), valid)
        return self.scale(x) + self.drop_path(self.mlp(y, valid)), carry


class FocusBlock(nn.Module):
    """Tokens and overview side by side: residual convolution, ContMix, residual convolution, MLP; then apart again.

    Args:
        place: of the tokens.
        context_dim: width of the overview.
        kernel_size, small_kernel_size: of ContMix.
        mlp_ratio: hidden width of the MLP over the width of the tokens.
        scale: start of the scales of the shortcuts.
        first: the overview is read as it comes; others add the first one to it, both scaled.
        merged: large kernels are built as one convolution.
    """

    def __init__(
        self,
        place: Place,
        context_dim: int,
        kernel_size: int,
        small_kernel_size: int,
        mlp_ratio: float,
        scale: float | None,
        first: bool,
        merged: bool,
    ):
        super().__init__()
        dim = place.dim
        both = dim + context_dim
        self.widths = (dim, context_dim)
        self.kept = None if first else LayerScale(context_dim, 1.0, bias=True)
        self.added = None if first else LayerScale(context_dim, 1.0, bias=True)
        self.position, self.norm = PositionalConv(both), LayerNorm(both)
        self.spread = ConvNorm(both, both, 3, groups=both, bias=True, activation=nn.GELU)
        self.join, self.join_norm = nn.Linear(both, dim), GlobalResponseNorm(dim)
        self.mixer = ContMix(
            dim, place.num_heads, kernel_size, small_kernel_size, context_dim=context_dim, out_dim=both, value=False,
            zero_bias=True, merged=merged,
        )  # fmt: skip
        self.scale, self.drop_path = scale_of(both, scale), DropPath(place.drop_path)
        self.mlp_position, self.mlp_norm = PositionalConv(both), LayerNorm(both)
        self.mlp, self.mlp_scale = ResponseMlp(both, int(dim * mlp_ratio)), scale_of(both, scale)

    def forward(
        self, x: Tensor, valid: Tensor | None, carry: tuple[Tensor, Tensor], losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """Tokens (B, H, W, dim), and the overview as it is and as it was -> the same two."""
        context, overview = carry
        if self.kept is not None and self.added is not None:
            context = self.kept(context) + self.added(overview)
        f = self.position(torch.cat([x, context], -1), valid)
        short, f = self.scale(f), self.norm(f)
        x = self.join_norm(self.join(self.spread(f, valid)), valid)
        query, key = f.split(self.widths, -1)
        f = short + self.drop_path(self.mixer.mixed(x, query, key, valid, valid))
        f = self.mlp_position(f, valid)
        f = self.mlp_scale(f) + self.drop_path(self.mlp(self.mlp_norm(f), valid))
        x, context = f.split(self.widths, -1)
        return x, (context, overview)


class Overview(nn.Module):
    """A stage's own blocks, a short stage on top of them, and what of it is carried along."""

    def __init__(self, base: Stage, top: Stage, dim: int, context_dim: int):
        super().__init__()
        self.base, self.top, self.project = base, top, nn.Linear(dim, context_dim)

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(B, H, W, C) -> the map of the stage, the overview as it is, that projected, and which tokens of it exist."""
        x, valid = self.base(x, valid)
        top, exists = self.top(x, valid)
        return x, top, zero_invalid(self.project(top), exists), exists


class FocusStage(Stage):
    """Blocks that carry an overview; the first such stage makes it, the second halves it with the tokens.

    Args:
        blocks: :class:`FocusBlock` s.
        overview: makes map and overview; ``None`` where both are handed on.
        dims: widths of tokens before and after, where both are handed on.
        context_dim: width of what is carried.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], overview: Overview | None, dims: tuple[int, int], context_dim: int
    ):  # fmt: skip
        between = None if overview is not None else ConvStem(ConvNorm(*dims, 3, 2))
        super().__init__(blocks, between)
        self.overview = overview
        self.shrink = ConvNorm(context_dim, context_dim, 3, 2) if overview is None else None


class AuxiliaryHead(nn.Module):
    """Norm, mean and linear map of the overview."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.dim, self.norm, self.fc = dim, MapNorm(dim), Head(dim, num_classes).fc

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.fc(masked_mean(self.norm(x, valid), valid))


class OverLoCK(Backbone):
    """A backbone whose last two stages hand an overview on beside their map."""

    def __init__(self, *parts: Any, auxiliary: AuxiliaryHead | None = None):
        super().__init__(*parts)
        self.auxiliary = auxiliary
        if auxiliary is not None:
            self.head_names = ("head.fc.", "auxiliary.fc.")

    def _maps(
        self,
        x: Tensor,
        valid: Tensor | None,
        losses: dict[str, Tensor] | None = None,
        last: int | None = None,
        seen: list[Any] | None = None,
    ) -> Iterable[tuple[Tensor, Tensor | None]]:
        self._check_images(x, valid)
        x, valid = self.stem(x.permute(0, 2, 3, 1).contiguous(), valid)
        top = context = exists = None
        for stage in self.stages[: None if last is None else last + 1]:  # type: ignore[union-attr]
            if not isinstance(stage, FocusStage):
                x, valid = stage(x, valid, losses)  # type: ignore[operator]
                yield x, valid
                continue
            if stage.overview is not None:
                x, top, overview, exists = stage.overview(x, valid)
                valid = valid if valid is None else strided_valid(valid, 2)
                if seen is not None:
                    seen.append((top, exists))
                reference = context = resize_map(overview, x.shape[1:3])
            else:
                context, reference = stage.shrink(context, valid), overview  # type: ignore[misc, arg-type]
                x, valid = stage.downsample(x, valid)  # type: ignore[misc]
            carry: Any = (context, reference)
            for block in stage.blocks:
                x, carry = checkpointed(block, x, valid, carry, losses, when=stage.checkpointing and losses is None)
            context = carry[0]
            yield (x if stage.overview is not None else torch.cat([x, context], -1)), valid

    def forward(self, x: Tensor, valid: Tensor | None = None, returns: Sequence[str] = ()) -> Any:
        """(B, in_chans, H, W) -> (B, num_classes); in training with ``auxiliary`` a pair of these.

        Args:
            x: images.
            valid: (B, H, W) boolean, which pixels exist.
            returns: as of :class:`attnlib.models.backbones.stages.Backbone`.
        """
        if not self.training or self.auxiliary is None or returns:
            return super().forward(x, valid, returns)
        seen: list[Any] = []
        *_, (y, exists) = self._maps(x, valid, seen=seen)
        return self.head(self.norm(y, exists), exists), self.auxiliary(*seen[0])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, and a new one of the overview: ``num_classes=0`` for none."""
        super().reset_classifier(num_classes, global_pool)
        if self.auxiliary is not None:
            self.auxiliary.fc = Head(self.auxiliary.dim, num_classes).fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the insides of blocks in the backward pass instead of keeping them."""
        super().set_grad_checkpointing(enable)
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointing = enable


def overlock(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (4, 4, 6, 2),
    focus_depths: Sequence[int] = (12, 2),
    num_heads: Sequence[int] = (4, 8),
    kernel_sizes: Sequence[int] = (17, 15, 13, 7),
    small_kernel_size: int = 5,
    mlp_ratio: float = 4.0,
    focus_mlp_ratio: float = 3.0,
    layer_scale: float | None = 1.0,
    projection: int = 1024,
    auxiliary: bool = True,
    merged: bool = False,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> OverLoCK:
    """An OverLoCK.

    Args:
        embed_dims: width per stage; a quarter of the last is carried as overview.
        depths: blocks per stage, the last of the overview.
        focus_depths: blocks of the focus, on the third stage's map and behind it.
        num_heads: heads of ContMix, of both.
        kernel_sizes: large kernels per stage.
        small_kernel_size: of ContMix.
        mlp_ratio, focus_mlp_ratio: hidden width over the width, of convolutional blocks and of the focus.
        layer_scale: start of the scales of shortcuts in the last two stages; ``None`` for none.
        projection: channels before the classifier.
        auxiliary: a classifier on the overview, which training gives as well.
        merged: large kernels are built as one convolution, as released ``reparam`` weights need.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.
    """
    check_flag("auxiliary", auxiliary)
    check_flag("merged", merged)
    check_stages(4, embed_dims=embed_dims, depths=depths, kernel_sizes=kernel_sizes)
    check_stages(2, focus_depths=focus_depths, num_heads=num_heads)
    check_ints("embed_dims", embed_dims, least=1)
    check_int("projection", projection, least=1)
    check_real("mlp_ratio", mlp_ratio, above=0)
    check_real("focus_mlp_ratio", focus_mlp_ratio, above=0)
    if layer_scale is not None:
        check_real("layer_scale", layer_scale)
    if embed_dims[0] % 2 or embed_dims[3] % 4:
        raise ValueError(f"embed_dims={tuple(embed_dims)} must begin with a multiple of 2 and end with one of 4")
    check_ints("focus_depths", focus_depths, least=1)
    scales = (None, None, layer_scale, layer_scale)
    carried = embed_dims[3] // 4
    dims = (*embed_dims, *embed_dims[2:])
    rows = places(
        dims, (*depths, *focus_depths), (1, 1, 1, 1, *num_heads), (4, 8, 16, 32, 16, 32), drop_path_rate
    )  # fmt: skip

    def conv_stage(i: int) -> Stage:
        blocks = [RepConvBlock(p, kernel_sizes[i], mlp_ratio, scales[i], merged) for p in rows[i]]
        return Stage(blocks, ConvStem(ConvNorm(dims[i - 1], dims[i], 3, 2)) if i else None)

    def focus_stage(i: int) -> FocusStage:
        blocks = [
            FocusBlock(
                p, carried, kernel_sizes[2 + i], small_kernel_size, focus_mlp_ratio, scales[2], not (i or p.block),
                merged,
            )
            for p in rows[4 + i]
        ]  # fmt: skip
        overview = None if i else Overview(conv_stage(2), conv_stage(3), dims[3], carried)
        return FocusStage(blocks, overview, (dims[2], dims[3]), carried)

    half = dims[0] // 2
    stem = ConvStem(
        ConvNorm(in_chans, half, 3, 2, activation=nn.GELU), ConvNorm(half, half, 3, activation=nn.GELU),
        ConvNorm(half, dims[0], 3, 2, activation=nn.GELU), ConvNorm(dims[0], dims[0], 3),
    )  # fmt: skip
    stages = [conv_stage(0), conv_stage(1), focus_stage(0), focus_stage(1)]
    whole = dims[3] + carried
    head = Head(projection, num_classes, global_pool, drop=drop_rate)
    norm = ConvNorm(whole, projection, activation=nn.SiLU)
    model = OverLoCK(
        stem, stages, (*dims[:3], whole), (4, 8, 16, 32), norm, head, num_classes, in_chans, img_size,
        auxiliary=AuxiliaryHead(dims[3], num_classes) if auxiliary else None,
    )  # fmt: skip
    model.num_features = model.head_hidden_size = projection
    model.input_name = "stem.0.conv.weight"
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, PositionalConv):
            nn.init.trunc_normal_(module.conv.weight, std=0.02)
            if module.conv.bias is not None:
                nn.init.zeros_(module.conv.bias)
    return model


#: Their names of blocks, the first of one or two groups being its number, and ours.
_BLOCKS = {
    "blocks1": "stages.0.blocks", "blocks2": "stages.1.blocks", "blocks3": "stages.2.overview.base.blocks",
    "blocks4": "stages.2.overview.top.blocks",
}  # fmt: skip
_BETWEEN = {
    "patch_embed2": "stages.1.downsample.0", "patch_embed3": "stages.2.overview.base.downsample.0",
    "patch_embed4": "stages.2.overview.top.downsample.0", r"patch_embedx\.x_proj": "stages.3.downsample.0",
    r"patch_embedx\.h_proj": "stages.3.shrink",
}  # fmt: skip


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``OverLoCK``, its large kernels merged or not."""
    theirs = Released(state_dict, "the authors' OverLoCK")
    rules: dict[str, Rule] = {}

    def conv(where: str, at: int, ours: str) -> None:
        rules[rf"{where}{at}\.weight"] = f"{ours}.conv.weight"
        rules[rf"{where}{at + 1}\.{NORM}"] = rf"{ours}.norm.\1"

    def mlp(block: str, at: int, ours: str) -> None:
        rules[rf"{block}{at}\.(weight|bias)"] = flattened(rf"{ours}mlp.fc1.\2")
        rules[rf"{block}{at + 2}\.(weight|bias)"] = rf"{ours}mlp.conv.conv.\2"
        rules[rf"{block}{at + 3}\.(gamma|beta)"] = functools.partial(_flat, to=rf"{ours}mlp.norm.\2")
        rules[rf"{block}{at + 4}\.(weight|bias)"] = flattened(rf"{ours}mlp.fc2.\2")

    def scale(where: str, ours: str) -> None:
        rules[rf"{where}\.weight"] = functools.partial(_flat, to=rf"{ours}.gamma")
        rules[rf"{where}\.bias"] = f"{ours}.beta"

    for i in range(4):
        conv(r"patch_embed1\.", 3 * i, f"stem.{i}")
    for name, to in _BETWEEN.items():
        conv(rf"{name}\.", 0, to)
    for name, to in _BLOCKS.items():
        block, ours = rf"{name}\.(\d+)\.", rf"{to}.\1."
        rules[rf"{block}dwconv\.(weight|bias)"] = rf"{ours}position.conv.\2"
        rules[rf"{block}proj\.0\.(weight|bias)"] = rf"{ours}norm.\2"
        rules |= large_kernel_rules(block + r"proj\.1\.", block + r"proj\.2\.", ours + "conv.")
        for number, fc in ((1, "fc1"), (3, "fc2")):
            rules[rf"{block}proj\.3\.proj\.{number}\.(weight|bias)"] = flattened(rf"{ours}squeeze.{fc}.\2")
        mlp(block + r"proj\.", 4, ours)
        scale(block + "ls", ours + "scale")
    for name, to in (("sub_blocks3", "stages.2.blocks"), ("sub_blocks4", "stages.3.blocks")):
        block, ours = rf"{name}\.(\d+)\.", rf"{to}.\1."
        for part, mine in (("dwconv1", "position.conv"), ("norm1", "norm"), ("dwconv2", "mlp_position.conv"),
                           ("norm2", "mlp_norm"), (r"fusion\.0", "spread.conv")):  # fmt: skip
            rules[rf"{block}{part}\.(weight|bias)"] = rf"{ours}{mine}.\2"
        rules[rf"{block}fusion\.1\.{NORM}"] = rf"{ours}spread.norm.\2"
        rules[rf"{block}fusion\.3\.(weight|bias)"] = flattened(rf"{ours}join.\2")
        rules[rf"{block}fusion\.4\.(gamma|beta)"] = functools.partial(_flat, to=rf"{ours}join_norm.\2")
        rules |= contmix_rules(block, ours + "mixer.", "dyconv_proj")
        mlp(block + r"mlp\.", 0, ours)
        for part, mine in (("ls1", "scale"), ("ls2", "mlp_scale"), ("x_scale", "kept"), ("h_scale", "added")):
            scale(block + part, ours + mine)
    rules[r"high_level_proj\.(weight|bias)"] = flattened(r"stages.2.overview.project.\1")
    rules[rf"aux_head\.0\.{NORM}"] = r"auxiliary.norm.norm.\1"
    rules[r"aux_head\.2\.(weight|bias)"] = flattened(r"auxiliary.fc.\1")
    conv(r"head\.", 0, "norm")
    rules[r"head\.4\.(weight|bias)"] = flattened(r"head.fc.\1")
    out = theirs.renamed(rules)
    if model is not None and model.auxiliary is None:
        out = {name: t for name, t in out.items() if not name.startswith("auxiliary.")}
    return theirs.close(out)


def _flat(match: Any, value: Tensor, to: str) -> dict[str, Tensor]:
    return {match.expand(to): value.flatten()}


_SIZES: dict[str, dict[str, Any]] = {
    "overlock_xt": dict(embed_dims=(56, 112, 256, 336), depths=(2, 2, 3, 2), focus_depths=(6, 2), num_heads=(4, 6)),
    "overlock_t": dict(),
    "overlock_s": dict(embed_dims=(64, 128, 320, 512), depths=(6, 6, 8, 3), focus_depths=(16, 3), num_heads=(8, 16)),
    "overlock_b": dict(embed_dims=(80, 160, 384, 576), depths=(8, 8, 10, 4), focus_depths=(20, 4), num_heads=(6, 9)),
}
_PARAMS = {"xt": (17_307_272, 16_791_384), "t": (34_990_472, 33_981_064), "s": (58_309_772, 56_670_476),
           "b": (98_012_968, 95_520_680)}  # fmt: skip
_ENDS = ("", "_reparam")
_CROPS = {"xt": 0.925, "t": 0.95, "s": 0.95, "b": 0.975}

register_models(
    "overlock-contmix",
    overlock,
    {**_SIZES, **{f"{name}_reparam": {**settings, "merged": True} for name, settings in _SIZES.items()}},
    params={f"overlock_{n}{end}": p for n, both in _PARAMS.items() for end, p in zip(_ENDS, both, strict=True)},
    license="Apache-2.0",
    source="LMMMEng/OverLoCK",
    convert=convert,
    data_of={f"overlock_{n}{end}": {"crop_pct": c} for n, c in _CROPS.items() for end in _ENDS},
)

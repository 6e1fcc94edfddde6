"""STViT: attention among super tokens in the first stages, among all tokens in the last, convolutions around it.

Huang et al., 2022, "Vision Transformer with Super Token Sampling", arXiv 2211.11167. Four 3 x 3 convolutions make
tokens of 4 x 4 pixels, each followed by a GELU and a BatchNorm; one of stride 2 with a BatchNorm lies between stages.
Every block is ``x + conv(x)``, super token attention behind a LayerNorm, and an MLP behind a BatchNorm, whose hidden
layer reads its neighbours: ``z + conv(z)``. A linear map to 1024 channels, a BatchNorm and a SiLU come before
the pool.

Differs from the authors' code: any size, whatever cells and strides divide; ``pad="zeros"`` pads maps as theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_ints, check_real
from ...nn.layers import ConvNorm, MapNorm, PositionalConv, strided_valid
from ...nn.reduced.stvit_super_token import SuperTokenAttention
from ...nn.released import Released, Rule
from ..blocks import Block, ConvStem, Make, Residual, places
from ..build import register_models
from .stages import Backbone, Head, Stage

NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


class ActivatedStem(nn.Module):
    """3 x 3 convolutions, each followed by a GELU and then a BatchNorm: ``stem(x, valid) -> (x, valid)``."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int]):
        super().__init__()
        self.strides = tuple(strides)
        self.convs = nn.ModuleList(
            ConvNorm(a, b, 3, s, bias=True, norm=False, activation=nn.GELU)
            for a, b, s in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(MapNorm(width) for width in widths[1:])

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, widths[0]) -> (B, ceil(H / s), ceil(W / s), widths[-1]), and which of these exist."""
        for conv, norm, stride in zip(self.convs, self.norms, self.strides, strict=True):
            x, valid = conv(x, valid), strided_valid(valid, stride)
            x = norm(x, valid)
        return x, valid


class LocalMlp(nn.Module):
    """``BatchNorm -> Linear -> GELU -> z + conv(z) -> Linear`` on (B, H, W, dim); in evaluation the norm is folded.

    Args:
        dim: width.
        ratio: hidden width over ``dim``.
    """

    def __init__(self, dim: int, ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = ConvNorm(dim, hidden, bias=True, norm=False, pre_norm=True, activation=nn.GELU)
        self.local = PositionalConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        return self.fc2(self.local(self.fc1(x, valid), valid))


class Projection(MapNorm):
    """``SiLU(BatchNorm(W x))`` of the final map.

    Args:
        dim: width in.
        out_dim: width out.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__(out_dim)
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return F.silu(super().forward(self.proj(x), valid))


def stvit(
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 5, 9, 3),
    num_heads: Sequence[int] = (1, 2, 5, 8),
    stoken_size: Sequence[int] = (8, 4, 1, 1),
    n_iter: Sequence[int] | int = 1,
    projection: int = 1024,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    layer_scale: Sequence[float] | float = 0.0,
    border: str = "zeros",
    detach: bool = True,
    pad: str = "mask",
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An STViT.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        stoken_size: tokens per side of a super token's cell, per stage; 1 for plain attention.
        n_iter: how often tokens are associated with super tokens, the same or per stage.
        projection: width of the map before the pool.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: bias of the query, key and value projections.
        layer_scale: start of the learned scales, the same or per stage; 0 for none.
        border: of :class:`attnlib.nn.reduced.stvit_super_token.SuperTokenAttention`, as ``detach`` and ``pad``.
        detach: see ``border``.
        pad: see ``border``.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(embed_dims)
    cells = check_ints("stoken_size", stoken_size, least=1)
    iterations = check_ints("n_iter", (n_iter,) * count if isinstance(n_iter, int) else n_iter, least=1)
    scales = (layer_scale,) * count if isinstance(layer_scale, (int, float)) else tuple(layer_scale)
    for name, given in (("stoken_size", cells), ("n_iter", iterations), ("layer_scale", scales)):
        if len(given) != count:
            raise ValueError(f"{name}={given} must have one number for each of {count} stages")
    for given_scale in scales:
        check_real("layer_scale", given_scale, least=0)
    if embed_dims[0] % 2:
        raise ValueError(f"embed_dims={tuple(embed_dims)} must begin with an even number, half of which the stem has")
    reductions = [4 * 2**i for i in range(count)]

    def own(place: Any) -> nn.Module:
        return SuperTokenAttention(
            place.dim, place.num_heads, cells[place.stage], iterations[place.stage], border, detach,
            qkv_bias=qkv_bias, pad=pad,
        )  # fmt: skip

    make = mechanism or own
    first = embed_dims[0]
    stem = ActivatedStem((in_chans, first // 2, first // 2, first, first), (2, 1, 2, 1))
    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        stage = row[0].stage
        between = ConvStem(ConvNorm(embed_dims[stage - 1], row[0].dim, 3, 2, bias=True)) if stage else None
        blocks = []
        for p in row:
            scale = scales[stage] or None
            block = Block(
                p.dim, make(p), mlp_ratio=0, norm=functools.partial(nn.LayerNorm, eps=1e-6), drop_path=p.drop_path,
                layer_scale=scale, position=3,
            )  # fmt: skip
            block.mlp = Residual(p.dim, LocalMlp(p.dim, mlp_ratio), None, p.drop_path, scale)
            blocks.append(block)
        stages.append(Stage(blocks, between))
    head = Head(projection, num_classes, global_pool, None, drop_rate)
    norm = Projection(embed_dims[-1], projection)
    model = Backbone(stem, stages, embed_dims, reductions, norm, head, num_classes, in_chans, img_size)
    model.num_features = model.head_hidden_size = projection
    model.input_name = "stem.convs.0.conv.weight"
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``STViT``."""
    theirs = Released(state_dict, "STViT")
    block = r"layers\.(\d+)\.blocks\.(\d+)"
    ours = r"stages.\1.blocks.\2"
    held: dict[tuple[str, str], dict[str, Tensor]] = {}
    for match, value in theirs.matching(rf"{block}\.attn\.(.+)"):
        held.setdefault((match[1], match[2]), {})[match[3]] = value
    out: dict[str, Tensor] = {}
    for (stage, number), part in held.items():
        place = f"stages.{stage}.blocks.{number}.mixer.inner"
        heads = model.get_submodule(place).num_heads if model is not None else None
        out |= {f"{place}.{k}": v for k, v in SuperTokenAttention.convert_state_dict(part, heads).items()}

    def flat(to: str) -> Rule:
        return lambda match, value: {match.expand(to): value.flatten(1) if value.dim() == 4 else value}

    def between(match: Any, value: Tensor) -> dict[str, Tensor]:
        """Theirs end a stage with what ours begin the next one with."""
        part = "conv" if match[2] == "0" else "norm"
        return {f"stages.{int(match[1]) + 1}.downsample.0.{part}.{match[3]}": value}

    def stem(match: Any, value: Tensor) -> dict[str, Tensor]:
        layer, part = divmod(int(match[1]), 3)
        return {f"stem.convs.{layer}.conv.{match[2]}" if part == 0 else f"stem.norms.{layer}.norm.{match[2]}": value}

    def scale(to: str) -> Rule:
        return lambda match, value: {match.expand(to): value.flatten()}

    rules: dict[str, Rule] = {
        rf"patch_embed\.proj\.(\d+)\.{NORM}": stem,
        rf"{block}\.pos_embed\.conv\.(weight|bias)": rf"{ours}.position.conv.\3",
        rf"{block}\.norm1\.norm\.(weight|bias)": rf"{ours}.mixer.norm.\3",
        rf"{block}\.norm2\.{NORM}": rf"{ours}.mlp.inner.fc1.pre.\3",
        rf"{block}\.mlp2\.fc1\.(weight|bias)": rf"{ours}.mlp.inner.fc1.conv.\3",
        rf"{block}\.mlp2\.conv\.conv\.(weight|bias)": rf"{ours}.mlp.inner.local.conv.\3",
        rf"{block}\.mlp2\.fc2\.(weight|bias)": flat(rf"{ours}.mlp.inner.fc2.\3"),
        rf"{block}\.gamma_1": scale(f"{ours}.mixer.scale.gamma"),
        rf"{block}\.gamma_2": scale(f"{ours}.mlp.scale.gamma"),
        rf"layers\.(\d+)\.downsample\.proj\.([01])\.{NORM}": between,
        r"proj\.(weight|bias)": flat(r"norm.proj.\1"),
        rf"norm\.{NORM}": r"norm.norm.\1",
        r"head\.(weight|bias)": r"head.fc.\1",
    }
    return theirs.close(out | theirs.renamed(rules))


register_models(
    "stvit-super-token",
    stvit,
    {
        "stvit_small": dict(drop_path_rate=0.1),
        "stvit_base": dict(
            embed_dims=(96, 192, 384, 512), depths=(4, 6, 14, 6), num_heads=(2, 3, 6, 8),
            layer_scale=(0.0, 0.0, 1e-6, 1e-6), drop_path_rate=0.4,
        ),
        "stvit_large": dict(
            embed_dims=(96, 192, 448, 640), depths=(4, 7, 19, 8), num_heads=(2, 3, 7, 10),
            layer_scale=(0.0, 0.0, 1e-6, 1e-6), drop_path_rate=0.6,
        ),
    },
    params={"stvit_small": 25_495_624, "stvit_base": 51_691_288, "stvit_large": 94_971_096},
    source="hhb072/STViT",
    convert=convert,
)  # fmt: skip

"""SOFT: three stages of softmax-free attention on a map, a last one of softmax attention beside a class token.

Lu et al., 2021, "SOFT: Softmax-free Transformer with Linear Complexity", arXiv 2110.11945; 2022, "Softmax-free Linear
Transformers", arXiv 2207.03341. Three convolutions with BatchNorm and ReLU make tokens of 4 x 4 pixels, one of stride 2
lies between stages, and every stage has a table of positions. Blocks of the first stages norm behind the shortcut,

    x <- LN(x + dropout(attention(x))),    x <- LN(x + dropout(mlp(x))),

with :class:`attnlib.nn.reduced.soft_softmax_free_transformer.SoftmaxFreeAttention` and cells of 8, 4 and 2 tokens a
side; those of the last stage norm before attention and MLP, and its head reads the class token.

``soft_small`` has the depth that gives the paper's 24 M parameters; the authors' code has a deeper one of 38.9 M, which
is ``soft_small_as_coded``.

Differs from the authors' code: any size; ``drop_rate`` is dropout before the head; ratios of MLPs, which theirs takes
and does not read in the first stages, are 4 everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...checks import check_flag, check_int, check_ints
from ...grids import Layout
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import ConvNorm, Mlp, PositionTable, normed
from ...nn.reduced.soft_softmax_free_transformer import SoftmaxFreeAttention
from ...nn.released import Released, Rule
from ..blocks import Block, Chain, ConvStem, Make, Place, add_losses, init_weights, mix, places
from ..build import register_models
from .stages import Backbone, Stage
from .vit import TokenHead, grid_of


class PostNormBlock(nn.Module):
    """``x <- LN(x + dropout(mixer(x)))``, ``x <- LN(x + dropout(mlp(x)))``: the norm is behind the shortcut.

    Args:
        dim: width.
        mixer: the mechanism.
        mlp_ratio: hidden width of the MLP over ``dim``.
        drop: dropout of both branches in training.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop: float = 0.0):
        super().__init__()
        self.mixer, self.mlp = mixer, Mlp(dim, mlp_ratio, functools.partial(nn.GELU, approximate="tanh"))
        self.norm1, self.norm2, self.drop = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(drop)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """(B, H, W, dim) -> the same, and the carry for the next block."""
        y, carry, own = mix(self.mixer, x, None, carry, valid)
        add_losses(losses, own)
        x = self.norm1(x + self.drop(y))
        return self.norm2(x + self.drop(self.mlp(x))), carry


class Soft(Backbone):
    """Stages on a map, the last one beside a class token.

    Args:
        stem, stages, dims, reductions, norm, head, settings: as of
            :class:`attnlib.models.backbones.stages.Backbone`.
        class_token: a learned token that joins the last stage.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        reductions: Sequence[int],
        norm: nn.Module,
        head: TokenHead,
        class_token: bool = True,
        **settings: Any,
    ):
        super().__init__(stem, stages, dims, reductions, norm, head, **settings)
        self.num_prefix_tokens = int(class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dims[-1])) if class_token else None
        self.cls_pos_embed = nn.Parameter(torch.empty(1, 1, dims[-1])) if class_token else None
        for token in (self.cls_token, self.cls_pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def _tokens(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None, tuple[int, int]]]:
        """Maps of the stages, tokens of the last one; which patches exist; their grid."""
        self._check_images(x, valid)
        x, valid = self.stem(x.permute(0, 2, 3, 1).contiguous(), valid)
        count = len(self.stages)
        for i in range(count if last is None else last + 1):
            stage: Any = self.stages[i]
            if i < count - 1 or self.cls_token is None or self.cls_pos_embed is None:
                x, valid = stage(x, valid, losses)
                yield x, valid, (x.shape[1], x.shape[2])
                continue
            if stage.downsample is not None:
                x, valid = stage.downsample(x, valid)
            grid = (x.shape[1], x.shape[2])
            first = (self.cls_token + self.cls_pos_embed).expand(x.shape[0], -1, -1).to(x.dtype)
            x = torch.cat([first, x.flatten(1, 2)], 1)
            layout = Layout((("cls", 1), ("image", grid)))
            exists = None if valid is None else F.pad(valid.flatten(1), (1, 0), value=True)
            carry: Any = None
            for block in stage.blocks:
                if stage.checkpointing and torch.is_grad_enabled() and losses is None:
                    x, carry = checkpoint(block, x, exists, carry, None, layout, use_reentrant=False)
                else:
                    x, carry = block(x, exists, carry, losses, layout)
            yield x, valid, grid

    def _maps(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        for y, exists, grid in self._tokens(x, valid, losses, last):
            yield (y[:, self.num_prefix_tokens :].unflatten(1, grid) if y.dim() == 3 else y), exists

    def _final(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        *_, (y, exists, _) = self._tokens(x, valid, losses)
        return y, exists

    def forward_features(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, 1 + N, C), normed; (B, h, w, C) without a class token."""
        y, exists = self._final(x, valid)
        return normed(self.norm, y, exists)


def soft(
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (1, 2, 3, 2),
    num_heads: Sequence[int] = (2, 4, 10, 16),
    ratios: Sequence[int] = (8, 4, 2),
    conv_sizes: Sequence[int] = (9, 5, 3),
    max_iter: int = 20,
    norm: bool = False,
    qkv_bias: bool = True,
    class_token: bool = True,
    compat: str | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "token",
) -> Soft:
    """A SOFT.

    Args:
        embed_dims, depths, num_heads: width, blocks and heads per stage.
        ratios: sides of the cells that make landmarks, per stage but the last.
        conv_sizes: sides of the convolutions of values, per stage but the last.
        max_iter, norm, compat: of :class:`attnlib.nn.reduced.soft_softmax_free_transformer.SoftmaxFreeAttention`.
        qkv_bias: biases of the projections of the last stage.
        class_token: a learned token in the last stage; without it ``global_pool`` is ``"avg"``.
        mechanism, num_classes, in_chans, img_size, drop_rate, global_pool: as in :func:`attnlib.create_model`. A
            mechanism of maps, which takes neither sequences nor layouts, needs ``class_token=False``.
        drop_path_rate: of the last block: stochastic depth in the last stage, plain dropout of the branches before.

    Raises:
        ValueError: a setting that has not one entry per stage, a mechanism that cannot stand beside a class token.
    """
    count = len(embed_dims)
    check_flag("class_token", class_token)
    check_int("max_iter", max_iter, least=1)
    for name, given, least in (("ratios", ratios, 1), ("conv_sizes", conv_sizes, 0)):
        if len(check_ints(name, given, least=least)) != count - 1:
            raise ValueError(f"{name}={tuple(given)} must have one entry for each of {count} stages but the last")
    sides = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)
    reductions = [4 * 2**i for i in range(count)]
    eps = functools.partial(nn.LayerNorm, eps=1e-6)

    def own(place: Place) -> nn.Module:
        if place.stage == count - 1:
            return SoftmaxAttention(place.dim, place.num_heads, qkv_bias=qkv_bias)
        return SoftmaxFreeAttention(
            place.dim, place.num_heads, ratios[place.stage], conv_sizes[place.stage], max_iter, norm, compat=compat
        )

    make = mechanism or own

    def block(place: Place) -> nn.Module:
        mixer = make(place)
        if place.stage < count - 1:
            return PostNormBlock(place.dim, mixer, drop=place.drop_path)
        traits: Any = getattr(mixer, "traits", None)
        if class_token and traits is not None and not traits.layout and 1 not in traits.grid_ranks:
            raise ValueError(
                f"mechanism={type(mixer).__name__} takes grids of rank {sorted(traits.grid_ranks)} and no layout, so "
                "that no token can stand beside the map: class_token=False, global_pool='avg' builds a model of it"
            )
        return Block(place.dim, mixer, norm=eps, drop_path=place.drop_path)

    def convs(stage: int) -> nn.Module:
        dim = embed_dims[stage]
        steps = [(embed_dims[stage - 1], dim, 2)] if stage else [(in_chans, 32, 2), (32, 32, 1), (32, dim, 2)]
        table = PositionTable(dim, tuple(-(-side // reductions[stage]) for side in sides), "bilinear")
        made = [ConvNorm(a, b, 3, s, bias=True, activation=nn.ReLU) for a, b, s in steps]
        return Chain(ConvStem(*made), table)

    rows = places(embed_dims, depths, num_heads, reductions, drop_path_rate)
    stages = [Stage([block(p) for p in row], convs(i) if i else None) for i, row in enumerate(rows)]
    head = TokenHead(embed_dims[-1], num_classes, global_pool, int(class_token), class_token, drop=drop_rate)
    model = Soft(
        convs(0), stages, embed_dims, reductions, eps(embed_dims[-1]), head, class_token,
        num_classes=num_classes, in_chans=in_chans, img_size=(sides[0], sides[1]),
    )  # fmt: skip
    model.input_name = "stem.0.0.conv.weight"
    init_weights(model, also=(SoftmaxFreeAttention, SoftmaxAttention))
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``SoftmaxFreeVisionTransformer``."""
    theirs = Released(state_dict, "SOFT")
    last = max((int(m[5:].partition(".")[0]) for m in theirs if m.startswith("block")), default=4)

    with_token = "cls_token" in theirs

    def at(stage: str) -> str:
        return "stem" if stage == "1" else f"stages.{int(stage) - 1}.downsample"

    def conv(match: Any, value: Tensor) -> dict[str, Tensor]:
        layer, part = divmod(int(match[2]), 3)
        return {f"{at(match[1])}.0.{layer}.{('conv', 'norm')[part]}.{match[3]}": value}

    def table(match: Any, value: Tensor) -> dict[str, Tensor]:
        beside, places = grid_of(value, int(with_token and int(match[1]) == last))
        out = {f"{at(match[1])}.1.pos_embed": places}
        return out if beside is None else {**out, "cls_pos_embed": beside}

    held = {
        f"{int(m[1]) - 1}.{m[2]}.{m[3]}": value
        for m, value in theirs.matching(r"block(\d+)\.(\d+)\.att\.mha\.(.+)")
    }  # fmt: skip
    out: dict[str, Tensor] = {}
    if held:
        out = Released(held, "attention of SOFT").parts(
            r"(\d+)\.(\d+)\.(.+)", r"stages.\1.blocks.\2.mixer", SoftmaxFreeAttention.convert_state_dict
        )

    def block(ours: str) -> Rule:
        return lambda m, value: {f"stages.{int(m[1]) - 1}.blocks.{m[2]}.{m.expand(ours)}": value}

    def kv(match: Any, value: Tensor) -> dict[str, Tensor]:
        to = f"stages.{int(match[1]) - 1}.blocks.{match[2]}.mixer.inner"
        k, v = value.chunk(2)
        return {f"{to}.k.{match[3]}": k, f"{to}.v.{match[3]}": v}

    b = r"block(\d+)\.(\d+)"
    return theirs.close(
        out
        | theirs.renamed(
            {
                rf"{b}\.att\.norm([12])\.(weight|bias)": block(r"norm\3.\4"),
                rf"{b}\.att\.ff([12])\.(weight|bias)": block(r"mlp.fc\3.\4"),
                rf"{b}\.norm1\.(weight|bias)": block(r"mixer.norm.\3"),
                rf"{b}\.norm2\.(weight|bias)": block(r"mlp.norm.\3"),
                rf"{b}\.mlp\.(fc[12])\.(weight|bias)": block(r"mlp.inner.\3.\4"),
                rf"{b}\.attn\.(q|proj)\.(weight|bias)": block(r"mixer.inner.\3.\4"),
                rf"{b}\.attn\.kv\.(weight|bias)": kv,
                r"patch_embed(\d+)\.proj\.(\d+)\.(.+)": conv,
                r"pos_embed(\d+)": table,
                r"cls_token": "cls_token",
                r"norm\.(weight|bias)": r"norm.\1",
                r"head\.(weight|bias)": r"head.fc.\1",
            }
        )
    )


_DEPTHS = {
    "tiny": (1, 2, 3, 2),
    "small": (1, 3, 7, 4),
    "small_as_coded": (1, 3, 20, 4),
    "medium": (1, 3, 29, 5),
    "large": (1, 3, 40, 5),
    "huge": (1, 5, 49, 5),
}
_THIRD = {"medium": 288, "huge": 352}
_PARAMS = {
    "tiny": 13_069_056, "small": 24_110_092, "small_as_coded": 38_858_462, "medium": 45_812_707, "large": 64_700_646,
    "huge": 87_108_273,
}  # fmt: skip


def _size(name: str) -> dict[str, Any]:
    third = _THIRD.get(name, 320)
    return dict(embed_dims=(64, 128, third, 512), num_heads=(2, 4, third // 32, 16), depths=_DEPTHS[name])


register_models(
    "soft-softmax-free-transformer",
    soft,
    {f"soft_{name}": _size(name) for name in _DEPTHS}
    | {f"soft_norm_{name}": {**_size(name), "norm": True} for name in _DEPTHS},
    params={f"soft_{form}{name}": count for name, count in _PARAMS.items() for form in ("", "norm_")},
    license="MIT",
    source="fudan-zvg/SOFT",
    convert=convert,
)

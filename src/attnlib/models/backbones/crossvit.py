"""CrossViT: two vision transformers, of small and of large patches, that exchange their class tokens.

Chen et al., 2021, "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", arXiv
2103.14899. One branch sees 12 x 12 patches of an enlarged image, the other 16 x 16 patches of the image. Every stage is
a few blocks in each branch, then :class:`attnlib.nn.dense.crossvit.ClassTokenExchange`. Each branch ends in a norm and
a linear map of its class token; the logits are averaged. Models with a dagger have three convolutions for patches.

Differs from the authors' code: branches see an image at 15/14 of its size and at its size, each rounded to whole
patches (240 and 224 pixels of 224, 408 and 384 of 384: theirs), and positions are interpolated, where theirs brings
every image to the sizes of training; sides may differ.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_ints, check_real
from ...grids import Layout
from ...nn.dense.crossvit import ClassTokenExchange
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import ConvNorm, masked_mean
from ...nn.recompute import checkpointed
from ...nn.released import Released
from ...positions import resized
from ..blocks import Block, ConvStem, Make, Place, check_stages, init_weights
from ..build import register_models
from .stages import Backbone
from .vit import PatchStem, beside_patches, grid_of

Norm = functools.partial(nn.LayerNorm, eps=1e-6)
#: Pixels per side of a patch in each branch, and the size of its image over that of the image.
PATCHES, SCALES = (12, 16), (15 / 14, 1.0)


class Branch(nn.Module):
    """Images to tokens: resized to whole patches, cut into patches, a class token before them, positions.

    Args:
        in_chans: channels of images.
        dim: width.
        patch_size: pixels per side of a patch: 12 or 16 with ``multi_conv``.
        scale: size of this branch's image over that of the image.
        img_size: (height, width) that positions are made for.
        multi_conv: patches by three convolutions.
    """

    tables = {"pos_embed": 2}

    def __init__(
        self, in_chans: int, dim: int, patch_size: int, scale: float, img_size: Sequence[int], multi_conv: bool
    ):
        super().__init__()
        self.patch_size, self.scale = patch_size, scale
        self.patches: nn.Module = PatchStem(in_chans, dim, patch_size)
        if multi_conv:
            second, last = ((3, 3, 0), (3, 1, 1)) if patch_size == 12 else ((3, 2, 1), (3, 2, 1))
            plain: dict[str, Any] = dict(bias=True, norm=False)
            self.patches = ConvStem(
                ConvNorm(in_chans, dim // 4, 7, 4, activation=nn.ReLU, **plain),
                ConvNorm(dim // 4, dim // 2, *second, activation=nn.ReLU, **plain),
                ConvNorm(dim // 2, dim, *last, **plain),
            )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.cls_pos_embed = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(dim, *self.grid(img_size)))
        for table in (self.cls_token, self.cls_pos_embed, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def grid(self, sides: Sequence[int]) -> tuple[int, int]:
        """Patches of an image of these sides."""
        height, width = (max(1, int(side * self.scale / self.patch_size + 0.5)) for side in sides)
        return height, width

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """(B, in_chans, H, W) -> (B, 1 + N, C), which of these exist, and the grid of the N patches."""
        grid = self.grid(x.shape[2:])
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if valid is not None:
            x = x.masked_fill(~valid[:, None], 0.0)
            valid = valid if tuple(valid.shape[1:]) == size else F.adaptive_max_pool2d(valid.float(), size) > 0
        x, valid = self.patches(resized(x, size).permute(0, 2, 3, 1).contiguous(), valid)
        x = x + resized(self.pos_embed, grid).permute(1, 2, 0)
        first = (self.cls_token + self.cls_pos_embed).expand(len(x), -1, -1)
        exists = None if valid is None else F.pad(valid.flatten(1), (1, 0), value=True)
        return torch.cat([first.to(x.dtype), x.flatten(1, 2)], 1), exists, grid


class Branches(nn.ModuleList):
    """Both branches of an image: their tokens, which of these exist, their grids."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Any, ...]:
        return tuple(zip(*(branch(x, valid) for branch in self), strict=True))


class MultiScaleStage(nn.Module):
    """Blocks in each branch, then the exchange of class tokens.

    Args:
        branches: the blocks of each.
        exchange: called as ``exchange(*streams, valid=...)``.
    """

    def __init__(self, branches: Sequence[Sequence[nn.Module]], exchange: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(nn.ModuleList(blocks) for blocks in branches)
        self.exchange = exchange
        self.checkpointing = False

    def forward(
        self, streams: Sequence[Tensor], valid: Sequence[Tensor | None], grids: Sequence[tuple[int, int]],
        losses: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Tokens (B, 1 + N, C) of both branches -> the same."""
        out = []
        for blocks, x, exists, grid in zip(self.branches, streams, valid, grids, strict=True):
            layout, carry = Layout((("cls", 1), ("image", grid))), None
            for block in blocks:  # type: ignore[attr-defined]
                again = self.checkpointing and losses is None
                x, carry = checkpointed(block, x, exists, carry, losses, layout, when=again)
            out.append(x)
        return list(self.exchange(*out, valid=valid))


class BranchNorms(nn.ModuleList):
    """A norm for each branch; a single map is of the last branch."""

    def forward(self, x: Any) -> Any:
        return self[-1](x) if isinstance(x, Tensor) else [norm(t) for norm, t in zip(self, x, strict=True)]


class BranchHead(nn.Module):
    """A linear map of each branch's class token, or of its pooled patches; logits are their mean.

    Args:
        dims: width of each branch.
        num_classes: 0 for no linear maps: what they read is put side by side.
        pool: ``"token"``, ``"avg"`` or ``""``.
        drop: dropout in training.
    """

    pools = ("token", "avg", "")

    def __init__(self, dims: Sequence[int], num_classes: int, pool: str = "token", drop: float = 0.0):
        super().__init__()
        self.dims, self.pool = tuple(dims), pool
        self.hidden = sum(dims)
        self.drop = nn.Dropout(check_real("drop_rate", drop, least=0, below=1))
        self.fc = nn.ModuleList()
        self.reset(num_classes, pool)

    def reset(self, num_classes: int, pool: str | None = None) -> None:
        """New linear maps."""
        if pool is not None:
            check_choice("global_pool", pool, self.pools)
            self.pool = pool
        like = next(self.parameters(), None)
        self.fc = nn.ModuleList(nn.Linear(dim, num_classes) for dim in self.dims if num_classes)
        init_weights(self)
        if like is not None:
            self.to(like.device, like.dtype)

    def forward(self, x: Sequence[Tensor], valid: Any = None, pre_logits: bool = False) -> Any:
        """Tokens (B, 1 + N, C) of both -> (B, num_classes); what the maps read (B, sum of C) with ``pre_logits``."""
        if not self.pool:
            return list(x)
        if self.pool == "token":
            read = [t[:, 0] for t in x]
        else:
            held = (None,) * len(x) if valid is None else valid
            read = [masked_mean(t[:, 1:], None if e is None else e[:, 1:]) for t, e in zip(x, held, strict=True)]
        read = [self.drop(t) for t in read]
        if pre_logits or not self.fc:
            return torch.cat(read, 1)
        return torch.stack([fc(t) for fc, t in zip(self.fc, read, strict=True)]).mean(0)


class CrossViT(Backbone):
    """Both branches through all stages; the maps of a stage are two levels, of small and of large patches.

    ``forward_features`` gives the normed tokens (B, 1 + N, C) of both branches, as timm's class does.

    Args:
        stem: the :class:`Branches`.
        stages: the :class:`MultiScaleStage` s.
        dims: width of each branch.
        patch_sizes: of each branch.
        head: the :class:`BranchHead`.
        settings: of :class:`attnlib.models.backbones.stages.Backbone`.
    """

    def __init__(
        self, stem: Branches, stages: Sequence[nn.Module], dims: Sequence[int], patch_sizes: Sequence[int],
        head: BranchHead, **settings: Any,
    ):  # fmt: skip
        count = len(stages)
        norm = BranchNorms(Norm(dim) for dim in dims)
        of_head: Any = head
        super().__init__(stem, stages, [*dims] * count, [*patch_sizes] * count, norm, of_head, **settings)
        self.num_features = sum(dims)
        for level, info in enumerate(self.feature_info):
            info["module"] = f"stages.{level // 2}.branches.{level % 2}"

    def _streams(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Tokens of both branches behind every stage, which of them exist, and their grids."""
        self._check_images(x, valid)
        streams, valids, grids = self.stem(x, valid)
        for stage in self.stages[: None if last is None else last // 2 + 1]:  # type: ignore[union-attr]
            streams = stage(streams, valids, grids, losses)
            yield streams, valids, grids

    def _maps(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        for streams, valids, grids in self._streams(x, valid, losses, last):
            for t, exists, grid in zip(streams, valids, grids, strict=True):
                yield t[:, 1:].unflatten(1, grid), None if exists is None else exists[:, 1:].unflatten(1, grid)

    def _final(self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None) -> Any:
        *_, (streams, valids, _) = self._streams(x, valid, losses)
        return streams, valids

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters stand at which depth, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}


def crossvit(
    embed_dims: Sequence[int] = (192, 384),
    depths: Sequence[Sequence[int]] = ((1, 4), (1, 4), (1, 4)),
    num_heads: Sequence[int] = (6, 6),
    mlp_ratio: float = 4.0,
    multi_conv: bool = False,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "token",
) -> CrossViT:
    """A CrossViT.

    Args:
        embed_dims: width of the branch of small and of the branch of large patches.
        depths: blocks of both branches, per stage.
        num_heads: heads of both branches.
        mlp_ratio: hidden width of MLPs over the width.
        multi_conv: patches by three convolutions (the models with a dagger); widths must be multiples of 4.
        mechanism: takes the place of attention in the blocks; the exchange stays.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate: as in :func:`attnlib.create_model`.
        global_pool: ``"token"`` reads the class tokens, ``"avg"`` the patches; ``""`` gives the tokens of both.
    """
    dims = check_ints("embed_dims", embed_dims, least=1)
    heads = check_ints("num_heads", num_heads, least=1)
    check_stages(2, embed_dims=dims, num_heads=heads)
    check_flag("multi_conv", multi_conv)
    check_real("mlp_ratio", mlp_ratio, above=0)
    if multi_conv and any(dim % 4 for dim in dims):
        raise ValueError(f"embed_dims={dims} must be multiples of 4 with multi_conv=True")
    if not isinstance(depths, Sequence) or isinstance(depths, str) or not depths:
        raise ValueError(f"depths={depths!r} must have the blocks of both branches for every stage: ((1, 4), (1, 4))")
    counts = [check_ints("depths", row, least=1) for row in depths]
    for row in counts:
        check_stages(2, depths=row)
    sides = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)
    if len(sides) != 2:
        raise ValueError(f"img_size must be one side or (height, width), got {sides}")

    def own(place: Place) -> nn.Module:
        return SoftmaxAttention(place.dim, place.num_heads)

    make = mechanism or own
    rate = check_real("drop_path_rate", drop_path_rate, least=0, below=1)
    total, at = sum(max(row) for row in counts), 0
    stages = []
    for i, row in enumerate(counts):
        rates = [rate * (at + j) / max(1, total - 1) for j in range(max(row))]
        at += max(row)
        branches = []
        for dim, h, count, patch in zip(dims, heads, row, PATCHES, strict=True):
            places = [Place(dim, h, i, j, at - max(row) + j, count, rates[j], patch) for j in range(count)]
            branches.append(
                [
                    Block(dim, beside_patches(make(p)), mlp_ratio=mlp_ratio, norm=Norm, drop_path=p.drop_path)
                    for p in places
                ]
            )
        stages.append(MultiScaleStage(branches, ClassTokenExchange(dims, heads, rates[-1])))
    stem = Branches(
        Branch(in_chans, dim, patch, scale, sides, multi_conv)
        for dim, patch, scale in zip(dims, PATCHES, SCALES, strict=True)
    )
    head = BranchHead(dims, num_classes, global_pool, drop_rate)
    model = CrossViT(stem, stages, dims, PATCHES, head, num_classes=num_classes, in_chans=in_chans, img_size=sides)
    first = "patches.0.conv.weight" if multi_conv else "patches.proj.weight"
    model.input_name, model.more_inputs = f"stem.0.{first}", (f"stem.1.{first}",)
    init_weights(model, also=(SoftmaxAttention,))
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``VisionTransformer`` of two branches, or timm's ``CrossViT``."""
    theirs = Released(state_dict, "the authors' CrossViT")
    block, to = r"blocks\.(\d+)\.blocks\.(\d)\.(\d+)", r"stages.\1.branches.\2.\3"
    made: Any = getattr(type(model.stages[0].branches[0][0].mixer.inner), "convert_state_dict", None)
    out = {} if made is None else theirs.parts(rf"{block}\.attn\.(.+)", f"{to}.mixer.inner", made)
    out |= theirs.parts(
        r"blocks\.(\d+)\.((?:projs|revert_projs|fusion)\..+)", r"stages.\1.exchange",
        ClassTokenExchange.convert_state_dict,
    )  # fmt: skip

    def positions(match: Any, value: Tensor) -> dict[str, Tensor]:
        before, table = grid_of(value, 1, model.stem[int(match[1])].pos_embed.shape[1:])
        assert before is not None
        return {f"stem.{match[1]}.cls_pos_embed": before, f"stem.{match[1]}.pos_embed": table}

    rules: dict[str, Any] = {
        r"pos_embed[._](\d)": positions,
        r"cls_token[._](\d)": r"stem.\1.cls_token",
        r"patch_embed\.(\d)\.proj\.(weight|bias)": r"stem.\1.patches.proj.\2",
        r"patch_embed\.(\d)\.proj\.(\d)\.(weight|bias)": lambda m, value: {
            f"stem.{m[1]}.patches.{int(m[2]) // 2}.conv.{m[3]}": value
        },
        rf"{block}\.norm1\.(weight|bias)": rf"{to}.mixer.norm.\4",
        rf"{block}\.norm2\.(weight|bias)": rf"{to}.mlp.norm.\4",
        rf"{block}\.mlp\.(fc[12])\.(weight|bias)": rf"{to}.mlp.inner.\4.\5",
        r"norm\.(\d)\.(weight|bias)": r"norm.\1.\2",
        r"head\.(\d)\.(weight|bias)": r"head.fc.\1.\2",
    }
    return theirs.close(out | theirs.renamed(rules))


def _three(*blocks: int) -> dict[str, Any]:
    return dict(depths=(blocks,) * 3)


_9: dict[str, Any] = dict(embed_dims=(128, 256), num_heads=(4, 4), mlp_ratio=3.0) | _three(1, 3)
_15: dict[str, Any] = dict(mlp_ratio=3.0) | _three(1, 5)
_18: dict[str, Any] = dict(embed_dims=(224, 448), num_heads=(7, 7), mlp_ratio=3.0) | _three(1, 6)
_DAGGER: dict[str, Any] = dict(multi_conv=True)
_SIZES: dict[str, dict[str, Any]] = {
    "crossvit_tiny_224": dict(embed_dims=(96, 192), num_heads=(3, 3)),
    "crossvit_small_224": dict(),
    "crossvit_base_224": dict(embed_dims=(384, 768), num_heads=(12, 12)),
    "crossvit_9_224": _9,
    "crossvit_15_224": _15,
    "crossvit_18_224": _18,
    "crossvit_9_dagger_224": _9 | _DAGGER,
    "crossvit_15_dagger_224": _15 | _DAGGER,
    "crossvit_15_dagger_384": _15 | _DAGGER | dict(img_size=384),
    "crossvit_18_dagger_224": _18 | _DAGGER,
    "crossvit_18_dagger_384": _18 | _DAGGER | dict(img_size=384),
}

register_models(
    "crossvit",
    crossvit,
    _SIZES,
    params={
        "crossvit_tiny_224": 7_014_800, "crossvit_small_224": 26_856_272, "crossvit_base_224": 105_025_232,
        "crossvit_9_224": 8_553_296, "crossvit_15_224": 27_528_464, "crossvit_18_224": 43_271_408,
        "crossvit_9_dagger_224": 8_776_592, "crossvit_15_dagger_224": 28_209_008,
        "crossvit_15_dagger_384": 28_500_080, "crossvit_18_dagger_224": 44_266_976,
        "crossvit_18_dagger_384": 44_606_560,
    },
    license="Apache-2.0",
    source="IBM/CrossViT",
    convert=convert,
    img_size={name: int(name.rpartition("_")[2]) for name in _SIZES},
)  # fmt: skip

"""ViT: patches and a class token under blocks of one width (Dosovitskiy et al., 2020), in DeiT's and timm's sizes.

An image is cut into patches of P x P pixels, every patch is one token; the class token and register tokens stand before
them. Positions are a learned table that is interpolated to the grid at hand. Every block is attention and an MLP, each
behind a norm and, with ``layer_scale``, before a scale per channel:

    x <- x + g_1 * attention(norm(x)),    x <- x + g_2 * mlp(norm(x)).

References: Dosovitskiy et al., 2020, arXiv 2010.11929; Touvron et al., 2020, "DeiT", arXiv 2012.12877; Touvron et al.,
2022, "DeiT III", arXiv 2204.07118 (layer scale, positions of patches alone); Darcet et al., 2023, arXiv 2309.16588
(register tokens).

With ``distilled`` a second learned token stands behind the class token, and a second head reads it: it learns from a
teacher, and both heads are averaged (DeiT). Differs from timm's class: any size from one patch up, with zeros at the
bottom and on the right, as theirs with ``dynamic_img_pad=True``; the table of positions is held as a map, apart from
the positions of the class and register tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints, check_real, describe
from ...grids import Layout
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import Mlp, Patchify, flat_valid, normed, through
from ...nn.recompute import checkpointed
from ...nn.released import Released, join
from ..blocks import Block, Make, init_weights, places
from ..build import register_models, resampled_patch, resized
from .stages import Backbone, Head, stage_indices


class PatchStem(Patchify):
    """Patches to tokens; only a share of the gradient reaches the weights: ``(1 - share) detach(x) + share x``."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, share: float = 1.0):
        super().__init__(in_chans, dim, patch_size, norm=None)
        self.share = check_real("stem_grad", share, least=0, most=1)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, in_chans) -> (B, ceil(H / P), ceil(W / P), dim), and which of these exist."""
        x, valid = super().forward(x, valid)
        return (x if self.share == 1 else x.detach() * (1 - self.share) + x * self.share), valid


class TokenHead(Head):
    """A head that reads the first token, or pools the patches, of tokens (B, prefix + N, C).

    Args:
        dim, num_classes, pool: as of :class:`attnlib.models.backbones.stages.Head`; ``pool`` may be ``"token"``, too.
        prefix: tokens before the patches.
        class_token: whether the first of them is the class token.
        options: of that head.
    """

    pools: ClassVar[tuple[str, ...]] = ("token", "avg", "max", "")

    def __init__(
        self,
        dim: int,
        num_classes: int,
        pool: str = "token",
        prefix: int = 1,
        class_token: bool = True,
        **options: Any,
    ):
        if not class_token:
            self.pools = ("avg", "max", "")  # type: ignore[assignment, misc]
        super().__init__(dim, num_classes, pool, **options)
        self.prefix = prefix

    def forward(self, x: Tensor, valid: Tensor | None = None, pre_logits: bool = False) -> Tensor:
        """(B, prefix + N, C) or (B, h, w, C) -> (B, num_classes); ``valid`` (B, h, w): which patches exist."""
        if self.pool == "token":
            x, valid = x[:, 0], None
        elif self.pool and self.prefix:
            x, valid = x[:, self.prefix :], flat_valid(valid)
        return super().forward(x, valid, pre_logits)


class DistilledHead(TokenHead):
    """Two linear maps, of the class token and of the distillation token behind it; logits are their mean.

    Args:
        dim, num_classes, prefix, options: as of :class:`TokenHead`.
    """

    pools = ("token", "")

    def __init__(self, dim: int, num_classes: int, pool: str = "token", prefix: int = 2, **options: Any):
        super().__init__(dim, num_classes, pool, prefix, **options)
        #: Whether both heads' logits are given in training, as a pair, for a loss of each.
        self.apart = False

    def reset(self, num_classes: int, pool: str | None = None) -> None:
        super().reset(num_classes, pool)
        self.fc_dist = copy.deepcopy(self.fc)
        if isinstance(self.fc_dist, nn.Linear):
            nn.init.trunc_normal_(self.fc_dist.weight, std=0.02)

    def forward(self, x: Tensor, valid: Tensor | None = None, pre_logits: bool = False) -> Any:
        """(B, prefix + N, C) -> (B, num_classes); what both maps read is averaged with ``pre_logits``."""
        if self.pool != "token":
            return super().forward(x, valid, pre_logits)
        first, second = self.drop(self.norm(x[:, 0])), self.drop(self.norm(x[:, 1]))
        if pre_logits:
            return (first + second) / 2
        first, second = self.fc(first), self.fc_dist(second)
        return (first, second) if self.apart and self.training else (first + second) / 2


class VisionTransformer(Backbone):
    """Blocks of one width on patches and tokens beside them; every block is a level of ``feature_info``.

    Tokens are (B, prefix + N, C) where there are any beside the patches: mechanisms that take layouts are told which is
    which, others mix them as a sequence. Without tokens beside them, patches stay a map (B, h, w, C), which mechanisms
    of maps need.

    Args:
        stem: gives a map of patches, called as ``stem(x, valid) -> (x, valid)``.
        blocks: called as ``block(x, valid, carry, losses, layout) -> (x, carry)``.
        dim: width.
        patch_size: pixels per side of a patch.
        norm: of all tokens behind the blocks; ``None`` for none.
        head: what gives logits.
        class_token: a learned token that stands first.
        reg_tokens: learned tokens behind it.
        positions: ``"all"`` tokens have them, those of the ``"grid"``, or ``"none"``.
        dist_token: a learned token behind the class token, for distillation.
        pos_drop: dropout of tokens with their positions, in training.
        settings: of :class:`attnlib.models.backbones.stages.Backbone`.
    """

    tables = {"pos_embed": 2}
    #: Tables are low-pass filtered before they are made smaller, as in timm.
    antialias = True
    #: A kernel of another patch size is resampled when weights are loaded.
    resamples_input = True

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        dim: int,
        patch_size: int,
        norm: nn.Module | None,
        head: TokenHead,
        class_token: bool = True,
        reg_tokens: int = 0,
        positions: str = "all",
        dist_token: bool = False,
        pos_drop: float = 0.0,
        **settings: Any,
    ):
        count = len(blocks)
        super().__init__(stem, blocks, [dim] * count, [patch_size] * count, norm, head, **settings)
        check_choice("positions", positions, ("all", "grid", "none"))
        if min(self.img_size) < patch_size:
            raise ValueError(f"img_size={self.img_size} must hold at least one patch of patch_size={patch_size}")
        self.patch_size, self.embed_dim = patch_size, dim
        self.num_reg_tokens, self.has_class_token = reg_tokens, class_token
        self.num_prefix_tokens = reg_tokens + class_token + dist_token
        beside = {"cls": int(class_token), "dist": int(dist_token), "register": reg_tokens}
        self.beside = tuple((name, size) for name, size in beside.items() if size)
        grid = tuple(side // patch_size for side in self.img_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if dist_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, dim)) if reg_tokens else None
        self.pos_drop = nn.Dropout(check_real("pos_drop_rate", pos_drop, least=0, below=1))
        self.pos_embed = None if positions == "none" else nn.Parameter(torch.empty(dim, *grid))
        own = positions == "all" and self.num_prefix_tokens > 0
        self.prefix_pos_embed = nn.Parameter(torch.empty(1, self.num_prefix_tokens, dim)) if own else None
        for table in (self.pos_embed, self.prefix_pos_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.dist_token is not None:
            nn.init.trunc_normal_(self.dist_token, std=0.02)

    # ---- the call

    def _check_images(self, x: Tensor, valid: Tensor | None) -> None:
        super()._check_images(x, valid)
        if min(x.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"x must hold at least one patch of {self.patch_size} x {self.patch_size} pixels, got {describe(x)}"
            )

    def positions(self, grid: Sequence[int]) -> Tensor | None:
        """(h, w, C): the table of positions for a grid, interpolated (bicubic) where it was made for another one."""
        if self.pos_embed is None:
            return None
        return resized(self.pos_embed, grid, antialias=self.antialias).permute(1, 2, 0)

    def _prefix(self) -> Tensor | None:
        """(1, prefix, C): tokens beside the patches."""
        tokens: list[Tensor] = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        if not tokens:
            return None
        beside = tokens[0] if len(tokens) == 1 else torch.cat(tokens, 1)
        return beside if self.prefix_pos_embed is None else beside + self.prefix_pos_embed

    def _tokens(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None, tuple[int, int]]]:
        """Tokens behind every block, which patches exist, and their grid."""
        for y, exists, grid, _ in self._handed_on(x, valid, losses, last):
            yield y, exists, grid

    def _handed_on(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None, tuple[int, int], Any]]:
        """The same, and what the block hands on to the next."""
        self._check_images(x, valid)
        # What follows is copied into one sequence anyway, so that images need not be put channels last before.
        x, valid = self.stem(x.permute(0, 2, 3, 1), valid)
        grid = (x.shape[1], x.shape[2])
        at, beside = self.positions(grid), self._prefix()
        if at is not None:
            x = x + at
        layout, exists = None, valid
        if beside is None:
            x = x.contiguous()
        else:
            x = torch.cat([beside.expand(x.shape[0], -1, -1).to(x.dtype), x.flatten(1, 2)], 1)
            layout = Layout((*self.beside, ("image", grid)))
            exists = None if valid is None else F.pad(valid.flatten(1), (self.num_prefix_tokens, 0), value=True)
        x = through(self.pos_drop, x)
        carry: Any = None
        for block in self.stages[: None if last is None else last + 1]:  # type: ignore[union-attr]
            again = getattr(block, "checkpointing", False) and losses is None
            x, carry = checkpointed(block, x, exists, carry, losses, layout, when=again)
            yield x, valid, grid, carry

    def _map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens -> (B, h, w, C), the patches alone; of clips (B, T, h, w, C)."""
        return x[..., self.num_prefix_tokens :, :].unflatten(-2, grid) if self.num_prefix_tokens else x

    def _maps(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None, last: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        for y, exists, grid in self._tokens(x, valid, losses, last):
            yield self._map(y, grid), exists

    def _final(
        self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        *_, (y, exists, _) = self._tokens(x, valid, losses)
        return y, exists

    def forward_features(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, prefix + N, C), normed. ``valid``: (B, H, W), which pixels exist."""
        y, exists = self._final(x, valid)
        y = normed(self.norm, y, exists)
        return y if self.num_prefix_tokens else y.flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False, valid: Tensor | None = None) -> Tensor:
        """(B, prefix + N, C) -> (B, num_classes), or what the last linear map reads."""
        if not self.num_prefix_tokens:
            valid = flat_valid(valid)
        return self.head(x, valid, pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """What stands behind chosen blocks: ``(final tokens, [maps])``, or the maps alone, as timm's class gives them.

        Args:
            x: images.
            indices: blocks; the last n for a number n; all by default. Negative ones count from the end.
            norm: apply the final norm to all of them.
            stop_early: do not run blocks behind the last that was asked for.
            output_fmt: ``"NCHW"``, ``"NHWC"`` or ``"NLC"`` (patches as a sequence).
            intermediates_only: return the maps alone.
            return_prefix_tokens: return pairs of patches and the tokens before them.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC", "NLC"))
        count = len(self.stages)
        chosen = stage_indices("indices", list(range(count))[-indices:] if isinstance(indices, int) else indices, count)
        last = max(chosen) if stop_early else count - 1
        found: list[Any] = []
        y = x
        for i, (y, _, grid) in enumerate(self._tokens(x, None, last=last)):
            if i not in chosen:
                continue
            made = self.norm(y) if norm else y
            patches = self._map(made, grid)
            if output_fmt == "NCHW":
                patches = patches.movedim(-1, 1)
            elif output_fmt == "NLC":
                patches = patches.flatten(1, -2)
            found.append((patches, made[..., : self.num_prefix_tokens, :]) if return_prefix_tokens else patches)
        if intermediates_only:
            return found
        y = self.norm(y) if last == count - 1 else y
        return (y if self.num_prefix_tokens else y.flatten(1, 2)), found

    def get_classifier(self) -> Any:
        """The last linear map; of a distilled model both."""
        return (self.head.fc, self.head.fc_dist) if isinstance(self.head, DistilledHead) else self.head.fc

    def set_distilled_training(self, enable: bool = True) -> None:
        """Give the logits of both heads in training, as a pair, instead of their mean.

        Raises:
            TypeError: a model without a distillation token.
        """
        if not isinstance(self.head, DistilledHead):
            raise TypeError("only a model with distilled=True has two heads")
        self.head.apart = check_flag("enable", enable)

    @torch.no_grad()
    def with_patches(self, patch_size: int, img_size: int | tuple[int, int] | None = None) -> VisionTransformer:
        """A copy that reads patches of another size, down to single pixels: width, depth and blocks are the same.

        The kernel is resampled by the pseudo-inverse (:func:`attnlib.models.build.resampled_patch`), positions are
        interpolated, all else is copied, so that parameters differ by ``3 (P'^2 - P^2) C`` and ``(N' - N) C`` alone.

        Args:
            patch_size: pixels per side of a patch.
            img_size: side of images that positions are made for; as they are by default.

        >>> model = vit(16, 24, 1, 2, img_size=32)
        >>> model.with_patches(1).forward_features(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 1025, 24])
        """
        check_int("patch_size", patch_size, least=1)
        sides = self.img_size if img_size is None else (img_size,) * 2 if isinstance(img_size, int) else img_size
        sides = check_ints("img_size", sides, least=1)
        if min(sides) < patch_size:
            raise ValueError(f"img_size={sides} must hold at least one patch of patch_size={patch_size}")
        out = copy.deepcopy(self)
        old: Any = self.stem
        if not isinstance(old, PatchStem):
            raise TypeError(f"the stem must be a PatchStem to read patches of another size, not {type(old).__name__}")
        kernel = resampled_patch(old.proj.weight.detach(), (patch_size, patch_size))
        out.stem = new = PatchStem(self.in_chans, self.embed_dim, patch_size, old.share)
        new.to(kernel.device, kernel.dtype)
        new.proj.weight.copy_(kernel)
        if new.proj.bias is not None and old.proj.bias is not None:
            new.proj.bias.copy_(old.proj.bias.detach())
        out.patch_size, out.img_size = patch_size, sides
        if self.pos_embed is not None:
            grid = tuple(side // patch_size for side in sides)
            out.pos_embed = nn.Parameter(resized(self.pos_embed, grid, antialias=self.antialias))
        out.feature_info = [{**level, "reduction": patch_size} for level in self.feature_info]
        return out

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters stand at which depth, for layer-wise learning rates."""
        return {
            "stem": r"^(stem|cls_token|dist_token|reg_token|pos_embed|prefix_pos_embed)",
            "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))],
        }


def beside_patches(mixer: nn.Module) -> nn.Module:
    """The mechanism, where it can mix tokens that stand beside the patches.

    Raises:
        ValueError: it takes neither sequences nor layouts.
    """
    traits: Any = getattr(mixer, "traits", None)
    if traits is not None and not traits.layout and 1 not in traits.grid_ranks:
        raise ValueError(
            f"mechanism={type(mixer).__name__} takes grids of rank {sorted(traits.grid_ranks)} and no layout, so "
            "that no token can stand beside the patches: in a plain ViT class_token=False, reg_tokens=0, "
            "global_pool='avg' builds a model of it"
        )
    return mixer


def vit(
    patch_size: int = 16,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    qk_norm: bool = False,
    swiglu: bool = False,
    layer_scale: float | None = None,
    class_token: bool = True,
    reg_tokens: int = 0,
    positions: str = "all",
    fc_norm: bool | None = None,
    rescale: bool = False,
    stem_grad: float = 1.0,
    distilled: bool = False,
    post_norm: bool = False,
    mlp_norm: bool = False,
    gates: bool = True,
    pos_drop_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    last_heads: int | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "token",
) -> VisionTransformer:
    """A vision transformer.

    Args:
        patch_size: pixels per side of a patch.
        embed_dim, depth, num_heads: width, blocks, heads.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: bias of the query, key and value projections.
        qk_norm: LayerNorm of every head of the queries and of the keys.
        swiglu: MLPs are ``W_3 (silu(a) * b)`` with ``[a, b] = W_12 x``, ``a`` and ``b`` of the hidden width.
        layer_scale: start of the learned scales behind attention and MLP; ``None`` for none.
        class_token: a learned token that stands first.
        reg_tokens: learned tokens behind it.
        positions: ``"all"`` tokens have positions; those of the ``"grid"`` alone (DeiT III, DINOv2); ``"none"``.
        fc_norm: the last norm stands behind the pool; where patches are pooled by default.
        rescale: output projections of block l start divided by sqrt(2 l), l from 1 (BEiT, EVA).
        stem_grad: share of the gradient that reaches the patch embedding.
        distilled: a distillation token and a head of its own; both heads are averaged (DeiT).
        post_norm: norms stand behind attention and MLP.
        mlp_norm: LayerNorm of the hidden layer of MLPs (sub-LN).
        gates: what gates multiply starts at 1, with ``swiglu``.
        pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout in training: of tokens with their positions, of outputs
            of attention and both layers of MLPs, of attention weights; the second and third with the model's own
            attention alone.
        last_heads: heads of the last block, where they are not ``num_heads``: a student whose last map is taught by a
            teacher's (UNIP).
        mechanism: as in :func:`attnlib.create_model`. One of maps, which takes neither sequences nor layouts, needs
            ``class_token=False, reg_tokens=0, global_pool="avg"``.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate: as in :func:`attnlib.create_model`.
        global_pool: ``"token"`` reads the class token; ``"avg"`` and ``"max"`` pool the patches; ``""`` gives all.

    Raises:
        ValueError: a mechanism that cannot mix tokens beside the patches, an image size below one patch.
    """
    check_int("patch_size", patch_size, least=1)
    check_int("reg_tokens", reg_tokens, least=0)
    check_real("mlp_ratio", mlp_ratio, above=0)
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    prefix = reg_tokens + class_token + check_flag("distilled", distilled)
    if distilled and not (class_token and global_pool in DistilledHead.pools):
        raise ValueError(
            f"distilled=True reads the class and the distillation token: class_token=True and global_pool='token' are "
            f"possible, got class_token={class_token} and global_pool={global_pool!r}"
        )
    fc_norm = global_pool in ("avg", "max") if fc_norm is None else fc_norm
    hidden = int(embed_dim * mlp_ratio)

    def own(place: Any) -> nn.Module:
        made = SoftmaxAttention(
            place.dim, place.num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
        )  # fmt: skip
        for of_heads in (made.q_norm, made.k_norm) if qk_norm else ():
            of_heads.eps = 1e-6  # type: ignore[assignment]
        return made

    make = mechanism or own
    (row,) = places([embed_dim], [depth], [num_heads], [patch_size], drop_path_rate)
    if last_heads is not None:
        row[-1] = dataclasses.replace(row[-1], num_heads=check_int("last_heads", last_heads, least=1))
    blocks = []
    for place in row:
        mixer = beside_patches(make(place)) if prefix else make(place)
        mlp = Mlp(
            embed_dim, hidden=hidden, gated=swiglu, activation=nn.SiLU if swiglu else nn.GELU, drop=proj_drop_rate,
            drop_hidden=True, norm=norm if mlp_norm else None,
        )  # fmt: skip
        blocks.append(
            Block(
                place.dim, mixer, mlp, norm=norm, drop_path=place.drop_path, layer_scale=layer_scale,
                post_norm=post_norm,
            )
        )  # fmt: skip
    of_head: dict[str, Any] = dict(norm=norm if fc_norm else None, drop=drop_rate)
    if distilled:
        head: TokenHead = DistilledHead(embed_dim, num_classes, global_pool, prefix, **of_head)
    else:
        head = TokenHead(embed_dim, num_classes, global_pool, prefix, class_token, **of_head)
    model = VisionTransformer(
        PatchStem(in_chans, embed_dim, patch_size, stem_grad), blocks, embed_dim, patch_size,
        None if fc_norm else norm(embed_dim), head, class_token, reg_tokens, positions, distilled, pos_drop_rate,
        num_classes=num_classes, in_chans=in_chans, img_size=img_size,
    )  # fmt: skip
    if distilled:
        model.head_names = ("head.fc.", "head.fc_dist.")
    start(model, rescale, gates=gates)
    return model


def start(
    model: VisionTransformer,
    rescale: bool = False,
    also: tuple[type[nn.Module], ...] = (SoftmaxAttention,),
    gates: bool = True,
) -> None:
    """Initial weights of linear maps as timm has them; of the mechanisms ``also``, too."""
    init_weights(model, also=also)
    for block in model.stages:
        mlp: Any = block.mlp.inner  # type: ignore[union-attr]
        if mlp.gated and gates:  # what the gate multiplies starts at 1
            half = mlp.fc1.out_features // 2
            nn.init.normal_(mlp.fc1.weight[half:], std=1e-6)
            nn.init.ones_(mlp.fc1.bias[half:])
    if rescale:
        divide(model)


@torch.no_grad()
def divide(model: VisionTransformer) -> None:
    """Divide the output projections of attention and MLP in block l by sqrt(2 l), l from 1."""
    for number, block in enumerate(model.stages, 1):
        inner: Any = block.mixer.inner  # type: ignore[union-attr]
        for linear in (getattr(inner, "proj", None), block.mlp.inner.fc2):  # type: ignore[union-attr]
            if isinstance(linear, nn.Linear):
                linear.weight.div_(math.sqrt(2.0 * number))


def grid_of(theirs: Tensor, prefix: int, grid: Sequence[int] | None = None) -> tuple[Tensor | None, Tensor]:
    """A released table of positions (1, prefix + N, C): those of the prefix, and a map (C, height, width).

    Args:
        theirs: the table.
        prefix: positions before those of the patches.
        grid: which N positions are read as, where it has so many; a square otherwise.

    Raises:
        ValueError: N is no square number.
    """
    count = theirs.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    sides = (side, side)
    if grid is not None and math.prod(grid) == count:
        sides = (grid[0], grid[1])
    if count < 1 or math.prod(sides) != count:
        raise ValueError(f"has {theirs.shape[1]} positions, which are no square grid behind {prefix} tokens")
    table = theirs[0, prefix:].unflatten(0, sides).permute(2, 0, 1)
    return (theirs[:, :prefix] if prefix else None), table


def convert(state_dict: dict[str, Tensor], model: Any, options: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """From timm's ``VisionTransformer``, DeiT's or EVA's, for whatever mechanism the blocks of ``model`` hold.

    Args:
        state_dict: theirs.
        model: ours.
        options: of the mechanism's ``convert_state_dict``.
    """
    theirs = Released(state_dict, "VisionTransformer")
    inner: Any = model.stages[0].mixer.inner
    prefix = 0 if model.prefix_pos_embed is None else model.num_prefix_tokens

    def positions(match: Any, value: Tensor) -> dict[str, Tensor]:
        before, table = grid_of(value, prefix, None if model.pos_embed is None else model.pos_embed.shape[1:])
        return {"pos_embed": table} | ({} if before is None else {"prefix_pos_embed": before})

    theirs.leave(r"rope\.freqs_(cos|sin)", because="constants of a grid")
    theirs.leave(r"mask_token|lm_head\.(weight|bias)", because="they serve pretraining alone")
    out: dict[str, Tensor] = {}
    convert_inner = getattr(type(inner), "convert_state_dict", None)
    if convert_inner is not None:
        out |= theirs.parts(
            r"blocks\.(\d+)\.attn\.(.+)", r"stages.\1.mixer.inner", functools.partial(convert_inner, **options or {})
        )
    for block in range(len(model.stages)):
        for pair in (("fc1_g", "fc1_x"), ("w1", "w2")):
            out |= join(theirs, f"stages.{block}.mlp.inner.fc1", [f"blocks.{block}.mlp.{n}" for n in pair])
    block_of = r"blocks\.(\d+)"
    out |= theirs.renamed(
        {
            r"patch_embed\.proj\.(weight|bias)": r"stem.proj.\1",
            r"(cls_token|dist_token|reg_token)": r"\1",
            r"register_tokens": r"reg_token",
            r"pos_embed": positions,
            rf"{block_of}\.norm1\.(weight|bias)": r"stages.\1.mixer.norm.\2",
            rf"{block_of}\.norm2\.(weight|bias)": r"stages.\1.mlp.norm.\2",
            rf"{block_of}\.mlp\.(fc[12])\.(weight|bias)": r"stages.\1.mlp.inner.\2.\3",
            rf"{block_of}\.mlp\.(?:norm|ffn_ln)\.(weight|bias)": r"stages.\1.mlp.inner.norm.\2",
            rf"{block_of}\.mlp\.w12\.(weight|bias)": r"stages.\1.mlp.inner.fc1.\2",
            rf"{block_of}\.mlp\.w3\.(weight|bias)": r"stages.\1.mlp.inner.fc2.\2",
            rf"{block_of}\.(?:ls1\.gamma|gamma_1)": r"stages.\1.mixer.scale.gamma",
            rf"{block_of}\.(?:ls2\.gamma|gamma_2)": r"stages.\1.mlp.scale.gamma",
            r"norm\.(weight|bias)": r"norm.\1",
            r"fc_norm\.(weight|bias)": r"head.norm.\1",
            r"head\.(weight|bias)": r"head.fc.\1",
            r"head_dist\.(weight|bias)": r"head.fc_dist.\1",
        }
    )
    return theirs.close(out)


_TINY, _SMALL = dict(embed_dim=192, num_heads=3), dict(embed_dim=384, num_heads=6)
_BASE, _LARGE = dict(embed_dim=768, num_heads=12), dict(embed_dim=1024, depth=24, num_heads=16)
_HUGE = dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14)
_AT_384 = dict(img_size=384)
_VIT: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _TINY,
    "vit_tiny_patch16_384": _TINY | _AT_384,
    "vit_small_patch32_224": _SMALL | dict(patch_size=32),
    "vit_small_patch16_224": _SMALL,
    "vit_small_patch16_384": _SMALL | _AT_384,
    "vit_base_patch32_224": _BASE | dict(patch_size=32),
    "vit_base_patch16_224": _BASE,
    "vit_base_patch16_384": _BASE | _AT_384,
    "vit_base_patch8_224": _BASE | dict(patch_size=8),
    "vit_large_patch16_224": _LARGE,
    "vit_large_patch16_384": _LARGE | _AT_384,
    "vit_large_patch14_224": _LARGE | dict(patch_size=14),
    "vit_huge_patch14_224": _HUGE,
}
_DEIT: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": _TINY,
    "deit_small_patch16_224": _SMALL,
    "deit_base_patch16_224": _BASE,
    "deit_base_patch16_384": _BASE | _AT_384,
    "deit_tiny_distilled_patch16_224": _TINY | dict(distilled=True),
    "deit_small_distilled_patch16_224": _SMALL | dict(distilled=True),
    "deit_base_distilled_patch16_224": _BASE | dict(distilled=True),
    "deit_base_distilled_patch16_384": _BASE | _AT_384 | dict(distilled=True),
}
_THIRD: dict[str, Any] = dict(positions="grid", layer_scale=1e-6)
_DEIT3: dict[str, dict[str, Any]] = {
    "deit3_small_patch16_224": _SMALL | _THIRD,
    "deit3_medium_patch16_224": dict(embed_dim=512, num_heads=8) | _THIRD,
    "deit3_base_patch16_224": _BASE | _THIRD,
    "deit3_large_patch16_224": _LARGE | _THIRD,
    "deit3_huge_patch14_224": _HUGE | _THIRD,
}
_SECOND: dict[str, Any] = dict(
    positions="grid", layer_scale=1e-5, reg_tokens=4, patch_size=14, img_size=518, num_classes=0
)
_DINO: dict[str, dict[str, Any]] = {
    "vit_small_patch14_reg4_dinov2": _SMALL | _SECOND,
    "vit_base_patch14_reg4_dinov2": _BASE | _SECOND,
    "vit_large_patch14_reg4_dinov2": _LARGE | _SECOND,
    "vit_giant_patch14_reg4_dinov2": _SECOND
    | dict(embed_dim=1536, depth=40, num_heads=24, swiglu=True, mlp_ratio=4096 / 1536),
}
_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_SIDES = {name: int(name.rpartition("_")[2]) for name in _VIT | _DEIT | _DEIT3} | dict.fromkeys(_DINO, 518)
_PARAMS = {
    "vit_tiny_patch16_224": 5_717_416, "vit_tiny_patch16_384": 5_790_376, "vit_small_patch32_224": 22_878_952,
    "vit_small_patch16_224": 22_050_664, "vit_small_patch16_384": 22_196_584, "vit_base_patch32_224": 88_224_232,
    "vit_base_patch16_224": 86_567_656, "vit_base_patch16_384": 86_859_496, "vit_base_patch8_224": 86_576_872,
    "vit_large_patch16_224": 304_326_632, "vit_large_patch16_384": 304_715_752, "vit_large_patch14_224": 304_203_752,
    "deit_tiny_distilled_patch16_224": 5_910_800, "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192, "deit_base_distilled_patch16_384": 87_630_032,
    "vit_huge_patch14_224": 632_045_800, "deit_tiny_patch16_224": 5_717_416, "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656, "deit_base_patch16_384": 86_859_496, "deit3_small_patch16_224": 22_059_496,
    "deit3_medium_patch16_224": 38_849_512, "deit3_base_patch16_224": 86_585_320,
    "deit3_large_patch16_224": 304_374_760, "deit3_huge_patch14_224": 632_126_440,
    "vit_small_patch14_reg4_dinov2": 22_057_344, "vit_base_patch14_reg4_dinov2": 86_582_016,
    "vit_large_patch14_reg4_dinov2": 304_370_688, "vit_giant_patch14_reg4_dinov2": 1_136_483_840,
}  # fmt: skip


def _hub(names: Sequence[str], tag: str) -> dict[str, tuple[str, str]]:
    return {name: (f"timm/{name}.{tag}", "model.safetensors") for name in names}


_AUGREG = [name for name in _VIT if name not in ("vit_large_patch14_224", "vit_huge_patch14_224")]
_SECOND_RUN = ("vit_base_patch16_224", "vit_base_patch8_224")
_WEIGHTS = (
    _hub(_AUGREG, "augreg_in21k_ft_in1k")
    | _hub(_SECOND_RUN, "augreg2_in21k_ft_in1k")
    | _hub([*_DEIT, *_DEIT3], "fb_in1k")
    | _hub(list(_DINO), "lvd142m")
)
register_models(
    "vit",
    vit,
    _VIT | _DEIT | _DEIT3 | _DINO,
    params=_PARAMS,
    license="Apache-2.0",
    source="huggingface/pytorch-image-models",
    weights=_WEIGHTS,
    convert=convert,
    img_size=_SIDES,
    data_of=dict.fromkeys(_VIT, _HALF)
    | {name: {"crop_pct": 1.0} for name in [*_DEIT, *_DINO] if _SIDES[name] > 224}
    | {name: _HALF | {"crop_pct": 1.0} for name in _VIT if _SIDES[name] > 224},
)

"""DependencyViT: a vision transformer of reversed attention, in which patches form trees and leaves can be let go.

Ding et al., 2023, "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", CVPR,
arXiv 2304.03282. Blocks are those of a ViT without a class token, with
:class:`attnlib.nn.dense.dependency_vit.ReversedAttention` in the place of attention; messages ``M`` pass from block to
block, and the final tokens are pooled by them::

    y = mean_i M_i norm(x_i).

The Lite models let tokens go behind blocks 2, 5, 8 and 11: after the t-th of these ``1 - 0.16 t`` of all patches are
left, those that received the most. Blocks behind compute nothing for the others. In the pooled mean these count as
zeros, as any token does that sends nothing; in the maps of ``features_only`` they stay what they were when they were
let go.

Our reading, since the authors have published no code (see the mechanism, too): layer scale, the missing query, key and
value biases and the places of pruning follow an unmerged contribution to timm; it divides the pooled sum by the number
of the tokens that are left, which only scales logits. No weights are released, and no count of parameters is known.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_ints, check_real
from ...grids import Layout
from ...nn.dense.dependency_vit import Messages, ReversedAttention
from ...nn.layers import Mlp, normed
from ...normalizers import softmax_rows
from ..blocks import Block, Make, Place, at_slots, places
from ..build import register_models
from . import vit
from .stages import Output, stage_indices
from .vit import PatchStem, TokenHead, VisionTransformer

#: How final tokens are pooled.
POOLS = ("messages", "weighted", "plain")

Norm = functools.partial(nn.LayerNorm, eps=1e-6)


class Dependencies(NamedTuple):
    """Who depends on whom, of every block.

    Args:
        masks: (L, B, N, N) dependency masks, parents by children: what child ``i`` sends to ``j``, over all heads.
            Columns sum to the message of their child; those of tokens that were let go are zero.
        messages: (L, B, N) how much every token sends in each block.
    """

    masks: Tensor
    messages: Tensor


class DependencyBlock(Block):
    """A block whose MLP runs for the tokens that are left; the others stay as they are."""

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """(B, h, w, C) -> the same, and the messages."""
        x, carry = self.mixer(x, valid, carry, losses, layout)
        assert self.mlp is not None
        left = carry.left if isinstance(carry, Messages) else None
        return (self.mlp(x, valid)[0] if left is None else at_slots(self.mlp, x, left, valid)), carry


class DependencyViT(VisionTransformer):
    """A vision transformer whose final tokens are pooled by their messages.

    Args:
        message_pool: ``"messages"``: the mean of ``M_i norm(x_i)``; ``"weighted"``: their sum over that of ``M``;
            ``"plain"``: the mean of ``norm(x_i)``. Tokens that were let go are zeros in each.
        settings: of :class:`attnlib.models.backbones.vit.VisionTransformer`.
    """

    def __init__(self, *args: Any, message_pool: str = "messages", **settings: Any):
        super().__init__(*args, **settings)
        check_choice("message_pool", message_pool, POOLS)
        self.message_pool = message_pool

    def _weighed(self, x: Tensor, valid: Tensor | None, losses: dict[str, Tensor] | None = None) -> tuple[Tensor, Any]:
        """(B, h, w, C) the final tokens, normed and multiplied, and which of them exist."""
        *_, (y, exists, grid, carry) = self._handed_on(x, valid, losses)
        y = normed(self.norm, y, exists)
        if not isinstance(carry, Messages):  # another mechanism, without messages
            return y, exists
        log = carry.log if self.message_pool != "plain" else torch.zeros_like(carry.log)
        if carry.left is not None:
            gone = torch.ones_like(log, dtype=torch.bool).scatter(1, carry.left, False)
            log = log.masked_fill(gone, float("-inf"))
        if self.message_pool == "weighted":
            there = None if exists is None else exists.flatten(1)
            count = log.shape[1] if there is None else there.sum(1, keepdim=True)
            shares = softmax_rows(log if there is None else log.masked_fill(~there, float("-inf"))) * count
        else:
            shares = log.exp()
        return y * shares.to(y.dtype).view(*y.shape[:-1], 1), exists

    def forward_features(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, N, C): final tokens, normed and multiplied by their messages."""
        return self._weighed(x, valid)[0].flatten(1, 2)

    def forward(self, x: Tensor, valid: Tensor | None = None, returns: Sequence[str] = ()) -> Any:
        """As of :class:`attnlib.models.backbones.stages.Backbone`."""
        if isinstance(returns, str) or set(returns) - {"losses"}:
            raise ValueError(f"returns={returns!r} is not possible; possible: () and ('losses',)")
        losses: dict[str, Tensor] | None = {} if returns else None
        y = self.head(*self._weighed(x, valid, losses))
        return y if losses is None else Output(y, losses)

    @torch.no_grad()
    def dependencies(self, x: Tensor, valid: Tensor | None = None) -> Dependencies:
        """The dependency masks and messages of every block for images (B, in_chans, H, W).

        Raises:
            ValueError: a model of another mechanism.
        """
        inner: list[Any] = [block.mixer.inner for block in self.stages]  # type: ignore[union-attr]
        if not all(isinstance(m, ReversedAttention) for m in inner):
            raise ValueError("dependencies are those of reversed attention, and this model has another mechanism")
        calls: list[tuple[Tensor, dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> None:
            calls.append((args[0], {k: v for k, v in given.items() if k != "returns"}))

        hooks = [m.register_forward_hook(note, with_kwargs=True) for m in inner]
        try:
            list(self._handed_on(x, valid))
        finally:
            for hook in hooks:
                hook.remove()
        made = [
            m(tokens, **given, returns=("weights", "carry")) for m, (tokens, given) in zip(inner, calls, strict=True)
        ]
        masks, messages = [], []
        for out, (_, given) in zip(made, calls, strict=True):
            masks.append(out.weights.sum(1))
            message, left = out.carry.log.exp(), given["carry"].left if given.get("carry") is not None else None
            if left is not None:  # the others sent nothing here
                message = torch.zeros_like(message).scatter(1, left, message.gather(1, left))
            messages.append(message)
        return Dependencies(torch.stack(masks), torch.stack(messages))


def dependency_vit(
    patch_size: int = 16,
    embed_dim: int = 192,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    layer_scale: float | None = 1e-6,
    prune_blocks: Sequence[int] = (),
    prune_ratio: float = 0.16,
    message_pool: str = "messages",
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
    **settings: Any,
) -> DependencyViT:
    """A DependencyViT.

    Args:
        patch_size: pixels per side of a patch.
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads, hidden width of MLPs over the width.
        layer_scale: start of the learned scales behind attention and MLP; ``None`` for none.
        prune_blocks: blocks that let tokens go, from 0.
        prune_ratio: share of all patches that each of these lets go.
        message_pool: as of :class:`DependencyViT`.
        mechanism: as in :func:`attnlib.create_model`.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate: as in :func:`attnlib.create_model`.
        global_pool: ``"avg"``, ``"max"`` or ``""`` for all tokens.
        settings: of :class:`attnlib.nn.dense.dependency_vit.ReversedAttention` in all blocks.

    Raises:
        ValueError: a block that is not there, more tokens let go than there are.
    """
    check_int("patch_size", patch_size, least=1)
    check_int("depth", depth, least=1)
    check_real("mlp_ratio", mlp_ratio, above=0)
    check_real("prune_ratio", prune_ratio, least=0, below=1)
    pruning = stage_indices("prune_blocks", check_ints("prune_blocks", prune_blocks), depth) if prune_blocks else []
    if pruning and 1 - prune_ratio * len(pruning) <= 0:
        raise ValueError(
            f"prune_ratio={prune_ratio} lets all tokens go after {len(pruning)} prune_blocks; possible: below "
            f"{1 / len(pruning):.3g}"
        )

    def own(place: Place) -> nn.Module:
        kept = 1 - prune_ratio * (pruning.index(place.depth) + 1) if place.depth in pruning else None
        return ReversedAttention(place.dim, place.num_heads, keep_rate=kept, **settings)

    make = mechanism or own
    (row,) = places([embed_dim], [depth], [num_heads], [patch_size], drop_path_rate)
    blocks = [
        DependencyBlock(
            p.dim, make(p), Mlp(p.dim, mlp_ratio), norm=Norm, drop_path=p.drop_path, layer_scale=layer_scale
        )
        for p in row
    ]
    head = TokenHead(embed_dim, num_classes, global_pool, 0, False, drop=drop_rate)
    model = DependencyViT(
        PatchStem(in_chans, embed_dim, patch_size), blocks, embed_dim, patch_size, Norm(embed_dim), head,
        class_token=False, message_pool=message_pool, num_classes=num_classes, in_chans=in_chans, img_size=img_size,
    )  # fmt: skip
    vit.start(model, also=(ReversedAttention,))
    return model


_LITE = dict(prune_blocks=(1, 4, 7, 10))
register_models(
    "dependency-vit",
    dependency_vit,
    {
        "dependency_vit_ti": dict(embed_dim=192),
        "dependency_vit_s": dict(embed_dim=384),
        "dependency_vit_lite_ti": dict(embed_dim=192) | _LITE,
        "dependency_vit_lite_s": dict(embed_dim=384) | _LITE,
    },
)

"""Sparsifiner: a DeiT whose heads read the pairs that a cheap predictor chooses, and may drop tokens on the way.

Wei et al., 2023, "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv
2303.13755. Everything but attention is DeiT's, whose weights it starts from: weights of a DeiT load, and leave the
predictors as they are initialised. Training first fits the predictors to the attention of that DeiT, then the whole
model to its classes and tokens; :func:`training_losses` has the losses of both phases.

Differs from the authors' class: only chosen pairs are computed; blocks behind one that drops tokens compute nothing for
these; any size, see :class:`attnlib.nn.sparse.sparsifiner.Sparsifiner`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_type
from ...grids import Layout
from ...nn.layers import Mlp, Patchify, normed
from ...nn.sparse.sparsifiner import Sparsifiner
from ..blocks import Block, Make, at_slots, places
from ..build import register_models
from . import vit
from .stages import stage_indices
from .vit import TokenHead, VisionTransformer

#: Weights of the losses, as released.
WEIGHTS: Mapping[str, float] = {"reconstruction": 0.01, "classes": 1.0, "logits": 0.5, "tokens": 0.5}


class DroppingBlock(Block):
    """A block that computes its MLP for the tokens that are left, and sets the others to zero."""

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, N, C) -> the same, and the slots (B, K) of the tokens that are left."""
        x, carry = self.mixer(x, valid, carry, losses, layout)
        assert self.mlp is not None
        if not isinstance(carry, Tensor) or carry.shape[1] == x.shape[1]:
            return self.mlp(x, valid)[0], carry
        return at_slots(self.mlp, x, carry, valid, torch.zeros_like(x)), carry


def sparsifiner(
    patch_size: int = 16,
    embed_dim: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    mlp_ratio: float = 4.0,
    keep_rate: float | Sequence[float] = 0.25,
    drop_blocks: Sequence[int] = (),
    token_keep_rate: float = 0.7,
    grid: int | Sequence[int] | None = None,
    reduce_n: int = 6,
    reduce_c: int = 2,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "token",
    **settings: Any,
) -> VisionTransformer:
    """A Sparsifiner on DeiT.

    Args:
        patch_size: pixels per side of a patch.
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads, hidden width of MLPs over the width.
        keep_rate: share of the tokens that a query reads, of all blocks or one each.
        drop_blocks: blocks that drop tokens, from 0; the release names 3, 6 and 9, and has none by default.
        token_keep_rate: share of the patches that the first of these leaves; the n-th leaves this to the power of n.
        grid: that the predictors' tables are made for; that of ``img_size`` by default.
        reduce_n, reduce_c: tokens per basis map, and by how much the predictors' heads are narrower.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.models.backbones.vit.vit`.
        settings: of :class:`attnlib.nn.sparse.sparsifiner.Sparsifiner` in all blocks: thresholds, ``recon_share``,
            ``compat``.

    Raises:
        ValueError: not one keep rate per block, a block that is not there.
    """
    check_int("patch_size", patch_size, least=1)
    rates = [keep_rate] * depth if isinstance(keep_rate, (int, float)) else list(keep_rate)
    if len(rates) != depth:
        raise ValueError(f"keep_rate={rates} must have one number for each of depth={depth} blocks")
    dropping = stage_indices("drop_blocks", drop_blocks, depth) if len(drop_blocks) else []
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if min(sides) < patch_size:
        raise ValueError(f"img_size={img_size} holds no patch of patch_size={patch_size}")
    places_of = tuple(max(1, -(-side // patch_size)) for side in sides) if grid is None else grid

    def own(place: Any) -> nn.Module:
        left = token_keep_rate ** (dropping.index(place.depth) + 1) if place.depth in dropping else None
        return Sparsifiner(
            place.dim, place.num_heads, rates[place.depth], grid=places_of, reduce_n=reduce_n, reduce_c=reduce_c,
            token_keep_rate=left, **settings,
        )  # fmt: skip

    make = mechanism or own
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    (row,) = places([embed_dim], [depth], [num_heads], [patch_size], drop_path_rate)
    blocks = [DroppingBlock(p.dim, make(p), Mlp(p.dim, mlp_ratio), norm=norm, drop_path=p.drop_path) for p in row]
    model = VisionTransformer(
        Patchify(in_chans, embed_dim, patch_size, norm=None), blocks, embed_dim, patch_size, norm(embed_dim),
        TokenHead(embed_dim, num_classes, global_pool, drop=drop_rate), num_classes=num_classes, in_chans=in_chans,
        img_size=img_size,
    )  # fmt: skip
    vit.start(model, also=(Sparsifiner,))
    return model


def training_losses(
    student: VisionTransformer,
    teacher: VisionTransformer,
    images: Tensor,
    labels: Tensor | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> dict[str, Tensor]:
    """The weighted terms of the loss in the phase that the student is in; their sum is what training minimises.

    While its predictors are being fitted (see ``recon_share`` of the mechanism), ``reconstruction``: the mean over
    blocks of the squared distance of the predicted maps from the teacher's. Afterwards ``classes`` (cross entropy,
    where there are labels), ``logits`` (Kullback-Leibler divergence from the teacher's) and ``tokens`` (mean squared
    distance of the final patches that are left).

    Args:
        student: of :func:`sparsifiner`, in training mode.
        teacher: a vision transformer of softmax attention with as many blocks and heads, on the same patches.
        images: (B, in_chans, H, W).
        labels: (B,) classes.
        weights: of the terms.

    Raises:
        ValueError: a teacher on another number of patches, or of other blocks.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        check_type(name, model, VisionTransformer)
    fitting = any(getattr(block.mixer.inner, "_fits", False) for block in student.stages)  # type: ignore[union-attr]
    with torch.no_grad():
        read = _calls(teacher, images) if fitting else ([], teacher.forward_features(images))
        theirs, goal = read
        maps = [inner(x, layout=layout, returns=("weights",)).weights for inner, x, layout, _ in theirs]
    mine, features = _calls(student, images)
    if features.shape[1] != goal.shape[1] or (fitting and len(maps) != len(mine)):
        raise ValueError(
            f"teacher has {len(teacher.stages)} blocks on {goal.shape[1]} tokens, student {len(student.stages)} on "
            f"{features.shape[1]}"
        )
    if fitting:
        total = features.new_zeros(())
        for (inner, x, layout, _), wanted in zip(mine, maps, strict=True):
            made = inner.approximation(x, layout=layout)
            total = total + (made - wanted[:, :, wanted.shape[2] - made.shape[2] :]).square().sum()
        return {"reconstruction": total / len(mine) * weights["reconstruction"]}
    losses: dict[str, Tensor] = {}
    logits = student.forward_head(features)
    if labels is not None:
        losses["classes"] = F.cross_entropy(logits, labels) * weights["classes"]
    with torch.no_grad():
        wanted = teacher.forward_head(goal).log_softmax(-1)
    losses["logits"] = (
        F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True) * weights["logits"]
    )
    before, left = student.num_prefix_tokens, mine[-1][3]
    if isinstance(left, Tensor):
        at = left[:, before:, None].expand(-1, -1, features.shape[2])
        pair = features.gather(1, at), goal.gather(1, at)
    else:
        pair = features[:, before:], goal[:, before:]
    losses["tokens"] = F.mse_loss(*pair) * weights["tokens"]
    return losses


def _calls(model: VisionTransformer, images: Tensor) -> tuple[list[tuple[Any, Tensor, Layout | None, Any]], Tensor]:
    """What the mechanism of every block was called with, and handed on; and the final tokens, normed."""
    found: list[tuple[Any, Tensor, Layout | None, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        found.append((module, args[0], kwargs.get("layout"), getattr(out, "carry", None)))

    hooks = [block.mixer.inner.register_forward_hook(note, with_kwargs=True) for block in model.stages]  # type: ignore[union-attr]
    try:
        *_, (y, exists, _) = model._tokens(images, None)
    finally:
        for hook in hooks:
            hook.remove()
    return found, normed(model.norm, y, exists)


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``Sparsifiner``, or from a DeiT, which leaves the predictors of ``model`` as they are."""
    out = vit.convert(state_dict, model)
    released = any("mask_predictor." in name for name in state_dict)
    ours = r"stages\.\d+\.mixer\.inner\.(fitting" + (")" if released else r"|reduce|expand|cheap_[qk]\.\w+)")
    return out | {name: value for name, value in model.state_dict().items() if re.fullmatch(ours, name)}


register_models(
    "sparsifiner",
    sparsifiner,
    {
        "sparsifiner_deit_small": dict(embed_dim=384, num_heads=6),
        "sparsifiner_deit_base": dict(embed_dim=768, num_heads=12),
    },
    params={"sparsifiner_deit_small": 22_251_880, "sparsifiner_deit_base": 86_768_872},
    license="MIT",
    source="lim142857/Sparsifiner",
    convert=convert,
)

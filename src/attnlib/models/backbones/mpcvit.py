"""MPCViT's networks: small vision transformers whose heads are ReLU-softmax or scaling attention.

Zeng et al., 2022, arXiv 2211.13955. Patches of 4 x 4 pixels, a class token, learned positions; in a block the norm
behind attention is also what the MLP is added to::

    x <- norm_2(x + attention(norm_1(x))),    x <- x + mlp(x).

Sizes are those of the release: ``mpcvit_7_4_32`` for images of 32 pixels, ``mpcvit_9_12_64`` for 64. A search trains
``alpha`` with the loss ``cost``; :func:`attnlib.nn.dense.mpcvit.choose_heads` decides; ``attnlib.deploy`` computes what
is left.

Differs from the authors' class: any size from one patch up, positions interpolated; with ``gelu_gates`` the size that
it was made for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_int
from ...nn.dense.mpcvit import MPCAttention, MPCMlp
from ...nn.layers import DropPath
from ...nn.released import Released
from ..blocks import Make, Residual, init_weights, places
from ..build import register_models
from . import vit as plain


class MPCBlock(nn.Module):
    """``x <- norm(x + mixer(x))``, ``x <- x + mlp(x)``; ``mixer`` a residual sublayer with a norm of its own.

    Args:
        dim: width.
        mixer: the mechanism.
        mlp: called as ``mlp(x, valid)``.
        drop_path: stochastic depth of both.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.mixer = Residual(dim, mixer, drop_path=drop_path)
        self.norm = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Any = None,
    ) -> tuple[Tensor, Any]:
        """(B, N, C) -> the same, and the carry for the next block."""
        x, carry = self.mixer(x, valid, carry, losses, layout)
        x = self.norm(x)
        return x + self.drop_path(self.mlp(x, valid)), carry


def mpcvit(
    embed_dim: int = 256,
    depth: int = 7,
    num_heads: int = 4,
    mlp_ratio: float = 2.0,
    patch_size: int = 4,
    alpha: float = 1.0,
    gelu_gates: bool = False,
    attn_drop: float = 0.1,
    mechanism: Make | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 32,
    drop_path_rate: float = 0.1,
    drop_rate: float = 0.0,
    global_pool: str = "token",
) -> plain.VisionTransformer:
    """An MPCViT.

    Args:
        embed_dim, depth, num_heads, mlp_ratio, patch_size: as of :func:`attnlib.models.backbones.vit.vit`.
        alpha, attn_drop: of :class:`attnlib.nn.dense.mpcvit.MPCAttention`.
        gelu_gates: one gate of the GELU per token (MPCViT+); the class token has one, too.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_int("patch_size", patch_size, least=1)
    check_flag("gelu_gates", gelu_gates)
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    tokens = 1 + (sides[0] // patch_size) * (sides[1] // patch_size)

    def own(place: Any) -> nn.Module:
        return MPCAttention(place.dim, place.num_heads, alpha, attn_drop=attn_drop)

    make = mechanism or own
    (row,) = places([embed_dim], [depth], [num_heads], [patch_size], drop_path_rate)
    blocks = [
        MPCBlock(
            place.dim, make(place), MPCMlp(place.dim, int(embed_dim * mlp_ratio), tokens if gelu_gates else 0),
            place.drop_path,
        )
        for place in row
    ]  # fmt: skip
    head = plain.TokenHead(embed_dim, num_classes, global_pool, 1, True, drop=drop_rate)
    model = plain.VisionTransformer(
        plain.PatchStem(in_chans, embed_dim, patch_size), blocks, embed_dim, patch_size, nn.LayerNorm(embed_dim), head,
        num_classes=num_classes, in_chans=in_chans, img_size=img_size,
    )  # fmt: skip
    init_weights(model, also=(MPCAttention,))
    with torch.no_grad():
        nn.init.kaiming_normal_(model.stem.proj.weight)  # type: ignore[union-attr, arg-type]
        for table in (model.pos_embed, model.prefix_pos_embed):
            assert table is not None
            nn.init.trunc_normal_(table, std=0.2)
        assert model.cls_token is not None
        nn.init.zeros_(model.cls_token)
    return model


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``ViTLite``."""
    theirs = Released(state_dict, "MPCViT's ViTLite")

    def positions(match: Any, value: Tensor) -> dict[str, Tensor]:
        before, table = plain.grid_of(value, 1)
        assert before is not None
        return {"pos_embed": table, "prefix_pos_embed": before}

    block, ours = r"classifier\.blocks\.(\d+)", r"stages.\1"
    out = theirs.parts(rf"{block}\.self_attn\.(.+)", rf"{ours}.mixer.inner", MPCAttention.convert_state_dict)
    out |= theirs.renamed(
        {
            r"tokenizer\.conv_layers\.0\.0\.(weight|bias)": r"stem.proj.\1",
            r"classifier\.class_emb": "cls_token",
            r"classifier\.positional_emb": positions,
            rf"{block}\.pre_norm\.(weight|bias)": rf"{ours}.mixer.norm.\2",
            rf"{block}\.norm1\.(weight|bias)": rf"{ours}.norm.\2",
            rf"{block}\.linear([12])\.(weight|bias)": rf"{ours}.mlp.fc\2.\3",
            rf"{block}\.beta": rf"{ours}.mlp.beta",
            r"classifier\.norm\.(weight|bias)": r"norm.\1",
            r"classifier\.fc\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(out)


_SIZES: dict[str, dict[str, Any]] = {
    "mpcvit_7_4_32": dict(),
    "mpcvit_9_12_64": dict(embed_dim=192, depth=9, num_heads=12, num_classes=200, img_size=64),
}

register_models(
    "mpcvit",
    mpcvit,
    _SIZES,
    params={"mpcvit_7_4_32": 3_716_902, "mpcvit_9_12_64": 2_766_068},
    source="PKU-SEC-Lab/mpcvit",
    convert=convert,
    img_size={"mpcvit_7_4_32": 32, "mpcvit_9_12_64": 64},
    data={"crop_pct": 1.0},
)

"""DynamicVis: four stages whose blocks scan few tokens and scale the rest, for large images of which little matters.

Chen et al., 2025, "DynamicVis: An Efficient and General Visual Foundation Model for Remote Sensing Image
Understanding", arXiv 2503.16426. Overlapping patches (7 x 7 of stride 4, then 3 x 3 of stride 2) with norms behind them
and a table of positions in the first stage; blocks are sparse mixers alone, without norms or MLPs around them; one in
eight, four, two and one tokens is scanned per stage; a norm ends every stage.

Differs from the authors' code: any size, with the table interpolated at every call; see
:class:`attnlib.nn.scan.dynamicvis.SparseScan` for the rest. No repository could be fetched: their file was read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_ints
from ...nn.layers import Patchify, PositionTable
from ...nn.released import Released, Rule
from ...nn.scan.dynamicvis import SparseScan
from ..blocks import Chain, Make, Place, Residual, places
from ..build import register_models
from .stages import Backbone, Head, Stage

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


def dynamicvis(
    embed_dims: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (2, 4, 16, 4),
    reductions: Sequence[int] = (8, 4, 2, 1),
    order: str = "score",
    keep_rest: bool = True,
    normalize: bool = False,
    noise: float = 0.1,
    noise_decay: bool = False,
    global_tokens: int = -1,
    global_place: str = "head",
    path: str = "mean",
    state_dim: int = 16,
    positions: bool = True,
    compat: str | None = None,
    num_heads: Sequence[int] | None = None,
    mechanism: Make | None = None,
    num_classes: int = 0,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 512,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A DynamicVis.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        reductions: one in how many tokens is scanned, per stage; 0 for all, without a router.
        order, keep_rest, normalize, noise, noise_decay, global_tokens, global_place, path, state_dim, compat: of
            :class:`attnlib.nn.scan.dynamicvis.SparseScan`.
        positions: the table.
        num_heads: heads per stage of another ``mechanism``; ``width / 32`` by default.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_ints("reductions", reductions, least=0)
    if len(reductions) != len(depths):
        raise ValueError(f"reductions={tuple(reductions)} must have one number for each of {len(depths)} stages")

    def own(place: Place) -> nn.Module:
        return SparseScan(
            place.dim, reductions[place.stage], order, keep_rest, normalize, noise, noise_decay, global_tokens,
            global_place, path, state_dim, compat=compat,
        )  # fmt: skip

    make, dims = mechanism or own, list(embed_dims)
    heads = [max(1, d // 32) for d in dims] if num_heads is None else num_heads
    steps = [4 * 2**i for i in range(len(dims))]
    stages = []
    for row in places(dims, depths, heads, steps, drop_path_rate):
        between = Patchify(dims[row[0].stage - 1], row[0].dim, 3, 2, 1, LayerNorm) if row[0].stage else None
        blocks = [Residual(p.dim, make(p), None, p.drop_path) for p in row]
        stages.append(Stage(blocks, between, LayerNorm(row[0].dim)))
    patches = Patchify(in_chans, dims[0], 7, 4, 3, LayerNorm)
    side = [-(-n // 4) for n in ((img_size, img_size) if isinstance(img_size, int) else img_size)]
    stem: nn.Module = Chain(patches, PositionTable(dims[0], side)) if positions else Chain(patches)
    head = Head(dims[-1], num_classes, global_pool, LayerNorm, drop_rate)
    model = Backbone(stem, stages, dims, steps, None, head, num_classes, in_chans, img_size)
    model.input_name = "stem.0.proj.weight"
    if positions:
        nn.init.zeros_(model.stem[1].pos_embed)  # type: ignore[index, union-attr, arg-type]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    if isinstance(head.fc, nn.Linear):
        nn.init.normal_(head.fc.weight, std=0.01)
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``DynamicVisBackbone``, or a classifier around it."""
    theirs = Released(state_dict, "the authors' DynamicVis", ("backbone.",))

    def patches(match: Any, value: Tensor) -> dict[str, Tensor]:
        stage, part = int(match[1]), {"projection": "proj", "norm": "norm"}[match[2]]
        to = f"stages.{stage}.downsample" if stage else "stem.0"
        return {f"{to}.{part}.{match[3]}": value}

    def table(match: Any, value: Tensor) -> dict[str, Tensor]:
        side = math.isqrt(value.shape[1])
        return {"stem.1.pos_embed": value[0].T.unflatten(1, (side, -1))}

    front = r"(?:backbone\.)?"
    out = theirs.parts(
        front + r"layers\.(\d+)\.1\.(\d+)\.(.+)", r"stages.\1.blocks.\2.inner", SparseScan.convert_state_dict
    )
    rules: dict[str, Rule] = {
        front + r"layers\.(\d+)\.0\.(projection|norm)\.(weight|bias)": patches,
        front + r"layers\.(\d+)\.2\.(weight|bias)": r"stages.\1.norm.\2",
        front + "pos_embed": table,
        front + r"post_meanpool_norm\.(weight|bias)": r"head.norm.\1",
        r"(?:head\.)?fc\.(weight|bias)": r"head.fc.\1",
    }
    return theirs.close(out | theirs.renamed(rules))


register_models(
    "dynamicvis",
    dynamicvis,
    {
        "dynamicvis_base": {},
        "dynamicvis_large": dict(embed_dims=(128, 256, 512, 1024), depths=(2, 4, 32, 4)),
    },
    params={"dynamicvis_base": 36_747_072, "dynamicvis_large": 91_244_288},  # with the norm of their mean map
    source="KyanChen/DynamicVis",
    convert=convert,
    img_size={"dynamicvis_base": 512, "dynamicvis_large": 512},
)

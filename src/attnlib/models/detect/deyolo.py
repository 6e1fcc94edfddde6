"""DEYOLO: a visible and an infrared image of one scene, a backbone each, fused at three strides, and one detector.

Chen et al., 2024, "DEYOLO: Dual-Feature-Enhancement YOLO for Cross-Modality Object Detection", arXiv 2412.04931. The
backbones, the neck and the head are those of the published configurations n, s, m, l and x: blocks
(:mod:`attnlib.models.detect.pan`) of which the first of each backbone ends in a :class:`BiFocus`; the maps of strides
8, 16 and 32 go through :class:`attnlib.nn.multimodal.deyolo.DualEnhancement`, whose merged maps go to the neck.

Written from the equations and the published configurations. What building these has as a result is kept, because their
numbers of parameters follow from it: at stride 4 there stand as many whole focused blocks one after the other as the
configuration has bottlenecks, each of one bottleneck without a shortcut.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_int, check_ints, check_real
from ...nn.multimodal.deyolo import BiFocus, DualEnhancement, conv_rules, rules
from ...nn.released import Released, Rule
from ..build import register_models
from .anchor_free import AnchorFreeDetector, DecoupledHead, Predicted
from .pan import PAN, CSPBackbone, CSPBlock, block_rules, check_images

#: Of all norms of the released detectors.
NORM: dict[str, Any] = dict(eps=1e-3, momentum=0.03)
#: Channels at the strides 2 to 32, and bottlenecks at the strides 4 to 32, before a size scales them.
DIMS, DEPTHS = (64, 128, 256, 512, 1024), (3, 6, 6, 3)
#: Sides of the fused maps of a square image of 640 pixels.
SIDES = (80, 40, 20)


class FocusedBlock(nn.Sequential):
    """A :class:`CSPBlock`, and a :class:`BiFocus` after it.

    Args:
        dim, depth, shortcut, groups, expansion: of the former.
        out_dim: channels out; ``dim`` by default.
    """

    def __init__(
        self, dim: int, depth: int = 1, shortcut: bool = False, out_dim: int | None = None, groups: int = 1,
        expansion: float = 0.5,
    ):  # fmt: skip
        out = dim if out_dim is None else check_int("out_dim", out_dim, least=2)
        super().__init__(CSPBlock(dim, out, depth, shortcut, groups, expansion, **NORM), BiFocus(out, **NORM))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``C2f_BiFocus``."""
        theirs = Released({f"block.{k}": v for k, v in state_dict.items()}, "the authors' C2f_BiFocus")
        return theirs.close(theirs.renamed({**block_rules("block", "0"), **BiFocus.rules(r"block\.bifocus\.", "1.")}))


class DEYOLO(AnchorFreeDetector):
    """Images ``x`` (B, in_chans, H, W) and ``infrared`` (B, infrared_chans, H, W) -> what every point says.

    Args:
        num_classes: of objects.
        width: channels are 64, 128, 256, 512 and 1024 times it, in eighths rounded up.
        depth: bottlenecks are 3 (at the strides 4 and 32) and 6 times it.
        max_dim: no map has more channels than ``width`` times it.
        in_chans: of ``x``.
        infrared_chans: of ``infrared``; like ``in_chans`` by default.
        sides: of the maps at the strides 8, 16 and 32 for which the fusions' pyramids are made.
        pooling, compat: of :class:`attnlib.nn.multimodal.deyolo.DualEnhancement`.
        bins: of the head's distributions.
        weights, assignment: of :class:`attnlib.models.detect.anchor_free.AnchorFreeDetector`.

    >>> import torch
    >>> model = DEYOLO(3, width=0.125, depth=0.33).eval()
    >>> boxes = model.predict(torch.rand(1, 3, 50, 70), torch.rand(1, 3, 50, 70))[0].boxes
    >>> boxes.shape[1:]
    torch.Size([4])
    """

    head_names: Sequence[str] = ("head.classes.",)

    def __init__(
        self,
        num_classes: int = 80,
        width: float = 0.25,
        depth: float = 0.33,
        max_dim: int = 1024,
        in_chans: int = 3,
        infrared_chans: int | None = None,
        sides: Sequence[int] = SIDES,
        pooling: str = "after",
        compat: str = "",
        bins: int = 16,
        weights: Sequence[float] = (7.5, 0.5, 1.5),
        assignment: Mapping[str, Any] | None = None,
    ):
        check_real("width", width, above=0)
        check_real("depth", depth, above=0)
        check_int("max_dim", max_dim, least=1)
        dims = [max(8, math.ceil(min(d, max_dim) * width / 8) * 8) for d in DIMS]
        depths = [max(1, round(n * depth)) for n in DEPTHS]
        sides = check_ints("sides", sides, least=20)
        if len(sides) != 3:
            raise ValueError(f"sides must be three, of the maps at the strides 8, 16 and 32, got {sides}")
        super().__init__(
            None, PAN(dims[2:], depths[0], **NORM), DecoupledHead(dims[2:], num_classes, bins=bins, **NORM), weights,
            assignment,
        )  # fmt: skip
        self.in_chans = check_int("in_chans", in_chans, least=1)
        self.infrared_chans = in_chans if infrared_chans is None else check_int("infrared_chans", infrared_chans, 1)
        self.num_classes = num_classes

        def first(dim: int, count: int) -> nn.Module:
            return nn.Sequential(*(FocusedBlock(dim) for _ in range(count)))

        self.encoders = nn.ModuleList(
            CSPBackbone(dims, depths, channels, first, **NORM) for channels in (self.in_chans, self.infrared_chans)
        )
        self.fusions = nn.ModuleList(
            DualEnhancement(d, side, pooling=pooling, compat=compat, reduction=min(16, d), **NORM)
            for d, side in zip(dims[2:], sides, strict=True)
        )

    def features(self, *images: Tensor) -> list[Tensor]:
        """The merged maps (B, H, W, C) at the strides 8, 16 and 32."""
        x, infrared = images
        check_images("x", x, self.in_chans)
        check_images("infrared", infrared, self.infrared_chans)
        if x.shape[0] != infrared.shape[0] or x.shape[2:] != infrared.shape[2:]:
            raise ValueError(
                f"x and infrared must be of one batch and size, pixel on pixel; got {tuple(x.shape)} and "
                f"{tuple(infrared.shape)}"
            )
        maps = zip(self.fusions, self.encoders[0](x), self.encoders[1](infrared), strict=True)
        return [DualEnhancement.merge(*fusion(visible, other)) for fusion, visible, other in maps]

    def forward(self, x: Tensor, infrared: Tensor) -> Predicted:  # type: ignore[override]
        """What every point says.

        Args:
            x: visible images, in [0, 1].
            infrared: of the same scenes and size, pixel on pixel.
        """
        made: Predicted = self.head(self.neck(self.features(x, infrared)))
        return made


def convert(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """From the authors' ``DetectionModel`` of one of the published configurations."""
    theirs = Released(state_dict, "the authors' DEYOLO")
    made: dict[str, Rule] = {}
    for which, start in enumerate((0, 10)):
        ours = f"encoders.{which}"
        made |= conv_rules(rf"{start}", f"{ours}.stem")
        for level in range(4):
            made |= conv_rules(rf"{start + 1 + 2 * level}", f"{ours}.downs.{level}")
            if level:
                made |= block_rules(rf"{start + 2 + 2 * level}", f"{ours}.blocks.{level}")
        made |= _focused(rf"{start + 2}", f"{ours}.blocks.0")
        for j, name in ((1, "reduce"), (2, "join")):
            made |= conv_rules(rf"{start + 9}\.cv{j}", f"{ours}.pool.{name}")
    for level in range(3):
        made |= rules(rf"{20 + level}\.", f"fusions.{level}.")
    for layer, ours in ((25, "top_down.0"), (28, "top_down.1"), (31, "bottom_up.0"), (34, "bottom_up.1")):
        made |= block_rules(rf"{layer}", f"neck.{ours}")
    made |= conv_rules("29", "neck.downs.0") | conv_rules("32", "neck.downs.1")
    for branch, ours in ((2, "boxes"), (3, "classes")):
        for at in (0, 1):
            made[rf"35\.cv{branch}\.(\d)\.{at}\.conv\.weight"] = rf"head.{ours}.\1.{at}.conv.weight"
            made[rf"35\.cv{branch}\.(\d)\.{at}\.bn\.(\w+)"] = rf"head.{ours}.\1.{at}.norm.\2"
        made[rf"35\.cv{branch}\.(\d)\.2\.(weight|bias)"] = _last(ours)
    made[r"35\.dfl\.conv\.weight"] = lambda found, value: {"head.places": value.flatten()}
    return theirs.close(theirs.renamed(made))


def _last(ours: str) -> Rule:
    def rule(found: re.Match[str], value: Tensor) -> Mapping[str, Tensor]:
        return {f"head.{ours}.{found[1]}.2.{found[2]}": value.flatten(1) if found[2] == "weight" else value}

    return rule


def _focused(theirs: str, ours: str) -> dict[str, Rule]:
    """Several focused blocks have a number before all names, a single one has none."""
    out: dict[str, Rule] = {}
    for count in range(8):
        for before, at in [(rf"{theirs}\.{count}", count), *([(theirs, 0)] if count == 0 else [])]:
            out |= block_rules(before, f"{ours}.{at}.0")
            out |= BiFocus.rules(rf"{before}\.bifocus\.", f"{ours}.{at}.1.")
    return out


#: Parameters as counted on the authors' models of the published configurations.
PARAMS = dict(n=6_154_300, s=22_972_636, m=48_817_468, l=78_428_060, x=122_412_476)

register_models(
    "deyolo",
    DEYOLO,
    {
        "deyolo_n": dict(width=0.25, depth=0.33, max_dim=1024),
        "deyolo_s": dict(width=0.5, depth=0.33, max_dim=1024),
        "deyolo_m": dict(width=0.75, depth=0.67, max_dim=768),
        "deyolo_l": dict(width=1.0, depth=1.0, max_dim=512),
        "deyolo_x": dict(width=1.25, depth=1.0, max_dim=512),
    },
    params={f"deyolo_{size}": count for size, count in PARAMS.items()},
    source="chips96/DEYOLO",
    convert=convert,
    img_size=640,
    task="detect",
)

__all__ = ["DEYOLO", "FocusedBlock", "convert"]

"""Swin (Liu et al., 2021, arXiv 2103.14030) as the encoder of detectors: normed maps of its last stages.

UPN of ChatRex reads Swin-L's four maps, GeoGLIP of SVE-Math Swin-T's. As released for detection, windows are filled up
with zeros that take part, and they are moved also where one covers the map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...nn.partition.maxvit import PartitionAttention
from ...nn.released import Released
from ..backbones import hosts
from ..blocks import Place

_B, _L = dict(embed_dim=128, num_heads=(4, 8, 16, 32)), dict(embed_dim=192, num_heads=(6, 12, 24, 48))
_DEEP: dict[str, Any] = dict(depths=(2, 2, 18, 2))
#: Settings by the names of UPN's configuration.
SIZES: dict[str, dict[str, Any]] = {
    "swin_T_224_1k": {},
    "swin_B_224_22k": _B | _DEEP,
    "swin_B_384_22k": _B | _DEEP | dict(window_size=12),
    "swin_L_224_22k": _L | _DEEP,
    "swin_L_384_22k": _L | _DEEP | dict(window_size=12),
}


class SwinMaps(nn.Module):
    """Images (B, 3, H, W) to maps (B, C_i, h_i, w_i) of the last stages, finest first, each behind a norm of its own.

    Args:
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths, num_heads: per stage.
        window_size: side of windows.
        first: the stage whose map is the first that is given.
        drop_path_rate: stochastic depth of the last block.

    >>> swin = SwinMaps(8, (1, 1), (1, 2), 4)
    >>> [tuple(m.shape) for m in swin(torch.randn(1, 3, 30, 16))]
    [(1, 8, 8, 4), (1, 16, 4, 2)]
    """

    def __init__(
        self, embed_dim: int = 96, depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7, first: int = 0, drop_path_rate: float = 0.2,
    ):  # fmt: skip
        super().__init__()
        check_int("window_size", window_size, least=2)
        self.first = check_int("first", first, least=0, most=len(depths) - 1)

        def windows(place: Place) -> nn.Module:
            return PartitionAttention(
                place.dim, place.num_heads, window_size, rank=2, pad="zeros", keep_shift=True,
                shift=window_size // 2 if place.block % 2 else 0,
            )  # fmt: skip

        self.model = hosts.swin(
            windows, embed_dim, depths, num_heads, 4.0, drop_path_rate, 3, num_classes=0, img_size=(224, 224),
            drop_rate=0.0, global_pool="avg",
        )  # fmt: skip
        self.model.norm = nn.Identity()
        for module in self.model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.reset_parameters()  # as the released classes start
        self.channels = tuple(embed_dim * 2**i for i in range(first, len(depths)))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for d in self.channels)

    @classmethod
    def named(cls, name: str, **settings: Any) -> SwinMaps:
        """One of :data:`SIZES`; ``settings`` win over it."""
        check_choice("name", name, SIZES)
        return cls(**{**SIZES[name], **settings})

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)[self.first :]
        return [norm(m).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps, strict=True)]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the release's ``SwinTransformer``, alone or as ``backbone`` of its UPN."""
        theirs = Released(state_dict, "a Swin with a norm per stage", wrappers=("backbone.",))
        found = (re.search(r"(?<!\d\.)norm(\d+)\.weight$", name) for name in state_dict)
        held = sorted(int(m[1]) for m in found if m is not None)  # norms of blocks stand behind a number
        norms = theirs.renamed(
            {r"norm(\d+)\.(weight|bias)": lambda m, value: {f"norms.{held.index(int(m[1]))}.{m[2]}": value}}
        )
        rest = theirs.parts(r"(.+)", "model", lambda part: hosts.convert_swin(part, "Swin", hosts.own_attention))
        return theirs.close(norms | rest)

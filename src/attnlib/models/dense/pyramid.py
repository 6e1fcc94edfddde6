"""A pyramid out of the last map of a plain vision transformer, for heads that read several levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, describe
from ..backbones.stages import Backbone, FeatureInfo
from ..backbones.vit import convert


class LastLayerPyramid(nn.Module):
    """Four maps, of strides 4, 8, 16 and 32, from the last map of a backbone alone (LL-FPN of UNIP).

    With ``U`` a transposed 2 x 2 convolution of stride 2 and patches of 16 pixels: ``U(GELU(BatchNorm(U(x))))``,
    ``U(x)``, ``x``, and the largest of 2 x 2 cells; with patches of 8 pixels ``U(x)``, ``x`` and the largest of
    2 x 2 and 4 x 4. Features of another block are those of a shorter model.

    Args:
        model: a backbone whose last map has 8 or 16 pixels per token.
        norm: read the map behind the model's last norm.

    Raises:
        ValueError: other patches.

    Reference: Zhang et al., 2025, arXiv 2502.02257, whose segmentation backbone this is (BatchNorm is theirs without
    its synchronisation over devices).

    >>> import attnlib, torch
    >>> model = attnlib.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=12, depth=1, num_heads=2)
    >>> [tuple(m.shape[1:]) for m in LastLayerPyramid(model)(torch.zeros(2, 3, 64, 64))]
    [(12, 16, 16), (12, 8, 8), (12, 4, 4), (12, 2, 2)]
    """

    def __init__(self, model: Backbone, norm: bool = True):
        super().__init__()
        if not isinstance(model, Backbone):
            raise TypeError(f"model must be a backbone, as create_model() gives it, got {describe(model)}")
        last: Any = model.feature_info[-1]
        dim, patch = last["num_chs"], last["reduction"]
        check_choice("pixels per token of the last map", patch, (8, 16))

        def up() -> nn.Module:
            return nn.ConvTranspose2d(dim, dim, 2, 2)

        fine: list[nn.Module] = [nn.Sequential(up(), nn.BatchNorm2d(dim), nn.GELU(), up())] if patch == 16 else []
        coarse: list[nn.Module] = [nn.MaxPool2d(4, ceil_mode=True)] if patch == 8 else []
        self.model, self.norm = model, norm
        self.levels = nn.ModuleList(
            [*fine, nn.Sequential(up()), nn.Identity(), nn.MaxPool2d(2, ceil_mode=True), *coarse]
        )
        self.feature_info = FeatureInfo(
            {**last, "num_chs": dim, "reduction": stride, "index": i} for i, stride in enumerate((4, 8, 16, 32))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> maps (B, C, h_i, w_i), finest first; a map of an odd side is halved upwards."""
        (y,) = self.model.forward_intermediates(x, [-1], norm=self.norm, intermediates_only=True)
        return [level(y) for level in self.levels]

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the segmentation backbone of UNIP, a vision transformer with ``fpn1`` to ``fpn4``."""
        fpn = {k: v for k, v in state_dict.items() if k.startswith("fpn")}
        rest = convert({k: v for k, v in state_dict.items() if k not in fpn}, self.model)
        out = {f"levels.{int(k[3]) - 1}{k[4:]}": v for k, v in fpn.items()}
        return out | {f"model.{k}": v for k, v in rest.items()}

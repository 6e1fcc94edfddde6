"""GeoGLIP: the geometry-aware vision encoder whose maps SVE-Math weighs beside a language model's own tokens.

Zhang et al., 2025, arXiv 2501.06430. The body is a Swin-T, its last three maps go through a feature pyramid with two
more levels, and a head for boundaries and junctions makes the finest map ``L_1`` of levels P3 (1/8), P4 and P6:

    a   = P4 + attention(queries of P4, keys and values of P6, each behind one norm and a ReLU),
    L_1 = F(P3 + up(conv(up(conv(a))))),

``F`` a Fourier unit: a 1 x 1 convolution of real and imaginary parts of the spectrum, beside the map itself. The other
levels are P5, P6 and P7. Windows are filled up with zeros that take part, and are moved also where one covers the map.

Differs from the authors' tower: gradients pass where weights are not frozen, theirs runs without any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_divides, check_int, check_real
from ...nn.layers import head_dim_of, merge_heads, split_heads
from ...nn.released import Released
from ...ops import attention
from ...types import stats_dtype
from ..backbones.stages import Stage
from .swin_maps import SwinMaps


class FourierUnit(nn.Module):
    """``irfft(relu(norm(conv([real, imaginary]))))`` of maps (B, C, H, W), each channel's two parts side by side.

    Args:
        dim: C.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv_layer = nn.Conv2d(2 * dim, 2 * dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        high = stats_dtype(x.dtype)
        spectrum = torch.view_as_real(torch.fft.rfftn(x.to(high), dim=(-2, -1), norm="ortho"))
        parts = spectrum.permute(0, 1, 4, 2, 3).flatten(1, 2).to(x.dtype)
        parts = F.relu(self.bn(self.conv_layer(parts))).to(high)
        parts = parts.unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2).contiguous()
        made = torch.fft.irfftn(torch.view_as_complex(parts), s=x.shape[-2:], dim=(-2, -1), norm="ortho")
        return made.to(x.dtype)


class SpectralTransform(nn.Module):
    """``conv(z + fourier(z))`` with ``z = relu(norm(conv(x)))``; (B, C, H, W) -> the same.

    Args:
        dim: C.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        self.fu = FourierUnit(dim)
        self.conv2 = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(x)
        return self.conv2(z + self.fu(z))  # type: ignore[no-any-return]


class _CrossAttention(nn.Module):
    """Tokens of one map read another; (B, C, H, W) and (B, C, h, w) -> (B, C, H, W)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        head_dim_of(dim, num_heads)
        self.num_heads = num_heads
        self.values, self.keys, self.queries = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.fc_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens, others = (t.flatten(2).transpose(1, 2) for t in (x, context))
        q, k, v = (
            split_heads(layer(t), self.num_heads)
            for layer, t in ((self.queries, tokens), (self.keys, others), (self.values, others))
        )
        out = self.fc_out(merge_heads(attention(q, k, v)))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]


class BoundaryHead(nn.Module):
    """The head for boundaries and junctions, see the module.

    Args:
        dim: channels of all levels.
        num_heads: of its attention.
    """

    def __init__(self, dim: int = 256, num_heads: int = 8):
        super().__init__()
        self.ffc = SpectralTransform(dim)
        self.deconv, self.merge_conv1 = (nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.merge_bn1, self.merge_bn2 = (nn.BatchNorm2d(dim) for _ in range(3))
        self.merge_trans = _CrossAttention(dim, num_heads)

    def forward(self, fine: Tensor, mid: Tensor, coarse: Tensor) -> Tensor:
        """P3 (B, C, H, W), P4 and P6 -> (B, C, H, W)."""
        context = F.relu(self.merge_bn2(coarse))
        z = mid + self.merge_trans(F.relu(self.merge_bn2(mid)), context)
        z = F.relu(self.merge_bn1(self.merge_conv1(z)))
        z = F.relu(self.bn1(self.deconv(_nearest(z, (2 * z.shape[2], 2 * z.shape[3])))))
        return cast(Tensor, self.ffc(fine + _nearest(z, fine.shape[2:])))


def _nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x.to(stats_dtype(x.dtype)), tuple(size), mode="nearest").to(x.dtype)


def drop_block(x: Tensor, share: float, size: int = 3) -> Tensor:
    """Maps (B, C, H, W) with squares of ``size`` set to zero in all channels, the rest scaled up to make good for them.

    Args:
        share: chance of a place to lie in a square, about.
        size: side of a square.
    """
    check_real("share", share, least=0, below=1)
    check_int("size", size, least=1)
    if not share:
        return x
    seeds = (torch.rand(len(x), 1, *x.shape[2:]) < share / size**2).to(x.device, torch.float32)
    hidden = F.max_pool2d(seeds, size, 1, size // 2)[:, :, : x.shape[2], : x.shape[3]]
    kept = (1 - hidden).to(x.dtype)
    return x * kept * (kept.numel() / kept.sum().clamp(min=1))


class GeoGLIP(nn.Module):
    """Images to four levels for :class:`attnlib.models.multimodal.sve_math.FeatureRouter`, see the module.

    Args:
        embed_dim, depths, num_heads, window_size, drop_path_rate: of the Swin.
        dim: channels of the levels.
        heads: of the boundary head's attention.
        drop: share of the pyramid's finer maps that :func:`drop_block` hides in training.
        frozen: the stem, from 0, and as many stages less one, keep their weights and stay in evaluation.

    >>> encoder = GeoGLIP(8, (1, 1, 1, 1), (1, 1, 2, 2), 4, dim=16).eval()
    >>> [tuple(level.shape) for level in encoder(torch.randn(1, 3, 64, 96))]
    [(1, 1, 1, 16), (1, 1, 2, 16), (1, 2, 3, 16), (1, 8, 12, 16)]
    """

    def __init__(
        self, embed_dim: int = 96, depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7, dim: int = 256, heads: int = 8, drop_path_rate: float = 0.2, drop: float = 0.3,
        frozen: int = 4,
    ):  # fmt: skip
        super().__init__()
        if len(depths) < 3:
            raise ValueError(
                f"depths={tuple(depths)} must have at least 3 stages: the pyramid's levels begin at the 2nd"
            )
        check_int("window_size", window_size, least=2)
        check_int("dim", dim, least=1)
        check_divides("heads", heads, "dim", dim)
        self.drop = check_real("drop", drop, least=0, below=1)
        self.frozen = check_int("frozen", frozen, least=-1, most=len(depths) + 1)

        self.body = SwinMaps(embed_dim, depths, num_heads, window_size, 1, drop_path_rate)
        dims = self.body.channels
        self.inner = nn.ModuleList(nn.Conv2d(d, dim, 1) for d in dims)
        self.outer = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in dims)
        self.p6, self.p7 = (nn.Conv2d(dim, dim, 3, 2, 1) for _ in range(2))
        for conv in (*self.inner, *self.outer, self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.boundary = BoundaryHead(dim, heads)
        for part in self._still():
            part.requires_grad_(False)
        self.train(self.training)

    def _still(self) -> list[nn.Module]:
        body = self.body.model
        held: list[nn.Module] = [body.stem] if self.frozen >= 0 else []
        for i in range(max(self.frozen - 1, 0)):
            stage = cast(Stage, body.stages[i])
            held += list(stage.blocks)
            # What ends a stage in the release begins the next one here.
            after = body.stages[i + 1 : i + 2]
            held += [cast(nn.Module, s.downsample) for s in after]
        return held

    def train(self, mode: bool = True) -> GeoGLIP:
        super().train(mode)
        for part in self._still():
            part.eval()
        return self

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> P3 to P7, finest first, (B, dim, h, w) each."""
        fine = self.body(images)
        levels: list[Tensor] = []
        above: Tensor | None = None
        for i in reversed(range(len(fine))):
            z = self.inner[i](fine[i])
            z = z if above is None else z + _nearest(above, z.shape[2:])
            hides = above is not None and self.training and self.drop > 0
            levels.insert(0, self.outer[i](drop_block(z, self.drop) if hides else z))
            above = z
        p6 = self.p6(levels[-1])
        return [*levels, p6, self.p7(F.relu(p6))]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> levels (B, h, w, dim), coarsest first, as the router reads them."""
        levels = self.pyramid(images)
        made = [self.boundary(levels[0], levels[1], levels[-2]), *levels[2:]]
        return [level.permute(0, 2, 3, 1) for level in reversed(made)]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' GLIPVisionTower, alone or as ``glip_vision_tower`` of their merged tower."""
        wrappers = ("glip_vision_tower.", "glip_model.")
        theirs = Released(state_dict, "the authors' GLIPVisionTower", wrappers=wrappers)
        rest = theirs.renamed(
            {
                r"fpn\.fpn_(inner|layer)(\d+)\.(weight|bias)": lambda m, value: {
                    f"{'inner' if m[1] == 'inner' else 'outer'}.{int(m[2]) - 2}.{m[3]}": value
                },
                r"fpn\.top_blocks\.(p[67]\.(?:weight|bias))": r"\1",
                r"bjhead\.deconv1\.1\.weight": "boundary.deconv.weight",
                r"bjhead\.((?:ffc|bn1|merge_conv1|merge_bn[12]|merge_trans)\..+)": r"boundary.\1",
            }
        )
        body = theirs.parts(r"body\.(.+)", "body", SwinMaps.convert_state_dict)
        return theirs.close(rest | body)

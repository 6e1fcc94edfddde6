"""PMAA: clouds taken off satellite images that were made on several dates.

Zou et al., 2023, "PMAA: A Progressive Multi-scale Attention Autoencoder Model for High-Performance Cloud Removal from
Multi-temporal Satellite Imagery", arXiv 2303.16565. One extractor reads every date and says where its clouds are; its
maps, side by side, pass three autoencoders (:class:`ScaleBlock`). In each, five scales o_k of strides 1 to 16 are
pooled to the coarsest grid and summed, ``g = MAM(sum_k pool(o_k))``, and g is injected into every scale:

    ``LIM(l, g) = l' * up(sigmoid(a(g))) + up(b(g))``,    ``x_k = LIM(o_k, g)``,

after which the scales meet from coarse to fine, ``e <- LIM(x_k, e)``. MAM is convolutional modulation (Conv2Former):
``x + s_1 P(DW11(gelu(W_1 n)) * W_2 n)``, ``n = LN(x)``, then an MLP; no softmax.

Norms: the release puts affine-free instance norms in place of all BatchNorms before it trains; what they replace in
separable convolutions would hold the ReLU (where timm puts one there; timm 1.0 does not). So ``"instance_noact"`` is
the published model, ``"batch"`` the one of the paper, ``"batch_noact"`` what the class is under timm 1.0 before norms
are replaced, and ``"instance"`` has the norms and the ReLU.

Their two data sets ask for two models: images of all four bands (Sen2_MTC_New), and colours alone (Sen2_MTC_Old,
``out_chans=3``), of which the extractor still gives all bands. Up to its first fix the release read images off the last
map by a 7 x 7 convolution (``head_kernel=7``), since then by one of 1 x 1.

Differs from the authors' code: any number of dates; sides need not be multiples of 16; a single pixel at the coarsest
grid is normed to zero instead of refused. The release begins the decoder with the second coarsest scale, so that
x of the coarsest is never read: its injection is left out, and the converter says so. ``coarsest=True`` begins with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real, describe
from ...nn.layers import DropPath
from ...nn.released import Released
from ...types import stats_dtype
from ..build import register_models
from ..dense.context import ASPP, conv_norm_act
from ..protocol import evaluating
from .adversarial import AdversarialModel

NORMS = ("batch", "batch_noact", "instance", "instance_noact")


class CloudPrediction(NamedTuple):
    """What :class:`PMAA` gives.

    ``image`` (B, C', H, W) without clouds, -1 to 1; ``masks`` (B, T, 1, H, W), 1 where a date shows clouds; ``dates``
    (B, T, C, H, W), what the extractor alone makes of every date.
    """

    image: Tensor
    masks: Tensor
    dates: Tensor


class InstanceNorm(nn.Module):
    """(B, C, H, W) to mean 0 and variance 1 in every channel of every image; zeros where there is one pixel."""

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        high = x.to(stats_dtype(x.dtype))
        high = high - high.mean((2, 3), keepdim=True)
        return (high * (high.square().mean((2, 3), keepdim=True) + self.eps).rsqrt()).to(x.dtype)


class PixelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class ConvModulation(nn.Module):
    """MAM: a large depthwise convolution multiplies values, then an MLP; both scaled by a number per channel.

    Args:
        dim: channels of (B, dim, H, W).
        mlp_ratio: width of the MLP over dim.
        drop_path: stochastic depth.
        init: of the numbers per channel.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.1, init: float = 1e-6):
        super().__init__()
        wide = int(dim * mlp_ratio)
        self.norm = PixelNorm(dim)
        self.gate = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.GELU(), nn.Conv2d(dim, dim, 11, padding=5, groups=dim))
        self.value, self.proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.mlp_norm = PixelNorm(dim)
        self.fc1, self.fc2 = nn.Conv2d(dim, wide, 1), nn.Conv2d(wide, dim, 1)
        self.place = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), float(init))) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        x = x + self.drop_path(self.scale1[:, None, None] * self.proj(self.gate(n) * self.value(n)))
        z = F.gelu(self.fc1(self.mlp_norm(x)))
        return x + self.drop_path(self.scale2[:, None, None] * self.fc2(z + F.gelu(self.place(z))))


class SeparableConv(nn.Module):
    """A convolution of places, norm (and ReLU), one of channels, norm; added to its input where shapes agree."""

    def __init__(self, dim: int, out_dim: int, kernel: int, stride: int = 1, dense: bool = False, act: bool = True):
        super().__init__()
        groups = 1 if dense else dim
        self.places = nn.Conv2d(dim, dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm1, self.act = nn.BatchNorm2d(dim), nn.ReLU() if act else nn.Identity()
        self.channels, self.norm2 = nn.Conv2d(dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim)
        self.skip = stride == 1 and dim == out_dim

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.channels(self.act(self.norm1(self.places(x)))))
        return y + x if self.skip else y


class Injection(nn.Module):
    """LIM: what is global gates what is local, and is added to it.

    Args:
        dim: channels of both.
        kernel: of the three depthwise convolutions.
    """

    def __init__(self, dim: int, kernel: int = 1):
        super().__init__()

        def embed() -> nn.Sequential:
            conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(dim))

        self.local, self.added, self.gate = embed(), embed(), embed()

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """(B, dim, H, W) and (B, dim, h, w) -> (B, dim, H, W)."""
        size = x.shape[2:]
        gate, added = (F.interpolate(t, size) for t in (self.gate(g).sigmoid(), self.added(g)))
        return self.local(x) * gate + added


class ScaleBlock(nn.Module):
    """One autoencoder: (B, in_dim, H, W) -> (B, out_dim, H, W).

    Args:
        in_dim: a multiple of out_dim; the parts are summed into what the block adds to.
        dim: channels inside.
        out_dim: channels out.
        depth: scales.
        act: ReLU inside separable convolutions.
        drop_path: of MAM.
        coarsest: the decoder begins with the coarsest scale.
    """

    def __init__(
        self, in_dim: int, dim: int, out_dim: int, depth: int = 5, act: bool = True, drop_path: float = 0.1,
        coarsest: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.out_dim, self.depth, self.coarsest = out_dim, depth, coarsest
        self.project = SeparableConv(in_dim, dim, 1, act=act)
        self.scales = nn.ModuleList(
            SeparableConv(dim, dim, 3, 2 if k else 1, dense=True, act=act) for k in range(depth)
        )
        self.attention = ConvModulation(dim, drop_path=drop_path)
        self.inject = nn.ModuleList(Injection(dim) for _ in range(depth if coarsest else depth - 1))
        self.merge = nn.ModuleList(Injection(dim, 5) for _ in range(depth - 1))
        self.out = nn.Conv2d(dim, out_dim, 1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
                nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / fan_out))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(1, (-1, self.out_dim)).sum(1)
        y = self.project(x)
        maps = []
        for scale in self.scales:
            y = scale(y)
            maps.append(y)
        size = maps[-1].shape[2:]
        g = self.attention(sum((F.adaptive_avg_pool2d(m, size) for m in maps), torch.zeros_like(maps[-1])))
        fused = [inject(m, g) for inject, m in zip(self.inject, maps, strict=False)]
        e = fused[-1] if self.coarsest else fused[-2]
        for merge, m in zip(reversed(self.merge), fused[self.depth - 2 :: -1], strict=True):
            e = merge(m, e)
        return self.out(e) + parts


class CloudExtractor(nn.Module):
    """Maps of one date, where its clouds are, and an image without them.

    Args:
        in_chans: C.
        dim: channels of the maps.
        pooled_norm: BatchNorm in ASPP's branch of the mean, as the released extractor that teaches masks has it.

    >>> [tuple(y.shape) for y in CloudExtractor(4, 8).eval()(torch.zeros(2, 4, 9, 7))]
    [(2, 1, 9, 7), (2, 8, 9, 7), (2, 4, 9, 7)]
    """

    def __init__(self, in_chans: int = 4, dim: int = 32, pooled_norm: bool = False):
        super().__init__()
        self.stem = conv_norm_act(2, in_chans, dim, 3, bias=False)
        self.cloud = nn.Sequential(
            *conv_norm_act(2, dim, 2 * dim, 1), *conv_norm_act(2, 2 * dim, 4 * dim, 1), nn.Conv2d(4 * dim, 1, 1)
        )

        def bottleneck() -> nn.Sequential:
            layers = [*conv_norm_act(2, dim, dim, 1, bias=False), *conv_norm_act(2, dim, dim, 3, rate=2, bias=False)]
            return nn.Sequential(*layers, *conv_norm_act(2, dim, dim, 1, bias=False))

        self.blocks = nn.ModuleList(bottleneck() for _ in range(6))
        self.aspp = ASPP(dim, 128, (12, 24, 36), last_dim=dim, mean_bias=False, mean_norm=pooled_norm)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Conv2d(dim, in_chans, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> clouds (B, 1, H, W), maps (B, dim, H, W), an image (B, C, H, W)."""
        y = self.stem(x)
        cloud = None
        for i, block in enumerate(self.blocks):
            if i in (1, 3):
                cloud = self.cloud(y).sigmoid()
            z = block(y)
            y = F.relu((z if cloud is None or i == 5 else z * cloud) + y)
        y = self.drop(self.aspp(y.movedim(1, -1)).movedim(-1, 1))
        assert cloud is not None
        return cloud, y, self.head(y).tanh()

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``FeatureExtractor`` (built with ``pooled_norm=True``) or ``Feature_Extractor``."""
        theirs = Released(state_dict, "the authors' FeatureExtractor")
        return theirs.close(theirs.renamed(EXTRACTOR))


class PMAA(AdversarialModel):
    """Images of T dates (B, T, C, H, W), -1 to 1, to one without clouds; a :class:`CloudPrediction`.

    Args:
        in_chans: C, bands.
        num_dates: T.
        out_chans: C', the first bands of the image that is made; all by default.
        head_kernel: sides of the last convolution, odd.
        dim: channels of the maps.
        depth: scales of an autoencoder.
        norm: ``"batch"``, ``"instance"``, and these with ``"_noact"``; ``"instance_noact"`` is the published one.
        drop_path: stochastic depth of MAM.
        coarsest: whether decoders begin with the coarsest scale; the release does not.
        l1, mask, aux: weights of the terms of the loss.
        discriminator: judges all dates and an image, ``T C + C'`` channels; none by default.
        gan_kind, gan_weight, gan_start: of :class:`attnlib.models.restore.adversarial.AdversarialModel`.

    Raises:
        ValueError: another number of dates or bands, no pixels.

    >>> model = PMAA(dim=8).eval()
    >>> made = model(torch.zeros(2, 3, 4, 21, 16))
    >>> made.image.shape, made.masks.shape
    (torch.Size([2, 4, 21, 16]), torch.Size([2, 3, 1, 21, 16]))
    """

    def __init__(
        self, in_chans: int = 4, num_dates: int = 3, dim: int = 32, depth: int = 5, norm: str = "instance_noact",
        drop_path: float = 0.1, coarsest: bool = False, l1: float = 100.0, mask: float = 1.0, aux: float = 0.0,
        discriminator: nn.Module | None = None, gan_kind: str = "least-squares", gan_weight: float = 1.0,
        gan_start: float = 0.0, out_chans: int | None = None, head_kernel: int = 1,
    ):  # fmt: skip
        super().__init__(discriminator, gan_kind, gan_weight, 0.5, gan_start)
        check_choice("norm", norm, NORMS)
        check_flag("coarsest", coarsest)
        self.in_chans = check_int("in_chans", in_chans, least=1)
        self.out_chans = in_chans if out_chans is None else check_int("out_chans", out_chans, least=1, most=in_chans)
        if not check_int("head_kernel", head_kernel, least=1) % 2:
            raise ValueError(f"head_kernel must be odd, got {head_kernel}")
        self.num_dates, dim = check_int("num_dates", num_dates, least=1), check_int("dim", dim, least=1)
        depth = check_int("depth", depth, least=3)
        self.l1, self.mask, self.aux = (
            check_real(n, v, least=0) for n, v in (("l1", l1), ("mask", mask), ("aux", aux))
        )
        self.norm = norm
        self.extractor = CloudExtractor(in_chans, dim)
        options: dict[str, Any] = dict(act=not norm.endswith("noact"), drop_path=drop_path, coarsest=coarsest)
        widths = (num_dates * dim, dim, dim)
        self.stages = nn.Sequential(*(ScaleBlock(w, 4 * dim, dim, depth, **options) for w in widths))
        self.head = nn.Conv2d(dim, self.out_chans, head_kernel, padding=head_kernel // 2)
        if norm.startswith("instance"):
            for part in (self.extractor, self.stages):
                _instance_norms(part)

    def forward(self, x: Tensor) -> CloudPrediction:
        shape = (self.num_dates, self.in_chans)
        if not isinstance(x, Tensor) or x.dim() != 5 or tuple(x.shape[1:3]) != shape or not x.is_floating_point():
            raise ValueError(f"x must be dates (B, {shape[0]}, {shape[1]}, H, W) of floating point, got {describe(x)}")
        if not x.shape[3:].numel():
            raise ValueError(f"x must hold at least one pixel, got shape {tuple(x.shape)}")
        if self.training and self.norm.startswith("batch"):  # statistics of one date at a time
            made = [self.extractor(date) for date in x.unbind(1)]
            masks, maps, dates = (torch.stack([m[i] for m in made], 1) for i in range(3))
        else:
            masks, maps, dates = (t.unflatten(0, x.shape[:2]) for t in self.extractor(x.flatten(0, 1)))
        return CloudPrediction(self.head(self.stages(maps.flatten(1, 2))).tanh(), masks, dates)

    def loss(self, prediction: CloudPrediction, target: Tensor | tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        """``{"l1"}``, and ``"masks"`` and ``"aux"`` where they have a weight and something to be held against.

        Args:
            prediction: of :meth:`forward`.
            target: the image without clouds (B, C', H, W), or that and masks (B, T, 1, H, W) of a trained extractor
                (:func:`cloud_masks`), 0 to 1.
        """
        image, masks = (target, None) if isinstance(target, Tensor) else target
        if not isinstance(image, Tensor) or image.shape != prediction.image.shape:
            raise ValueError(f"target must be an image {tuple(prediction.image.shape)}, got {describe(image)}")
        image = image.to(prediction.image.dtype)
        terms = {"l1": self.l1 * F.l1_loss(prediction.image, image)}
        if masks is not None and self.mask:
            if not isinstance(masks, Tensor) or masks.shape != prediction.masks.shape:
                raise ValueError(f"target's masks must be {tuple(prediction.masks.shape)}, got {describe(masks)}")
            square = (prediction.masks - masks.to(prediction.masks.dtype)).square()
            terms["masks"] = self.mask * square.mean((0, 2, 3, 4)).sum()
        if self.aux:
            seen = prediction.dates[:, :, : self.out_chans]
            terms["aux"] = self.aux * (seen - image[:, None]).abs().mean((0, 2, 3, 4)).sum()
        return terms

    def image_of(self, prediction: CloudPrediction, inputs: Mapping[str, Any]) -> Tensor:
        return prediction.image

    def truth_of(self, target: Any) -> Tensor:
        return target if isinstance(target, Tensor) else target[0]

    def shown(self, image: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        return torch.cat([inputs["x"].flatten(1, 2).to(image.dtype), image], 1)

    def predict(self, x: Tensor) -> Tensor:
        """The image without clouds (B, C', H, W)."""
        return self(x).image


@torch.no_grad()
def cloud_masks(teacher: CloudExtractor, x: Tensor) -> Tensor:
    """Masks (B, T, 1, H, W) that a trained extractor gives for dates (B, T, C, H, W), as in evaluation."""
    with evaluating(teacher):
        return teacher(x.flatten(0, 1))[0].unflatten(0, x.shape[:2])


def _instance_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, InstanceNorm(child.eps))
        else:
            _instance_norms(child)


EXTRACTOR: dict[str, Any] = {
    r"conv_in\.(\d\..*)": r"stem.\1",
    r"cloud_detection\.cloud_det\.(.*)": r"cloud.\1",
    r"bottle(\d)\.bottleneck\.(.*)": lambda m, t: {f"blocks.{int(m[1]) - 1}.{m[2]}": t},
    r"ASPP\.convs\.([0-3])\.(.*)": r"aspp.branches.\1.\2",
    r"ASPP\.convs\.4\.(\d)\.(.*)": lambda m, t: {f"aspp.mean.{int(m[1]) - 1}.{m[2]}": t},
    r"ASPP\.project\.(.*)": r"aspp.project.\1",
    r"aux_conv\.(.*)": r"head.\1",
}
_SEPARABLE = {"conv_dw": "places", "bn1": "norm1", "conv_pw": "channels", "bn2": "norm2"}
_EMBED = {"local_embedding": "local", "global_embedding": "added", "global_act": "gate"}
_MODULATION = {
    "attn.norm": "norm", "attn.a": "gate", "attn.v": "value", "attn.proj": "proj", "mlp.norm": "mlp_norm",
    "mlp.fc1": "fc1", "mlp.pos": "place", "mlp.fc2": "fc2",
}  # fmt: skip


def _block_name(name: str) -> str:
    """Our name within a :class:`ScaleBlock`."""
    for pattern, table, to in (
        (r"proj_1x1\.()(\w+)\.(.*)", _SEPARABLE, "project{}"), (r"spp_dw\.(\d)\.(\w+)\.(.*)", _SEPARABLE, "scales.{}"),
        (r"loc_glo_fus\.(\d)\.(\w+)\.(.*)", _EMBED, "inject.{}"),
        (r"last_layer\.(\d)\.(\w+)\.(.*)", _EMBED, "merge.{}"),
        (r"globalatt\.()((?:attn|mlp)\.\w+)\.(.*)", _MODULATION, "attention{}"),
    ):  # fmt: skip
        found = re.fullmatch(pattern, name)
        if found and found[2] in table:
            return f"{to.format(found[1])}.{table[found[2]]}.{found[3]}"
    name = re.sub(r"^globalatt\.layer_scale_(\d)$", r"attention.scale\1", name)
    return re.sub(r"^res_conv\.", "out.", name)


def convert(state_dict: Mapping[str, Tensor], model: PMAA) -> dict[str, Tensor]:
    """From the authors' ``PMAA``; the injection of the coarsest scale, which it never reads, is left out."""
    theirs = Released(state_dict, "the authors' PMAA")
    out = theirs.parts(r"(feature_extractor)\.(.+)", "extractor", CloudExtractor.convert_state_dict)
    first: Any = model.stages[0]
    last = first.depth - 1
    if not first.coarsest:
        theirs.leave(rf".*\.loc_glo_fus\.{last}\..*", because="its answer is not read")
    out |= theirs.renamed(
        {
            r"concat_unet\.(.+)": lambda m, t: {f"stages.0.{_block_name(m[1])}": t},
            r"other_unet\.(\d)\.(.+)": lambda m, t: {f"stages.{int(m[1]) + 1}.{_block_name(m[2])}": t},
            r"output_layer\.0\.(.+)": r"head.\1",
        }
    )
    return theirs.close(out)


register_models(
    "pmaa",
    PMAA,
    {"pmaa": dict(in_chans=4), "pmaa_old": dict(in_chans=4, out_chans=3)},
    # The released classes have 1,152 more, which never run.
    params={"pmaa": 3_438_537, "pmaa_old": 3_438_504},
    license="MIT",
    source="XavierJiezou/PMAA",
    convert=convert,  # type: ignore[arg-type]
    img_size=256,
    task="restore",
)

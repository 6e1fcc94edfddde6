"""PEPSI: holes in images filled by one encoder and one decoder, which is run twice in training.

Shin et al., 2019, "PEPSI++: Fast and Lightweight Network for Image Inpainting", arXiv 1905.09010; Sagong et al., CVPR
2019. The encoder's map F (stride 8) is decoded as it is (the coarse path, in training only), and after contextual
attention (the inpainting path) by the same decoder:

    ``B = F * M``,  ``A = B + patch_attention(F, B) * (1 - M)``,  ``F' = ELU(W [F, A])``,

with :func:`attnlib.ops.patch_attention` of 3 x 3 patches by truncated distance. Loss: 10 L1 of the image, 5 (1 - t) L1
of the coarse one, t the part of training that lies behind, and .1 of a hinge loss of a discriminator that has another
classifier at every place of its last map (RED).

``diet=True`` is our reading of Diet-PEPSI, whose code is not released: the four dilated convolutions share one kernel,
``W_r = alpha_r W + beta_r`` with two numbers per rate and channel that comes out.

Masks say what is known: 1 known, 0 missing. Differs from the authors' code: any size; an image of which everything, or
nothing, is missing is refused; the coarse path is left out in evaluation; the power iteration of spectral norms has no
gradient; the bias of a place's classifier counts once, where the release adds it once per channel
(``compat="authors"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_grid, check_int, check_ints, check_real, describe
from ...ops import patch_attention
from ..build import register_models
from .adversarial import AdversarialModel
from .base import mirrored
from .masks import checked_known


class Inpainted(NamedTuple):
    """What :class:`PEPSI` gives, images (B, C, H, W).

    ``image`` with what is known as it was; ``made``, all of it by the net; ``coarse``, by the coarse path, in training
    only.
    """

    image: Tensor
    made: Tensor
    coarse: Tensor | None


class MirroredConv(nn.Module):
    """A convolution over mirrored borders; Xavier's uniform weights and no bias at the start."""

    def __init__(self, dim: int, out_dim: int, kernel: int = 3, stride: int = 1, rate: int = 1):
        super().__init__()
        self.pad = rate * (kernel // 2)
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride, dilation=rate)
        _xavier(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(mirrored(x, self.pad))


def _xavier(conv: nn.Conv2d) -> None:
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class RateAdaptiveConvs(nn.Module):
    """Dilated convolutions one behind the other, each with an ELU, of one kernel: ``alpha_r W + beta_r`` at rate r.

    Args:
        dim: channels in and out.
        rates: dilations.

    >>> sum(p.numel() for p in RateAdaptiveConvs(4, (2, 4, 8)).parameters()) == 4 * 4 * 9 + 4 + 3 * 2 * 4
    True
    """

    def __init__(self, dim: int, rates: Sequence[int] = (2, 4, 8, 16)):
        super().__init__()
        self.rates = check_ints("rates", rates, least=1)
        self.conv = nn.Conv2d(dim, dim, 3)
        _xavier(self.conv)
        self.scale = nn.Parameter(torch.ones(len(self.rates), dim))
        self.shift = nn.Parameter(torch.zeros(len(self.rates), dim))

    def forward(self, x: Tensor) -> Tensor:
        for i, rate in enumerate(self.rates):
            weight = self.scale[i][:, None, None, None] * self.conv.weight + self.shift[i][:, None, None, None]
            x = F.elu(F.conv2d(mirrored(x, rate), weight, self.conv.bias, dilation=rate))
        return x


class ContextAttention(nn.Module):
    """CAM: (B, dim, h, w) and what of it is known, (B, 1, h, w), to (B, dim, h, w).

    Args:
        dim: channels.
        settings: of :func:`attnlib.ops.patch_attention`.
    """

    def __init__(self, dim: int, **settings: Any):
        super().__init__()
        self.settings = settings
        self.mix = nn.Conv2d(2 * dim, dim, 1)
        _xavier(self.mix)

    def filled(self, x: Tensor, known: Tensor) -> Tensor:
        """What is known as it is, the rest from patches that are alike."""
        rows = x.movedim(1, -1)
        held = torch.where(known, x, 0.0)
        found: Any = patch_attention(rows, held.movedim(1, -1), known=known[:, 0], **self.settings)
        return torch.where(known, x, found.movedim(-1, 1))

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        return F.elu(self.mix(torch.cat([x, self.filled(x, known)], 1)))


class PEPSI(AdversarialModel):
    """Images (B, in_chans, H, W), -1 to 1, and what is known of them; an :class:`Inpainted`.

    Args:
        in_chans: channels of images.
        dims: channels of the encoder at full size and at three halves; the decoder halves the last, four times.
        rates: of dilated convolutions at the coarsest map.
        diet: one kernel for all rates.
        similarity, sharpness, valid_only: ``similarity``, ``scale`` and ``valid_only`` of
            :func:`attnlib.ops.patch_attention`.
        image, coarse: weights of L1.
        discriminator: of images, :class:`REDDiscriminator` in the paper.
        gan_weight, gan_start: of :class:`attnlib.models.restore.adversarial.AdversarialModel`.

    Raises:
        ValueError: images or masks of other shapes; a mask of which everything, or nothing, is missing.

    >>> model = PEPSI(dims=(4, 8, 8, 8)).eval()
    >>> known = torch.ones(2, 1, 40, 32)
    >>> known[..., 8:24, 8:24] = 0
    >>> model(torch.zeros(2, 3, 40, 32), known).image.shape
    torch.Size([2, 3, 40, 32])
    """

    def __init__(
        self, in_chans: int = 3, dims: Sequence[int] = (32, 64, 128, 256), rates: Sequence[int] = (2, 4, 8, 16),
        diet: bool = False, similarity: str = "distance", sharpness: float = 50.0, valid_only: bool = False,
        image: float = 10.0, coarse: float = 5.0, discriminator: nn.Module | None = None, gan_weight: float = 0.1,
        gan_start: float = 0.0,
    ):  # fmt: skip
        super().__init__(discriminator, "hinge", gan_weight, 1.0, gan_start)
        self.in_chans = check_int("in_chans", in_chans, least=1)
        dims = check_ints("dims", dims, least=2)
        if len(dims) != 4:
            raise ValueError(f"dims must hold four numbers, of full size and three halves, got {dims}")
        check_flag("diet", diet)
        check_choice("similarity", similarity, ("distance", "cosine"))
        check_real("sharpness", sharpness, above=0)
        self.image, self.coarse = check_real("image", image, least=0), check_real("coarse", coarse, least=0)
        a, b, c, d = dims
        self.stem = nn.ModuleList(
            [MirroredConv(2 * in_chans, a, 5), MirroredConv(a, b, 3, 2), MirroredConv(b, b), MirroredConv(b, c, 3, 2),
             MirroredConv(c, c), MirroredConv(c, d, 3, 2)]
        )  # fmt: skip
        rates = check_ints("rates", rates, least=1)
        self.dilated: nn.Module = RateAdaptiveConvs(d, rates) if diet else nn.ModuleList(
            MirroredConv(d, d, rate=r) for r in rates
        )  # fmt: skip
        settings: dict[str, Any] = dict(similarity=similarity, scale=sharpness, valid_only=valid_only)
        self.attention = ContextAttention(d, fuse=similarity == "cosine", **settings)
        widths = [max(d >> i, 1) for i in range(5)]
        self.up = nn.ModuleList(
            nn.ModuleList([MirroredConv(before, width), MirroredConv(width, width)])
            for before, width in zip(widths, widths[1:], strict=False)
        )
        self.out = nn.Conv2d(widths[-1], in_chans, 3, padding=1)
        _xavier(self.out)

    def encode(self, x: Tensor, known: Tensor) -> Tensor:
        """Images whose missing pixels are -1, and masks, to the map at stride 8."""
        shown = torch.where(known, x, -1.0)
        y = torch.cat([shown, known.expand_as(x).to(x.dtype)], 1)
        for conv in self.stem:
            y = F.elu(conv(y))
        if isinstance(self.dilated, RateAdaptiveConvs):
            return self.dilated(y)
        for conv in self.dilated:  # type: ignore[union-attr,attr-defined]
            y = F.elu(conv(y))
        return y

    def decode(self, y: Tensor, size: Sequence[int]) -> Tensor:
        """The map at stride 8 to images of ``size``, -1 to 1."""
        half = [(n + 1) // 2 for n in size]
        sizes = [[(n + 1) // 2 for n in half], half, list(size), list(size)]
        for at, pair in zip(sizes, self.up, strict=True):
            for conv in pair:  # type: ignore[attr-defined]
                y = F.elu(conv(y))
            y = F.interpolate(y, at)
        return self.out(y).clamp(-1, 1)

    def forward(self, x: Tensor, known: Tensor) -> Inpainted:
        """(B, in_chans, H, W), and (B, 1, H, W) or (B, H, W), 1 where pixels are known; others may hold anything."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        if min(x.shape[2:]) < 17:
            raise ValueError(f"x must be 17 pixels a side at least, 3 x 3 at stride 8, got {tuple(x.shape[2:])}")
        mask = checked_known("known", known, x)
        y = self.encode(x, mask)
        small = F.interpolate(mask.to(x.dtype), y.shape[2:]) > 0.5
        filled = self.attention(y, small)
        if self.training and self.coarse:
            made, coarse = self.decode(torch.cat([filled, y]), x.shape[2:]).chunk(2)
        else:
            made, coarse = self.decode(filled, x.shape[2:]), None  # type: ignore[assignment]
        return Inpainted(torch.where(mask, x, made), made, coarse)

    def loss(self, prediction: Inpainted, target: Tensor) -> dict[str, Tensor]:
        """``{"image"}``, and ``"coarse"`` where there is a coarse image; its weight falls to 0 over the training.

        Args:
            prediction: of :meth:`forward`.
            target: whole images (B, in_chans, H, W).
        """
        made = prediction.made
        if not isinstance(target, Tensor) or target.shape != made.shape:
            raise ValueError(f"target must be images {tuple(made.shape)}, got {describe(target)}")
        target = target.to(made.dtype)
        terms = {"image": self.image * F.l1_loss(made, target)}
        if prediction.coarse is not None:
            terms["coarse"] = self.coarse * (1 - self.progress) * F.l1_loss(prediction.coarse, target)
        return terms

    def image_of(self, prediction: Inpainted, inputs: Mapping[str, Any]) -> Tensor:
        return prediction.image

    def predict(self, x: Tensor, known: Tensor) -> Tensor:
        """Images with their holes filled (B, in_chans, H, W)."""
        return self(x, known).image


class SpectralConv(nn.Module):
    """A convolution whose weight is divided by its largest singular value, by one power iteration a training step.

    Borders are padded as TensorFlow's ``SAME``: the odd pixel at the bottom and on the right.
    """

    u: Tensor

    def __init__(self, dim: int, out_dim: int, kernel: int = 5, stride: int = 2):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(out_dim, dim, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_dim))
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("u", F.normalize(torch.randn(out_dim), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(w.T @ self.u.to(w.dtype), dim=0)
            u = F.normalize(w @ v, dim=0)
            if self.training:
                self.u.copy_(u)
        sigma = torch.dot(u, w @ v)
        weight = self.weight / torch.where(sigma > 0, sigma, 1.0)
        pads = []
        for n in (x.shape[3], x.shape[2]):
            total = max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, self.bias, self.stride)


class REDDiscriminator(nn.Module):
    """Region ensemble: convolutions with spectral norms, then a classifier of its own at every place.

    Args:
        in_chans: channels of images.
        dims: channels of the layers, each at half the size of the one before.
        img_size: of the images it is for.
        compat: ``"authors"``: a classifier's bias counts once per channel.

    >>> REDDiscriminator(3, (4, 8), (16, 24))(torch.zeros(2, 3, 16, 24)).shape
    torch.Size([2, 4, 6])
    """

    def __init__(
        self, in_chans: int = 3, dims: Sequence[int] = (64, 128, 256, 256, 256, 512),
        img_size: Sequence[int] = (256, 256), compat: str | None = None,
    ):  # fmt: skip
        super().__init__()
        check_int("in_chans", in_chans, least=1)
        dims = check_ints("dims", dims, least=1)
        if not dims:
            raise ValueError("dims must hold one number for every layer, got none")
        check_choice("compat", compat, (None, "authors"))
        self.in_chans, self.img_size, self.compat = in_chans, check_grid("img_size", img_size, (2,)), compat
        self.layers = nn.ModuleList(SpectralConv(a, b) for a, b in zip((in_chans, *dims), dims, strict=False))
        grid = [-(-n // 2 ** len(dims)) for n in self.img_size]
        self.weight = nn.Parameter(torch.empty(*grid, dims[-1]))
        bound = (6 / (grid[0] * grid[1] * (dims[-1] + 1))) ** 0.5  # Xavier's of their (h w, 1, C, 1)
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias = nn.Parameter(torch.zeros(*grid))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> a score for every place (B, h, w)."""
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != (self.in_chans, *self.img_size):
            raise ValueError(f"x must be images (B, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]}), got "
                             f"{describe(x)}")  # fmt: skip
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        weight = F.normalize(self.weight, dim=-1)  # of a vector, the norm is the largest singular value
        bias = self.bias if self.compat is None else self.bias * self.weight.shape[-1]
        return torch.einsum("bchw,hwc->bhw", x, weight) + bias


register_models(
    "pepsi-diet-inpainting",
    PEPSI,
    {"pepsi": dict(in_chans=3)},
    params={"pepsi": 3_656_947},
    license="MIT",
    source="Forty-lock/PEPSI-Fast_image_inpainting_with_parallel_decoding_network",
    img_size=256,
    task="restore",
)

"""RestoreFormer and RestoreFormer++: degraded faces that read keys and values of undegraded ones.

Wang et al., 2023, "RestoreFormer++: Towards Real-World Blind Face Restoration from Undegraded Key-Value Pairs", arXiv
2308.07228. Two stages of one net: an encoder E, a codebook, a decoder.

1. The dictionary (``cross=False``): a VQGAN that gives faces of high quality back; its attention is self-attention.
2. The restorer: the codebook is kept, and in the decoder the dictionary's map x is read by the degraded face's map y of
   the same size: ``q = W_q norm(y), k = W_k norm(x), v = W_v norm(x)``, ``x + W_o softmax(q k^T / sqrt(d)) v``.

RestoreFormer reads at stride 32, RestoreFormer++ at stride 16 too (``extra_scales=1``).

Differs from the authors' code: of several extra scales all are kept, where the release reads at the first and the last
one only; the codebook's loss weighs the commitment, ``|e - sg z|^2 + .25 |sg e - z|^2``, where the release has weights
the other way round (``compat="authors"`` has both slips); any size; norms of queries that self-attention never reads
are left out, and named by the converter. Discriminators of eyes and mouth are not here, and features (LPIPS, ArcFace)
are nets that the user gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints, check_real, check_type, describe
from ...nn.quantizer import VectorQuantizer
from ...nn.released import Released
from ...ops import attention
from ..build import register_models
from .adversarial import AdversarialModel, adaptive_weight
from .base import reflected


class Restored(NamedTuple):
    """What :class:`RestoreFormer` gives.

    ``image`` (B, C, H, W); ``codes`` (B, h, w), the numbers of the dictionary's entries; ``loss`` of codes;
    ``perplexity`` of them, from 1 to K.
    """

    image: Tensor
    codes: Tensor
    loss: Tensor
    perplexity: Tensor


def _norm(dim: int, groups: int) -> nn.GroupNorm:
    if dim % groups:
        raise ValueError(f"groups={groups} does not divide {dim} channels: choose other dims or groups")
    return nn.GroupNorm(groups, dim, eps=1e-6)


class ResBlock(nn.Module):
    """``shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))`` of (B, C, H, W)."""

    def __init__(self, dim: int, out_dim: int, groups: int = 32, drop: float = 0.0):
        super().__init__()
        self.norm1, self.conv1 = _norm(dim, groups), nn.Conv2d(dim, out_dim, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_dim, groups), nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.drop = nn.Dropout(drop)
        self.shortcut = nn.Identity() if dim == out_dim else nn.Conv2d(dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.drop(F.silu(self.norm2(y))))


class PriorAttention(nn.Module):
    """Attention over a map x, of itself or of another map y; what is read is added to x.

    Args:
        dim: channels of both.
        num_heads: H, of neighbouring channels.
        cross: whether there is a y, which has a norm of its own.
        groups: of the norms.

    >>> PriorAttention(8, 2, groups=4)(torch.randn(1, 8, 3, 5), torch.randn(1, 8, 3, 5)).shape
    torch.Size([1, 8, 3, 5])
    """

    def __init__(self, dim: int, num_heads: int = 4, cross: bool = True, groups: int = 32):
        super().__init__()
        check_int("num_heads", num_heads, least=1)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        self.num_heads, self.cross = num_heads, check_flag("cross", cross)
        self.norm1 = _norm(dim, groups)
        self.norm2 = _norm(dim, groups) if cross else None
        self.q, self.k, self.v, self.proj = (nn.Conv2d(dim, dim, 1) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, dim, H, W), and queries of the same shape."""
        h = self.norm1(x)
        if self.norm2 is None:
            if y is not None:
                raise ValueError("y was given to self-attention (cross=False)")
            y = h
        elif y is None:
            y = h
        elif y.shape != x.shape:
            raise ValueError(f"y must be of the shape of x, {tuple(x.shape)}, got {describe(y)}")
        else:
            y = self.norm2(y)
        q, k, v = (
            f(t).flatten(2).unflatten(1, (self.num_heads, -1)).mT for f, t in ((self.q, y), (self.k, h), (self.v, h))
        )
        read = attention(q, k, v).mT.flatten(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj(read)


class _Level(nn.Module):
    """Blocks of one size, each with attention behind it or not, and what leads to the next size."""

    def __init__(self, blocks: Sequence[nn.Module], attention: Sequence[nn.Module], resize: nn.Module | None):
        super().__init__()
        self.blocks, self.attention, self.resize = nn.ModuleList(blocks), nn.ModuleList(attention), resize


class _Middle(nn.Module):
    def __init__(self, dim: int, num_heads: int, cross: bool, groups: int, drop: float):
        super().__init__()
        self.block1, self.block2 = (ResBlock(dim, dim, groups, drop) for _ in range(2))
        self.attention = PriorAttention(dim, num_heads, cross, groups)


class FaceEncoder(nn.Module):
    """(B, C, H, W) to its features before they are quantized, and maps that a decoder reads: coarsest last, then the
    one behind the middle."""

    def __init__(
        self, in_chans: int, dim: int, mults: Sequence[int], depth: int, code_dim: int, strides: Sequence[int],
        num_heads: int, groups: int, drop: float,
    ):  # fmt: skip
        super().__init__()
        self.conv_in = nn.Conv2d(in_chans, dim, 3, padding=1)
        widths, levels = [dim * m for m in mults], []
        for i, (before, width) in enumerate(zip((dim, *widths), widths, strict=False)):
            blocks = [ResBlock(before if j == 0 else width, width, groups, drop) for j in range(depth)]
            reads = depth if 2**i in strides else 0
            heads = [PriorAttention(width, num_heads, False, groups) for _ in range(reads)]
            down = nn.Conv2d(width, width, 3, 2) if i < len(widths) - 1 else None
            levels.append(_Level(blocks, heads, down))
        self.levels = nn.ModuleList(levels)
        self.middle = _Middle(widths[-1], num_heads, False, groups, drop)
        self.norm_out, self.conv_out = _norm(widths[-1], groups), nn.Conv2d(widths[-1], code_dim, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, maps = self.conv_in(x), []
        for level in self.levels:
            for i, block in enumerate(level.blocks):  # type: ignore[arg-type]
                x = block(x)
                if len(level.attention):  # type: ignore[arg-type]
                    x = level.attention[i](x)  # type: ignore[index,operator]
            if level.resize is not None:
                maps.append(x)
                x = level.resize(F.pad(x, (0, 1, 0, 1)))  # type: ignore[operator]
        x = self.middle.block1(x)
        maps.append(x)
        x = self.middle.block2(self.middle.attention(x))
        maps.append(x)
        return self.conv_out(F.silu(self.norm_out(x))), maps


class FaceDecoder(nn.Module):
    """Codes back to an image; attention at ``strides`` reads maps of the encoder, if ``cross``."""

    def __init__(
        self, out_chans: int, dim: int, mults: Sequence[int], depth: int, code_dim: int, strides: Sequence[int],
        num_heads: int, groups: int, drop: float, cross: bool,
    ):  # fmt: skip
        super().__init__()
        widths = [dim * m for m in mults]
        self.cross = cross
        self.conv_in = nn.Conv2d(code_dim, widths[-1], 3, padding=1)
        self.middle = _Middle(widths[-1], num_heads, cross, groups, drop)
        levels = []
        for i, width in enumerate(widths):
            before = widths[min(i + 1, len(widths) - 1)]
            blocks = [ResBlock(before if j == 0 else width, width, groups, drop) for j in range(depth + 1)]
            reads = depth + 1 if 2**i in strides else 0
            heads = [PriorAttention(width, num_heads, cross, groups) for _ in range(reads)]
            levels.append(_Level(blocks, heads, nn.Conv2d(width, width, 3, padding=1) if i else None))
        self.levels = nn.ModuleList(levels)
        self.norm_out, self.conv_out = _norm(widths[0], groups), nn.Conv2d(widths[0], out_chans, 3, padding=1)

    def forward(self, z: Tensor, maps: Sequence[Tensor]) -> Tensor:
        def read(layer: Any, x: Tensor, at: int) -> Tensor:
            return layer(x, maps[at]) if self.cross else layer(x)

        x = self.middle.block1(self.conv_in(z))
        x = self.middle.block2(read(self.middle.attention, x, -1))
        for i in range(len(self.levels) - 1, -1, -1):
            level: Any = self.levels[i]
            for j, block in enumerate(level.blocks):
                x = block(x)
                if len(level.attention):
                    x = read(level.attention[j], x, i)
            if level.resize is not None:
                x = level.resize(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class RestoreFormer(AdversarialModel):
    """Faces (B, in_chans, H, W), -1 to 1, to restored ones; a :class:`Restored`.

    Sides that are no multiples of the coarsest stride are padded by reflection, and what that adds is cut off.

    Args:
        in_chans: channels of images.
        dim: channels at full size.
        mults: of dim, at every level.
        depth: residual blocks of a level of the encoder; the decoder has one more.
        num_codes, code_dim: of the dictionary.
        num_heads: of all attention.
        extra_scales: levels above the coarsest where the decoder reads: 0 is RestoreFormer, 1 RestoreFormer++.
        cross: False: the dictionary's stage.
        frozen: what has no gradient: of ``"dictionary"`` (the default of the second stage), ``"encoder"``,
            ``"decoder"`` (with the dictionary); a sequence.
        groups: of the norms.
        drop: dropout.
        perceptual: distance of two images, such as :class:`attnlib.models.restore.adversarial.PerceptualLoss`.
        identity: grey images (B, 1, 128, 128) to vectors of who is shown; their L1 distance is a term.
        l1, codes, perceptual_weight, identity_weight: weights of the terms.
        discriminator: of images.
        gan_weight, gan_start: of the adversarial term; it is weighed so that it pulls at the last layer as much as the
            images' difference does, times ``gan_weight``.
        compat: ``"authors"``: their weights of the codes' loss, and their scales where ``extra_scales`` is above 1.

    >>> model = RestoreFormer(dim=8, mults=(1, 2), num_codes=6, code_dim=4, num_heads=2, groups=4).eval()
    >>> made = model(torch.zeros(1, 3, 10, 13))
    >>> made.image.shape, made.codes.shape
    (torch.Size([1, 3, 10, 13]), torch.Size([1, 5, 7]))
    """

    def __init__(
        self, in_chans: int = 3, dim: int = 64, mults: Sequence[int] = (1, 2, 2, 4, 4, 8), depth: int = 2,
        num_codes: int = 1024, code_dim: int = 256, num_heads: int = 4, extra_scales: int = 1, cross: bool = True,
        frozen: Sequence[str] | None = None, groups: int = 32, drop: float = 0.0, perceptual: nn.Module | None = None,
        identity: nn.Module | None = None, l1: float = 1.0, codes: float = 1.0, perceptual_weight: float = 1.0,
        identity_weight: float = 1.0, discriminator: nn.Module | None = None, gan_weight: float = 0.8,
        gan_start: float = 0.0, compat: str | None = None,
    ):  # fmt: skip
        super().__init__(discriminator, "hinge", gan_weight, 0.5, gan_start)
        self.in_chans = check_int("in_chans", in_chans, least=1)
        for name, value in (("dim", dim), ("depth", depth), ("code_dim", code_dim), ("groups", groups)):
            check_int(name, value, least=1)
        mults = check_ints("mults", mults, least=1)
        if not mults:
            raise ValueError("mults must hold one number for every level, got none")
        self.cross = check_flag("cross", cross)
        most = len(mults) - 1
        extra = check_int("extra_scales", extra_scales, least=0, most=most) if cross else 0
        check_choice("compat", compat, (None, "authors"))
        self.step = 2**most
        self.strides = [self.step >> e for e in range(extra + 1)]
        if compat is not None and extra > 1:
            self.strides = [self.strides[0], self.strides[-1]]
        weights = [check_real(n, v, least=0) for n, v in (
            ("l1", l1), ("codes", codes), ("perceptual_weight", perceptual_weight), ("identity_weight", identity_weight)
        )]  # fmt: skip
        self.l1, self.codes, self.perceptual_weight, self.identity_weight = weights
        for name, net in (("perceptual", perceptual), ("identity", identity)):
            if net is not None:
                check_type(name, net, nn.Module)
        sizes = (in_chans, dim, mults, depth, code_dim)
        self.encoder = FaceEncoder(*sizes, (self.step,), num_heads, groups, drop)
        self.decoder = FaceDecoder(*sizes, self.strides, num_heads, groups, drop, cross)
        commitment, codebook = (0.25, 1.0) if compat is None else (1.0, 0.25)
        self.quantizer = VectorQuantizer(num_codes, code_dim, 0.0, commitment, codebook_weight=codebook)
        self.quant_in, self.quant_out = nn.Conv2d(code_dim, code_dim, 1), nn.Conv2d(code_dim, code_dim, 1)
        self.perceptual, self.identity = perceptual, identity
        if frozen is None:
            frozen = ("dictionary",) if cross else ()
        parts: dict[str, list[nn.Module]] = {
            "dictionary": [self.quantizer], "encoder": [self.encoder, self.quant_in],
            "decoder": [self.decoder, self.quant_out, self.quantizer],
        }  # fmt: skip
        for i, part in enumerate(frozen):
            check_choice(f"frozen[{i}]", part, parts)
            for module in parts[part]:
                module.requires_grad_(False)

    def forward(self, x: Tensor) -> Restored:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        if not x.shape[2:].numel():
            raise ValueError(f"x must hold at least one pixel, got shape {tuple(x.shape)}")
        height, width = x.shape[2:]
        features, maps = self.encoder(reflected(x, (-height % self.step, -width % self.step)))
        found = self.quantizer(self.quant_in(features).movedim(1, -1))
        image = self.decoder(self.quant_out(found.y.movedim(-1, 1)), maps)
        return Restored(image[..., :height, :width], found.indices, found.loss, found.perplexity)

    def start_from(self, dictionary: RestoreFormer) -> list[str]:
        """Take the weights of a trained dictionary; what it does not have stays as it was, and is named.

        Raises:
            ValueError: a model of other sizes, or one that is no dictionary.
        """
        check_type("dictionary", dictionary, RestoreFormer)
        if dictionary.cross:
            raise ValueError("dictionary must be a model of the first stage (cross=False)")
        own, given = self.state_dict(), dictionary.state_dict()
        judge = ("discriminator.", "perceptual.", "identity.")
        given = {k: v for k, v in given.items() if not k.startswith(judge)}
        wrong = [k for k, v in given.items() if k not in own or own[k].shape != v.shape]
        if wrong:
            raise ValueError(f"dictionary is of other sizes: {wrong[0]} has shape {tuple(given[wrong[0]].shape)}")
        self.load_state_dict({**own, **given})
        return [k for k in own if k not in given and not k.startswith(judge)]

    def loss(self, prediction: Restored, target: Tensor) -> dict[str, Tensor]:
        """``{"l1", "codes"}``, and ``"perceptual"`` and ``"identity"`` where there are nets for them.

        Args:
            prediction: of :meth:`forward`.
            target: (B, in_chans, H, W), undegraded.
        """
        image = prediction.image
        if not isinstance(target, Tensor) or target.shape != image.shape:
            raise ValueError(f"target must be images {tuple(image.shape)}, got {describe(target)}")
        target = target.to(image.dtype)
        terms = {"l1": self.l1 * F.l1_loss(image, target), "codes": self.codes * prediction.loss}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual_weight * self.perceptual(image, target)
        if self.identity is not None:
            with torch.no_grad():
                right = self.identity(grey_faces(target))
            terms["identity"] = self.identity_weight * F.l1_loss(self.identity(grey_faces(image)), right)
        return terms

    def image_of(self, prediction: Restored, inputs: Mapping[str, Any]) -> Tensor:
        return prediction.image

    def pull(self, terms: Mapping[str, Tensor], adversarial: Tensor) -> Tensor | float:
        last = self.decoder.conv_out.weight
        if not last.requires_grad:
            return self.gan_weight
        seen = [terms[name] for name in ("l1", "perceptual") if name in terms]
        return self.gan_weight * adaptive_weight(torch.stack(seen).sum(), adversarial, last)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The restored image (B, in_chans, H, W), -1 to 1."""
        training = self.training
        self.eval()
        try:
            return self(x).image.clamp(-1, 1)
        finally:
            self.train(training)


def grey_faces(x: Tensor, size: int = 128) -> Tensor:
    """(B, 3, H, W) to grey (B, 1, size, size), as nets of identity read faces; grey images only change their size."""
    if x.shape[1] == 3:
        x = (x * torch.tensor([0.2989, 0.5870, 0.1140], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)).sum(1, True)
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def convert(state_dict: Mapping[str, Tensor], model: RestoreFormer) -> dict[str, Tensor]:
    """From the authors' ``VQVAEGANMultiHeadTransformer`` or ``VQVAEGAN``, also inside a checkpoint of their training.

    Left out: norms of queries in self-attention, which never run, and of a checkpoint the parts of the loss.
    """
    entries = dict(state_dict)
    if any(str(k).startswith("vqvae.") for k in entries):
        entries = {(k[6:] if k.startswith("vqvae.") else k): v for k, v in entries.items() if not k.startswith("loss.")}
    theirs = Released(entries, "the authors' RestoreFormer")
    theirs.leave(r"encoder\.(down\.\d\.attn\.\d|mid\.attn_1)\.norm2\..*", because="self-attention reads one norm")
    if not model.cross:
        theirs.leave(r"decoder\.(up\.\d\.attn\.\d|mid\.attn_1)\.norm2\..*", because="self-attention reads one norm")

    def rename(found: re.Match[str], value: Tensor) -> dict[str, Tensor]:
        side, name = found[1], found[2]
        for pattern, to in (
            (r"(?:down|up)\.(\d)\.block\.(\d)\.nin_shortcut\.(.*)", r"levels.\1.blocks.\2.shortcut.\3"),
            (r"(?:down|up)\.(\d)\.block\.(\d)\.(.*)", r"levels.\1.blocks.\2.\3"),
            (r"(?:down|up)\.(\d)\.attn\.(\d)\.proj_out\.(.*)", r"levels.\1.attention.\2.proj.\3"),
            (r"(?:down|up)\.(\d)\.attn\.(\d)\.(.*)", r"levels.\1.attention.\2.\3"),
            (r"(?:down|up)\.(\d)\.(?:down|up)sample\.conv\.(.*)", r"levels.\1.resize.\2"),
            (r"mid\.block_(\d)\.(.*)", r"middle.block\1.\2"),
            (r"mid\.attn_1\.proj_out\.(.*)", r"middle.attention.proj.\1"),
            (r"mid\.attn_1\.(.*)", r"middle.attention.\1"),
        ):
            if re.fullmatch(pattern, name):
                return {f"{side}coder.{re.sub(pattern, to, name)}": value}
        return {f"{side}coder.{name}": value}

    out = theirs.renamed(
        {
            r"(en|de)coder\.(.+)": rename,
            r"quant_conv\.(.*)": r"quant_in.\1",
            r"post_quant_conv\.(.*)": r"quant_out.\1",
            r"quantize\.embedding\.weight": "quantizer.codebook",
        }
    )
    return theirs.close(out)


register_models(
    "restoreformer-plusplus",
    RestoreFormer,
    {
        "restoreformer": dict(in_chans=3, extra_scales=0),
        "restoreformer_plusplus": dict(in_chans=3),
        "restoreformer_dictionary": dict(in_chans=3, cross=False),
    },
    # With norms that never run, the released classes have 72,680,003, 73,472,579 and 72,680,003.
    params={
        "restoreformer": 72_676_931,
        "restoreformer_plusplus": 73_469_507,
        "restoreformer_dictionary": 72_672_835,
    },
    license="Apache-2.0",
    source="wzhouxiff/RestoreFormerPlusPlus",
    convert=convert,  # type: ignore[arg-type]
    img_size=512,
    task="restore",
)

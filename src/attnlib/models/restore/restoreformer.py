"""RestoreFormer and RestoreFormer++: degraded faces that read keys and values of undegraded ones.

Wang et al., 2023, "RestoreFormer++: Towards Real-World Blind Face Restoration from Undegraded Key-Value Pairs", arXiv
2308.07228. Two stages of one net: an encoder E, a codebook, a decoder.

1. The dictionary (``cross=False``): a VQGAN that gives faces of high quality back; its attention is self-attention.
2. The restorer: the codebook is kept, and in the decoder the dictionary's map x is read by the degraded face's map y of
   the same size: ``q = W_q norm(y), k = W_k norm(x), v = W_v norm(x)``, ``x + W_o softmax(q k^T / sqrt(d)) v``.

RestoreFormer reads at stride 32, RestoreFormer++ at stride 16 too (``extra_scales=1``). Eyes and mouth, where targets
say where they are, have judges of their own (``parts=True``), whose maps are held against those of the undegraded face
by their Gram matrices (``parts_style``), as RestoreFormer's training does.

Differs from the authors' code: of several extra scales all are kept, where the release reads at the first and the last
one only; the codebook's loss weighs the commitment, ``|e - sg z|^2 + .25 |sg e - z|^2``, where the release has weights
the other way round (``compat="authors"`` has both slips); any size; norms of queries that self-attention never reads
are left out, and named by the converter. Features (LPIPS, ArcFace) are nets that the user gives. All judges see the
image of one forward pass, where theirs make it anew for each; crops of images of other sizes than 512 are not dimmed by
that share.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_choice,
    check_divides,
    check_flag,
    check_float,
    check_int,
    check_ints,
    check_real,
    check_type,
    describe,
)
from ...nn.quantizer import VectorQuantizer
from ...nn.released import Released
from ...ops import attention
from ..build import register_models
from ..detect.regions import roi_align
from ..protocol import Step, split_batch, trained
from .adversarial import (
    KINDS,
    AdversarialModel,
    PartDiscriminator,
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gram,
)
from .base import reflected

#: Parts of faces that are judged by themselves, and the sides of their crops in images of 512 pixels.
PARTS = {"left_eye": 80, "right_eye": 80, "mouth": 120}


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
        num_heads: int, groups: int, drop: float, middle: bool = True,
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
        self.middle = _Middle(widths[-1], num_heads, False, groups, drop) if middle else None
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
        if self.middle is not None:
            x = self.middle.block1(x)
            maps.append(x)
            x = self.middle.block2(self.middle.attention(x))
            maps.append(x)
        return self.conv_out(F.silu(self.norm_out(x))), maps


class FaceDecoder(nn.Module):
    """Codes back to an image; attention at ``strides`` reads maps of the encoder, if ``cross``."""

    def __init__(
        self, out_chans: int, dim: int, mults: Sequence[int], depth: int, code_dim: int, strides: Sequence[int],
        num_heads: int, groups: int, drop: float, cross: bool, middle: bool = True,
    ):  # fmt: skip
        super().__init__()
        widths = [dim * m for m in mults]
        self.cross = cross
        self.conv_in = nn.Conv2d(code_dim, widths[-1], 3, padding=1)
        self.middle = _Middle(widths[-1], num_heads, cross, groups, drop) if middle else None
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

        x = self.conv_in(z)
        if self.middle is not None:
            x = self.middle.block2(read(self.middle.attention, self.middle.block1(x), -1))
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
        extra_scales: levels above the finest of ``strides`` where the decoder reads, too: 0 is RestoreFormer, 1
            RestoreFormer++.
        strides: of the maps with attention behind every block, powers of two; the coarsest by default.
        middle: two blocks with attention between them, behind the coarsest level and before it.
        z_dim: channels of the features before and behind the dictionary; ``code_dim`` by default.
        out_chans: of images that are made; ``in_chans`` by default.
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
        parts: eyes and mouth are judged, each by its own; targets are then (image, boxes) in training.
        parts_weight, parts_style: of what these judges say, and of the distance of Gram matrices of their maps.
        judge_kind: ``"hinge"`` or ``"logistic"``: the loss of the judge of images; what it says of made ones is their
            mean score in both, as released.
        parts_kind: one of ``KINDS``, of the judges of parts.
        compat: ``"authors"``: their weights of the codes' loss, their scales where ``extra_scales`` is above 1, and
            their crops.

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
        gan_start: float = 0.0, compat: str | None = None, strides: Sequence[int] | None = None, middle: bool = True,
        z_dim: int | None = None, out_chans: int | None = None, parts: bool = False, parts_weight: float = 1.0,
        parts_style: float = 0.0, judge_kind: str = "hinge", parts_kind: str = "logistic",
    ):  # fmt: skip
        check_choice("judge_kind", judge_kind, ("hinge", "logistic"))
        super().__init__(discriminator, "hinge", gan_weight, 0.5, gan_start, judge_kind)
        self.in_chans = check_int("in_chans", in_chans, least=1)
        for name, value in (("dim", dim), ("depth", depth), ("code_dim", code_dim), ("groups", groups)):
            check_int(name, value, least=1)
        mults = check_ints("mults", mults, least=1)
        if not mults:
            raise ValueError("mults must hold one number for every level, got none")
        self.cross, self.compat = check_flag("cross", cross), compat
        most = len(mults) - 1
        check_choice("compat", compat, (None, "authors"))
        self.step = 2**most
        held = (self.step,) if strides is None else check_ints("strides", strides, least=1)
        for stride in held:
            check_divides("strides", stride, "the coarsest stride", self.step)
        if not held:
            raise ValueError("strides must hold at least one, got none")
        finest = min(held)
        extra = check_int("extra_scales", extra_scales, least=0, most=finest.bit_length() - 1) if cross else 0
        self.strides = [*held, *(finest >> e for e in range(1, extra + 1))]
        if compat is not None and extra:
            self.strides = [held[0], held[-1] >> extra]
        if cross and not check_flag("middle", middle) and self.step in self.strides:
            raise ValueError(f"middle=False leaves no map to read at stride {self.step}; choose other strides")
        weights = [check_real(n, v, least=0) for n, v in (
            ("l1", l1), ("codes", codes), ("perceptual_weight", perceptual_weight), ("identity_weight", identity_weight)
        )]  # fmt: skip
        self.l1, self.codes, self.perceptual_weight, self.identity_weight = weights
        for name, net in (("perceptual", perceptual), ("identity", identity)):
            if net is not None:
                check_type(name, net, nn.Module)
        z_dim = code_dim if z_dim is None else check_int("z_dim", z_dim, least=1)
        self.out_chans = in_chans if out_chans is None else check_int("out_chans", out_chans, least=1)
        sizes = (dim, mults, depth, z_dim)
        self.encoder = FaceEncoder(in_chans, *sizes, held, num_heads, groups, drop, middle)
        self.decoder = FaceDecoder(self.out_chans, *sizes, self.strides, num_heads, groups, drop, cross, middle)
        commitment, codebook = (0.25, 1.0) if compat is None else (1.0, 0.25)
        self.quantizer = VectorQuantizer(num_codes, code_dim, 0.0, commitment, codebook_weight=codebook)
        self.quant_in, self.quant_out = nn.Conv2d(z_dim, code_dim, 1), nn.Conv2d(code_dim, z_dim, 1)
        self.parts_weight, self.parts_style = (
            check_real(n, v, least=0) for n, v in (("parts_weight", parts_weight), ("parts_style", parts_style))
        )
        judges = {name: PartDiscriminator(self.out_chans) for name in PARTS} if check_flag("parts", parts) else {}
        self.parts = nn.ModuleDict(judges)
        check_choice("parts_kind", parts_kind, KINDS)
        self.parts_kind = parts_kind
        self.perceptual, self.identity = perceptual, identity
        if frozen is None:
            frozen = ("dictionary",) if cross else ()
        sections: dict[str, list[nn.Module]] = {
            "dictionary": [self.quantizer], "encoder": [self.encoder, self.quant_in],
            "decoder": [self.decoder, self.quant_out, self.quantizer],
        }  # fmt: skip
        for i, part in enumerate(frozen):
            check_choice(f"frozen[{i}]", part, sections)
            for module in sections[part]:
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
        judge = ("discriminator.", "perceptual.", "identity.", "parts.")
        given = {k: v for k, v in given.items() if not k.startswith(judge)}
        wrong = [k for k, v in given.items() if k not in own or own[k].shape != v.shape]
        if wrong:
            raise ValueError(f"dictionary is of other sizes: {wrong[0]} has shape {tuple(given[wrong[0]].shape)}")
        self.load_state_dict({**own, **given})
        return [k for k in own if k not in given and not k.startswith(judge)]

    def loss(self, prediction: Restored, target: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """``{"l1", "codes"}``, and ``"perceptual"`` and ``"identity"`` where there are nets for them.

        ``"style"`` is the perceptual net's own, with its own weight, and not part of what the adversarial term is
        held against.

        Args:
            prediction: of :meth:`forward`.
            target: (B, out_chans, H, W), undegraded; or that and boxes, which only :meth:`steps` reads.
        """
        image, target = prediction.image, self.truth_of(target)
        if not isinstance(target, Tensor) or target.shape != image.shape:
            raise ValueError(f"target must be images {tuple(image.shape)}, got {describe(target)}")
        target = target.to(image.dtype)
        terms = {"l1": self.l1 * F.l1_loss(image, target), "codes": self.codes * prediction.loss}
        if self.perceptual is not None:
            net = self.perceptual
            found = net.terms(image, target) if isinstance(net, PerceptualLoss) else {"distance": net(image, target)}
            terms["perceptual"] = self.perceptual_weight * found.pop("distance")
            terms |= found
        if self.identity is not None:
            with torch.no_grad():
                right = self.identity(grey_faces(target))
            terms["identity"] = self.identity_weight * F.l1_loss(self.identity(grey_faces(image)), right)
        return terms

    def image_of(self, prediction: Restored, inputs: Mapping[str, Any]) -> Tensor:
        return prediction.image

    def truth_of(self, target: Any) -> Tensor:
        return target[0] if isinstance(target, (tuple, list)) else target

    def generator_params(self) -> list[nn.Parameter]:
        judges = {id(p) for p in self.parts.parameters()}
        return [p for p in super().generator_params() if id(p) not in judges]

    def steps(self, batch: Mapping[str, Any]) -> Iterator[Step]:
        """As of :class:`AdversarialModel`; before the generator's turn that of every part's judge, by its name.

        Args:
            batch: its ``"target"`` is (image, boxes) where parts are judged, boxes (B, 3, 4): left, top, right and
                bottom, in pixels, of the left eye, the right eye and the mouth.
        """
        if not len(self.parts) or self.progress < self.gan_start:
            yield from super().steps(batch)
            return
        inputs, target = split_batch(self, batch)
        if not isinstance(target, (tuple, list)) or len(target) != 2:
            raise ValueError(f"target must be (image, boxes (B, 3, 4)) where parts are judged, got {describe(target)}")
        made = self(**inputs)
        image, truth = made.image, self.truth_of(target).to(made.image.dtype)
        fake, real = (face_parts(t, target[1], self.compat) for t in (image, truth))

        def judged(judge: Any, name: str, first: Tensor, second: Tensor) -> dict[str, Tensor]:
            own = name == "discriminator"
            weight, kind = (self.judge_weight, self.judge_kind) if own else (1.0, self.parts_kind)
            return {name: weight * discriminator_loss(judge(second), judge(first.detach()), kind)}

        def fooled() -> dict[str, Tensor]:
            found = self.loss(made, (target[0], target[1]))
            if self.discriminator is not None:
                adversarial = generator_loss(self.discriminator(image), self.gan_kind)
                found["adversarial"] = self.pull(found, adversarial) * adversarial
            return {**found, **self.part_terms(fake, real)}

        pairs = {name: (judge, fake[name], real[name]) for name, judge in self.parts.items()}
        if self.discriminator is not None:
            pairs = {"discriminator": (self.discriminator, image, truth), **pairs}
        for name, (judge, first, second) in pairs.items():
            yield Step(name, trained(judge), functools.partial(judged, judge, name, first, second))
        yield Step("generator", self.generator_params(), fooled)

    def part_terms(self, fake: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"parts"}``, and ``"parts_style"`` where it has a weight, of crops by name (:func:`face_parts`)."""
        scores, styles = [], []
        for name, judge in self.parts.items():
            middle, coarse, score = judge.maps(fake[name])  # type: ignore[operator,union-attr]
            scores.append(generator_loss(score, self.parts_kind))
            if self.parts_style:
                with torch.no_grad():
                    right = judge.maps(real[name])  # type: ignore[operator,union-attr]
                styles.append(0.5 * F.l1_loss(gram(middle), gram(right[0])) + F.l1_loss(gram(coarse), gram(right[1])))
        terms = {"parts": self.parts_weight * torch.stack(scores).sum()}
        return {**terms, "parts_style": self.parts_style * torch.stack(styles).sum()} if styles else terms

    def pull(self, terms: Mapping[str, Tensor], adversarial: Tensor) -> Tensor | float:
        last = self.decoder.conv_out.weight
        if not last.requires_grad:
            return self.gan_weight
        seen = [terms[name] for name in ("l1", "perceptual") if name in terms]
        return self.gan_weight * adaptive_weight(torch.stack(seen).sum(), adversarial, last)

    def predict(self, x: Tensor) -> Tensor:
        """The restored image (B, in_chans, H, W), -1 to 1."""
        return self(x).image.clamp(-1, 1)


def face_parts(x: Tensor, boxes: Tensor, compat: str | None = None) -> dict[str, Tensor]:
    """Crops of :data:`PARTS` by name, (B, C, s, s): s is 80 for eyes and 120 for mouths in images of 512 pixels.

    Args:
        x: faces (B, C, H, W).
        boxes: (B, 3, 4) left, top, right and bottom in pixels, of the left eye, the right eye and the mouth.
        compat: ``"authors"``: crops are multiplied by ``W / 512``.

    Raises:
        ValueError: boxes of another shape, or that are empty.
    """
    check_float("x", x)
    if not isinstance(boxes, Tensor) or boxes.shape != (len(x), len(PARTS), 4):
        raise ValueError(f"boxes must be ({len(x)}, {len(PARTS)}, 4), got {describe(boxes)}")
    if not bool((boxes[..., 2:] > boxes[..., :2]).all()):
        raise ValueError("boxes must be left, top, right, bottom with right > left and bottom > top")
    share = x.shape[-1] / 512
    owner = torch.arange(len(x), device=x.device, dtype=x.dtype)[:, None]
    out = {}
    for i, (name, side) in enumerate(PARTS.items()):
        rows = torch.cat([owner, boxes[:, i].to(x)], 1)
        crop = roi_align(x, rows, max(1, int(side * share)), samples=None, aligned=False)
        out[name] = crop if compat is None else crop * share
    return out


def grey_faces(x: Tensor, size: int = 128) -> Tensor:
    """(B, 3, H, W) to grey (B, 1, size, size), as nets of identity read faces; grey images only change their size."""
    if x.shape[1] == 3:
        x = (x * torch.tensor([0.2989, 0.5870, 0.1140], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)).sum(1, True)
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def convert(state_dict: Mapping[str, Tensor], model: RestoreFormer) -> dict[str, Tensor]:
    """From the authors' ``VQVAEGANMultiHeadTransformer`` or ``VQVAEGAN``, also inside a checkpoint of their training.

    Left out: norms of queries in self-attention, which never run, and of a checkpoint the nets of the loss that the
    model does not have. What the model trains against and no checkpoint holds stays as it is.
    """
    entries, kept = dict(state_dict), {}
    if any(str(k).startswith("vqvae.") for k in entries):
        kept = _judges({str(k)[5:]: v for k, v in entries.items() if str(k).startswith("loss.")}, model)
        entries = {(k[6:] if k.startswith("vqvae.") else k): v for k, v in entries.items() if not k.startswith("loss.")}
    nets = ("discriminator.", "parts.", "perceptual.", "identity.")
    own = {k: v for k, v in model.state_dict().items() if k.startswith(nets)}
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
    return {**own, **kept, **theirs.close(out)}


def _judges(held: Mapping[str, Tensor], model: RestoreFormer) -> dict[str, Tensor]:
    """Of the parts of a checkpoint's loss, what the model has: the judge of images, and those of eyes and mouth."""
    out: dict[str, Tensor] = {}
    if isinstance(model.discriminator, PatchDiscriminator):
        lead = "discriminator.main."
        out |= {f"discriminator.layers.{k[len(lead) :]}": v for k, v in held.items() if k.startswith(lead)}
    for name in model.parts:
        lead = f"net_d_{name}."
        part = {k[len(lead) :]: v for k, v in held.items() if k.startswith(lead)}
        if part:
            out |= {f"parts.{name}.{k}": v for k, v in PartDiscriminator.convert_state_dict(part).items()}
    return out


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

"""DMMI: referring segmentation for expressions that name nothing, one thing or many.

Hu et al., 2023, "Beyond One-to-One: Rethinking the Referring Image Segmentation", arXiv 2308.13853. A Swin, or a
ResNet, whose stages exchange with the words of a sentence, and two decoders: pixels read the words and become a mask;
words of the sentence with its naming phrase erased read the pixels, and are to become the words of the whole sentence.
A vector of what the mask decoder saw is held against the mean word of the sentence, in a batch (InfoNCE).

Behind every stage, for its map x and the words l (LAVT's fusion, in both directions and at three extents):

    ``S_k = softmax(q_k(x) key_k(l)^T)``,   ``x_l = IN(W sum_k a_k S_k v(l))``,   ``r = f(g(x) * x_l)``,
    ``T_k = softmax(q'_k(l) key'_k(x)^T)``, ``l <- l + W_l W_2 sum_k b_k T_k v'(x)``, ``x <- x + gate(r) * r``,

where q_k is a k x k convolution (k = 1, 3, 5) and q'_k one of 1, 2 and 3 neighbouring words. Decoders get LN(r) of a
Swin, the new x of a ResNet.

Loss, with f = 1 for samples that name something: cross entropy, weighted 0.9 to 1.1;
0.01 ``(1 - mean_b f_b mean_t cos(sg l_t, rebuilt_t))``; and 0.01 of InfoNCE, each sample's terms times f.

Differs from the authors' code, whose arithmetic ``compat="authors"`` reproduces: its decoders attend to padding, its
mean word counts it, and extents of words reach into it (here beyond the ends of a sentence its end words stand); zeros
that fill up windows take part in attention. Any grid, where theirs needs squares. Left out is what never runs: a second
copy of every decoder layer, and the gate of a Swin's last stage. Gates start as their Swin does, not at zero, where
both layers would stay. Their numbers of heads of the fusion (``mha``) change nothing: all heads read by one map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_ints, check_real, check_type, check_valid, describe
from ...nn.layers import masked_mean, zero_invalid
from ...nn.partition.maxvit import PartitionAttention
from ...nn.released import Released, Rule
from ..backbones import hosts
from ..backbones.resnet import convert as convert_resnet
from ..backbones.resnet import resnet
from ..blocks import Place
from ..build import register_models
from ..protocol import TaskModel
from ..retrieval.contrast import symmetric_contrast
from .heads import pixel_cross_entropy

VISUAL, VERBAL = (1, 3, 5), (1, 2, 3)
TRUNKS = ("swin", "resnet")


def _standard(x: Tensor) -> Tensor:
    """Every channel of (B, N, C) to mean 0 and deviation 1 over the places of its sample."""
    y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    y = y - y.mean(1, keepdim=True)
    return (y * (y.square().mean(1, keepdim=True) + 1e-5).rsqrt()).to(x.dtype)


def _aligned(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


class VisualQueries(nn.Module):
    """Weights (B, N, T) with which places read words, from k x k places around each."""

    def __init__(self, dim: int, text_dim: int, kernel: int):
        super().__init__()
        inner = max(1, dim // {1: 1, 3: 2, 5: 4}[kernel])
        self.scale = dim**-0.5
        self.query, self.key = nn.Linear(dim, inner), nn.Linear(text_dim, dim)
        self.around = nn.Conv2d(inner, dim, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, text: Tensor, grid: Sequence[int], valid: Tensor | None) -> Tensor:
        y = _standard(self.query(x)).mT.unflatten(2, tuple(grid))
        q = _standard(self.around(y).flatten(2).mT)
        scores = q @ self.key(text).mT * self.scale
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1)


class VerbalQueries(nn.Module):
    """Weights (B, T, N) with which words read places, from a few neighbouring words each."""

    def __init__(self, dim: int, text_dim: int, kernel: int):
        super().__init__()
        inner = max(1, dim // kernel)
        self.scale, self.kernel = dim**-0.5, kernel
        self.query, self.key = nn.Linear(text_dim, inner), nn.Linear(dim, text_dim)
        self.around = nn.Conv1d(inner, text_dim, kernel)

    def forward(self, x: Tensor, text: Tensor, valid: Tensor | None, ends: Tensor | None) -> Tensor:
        y = self.query(text)
        if ends is not None:
            y = y.gather(1, ends[..., None].expand_as(y))
        k = self.kernel
        y = F.pad(y.mT, (k // 2, (k - 1) // 2), mode="replicate") if k > 1 else y.mT
        q = zero_invalid(self.around(y).mT, valid)
        return (q @ _standard(self.key(x)).mT * self.scale).softmax(-1)


class WordPixelFusion(nn.Module):
    """What places hear from words, and words from places.

    Args:
        dim: channels of the map.
        text_dim: width of the words.
        drop: dropout of the projections of the map.
    """

    def __init__(self, dim: int, text_dim: int, drop: float = 0.0):
        super().__init__()
        self.visual = nn.ModuleList(VisualQueries(dim, text_dim, k) for k in VISUAL)
        self.verbal = nn.ModuleList(VerbalQueries(dim, text_dim, k) for k in VERBAL)
        self.visual_weight, self.verbal_weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.text_value, self.text_out = nn.Linear(text_dim, dim), nn.Linear(dim, dim)
        self.map_value, self.map_out = nn.Linear(dim, text_dim), nn.Linear(text_dim, text_dim)
        self.own, self.mixed = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.drop = nn.Dropout(check_real("drop", drop, least=0, below=1))

    def forward(
        self, x: Tensor, text: Tensor, grid: Sequence[int], valid: Tensor | None = None, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, dim) of a grid and (B, T, text_dim) -> the same shapes.

        Args:
            x: places.
            text: words.
            grid: of the places.
            valid: (B, T) boolean, which words exist.
            ends: (B, T), which word stands for each, so that beyond a sentence its end words stand.
        """
        weights = self.visual_weight.softmax(0)
        maps = sum(w * f(x, text, grid, valid) for w, f in zip(weights, self.visual, strict=True))
        heard = _standard(self.text_out(maps @ zero_invalid(self.text_value(text), valid)))
        mixed = self.drop(F.gelu(self.mixed(self.drop(F.gelu(self.own(x))) * heard)))
        weights = self.verbal_weight.softmax(0)
        maps = sum(w * f(x, text, valid, ends) for w, f in zip(weights, self.verbal, strict=True))
        return mixed, self.map_out(maps @ _standard(self.map_value(x)))


class FusedStage(nn.Module):
    """A fusion, its gate into the map, and its way into the words.

    Args:
        dim, text_dim, drop: of the fusion.
        gated: whether the map changes.
        normed: decoders get the norm of what was fused, or the new map.
    """

    def __init__(self, dim: int, text_dim: int, drop: float, gated: bool, normed: bool = True):
        super().__init__()
        self.fusion = WordPixelFusion(dim, text_dim, drop)
        self.norm = nn.LayerNorm(dim) if normed else None
        self.gate = None if not gated else nn.Sequential(
            nn.Linear(dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.Tanh()
        )  # fmt: skip
        self.words = nn.Linear(text_dim, text_dim)

    def forward(
        self, x: Tensor, text: Tensor, valid: Tensor | None, ends: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, H, W, C) for the next stage, words for it, and the map (B, C, H, W) for decoders."""
        grid = x.shape[1:3]
        mixed, told = self.fusion(x.flatten(1, 2), text, grid, valid, ends)
        if self.gate is not None:
            x = x + (self.gate(mixed) * mixed).unflatten(1, grid)
        out = x.movedim(-1, 1) if self.norm is None else self.norm(mixed).mT.unflatten(2, grid)
        return x, text + F.gelu(self.words(told)), out


class MaskStep(nn.Module):
    """A finer map joins: two 3 x 3 convolutions with norm and ReLU over both."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(d, out_dim, 3, padding=1, bias=False) for d in (dim, out_dim))
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_dim) for _ in range(2))

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        if coarse.shape[2] < fine.shape[2] or coarse.shape[3] < fine.shape[3]:
            coarse = _aligned(coarse, fine.shape[2:])
        y = torch.cat([coarse, fine], 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(y)).relu()
        return y


class DMMIPrediction(NamedTuple):
    """What training judges.

    Args:
        logits: (B, 2, H, W); class 1 is what is named.
        words: (B, T, E), behind the backbone.
        rebuilt: (B, T, E) from the erased sentence; ``None`` where none was given.
        seen: (B, E), what the mask decoder saw.
        valid: (B, T) boolean, which words exist; ``None`` for all.
    """

    logits: Tensor
    words: Tensor
    rebuilt: Tensor | None
    seen: Tensor
    valid: Tensor | None


class DMMI(TaskModel):
    """Images (B, in_chans, H, W) and words to logits (B, 2, H, W); in training a :class:`DMMIPrediction`.

    Args:
        trunk: ``"swin"``, or ``"resnet"`` of bottlenecks.
        embed_dim, depths: of the trunk; 128 and (2, 2, 18, 2) of a Swin, 64 and (3, 4, 23, 3) of a ResNet by default,
            whose maps have four times as many channels.
        num_heads, window_size: of the Swin; (4, 8, 16, 32) and 12 by default.
        text_dim: width E of words.
        text_heads, ff_dim, drop: of the decoders' layers.
        fusion_drop: dropout in the fusions.
        text_encoder: from ids (B, T) and ``attention_mask=`` to (B, T, E), or to what has it as
            ``last_hidden_state``: transformers' BERT. It is a part of the model and trains with it.
        in_chans, drop_path_rate: as in :func:`attnlib.create_model`.
        class_weight: of background and foreground.
        similarity, contrast: weights of these terms.
        temperature: of the latter.
        ignore_index: the label of pixels that have none.
        compat: ``"authors"``: padding takes part, see above.

    Raises:
        ValueError: shapes that do not fit, a sentence without words, ids without an encoder, heads or windows of a
            ResNet.
    """

    def __init__(
        self,
        embed_dim: int | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        window_size: int | None = None,
        text_dim: int = 768,
        text_heads: int = 8,
        ff_dim: int = 2048,
        drop: float = 0.1,
        fusion_drop: float = 0.0,
        text_encoder: nn.Module | None = None,
        in_chans: int = 3,
        drop_path_rate: float | None = None,
        class_weight: Sequence[float] = (0.9, 1.1),
        similarity: float = 0.01,
        contrast: float = 0.01,
        temperature: float = 0.05,
        ignore_index: int = 255,
        compat: str | None = None,
        trunk: str = "swin",
    ):
        super().__init__()
        check_choice("compat", compat, (None, "authors"))
        check_choice("trunk", trunk, TRUNKS)
        own = trunk == "swin"
        for name, value in (("num_heads", num_heads), ("window_size", window_size)):
            if not own and value is not None:
                raise ValueError(f"{name}={value} is of a Swin, and trunk={trunk!r} has none")
        embed_dim = (128 if own else 64) if embed_dim is None else check_int("embed_dim", embed_dim, least=1)
        depths = ((2, 2, 18, 2) if own else (3, 4, 23, 3)) if depths is None else depths
        heads = (4, 8, 16, 32) if num_heads is None else num_heads
        side = 12 if window_size is None else check_int("window_size", window_size, least=1)
        drop_path_rate = (0.3 if own else 0.0) if drop_path_rate is None else drop_path_rate
        if len(check_ints("depths", depths, least=1)) != 4:
            raise ValueError(f"depths={tuple(depths)} must be four stages")
        if text_encoder is not None:
            check_type("text_encoder", text_encoder, nn.Module)
        self.in_chans, self.text_dim = (
            check_int("in_chans", in_chans, least=1),
            check_int("text_dim", text_dim, least=1),
        )
        self.compat, self.ignore_index = compat, check_int("ignore_index", ignore_index)
        self.class_weight = tuple(check_real("class_weight", w, least=0) for w in class_weight)
        if len(self.class_weight) != 2:
            raise ValueError(f"class_weight must be two numbers, got {self.class_weight}")
        self.similarity, self.contrast = (
            check_real("similarity", similarity, least=0),
            check_real("contrast", contrast, least=0),
        )
        self.temperature = check_real("temperature", temperature, above=0)

        def windows(place: Place) -> nn.Module:
            shift = side // 2 if place.block % 2 else 0
            pad = "mask" if compat is None else "zeros"
            return PartitionAttention(place.dim, place.num_heads, side, rank=2, shift=shift, pad=pad)

        rest: dict[str, Any] = dict(num_classes=0, img_size=(480, 480), drop_rate=0.0, global_pool="avg")
        if own:
            body = hosts.swin(windows, embed_dim, depths, heads, 4.0, drop_path_rate, in_chans, **rest)
            dims = [embed_dim * 2**i for i in range(4)]
        else:
            widths = [embed_dim * 2**i for i in range(4)]
            body = resnet(widths, depths, in_chans=in_chans, drop_path_rate=drop_path_rate, stem_dim=embed_dim, **rest)
            dims = [4 * width for width in widths]
            for part in body.modules():
                if isinstance(part, nn.BatchNorm2d):
                    nn.init.ones_(part.weight)  # torchvision's start: no branch begins at zero
        self.trunk, self.stem, self.stages = trunk, body.stem, body.stages
        self.fused = nn.ModuleList(
            FusedStage(c, text_dim, fusion_drop, not own or i < 3, own) for i, c in enumerate(dims)
        )
        for stage in self.fused if own else ():
            for module in stage.gate or ():  # type: ignore[union-attr]
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)

        def layer() -> nn.TransformerDecoderLayer:
            return nn.TransformerDecoderLayer(text_dim, text_heads, ff_dim, drop, batch_first=True)

        self.mask_steps = nn.ModuleList(
            MaskStep(a + b, text_dim) for a, b in ((dims[3], dims[2]), (text_dim, dims[1]), (text_dim, dims[0]))
        )
        self.pixel_layers = nn.ModuleList(layer() for _ in range(2))
        self.word_conv, self.word_norm = (
            nn.Conv2d(text_dim, text_dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(text_dim),
        )
        self.word_layer = layer()
        self.seen = nn.ModuleList(nn.Linear(2 * text_dim, text_dim) for _ in range(2))
        self.classifier = nn.Conv2d(text_dim, 2, 1)
        self.align = nn.Linear(text_dim, text_dim)
        self.text_encoder = text_encoder

    # ---- words

    def embedded(self, text: Tensor, valid: Tensor | None) -> Tensor:
        """Words (B, T, E) of ids (B, T), or as they are."""
        if isinstance(text, Tensor) and text.dim() == 2 and not text.is_floating_point():
            if self.text_encoder is None:
                raise ValueError(
                    "text holds ids, but no text_encoder is bound; give embeddings (B, T, E) or an encoder"
                )
            mask = torch.ones_like(text) if valid is None else valid.to(text.dtype)
            made = self.text_encoder(text, attention_mask=mask)
            text = made if isinstance(made, Tensor) else made.last_hidden_state
        wrong = not isinstance(text, Tensor) or text.dim() != 3 or text.shape[-1] != self.text_dim
        if wrong or not text.is_floating_point():
            raise ValueError(f"text must be words (B, T, {self.text_dim}) or ids (B, T), got {describe(text)}")
        return text

    def _words(self, x: Tensor, text: Tensor, valid: Tensor | None) -> Tensor:
        text = self.embedded(text, valid)
        if text.shape[0] != x.shape[0]:
            raise ValueError(f"text must be of {x.shape[0]} samples, one for each image, got {text.shape[0]}")
        if not text.shape[1]:
            raise ValueError("text is empty: it has no words")
        check_valid("valid", valid, text.shape[:2])
        if valid is not None and not torch.compiler.is_compiling() and not valid.is_meta:
            if not bool(valid.any(1).all()):
                raise ValueError(f"text is empty in samples {(~valid.any(1)).nonzero().flatten().tolist()}")
        # What stands where there is no word must not count, whatever it is.
        return text if valid is None or self.compat else zero_invalid(text, valid)

    # ---- the call

    def backbone(self, x: Tensor, text: Tensor, valid: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Words (B, T, E) and four maps (B, C_i, h_i, w_i)."""
        ends = None
        if valid is not None and self.compat is None:
            at = torch.arange(text.shape[1], device=text.device)
            first = valid.int().argmax(1, keepdim=True)
            last = text.shape[1] - 1 - valid.flip(1).int().argmax(1, keepdim=True)
            ends = torch.minimum(torch.maximum(at, first), last)
        y, _ = self.stem(x.movedim(1, -1).contiguous(), None)
        maps = []
        for stage, fused in zip(self.stages, self.fused, strict=True):  # type: ignore[call-overload]
            y, _ = stage(y, None)
            y, text, out = fused(y, text, valid, ends)
            maps.append(out)
        return text, maps

    def forward(
        self, x: Tensor, text: Tensor, valid: Tensor | None = None, erased: Tensor | None = None
    ) -> Tensor | DMMIPrediction:
        """Logits, or in training what :meth:`loss` takes.

        Args:
            x: (B, in_chans, H, W).
            text: words (B, T, E), or ids (B, T) for the text encoder.
            valid: (B, T) boolean, which words exist; one a sentence at least.
            erased: the sentence without the phrase that names, of the same shape and ``valid``.
        """
        made = self.everything(x, text, valid, erased)
        return made if self.training else made.logits

    def everything(
        self, x: Tensor, text: Tensor, valid: Tensor | None = None, erased: Tensor | None = None
    ) -> DMMIPrediction:
        """All that training judges."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        words = self._words(x, text, valid)
        without = None if erased is None else self._words(x, erased, valid)
        if without is not None and without.shape != words.shape:
            raise ValueError(f"erased must have the shape of text, got {tuple(without.shape)} and {tuple(words.shape)}")
        absent = None if valid is None or self.compat or not len(x) else ~valid  # torch takes no mask of no rows
        words, maps = self.backbone(x, words, valid)
        if valid is not None and self.compat is None:
            words = zero_invalid(words, valid)
        y = self.mask_steps[0](maps[3], maps[2])
        seen, rebuilt = y.flatten(2).mean(2), None
        y = self._read(self.pixel_layers[0], y, words, absent)
        y = self.mask_steps[1](y, maps[1])
        if without is not None:
            memory = self.word_norm(self.word_conv(y)).relu().flatten(2).mT
            rebuilt = self.word_layer(without, memory, tgt_key_padding_mask=absent)
        seen = self.seen[0](torch.cat([seen, y.flatten(2).mean(2)], 1))
        y = self._read(self.pixel_layers[1], y, words, absent)
        y = self.mask_steps[2](y, maps[0])
        seen = self.seen[1](torch.cat([seen, y.flatten(2).mean(2)], 1))
        return DMMIPrediction(_aligned(self.classifier(y), x.shape[2:]), words, rebuilt, seen, valid)

    @staticmethod
    def _read(layer: nn.Module, y: Tensor, words: Tensor, absent: Tensor | None) -> Tensor:
        return layer(y.flatten(2).mT, words, memory_key_padding_mask=absent).mT.unflatten(2, y.shape[2:])

    # ---- the loss

    def loss(self, prediction: DMMIPrediction | Tensor, target: Tensor) -> dict[str, Tensor]:
        """``{"cross_entropy", "contrast", "similarity"}``, weighted; of plain logits the first alone.

        Args:
            prediction: of :meth:`forward`.
            target: (B, H, W), 1 where something is named, 0 elsewhere, ``ignore_index`` where that is not known. A
                sample without a 1 names nothing: it is left out of the other two.
        """
        logits = prediction if isinstance(prediction, Tensor) else prediction.logits
        terms = {"cross_entropy": pixel_cross_entropy(logits, target, self.ignore_index, self.class_weight)}
        if isinstance(prediction, Tensor):
            return terms
        named = (target == 1).flatten(1).any(1)
        terms["contrast"] = self.contrast * self._contrast(prediction, named)
        if prediction.rebuilt is not None:
            there = prediction.valid
            alike = F.cosine_similarity(prediction.words.detach(), prediction.rebuilt, dim=-1, eps=1e-6)
            alike = alike.mean(1) if there is None else alike.masked_fill(~there, 0.0).sum(1) / there.sum(1)
            terms["similarity"] = self.similarity * (1 - (alike * named).mean())
        return terms

    def _contrast(self, prediction: DMMIPrediction, named: Tensor) -> Tensor:
        """InfoNCE both ways of the samples that name something among all; a mean over the whole batch."""
        mean = masked_mean(self.align(prediction.words), None if self.compat else prediction.valid)
        scores = F.normalize(prediction.seen, dim=1) @ F.normalize(mean, dim=1).mT / self.temperature
        if not named.any():
            return 0.0 * scores.sum()
        return 2 * named.to(scores.dtype).mean() * symmetric_contrast(scores, same=named.diag())

    def predict(self, x: Tensor, text: Tensor, valid: Tensor | None = None, erased: Tensor | None = None) -> Tensor:
        """(B, H, W) boolean: what the text names; ``erased`` is for training and changes nothing."""
        return self(x, text, valid).argmax(1) == 1  # type: ignore[union-attr]


def referring_scores(found: Tensor, truth: Tensor, at: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9)) -> dict[str, float]:
    """Scores of masks (B, H, W), boolean, by name.

    ``oIoU``: intersections over unions, each summed over samples; ``mIoU``: their mean per sample; ``P@t``: share
    of samples that reach t; all of samples that name something. ``empty``: share of the others whose mask is empty.
    What has no samples is left out.

    >>> truth = torch.zeros(2, 2, 2, dtype=torch.bool)
    >>> truth[0, 0] = True
    >>> referring_scores(truth, truth, (0.5,))
    {'oIoU': 1.0, 'mIoU': 1.0, 'P@0.5': 1.0, 'empty': 1.0}
    """
    for name, t in (("found", found), ("truth", truth)):
        if not isinstance(t, Tensor) or t.dtype != torch.bool or t.dim() != 3:
            raise ValueError(f"{name} must be boolean masks (B, H, W), got {describe(t)}")
    if found.shape != truth.shape:
        raise ValueError(f"found and truth must have one shape, got {tuple(found.shape)} and {tuple(truth.shape)}")
    check_type("at", at, Sequence, "thresholds")
    for share in at:
        check_real("at", share, least=0, most=1)
    named = truth.flatten(1).any(1)
    both, either = ((found & truth).flatten(1).sum(1).double(), (found | truth).flatten(1).sum(1).double())
    scores: dict[str, float] = {}
    if named.any():
        each = (both / either)[named]
        scores["oIoU"] = float(both[named].sum() / either[named].sum())
        scores["mIoU"] = float(each.mean())
        scores |= {f"P@{t}": float((each >= t).double().mean()) for t in at}
    if not named.all():
        scores["empty"] = float((~found.flatten(1).any(1))[~named].double().mean())
    return scores


#: What the release builds and never runs.
DEAD = (r"(classifier\.\w+\.decoder_layer|backbone\.layers\.3\.res_gate)\..*", r".*relative_position_index")


def _trunk(theirs: Released, model: DMMI) -> dict[str, Tensor]:
    if model.trunk == "swin":
        kept = r"backbone\.(patch_embed\..+|layers\.\d\.(?:blocks|downsample)\..+)"
        swin = {m[1]: v for m, v in theirs.matching(kept)}
        return hosts.convert_swin(swin, "the authors' Swin", hosts.own_attention) if swin else {}
    named = {f"{('conv1', 'bn1')[int(m[1])]}.{m[2]}": v for m, v in theirs.matching(r"backbone\.layer1\.([01])\.(\w+)")}
    named |= {f"layer1.{m[1]}": v for m, v in theirs.matching(r"backbone\.layer1\.4\.(.+)")}
    named |= {m[1]: v for m, v in theirs.matching(r"backbone\.(layer[234]\..+)")}
    return convert_resnet(named, model) if named else {}


def convert(state_dict: Mapping[str, Tensor], model: DMMI) -> dict[str, Tensor]:
    """From the authors' ``DMMI`` over Swin or ResNet, which is ``model`` in a checkpoint of their training.

    BERT is ``bert_model`` there, and goes into ``text_encoder``.
    """
    check_type("state_dict", state_dict, Mapping)
    theirs = Released(state_dict, "the authors' DMMI")
    fused = {"swin": r"backbone\.layers\.", "resnet": r"backbone\.all_fusion"}
    for kind, lead in fused.items():
        if kind != model.trunk and any(re.match(lead, name) for name in theirs):
            raise ValueError(f"state_dict is of trunk={kind!r}, the model has trunk={model.trunk!r}")
    for pattern in DEAD:
        theirs.leave(pattern, because="it never runs, or holds places")
    out = _trunk(theirs, model)
    own = model.state_dict()

    def fit(name: str) -> Rule:
        def rule(match: Any, value: Tensor) -> dict[str, Tensor]:
            into = match.expand(name)
            return {into: value.reshape(own[into].shape) if into in own else value}

        return rule

    entries: dict[str, Tensor] = {}
    for name in theirs:  # a ResNet's stages are counted from 1
        late = re.match(r"backbone\.all_fusion(\d)\.", name)
        put = f"backbone.layers.{int(late[1]) - 1}.{name[late.end() :]}" if late else name
        entries[put] = theirs.take(name)
    theirs = Released(entries, theirs.source)
    lead, fusion = r"backbone\.layers\.(\d)\.", r"fused.\1.fusion"
    att = lead + r"fusion\.image_lang_att\."
    last = r"\.(weight|bias)"
    rules: dict[str, Rule] = {
        r"backbone\.norm(\d)" + last: r"fused.\1.norm.\2",
        lead + r"res_gate\.(\d)\.weight": r"fused.\1.gate.\2.weight",
        lead + r"W_l\.0" + last: fit(r"fused.\1.words.\2"),
        lead + r"fusion\.vis_project\.0" + last: fit(fusion + r".own.\2"),
        lead + r"fusion\.project_mm\.0" + last: fit(fusion + r".mixed.\2"),
        att + r"vis_weight": fusion + ".visual_weight",
        att + r"lan_weight": fusion + ".verbal_weight",
        att + r"f_value\.0" + last: fit(fusion + r".text_value.\2"),
        att + r"f_value_v\.0" + last: fit(fusion + r".map_value.\2"),
        att + r"W\.0" + last: fit(fusion + r".text_out.\2"),
        att + r"W2\.0" + last: fit(fusion + r".map_out.\2"),
        r"contrastive\.align_lan\.0" + last: fit(r"align.\1"),
        r"classifier\.conv1_1" + last: r"classifier.\1",
        r"classifier\.lan_func\.conv1\.weight": "word_conv.weight",
        r"classifier\.lan_func\.bn1\.(\w+)": r"word_norm.\1",
        r"classifier\.lan_func\.transformer_model\.layers\.0\.(.+)": r"word_layer.\1",
        r"classifier\.transformer_fusion1\.transformer_model\.layers\.0\.(.+)": r"pixel_layers.0.\1",
        r"classifier\.transformer_fusion2\.transformer_model\.layers\.0\.(.+)": r"pixel_layers.1.\1",
        r"classifier\.crossfuse1\.linear" + last: r"seen.0.\1",
        r"classifier\.crossfuse2\.linear" + last: r"seen.1.\1",
    }
    for kind, ours, names in (("img", "visual", ("11", "33", "55")), ("lan", "verbal", ("11", "21", "31"))):
        for i, name in enumerate(names):
            for part, into in (("f_key", "key"), ("f_query", "query"), ("f_query2", "around")):
                rules[att + rf"refine{kind}{name}\.{part}\.0" + last] = fit(rf"{fusion}.{ours}.{i}.{into}.\2")
    for i, number in enumerate((4, 3, 2)):
        for j in (1, 2):
            rules[rf"classifier\.conv{j}_{number}\.weight"] = f"mask_steps.{i}.convs.{j - 1}.weight"
            rules[rf"classifier\.bn{j}_{number}\.(\w+)"] = rf"mask_steps.{i}.norms.{j - 1}.\1"
    out |= theirs.renamed(rules)
    return theirs.close(out | {k: v for k, v in own.items() if k.startswith("text_encoder.")})


_SIZES: dict[str, dict[str, Any]] = {
    "dmmi_swin_base": {},
    "dmmi_swin_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7),
    "dmmi_swin_small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), window_size=7),
    "dmmi_swin_large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "dmmi_resnet101": dict(trunk="resnet"),
}
register_models(
    "dmmi-ris",
    DMMI,
    {name: dict(compat="authors", **size) for name, size in _SIZES.items()},
    # The released classes have 25,730,816, 24,813,312, 24,813,312, 28,352,256 and 23,633,664 more, which never run.
    params={
        "dmmi_swin_base": 205_955_696,
        "dmmi_swin_tiny": 128_192_828,
        "dmmi_swin_small": 149_510_732,
        "dmmi_swin_large": 359_976_350,
        "dmmi_resnet101": 273_184_792,
    },
    source="toggle1995/RIS-DMMI",
    convert=convert,  # type: ignore[arg-type]
    img_size=480,
    task="segment",
)

"""SegMiF: an infrared and a visible image become one, helped by the segmenter that will read it.

Liu et al., 2023, "Multi-interactive Feature Learning and a Full-time Multi-modality Benchmark for Image Fusion and
Segmentation", arXiv 2308.02097. Two streams of 64 channels at full resolution, for the infrared image and for the
luminance of the visible one: convolution, dilated dense block, hierarchical interactive attention
(:class:`attnlib.nn.linear.hierarchical_interaction.HierarchicalInteraction`) with the first maps of the segmenter's
encoder, block, attention with the second maps; three convolutions make one luminance of both. With the colours of the
visible image that is a picture, which the segmenter (a SegFormer) reads.

Training goes in rounds. The fusion network is updated with the loss of the picture, from the second round on also with
the segmenter's; the segmenter then learns from the pictures. For losses ``l`` and round ``r``,

    ``w_t = 2 softmax((l_{t-1} / l_{t-2}) / T)``,    ``L = w_0 (0.4 / r) l_picture + w_1 0.8 l_segment``.

With the published ``T = 1000`` the weights are 1 to three digits: they say next to nothing; a smaller T lets them act.

Differs from the authors' code: the second attention module that never runs is left out (1,034,370 parameters with it,
968,066 without); the 1 x 1 convolutions of semantic maps come before these are resized, which is the same number; the
segmenter's encoder sees pictures normalised as the segmenter does, where theirs gives it the raw ones while it guides
the fusion (``compat="authors"``); what the fusion aims at is given, as theirs, or by default the brighter of luminance
and infrared, pixel by pixel (our reading: the authors' targets are ready files); no minimum or maximum is taken over a
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_flag, check_int, check_ints, check_real, check_type, describe
from ...nn.linear.hierarchical_interaction import HierarchicalInteraction
from ...nn.reduced.spatial_reduction import SpatialReductionAttention
from ...nn.released import Released, Rule
from ..backbones.stages import Features, map_info
from ..blocks import Place
from ..build import register_models
from ..perception.foveation import similarity
from ..protocol import Step, TaskModel, split_batch, trained
from .context import resized_maps
from .datr import convert as convert_segformer
from .datr import datr_encoder
from .heads import SegFormerHead, Segmenter, pixel_cross_entropy, resized_logits

#: How a semantic map may meet a stream but by attention.
JOINS = ("concatenate", "add", "gate")

MEAN, STD = (123.675 / 255, 116.28 / 255, 103.53 / 255), (58.395 / 255, 57.12 / 255, 57.375 / 255)


def to_luminance(rgb: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> luminance, red and blue difference (B, 3, H, W).

    >>> to_luminance(torch.full((1, 3, 1, 1), 0.25)).flatten().tolist()
    [0.25, 0.5, 0.5]
    """
    check_axes("rgb", rgb, B=None, channels=3, H=None, W=None)
    r, g, b = rgb.unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([y, (r - y) * 0.713 + 0.5, (b - y) * 0.564 + 0.5], 1)


def from_luminance(ycc: Tensor) -> Tensor:
    """The way back, up to the rounding of its published constants; not clamped."""
    check_axes("ycc", ycc, B=None, channels=3, H=None, W=None)
    y, red, blue = ycc.unbind(1)
    red, blue = red - 0.5, blue - 0.5
    return torch.stack([y + 1.403 * red, y - 0.714 * red - 0.344 * blue, y + 1.773 * blue], 1)


def edges(x: Tensor) -> Tensor:
    """(B, 1, H, W): sum of the sizes of both Sobel filters, zeros being around the image."""
    across = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    both = torch.stack([across, -across.mT])[:, None]
    return F.conv2d(x, both, padding=1).abs().sum(1, keepdim=True)


class DilatedDenseBlock(nn.Module):
    """``x + relu(W [x, f_1, .., f_n])``; each ``f`` is a 3 x 3 convolution of dilation 2 and ReLU of all before it.

    Args:
        dim: channels in and out.
        growth: channels of each f.
        depth: how many of them.

    >>> DilatedDenseBlock(4, 2)(torch.randn(1, 4, 5, 6)).shape
    torch.Size([1, 4, 5, 6])
    """

    def __init__(self, dim: int = 64, growth: int = 32, depth: int = 5):
        super().__init__()
        for name, value in (("dim", dim), ("growth", growth), ("depth", depth)):
            check_int(name, value, least=1)
        self.convs = nn.ModuleList(nn.Conv2d(dim + i * growth, growth, 3, padding=2, dilation=2) for i in range(depth))
        self.out = nn.Conv2d(dim + depth * growth, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> the same."""
        held = x
        for conv in self.convs:
            held = torch.cat([held, conv(held).relu()], 1)
        return x + self.out(held).relu()


class SemanticJoin(nn.Module):
    """What the release compares its attention with: a stream x and semantic features s of one shape, (B, dim, H, W).

    Args:
        dim: channels.
        kind: ``"concatenate"``: ``conv([x, s])``; ``"add"``: ``conv(x + s)``; ``"gate"``: ``g(x) + g(s)``, each with
            two convolutions of its own, ``g(t) = sigmoid(c) c`` of ``c = conv(relu(conv(t)))``. All are 3 x 3.
    """

    def __init__(self, dim: int, kind: str):
        super().__init__()
        check_choice("kind", kind, JOINS)
        self.kind = kind

        def conv(wide: int = 1) -> nn.Conv2d:
            return nn.Conv2d(wide * dim, dim, 3, padding=1)

        if kind == "gate":
            self.gates = nn.ModuleList(nn.Sequential(conv(), nn.ReLU(), conv()) for _ in range(2))
        else:
            self.conv = conv(2 if kind == "concatenate" else 1)

    def forward(self, x: Tensor, semantic: Tensor) -> Tensor:
        """The stream."""
        if self.kind != "gate":
            return self.conv(torch.cat([x, semantic], 1) if self.kind == "concatenate" else x + semantic)
        made = [gate(t) for gate, t in zip(self.gates, (x, semantic), strict=True)]
        return made[0].sigmoid() * made[0] + made[1].sigmoid() * made[1]


class FusionNet(nn.Module):
    """One luminance of two images, with two semantic maps.

    Args:
        dim: channels of both streams.
        growth: of the dense blocks.
        num_heads: of the attention.
        semantic_dims: channels of the two semantic maps.
        share_hia: both attentions are one module, as released.
        branches: of :class:`HierarchicalInteraction`.
        join: what semantic maps meet the streams in: ``"hia"``, the attention; ``"concatenate"``, ``"add"`` or
            ``"gate"`` (:class:`SemanticJoin`), one for each stream and map; ``"none"``: there are no semantic maps.
        head_dims: channels of the convolutions that make one luminance; ``(dim, dim // 2, 1)`` by default.

    Raises:
        ValueError: images of different sizes, maps of other channels.
    """

    def __init__(
        self, dim: int = 64, growth: int = 32, num_heads: int = 8, semantic_dims: Sequence[int] = (64, 128),
        share_hia: bool = True, branches: str = "both", join: str = "hia", head_dims: Sequence[int] | None = None,
    ):  # fmt: skip
        super().__init__()
        check_choice("join", join, ("hia", *JOINS, "none"))
        self.join = join
        self.semantic_dims = check_ints("semantic_dims", semantic_dims, least=1)
        if len(self.semantic_dims) != 2:
            raise ValueError(f"semantic_dims must be two numbers of channels, got {self.semantic_dims}")
        check_flag("share_hia", share_hia)
        self.dim = check_int("dim", dim, least=2)
        self.stems = nn.ModuleList(nn.Conv2d(1, dim, 3, padding=1) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleList(DilatedDenseBlock(dim, growth) for _ in range(2)) for _ in range(2))
        self.act = nn.PReLU()
        attends = 0 if join != "hia" else 1 if share_hia else 2
        self.hia = nn.ModuleList(HierarchicalInteraction(dim, num_heads, branches=branches) for _ in range(attends))
        self.joins = nn.ModuleList(
            nn.ModuleList(SemanticJoin(dim, join) for _ in range(2)) for _ in range(2 if join in JOINS else 0)
        )
        self.semantic = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in self.semantic_dims if join != "none")
        tail = (dim, dim // 2, 1) if head_dims is None else check_ints("head_dims", head_dims, least=1)
        if not tail or tail[-1] != 1:
            raise ValueError(f"head_dims must end in 1, the luminance, got {tail}")
        widths = (2 * dim, *tail)
        self.out = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, infrared: Tensor, luminance: Tensor, maps: Sequence[Tensor] = ()) -> Tensor:
        """(B, 1, H, W) twice and two maps (B, C_i, h_i, w_i) of any size, or none -> (B, 1, H, W)."""
        for name, x in (("infrared", infrared), ("luminance", luminance)):
            if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != 1 or not x.is_floating_point():
                raise ValueError(f"{name} must be (B, 1, H, W) of floating point, got {describe(x)}")
        if infrared.shape != luminance.shape:
            raise ValueError(
                f"infrared and luminance must have one grid, got {tuple(infrared.shape)} and {tuple(luminance.shape)}"
            )
        given, wanted = [tuple(m.shape[:2]) for m in maps], self.semantic_dims if self.join != "none" else ()
        if given != [(infrared.shape[0], c) for c in wanted]:
            raise ValueError(f"maps must have {list(wanted)} channels, in a batch, got {given}")
        size = infrared.shape[2:]
        streams = [self.act(stem(x)) for stem, x in zip(self.stems, (infrared, luminance), strict=True)]
        for i, blocks in enumerate(self.blocks):
            streams = [block(x) for block, x in zip(blocks, streams, strict=True)]  # type: ignore[call-overload]
            if self.join == "none":
                continue
            known = resized_maps(self.semantic[i](maps[i]), size)
            if self.join != "hia":
                streams = [join(x, known) for join, x in zip(self.joins[i], streams, strict=True)]  # type: ignore[call-overload]
                continue
            hia = self.hia[i % len(self.hia)]
            a, b = hia(*(x.permute(0, 2, 3, 1) for x in streams), semantic=known.permute(0, 2, 3, 1))
            streams = [a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2)]
        y = torch.cat(streams, 1)
        for conv in self.out:
            y = self.act(conv(y))
        return y

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], branches: str = "both") -> dict[str, Tensor]:
        """From the authors' ``Fusion_Network3_ac``, or another of theirs.

        These are ``Fusion_Network3`` (dim 32, head_dims (32, 1)), its ``_S`` and ``_M`` (``branches``), ``_Con``,
        ``_Add`` and ``_Average`` (``join``), and ``Fusion_Network_rmseg`` (``join="none"``).
        """
        theirs = Released(state_dict, "the authors' Fusion_Network3_ac")
        theirs.leave(r"ffm2\..*", because="the second attention calls the first module")

        def attention(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return HierarchicalInteraction.convert_state_dict(part, branches)

        out = theirs.parts(r"ffm()\.(.+)", r"hia.0\1", attention)
        rules: dict[str, Rule] = {
            r"conv1_ir\.(weight|bias)": r"stems.0.\1", r"conv1_vis\.(weight|bias)": r"stems.1.\1",
            r"conv2\.(weight|bias)": r"out.0.\1", r"conv21\.(weight|bias)": r"out.1.\1",
            r"conv22\.(weight|bias)": r"out.2.\1", r"conv3\.(weight|bias)": r"semantic.0.\1",
            r"conv4\.(weight|bias)": r"semantic.1.\1", r"relu\.weight": "act.weight",
            r"DRDB(\d)\.Dcov(\d)\.(weight|bias)": lambda m, v: {
                f"blocks.{(int(m[1]) - 1) // 2}.{(int(m[1]) - 1) % 2}.convs.{int(m[2]) - 1}.{m[3]}": v
            },
            r"conv([24])([12])1\.(weight|bias)": lambda m, v: {
                f"joins.{int(m[1]) // 2 - 1}.{int(m[2]) - 1}.conv.{m[3]}": v
            },
            r"att([1-8])\.conv\.(\d)\.(weight|bias)": lambda m, v: {
                f"joins.{(int(m[1]) - 1) // 4}.{(int(m[1]) - 1) // 2 % 2}.gates.{(int(m[1]) - 1) % 2}.{m[2]}.{m[3]}": v
            },
            r"DRDB(\d)\.conv\.(weight|bias)": lambda m, v: {
                f"blocks.{(int(m[1]) - 1) // 2}.{(int(m[1]) - 1) % 2}.out.{m[2]}": v
            },
        }  # fmt: skip
        return theirs.close(out | theirs.renamed(rules))


class DynamicWeight(nn.Module):
    """Weights of tasks from how fast their losses fall: ``n softmax((l_{t-1} / l_{t-2}) / T)``, n tasks.

    In training it keeps the losses it is given, which the weights of later calls come from; ones until there are two.

    Args:
        tasks: how many.
        temperature: T; with 1000, as published, the weights differ from 1 by a thousandth.

    >>> w = DynamicWeight(2, 1.0)
    >>> for losses in ([4.0, 4.0], [2.0, 4.0]):
    ...     _ = w(torch.tensor(losses))
    >>> [round(x, 4) for x in w(torch.tensor([1.0, 1.0])).tolist()]
    [0.7551, 1.2449]
    """

    seen: Tensor
    count: Tensor

    def __init__(self, tasks: int = 2, temperature: float = 1000.0):
        super().__init__()
        self.temperature = check_real("temperature", temperature, above=0)
        self.register_buffer("seen", torch.ones(2, check_int("tasks", tasks, least=1)))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, losses: Tensor) -> Tensor:
        """Losses (tasks,) -> weights (tasks,), without gradient; they sum to the number of tasks."""
        if not isinstance(losses, Tensor) or losses.shape != self.seen.shape[1:]:
            raise ValueError(f"losses must be ({self.seen.shape[1]},), got {describe(losses)}")
        seen = self.seen.to(losses.dtype)
        ratio = torch.where(self.count >= 2, seen[1] / seen[0].clamp(min=torch.finfo(seen.dtype).tiny), 1.0)
        weights = len(ratio) * (ratio / self.temperature).softmax(0)
        if self.training:
            with torch.no_grad():
                self.seen.copy_(torch.stack([self.seen[1], losses.detach().to(self.seen)]))
                self.count += 1
        return weights


class SegMiFPrediction(NamedTuple):
    """What :meth:`SegMiF.forward` gives.

    Args:
        fused: luminance (B, 1, H, W).
        image: with the colours of the visible image (B, 3, H, W), not clamped.
        logits: (B, K, H, W).
        guide: what the fusion is to look like (B, 1, H, W).
    """

    fused: Tensor
    image: Tensor
    logits: Tensor
    guide: Tensor


class SegMiFAnswer(NamedTuple):
    """Classes (B, H, W), and the picture (B, 3, H, W) in [0, 1]."""

    classes: Tensor
    image: Tensor


def mit_encoder(
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 4, 18, 3),
    num_heads: Sequence[int] = (1, 2, 5, 8),
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    compat: str | None = None,
    **settings: Any,
) -> nn.Module:
    """SegFormer's encoder, MiT-B3 by default: maps at strides 4, 8, 16 and 32."""
    ratios = check_ints("sr_ratios", sr_ratios, least=1)
    if len(ratios) != len(embed_dims):
        raise ValueError(f"sr_ratios={ratios} must have one number for each of {len(embed_dims)} stages")

    def own(place: Place) -> nn.Module:
        return SpatialReductionAttention(place.dim, place.num_heads, ratios[place.stage], compat=compat)

    return Features(datr_encoder(embed_dims, depths, num_heads, ratios[:-1], mechanism=own, **settings))


class SegMiF(TaskModel):
    """Visible images (B, 3, H, W) and infrared ones (B, 1, H, W), both in [0, 1], to one picture and its classes.

    Args:
        segmenter: has ``encoder`` (maps, with a ``feature_info``) and gives logits of images normalised by ImageNet's
            mean and deviation: a :class:`attnlib.models.dense.heads.Segmenter`.
        dim, growth, num_heads, share_hia, branches: of the :class:`FusionNet`.
        temperature: of the :class:`DynamicWeight`.
        rounds: how many rounds :meth:`set_progress` counts.
        alternate: ``"batch"``: both networks are updated with every batch; ``"round"``: in every round first the
            fusion network, then the segmenter, 6 to 10 parts of the first round and 4 to 10 of the others, as released
            (moved by :meth:`set_progress` alone).
        ignore_index: the label of pixels that have none.
        compat: ``"authors"``: semantic features are of pictures that are not normalised.

    Raises:
        ValueError: a segmenter without two maps.
    """

    head_names: Sequence[str] = ("segmenter.head.classifier.",)
    round: Tensor
    progress: Tensor

    def __init__(
        self,
        segmenter: nn.Module,
        dim: int = 64,
        growth: int = 32,
        num_heads: int = 8,
        share_hia: bool = True,
        branches: str = "both",
        temperature: float = 1000.0,
        rounds: int = 7,
        alternate: str = "batch",
        ignore_index: int = 255,
        compat: str | None = None,
    ):
        super().__init__()
        check_type("segmenter", segmenter, nn.Module)
        channels = map_info(getattr(segmenter, "encoder", None), "segmenter.encoder").channels()
        if len(channels) < 2:
            raise ValueError(f"segmenter.encoder must give two maps or more, got {len(channels)}")
        check_choice("compat", compat, (None, "authors"))
        check_choice("alternate", alternate, ("batch", "round"))
        self.segmenter, self.compat, self.alternate = segmenter, compat, alternate
        self.fusion = FusionNet(dim, growth, num_heads, channels[:2], share_hia, branches)
        self.weights = DynamicWeight(2, temperature)
        self.rounds, self.ignore_index = check_int("rounds", rounds, least=1), check_int("ignore_index", ignore_index)
        self.register_buffer("round", torch.ones((), dtype=torch.long))
        self.register_buffer("progress", torch.zeros(()))

    @property
    def num_classes(self) -> int:
        return self.segmenter.num_classes  # type: ignore[return-value]

    def set_progress(self, progress: float) -> None:
        """How much of training is behind, from 0 to 1: sets the round and how far it is."""
        at = check_real("progress", progress, least=0, most=1) * self.rounds
        done = min(int(at), self.rounds - 1)
        self.round.fill_(1 + done)
        self.progress.fill_(at - done)

    def forward(self, visible: Tensor, infrared: Tensor, guide: Tensor | None = None) -> SegMiFPrediction:
        """Picture and logits.

        Args:
            visible: (B, 3, H, W) in [0, 1].
            infrared: (B, 1, H, W) in [0, 1], of the same grid.
            guide: (B, 1, H, W), what the fusion aims at and where semantic features come from; the brighter of
                luminance and infrared by default.
        """
        if (
            not isinstance(visible, Tensor) or visible.dim() != 4 or visible.shape[1] != 3
            or not visible.is_floating_point()
        ):  # fmt: skip
            raise ValueError(f"visible must be images (B, 3, H, W) of floating point, got {describe(visible)}")
        for name, x in (("infrared", infrared), ("guide", guide)):
            want = (visible.shape[0], 1, *visible.shape[2:])
            if x is not None and (not isinstance(x, Tensor) or tuple(x.shape) != want):
                raise ValueError(f"{name} must be {want}, on the grid of visible, got {describe(x)}")
        ycc = to_luminance(visible)
        y = ycc[:, :1]
        aim = torch.maximum(y, infrared) if guide is None else guide
        fused = self.fusion(infrared, y, self.known(aim))
        image = from_luminance(torch.cat([fused, ycc[:, 1:]], 1))
        return SegMiFPrediction(fused, image, self._segmented(image), aim)

    @torch.no_grad()
    def known(self, guide: Tensor) -> list[Tensor]:
        """Two semantic maps of a guide, without gradient."""
        picture = guide.expand(-1, 3, -1, -1)
        maps = self.segmenter.encoder(picture if self.compat else self.normalised(picture))  # type: ignore[operator]
        return list(maps[:2])

    @staticmethod
    def normalised(image: Tensor) -> Tensor:
        """As the segmenter reads images."""
        mean, std = (image.new_tensor(t).view(3, 1, 1) for t in (MEAN, STD))
        return (image - mean) / std

    def _segmented(self, image: Tensor) -> Tensor:
        return resized_logits(self.segmenter(self.normalised(image)), image.shape[2:])

    def loss(self, prediction: SegMiFPrediction, target: Tensor) -> dict[str, Tensor]:
        """Of the fusion network, by round: ``"intensity"`` and ``"edges"``; then ``"intensity"``, ``"similarity"`` and
        ``"segment"``, weighted.

        Args:
            prediction: of :meth:`forward`.
            target: (B, H, W) classes, ``ignore_index`` where a pixel has none.
        """
        fused, guide = prediction.fused, prediction.guide.to(prediction.fused.dtype)
        if int(self.round) == 1:
            return {"intensity": F.l1_loss(fused, guide), "edges": F.l1_loss(edges(guide), edges(fused))}
        near = F.mse_loss(fused, guide)
        alike = 1.1 * (1 - similarity(fused, guide, pad=True).mean())
        segment = pixel_cross_entropy(prediction.logits, target, self.ignore_index)
        weight = self.weights(torch.stack([near + alike, segment]).detach())
        picture = weight[0] * (0.4 / int(self.round))
        return {"intensity": picture * near, "similarity": picture * alike, "segment": weight[1] * 0.8 * segment}

    def steps(self, batch: Mapping[str, Any]) -> Iterator[Step]:
        """``"fusion"``, then ``"segment"`` on the pictures; one of them with ``alternate="round"``."""
        inputs, target = split_batch(self, batch)
        share = (6 if int(self.round) == 1 else 4) / (16 if int(self.round) == 1 else 14)
        phase = None if self.alternate == "batch" else "fusion" if float(self.progress) < share else "segment"

        def segment() -> dict[str, Tensor]:
            with torch.no_grad():
                ycc = to_luminance(inputs["visible"])
                aim = inputs.get("guide")
                aim = torch.maximum(ycc[:, :1], inputs["infrared"]) if aim is None else aim
                fused = self.fusion(inputs["infrared"], ycc[:, :1], self.known(aim))
                image = from_luminance(torch.cat([fused, ycc[:, 1:]], 1))
            return {"segment": pixel_cross_entropy(self._segmented(image), target, self.ignore_index)}

        if phase != "segment":
            yield Step("fusion", trained(self.fusion), lambda: self.loss(self(**inputs), target))
        if phase != "fusion":
            yield Step("segment", trained(self.segmenter), segment)

    def predict(self, visible: Tensor, infrared: Tensor, guide: Tensor | None = None) -> SegMiFAnswer:
        """Classes and picture."""
        made = self(visible, infrared, guide)
        return SegMiFAnswer(made.logits.argmax(1), made.image.clamp(0, 1))


def segmif(
    num_classes: int = 9,
    in_chans: int = 3,
    head_dim: int = 256,
    encoder: Mapping[str, Any] | None = None,
    drop_path_rate: float = 0.1,
    **settings: Any,
) -> SegMiF:
    """SegMiF over SegFormer.

    Args:
        num_classes: 9 of MFNet, 15 of FMB.
        in_chans: channels of the visible image, 3.
        head_dim: of the head.
        encoder: settings of :func:`mit_encoder`.
        drop_path_rate: of the encoder.
        settings: of :class:`SegMiF`.
    """
    if in_chans != 3:
        raise ValueError(f"in_chans={in_chans} must be 3: the visible image has colours, the infrared one none")
    given = dict(encoder or {})
    trunk: Any = mit_encoder(compat=settings.get("compat"), drop_path_rate=drop_path_rate, **given)
    head = SegFormerHead(trunk.feature_info.channels(), head_dim, num_classes)
    return SegMiF(Segmenter(trunk, head), **settings)


def convert(state_dict: Mapping[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' two files as one: ``Fusion_Network3_ac``, and ``Network3`` (``denoise_net.*``).

    The round and the losses seen are not in them: they stay as the model has them.
    """
    check_type("state_dict", state_dict, Mapping)
    lead = "denoise_net."
    first = {k: v for k, v in state_dict.items() if not str(k).startswith(lead)}
    second = {k.removeprefix(lead): v for k, v in state_dict.items() if str(k).startswith(lead)}
    out = {f"fusion.{k}": v for k, v in FusionNet.convert_state_dict(first).items()}
    out |= {f"segmenter.{k}": v for k, v in convert_segformer(second).items()}
    own = {} if model is None else model.state_dict()
    return out | {k: own[k] for k in ("round", "progress", "weights.seen", "weights.count") if k in own}


_DEPTHS = {1: (2, 2, 2, 2), 2: (3, 4, 6, 3), 3: (3, 4, 18, 3), 4: (3, 8, 27, 3), 5: (3, 6, 40, 3)}
register_models(
    "segmif-him",
    segmif,
    {f"segmif_mit_b{n}": dict(compat="authors", encoder=dict(depths=depths)) for n, depths in _DEPTHS.items()},
    # Both released classes together, less 66,304 and 4,608 (a second attention and a classifier), which never run.
    params={
        "segmif_mit_b1": 14_647_627, "segmif_mit_b2": 25_692_491, "segmif_mit_b3": 45_568_331,
        "segmif_mit_b4": 62_338_891, "segmif_mit_b5": 82_939_211,
    },
    source="JinyuanLiu-CV/SegMiF",
    convert=convert,  # type: ignore[arg-type]
    task="segment",
)  # fmt: skip

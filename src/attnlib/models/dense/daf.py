"""DAF: attention over places and over channels at four scales of one resolution, guided by what a code remembers.

Sinha and Dolz, 2020, "Multi-scale self-guided attention for medical image segmentation", arXiv 1906.02849. With s = 1
to 4, d_s the maps of a backbone as 64 channels at stride 4, and F all of them in one map:

    ``z_s = [d_s, F]``,       ``A_s = c_s((PAM_s(z_s) + CAM_s(z_s)) * e_s(Sem_1(z_s)))``,
    ``z'_s = [d_s, A_s * F]``, ``R_s = c'_s((PAM'_s(z'_s) + CAM'_s(z'_s)) * e'_s(Sem_2(z'_s)))``.

Sem is a small encoder and decoder, one for all scales: it is trained to give back what it is given, and its code for
z'_s to be the code for z_s (the guide). Both d_s and R_s predict; in training all eight are judged, the answer is the
mean of those of R_s. Loss: eight cross entropies + 0.25 guide + 0.1 reconstruction.

Differs from the authors' code: the modules that never run (two stacks of 1 x 1 convolutions, eight fusions) are left
out and the converter names them; position attention builds no map; any size that has four pixels at stride 4. There
the reconstruction is brought to the size of what it is held against, which is its own where 16 divides the image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_real, check_type, describe
from ...nn.base import Mechanism
from ...nn.dense.danet import PositionAttention
from ...nn.modulation.danet import ChannelAttention
from ...nn.released import Released
from ..backbones.resnet import resnet
from ..backbones.stages import Features, map_info
from ..build import register_models
from ..protocol import TaskModel
from .context import resized_maps
from .heads import pixel_cross_entropy

SCALES = 4


class DAFPrediction(NamedTuple):
    """What training judges: finest scale first.

    Args:
        coarse: logits of d_s, (B, K, H, W) each.
        refined: logits of R_s.
        codes: of z_s and of z'_s, pairs.
        copies: what Sem was given and what it gave back, pairs; of z_s, then of z'_s.
    """

    coarse: tuple[Tensor, ...]
    refined: tuple[Tensor, ...]
    codes: tuple[tuple[Tensor, Tensor], ...]
    copies: tuple[tuple[Tensor, Tensor], ...]

    @property
    def mean(self) -> Tensor:
        """The answer: mean of the refined logits."""
        return sum(self.refined[1:], self.refined[0]) / len(self.refined)


def _conv(dim: int, out_dim: int, kernel: int = 3, act: type[nn.Module] = nn.PReLU) -> list[nn.Module]:
    return [nn.Conv2d(dim, out_dim, kernel, padding=kernel // 2), nn.BatchNorm2d(out_dim), act()]


class SemanticModule(nn.Module):
    """A code of four times the channels at a quarter of the size, and what is read back from it.

    Args:
        dim: channels in and out.

    >>> [tuple(y.shape) for y in SemanticModule(4)(torch.randn(1, 4, 10, 9))]
    [(1, 16, 2, 2), (1, 4, 10, 9)]
    """

    def __init__(self, dim: int):
        super().__init__()
        self.enc1, self.enc2 = self._encoder(dim, 2 * dim), self._encoder(2 * dim, 4 * dim)
        self.dec2, self.dec1 = self._decoder(4 * dim, 2 * dim, 2 * dim), self._decoder(2 * dim, dim, dim)

    @staticmethod
    def _encoder(dim: int, out_dim: int) -> nn.Sequential:
        return nn.Sequential(*_conv(dim, out_dim, 3, nn.ReLU), *_conv(out_dim, out_dim, 3, nn.ReLU), nn.MaxPool2d(2))

    @staticmethod
    def _decoder(dim: int, middle: int, out_dim: int) -> nn.Sequential:
        up = nn.ConvTranspose2d(middle, out_dim, 2, 2)
        return nn.Sequential(*_conv(dim, middle, 3, nn.ReLU), *_conv(middle, middle, 3, nn.ReLU), up)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim, H, W), H and W of 4 or more -> (B, 4 dim, H // 4, W // 4) and (B, dim, H, W)."""
        first = self.enc1(x)
        code = self.enc2(first)
        back = self.dec1(resized_maps(self.dec2(code), first.shape[2:]))
        return code, resized_maps(back, x.shape[2:])


class GuidedScale(nn.Module):
    """Both attentions of one scale, and the place where the semantic module speaks to them."""

    def __init__(self, dim: int):
        super().__init__()
        self.position, self.channel = PositionAttention(dim), ChannelAttention(dim)
        self.position_in, self.position_out = (nn.Sequential(*_conv(d, dim)) for d in (2 * dim, dim))
        self.channel_in, self.channel_out = (nn.Sequential(*_conv(d, dim)) for d in (2 * dim, dim))
        self.semantic = nn.Conv2d(2 * dim, dim, 3, padding=1)
        self.out = nn.Conv2d(dim, dim, 1)

    def _attended(self, layer: Mechanism, x: Tensor) -> Tensor:
        return layer(x.movedim(1, -1)).movedim(-1, 1)

    def forward(self, z: Tensor, semantic: Tensor) -> Tensor:
        """(B, 2 dim, H, W) twice -> (B, dim, H, W)."""
        p = self.position_out(self._attended(self.position, self.position_in(z)))
        c = self.channel_out(self._attended(self.channel, self.channel_in(z)))
        return self.out((p + c) * self.semantic(semantic))


class DAF(TaskModel):
    """Images (B, in_chans, H, W) to logits (B, num_classes, H, W); in training a :class:`DAFPrediction`.

    Args:
        num_classes: with the background.
        in_chans: channels of images.
        dim: channels of every scale.
        encoder: gives four maps, finest first, with a ``feature_info``; ResNeXt-101 32x8d by default.
        guide, reconstruct: weights of these terms of the loss.
        ignore_index: the label of pixels that have none.

    Raises:
        ValueError: an encoder of another number of maps.
    """

    head_names: Sequence[str] = ("coarse_heads.", "refined_heads.")

    def __init__(
        self,
        num_classes: int = 5,
        in_chans: int = 1,
        dim: int = 64,
        encoder: nn.Module | None = None,
        guide: float = 0.25,
        reconstruct: float = 0.1,
        ignore_index: int = 255,
    ):
        super().__init__()
        self.num_classes = check_int("num_classes", num_classes, least=1)
        self.in_chans, self.dim = check_int("in_chans", in_chans, least=1), check_int("dim", dim, least=1)
        self.guide, self.reconstruct = (
            check_real("guide", guide, least=0),
            check_real("reconstruct", reconstruct, least=0),
        )
        self.ignore_index = check_int("ignore_index", ignore_index)
        if encoder is None:
            trunk = resnet(depths=(3, 4, 23, 3), groups=32, group_width=8, num_classes=0, in_chans=in_chans)
            encoder = Features(trunk, (1, 2, 3, 4))
            encoder.apply(_start)
        check_type("encoder", encoder, nn.Module)
        channels = map_info(encoder).channels()
        if len(channels) != SCALES:
            raise ValueError(f"encoder must have a feature_info of {SCALES} maps, got {len(channels)}")
        self.encoder = encoder
        self.down = nn.ModuleList(nn.Sequential(*_conv(c, dim, 1)) for c in channels)
        self.fuse = nn.Sequential(*_conv(SCALES * dim, dim), *_conv(dim, dim), *_conv(dim, dim, 1))
        self.semantic = nn.ModuleList(SemanticModule(2 * dim) for _ in range(2))
        self.stages = nn.ModuleList(nn.ModuleList(GuidedScale(dim) for _ in range(SCALES)) for _ in range(2))
        self.coarse_heads = nn.ModuleList(nn.Conv2d(dim, num_classes, 1) for _ in range(SCALES))
        self.refined_heads = nn.ModuleList(nn.Conv2d(dim, num_classes, 1) for _ in range(SCALES))
        for name, part in self.named_children():
            if name != "encoder":
                part.apply(_start)

    def forward(self, x: Tensor) -> Tensor | DAFPrediction:
        """(B, in_chans, H, W) -> logits (B, num_classes, H, W), or in training what :meth:`loss` takes."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        made = self.everything(x)
        return made if self.training else made.mean

    def everything(self, x: Tensor) -> DAFPrediction:
        """All that training judges."""
        maps = self.encoder(x)
        if min(maps[0].shape[2:]) < 4:
            raise ValueError(
                f"x of {tuple(x.shape[2:])} pixels leaves {tuple(maps[0].shape[2:])} at the finest map; 4 a side at "
                "least are needed"
            )
        size = maps[0].shape[2:]
        scales = [resized_maps(f(m), size) for f, m in zip(self.down, maps, strict=True)]
        fused = self.fuse(torch.cat(scales[::-1], 1))
        coarse, refined, codes, copies = [], [], [], ([], [])  # type: ignore[var-annotated]
        for s, d in enumerate(scales):
            coarse.append(self.coarse_heads[s](d))
            first = torch.cat([d, fused], 1)
            code, copy = self.semantic[0](first)
            attention = self.stages[0][s](first, copy)  # type: ignore[index]
            second = torch.cat([d, attention * fused], 1)
            again, copied = self.semantic[1](second)
            refined.append(self.refined_heads[s](self.stages[1][s](second, copied)))  # type: ignore[index]
            codes.append((code, again))
            copies[0].append((first, copy))
            copies[1].append((second, copied))
        at = x.shape[2:]
        return DAFPrediction(
            tuple(resized_maps(y, at) for y in coarse), tuple(resized_maps(y, at) for y in refined), tuple(codes),
            tuple(copies[0] + copies[1]),
        )  # fmt: skip

    def loss(self, prediction: DAFPrediction | Tensor, target: Tensor) -> dict[str, Tensor]:
        """``{"coarse", "refined", "guide", "reconstruct"}``, weighted; of plain logits the cross entropy alone.

        Args:
            prediction: of :meth:`forward`.
            target: (B, H, W) classes, ``ignore_index`` where a pixel has none.
        """
        if isinstance(prediction, Tensor):
            return {"cross_entropy": pixel_cross_entropy(prediction, target, self.ignore_index)}

        def entropy(several: Sequence[Tensor]) -> Tensor:
            return torch.stack([pixel_cross_entropy(y, target, self.ignore_index) for y in several]).sum()

        def distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
            return torch.stack([F.mse_loss(a, b) for a, b in pairs]).sum()

        return {
            "coarse": entropy(prediction.coarse), "refined": entropy(prediction.refined),
            "guide": self.guide * distance(prediction.codes),
            "reconstruct": self.reconstruct * distance(prediction.copies),
        }  # fmt: skip

    def predict(self, x: Tensor) -> Tensor:
        """Classes (B, H, W)."""
        return self(x).argmax(1)


def _start(module: nn.Module) -> None:
    """As the release starts: Xavier's normal weights, norms of N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.xavier_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


#: What the release builds and never runs.
DEAD = r"(conv[67]_[1-4]\.1|attention[1-4]\.fuse_attn|refine[1-4]\.fuse_attn)\..*"


def convert(state_dict: Mapping[str, Tensor], model: DAF) -> dict[str, Tensor]:
    """From the authors' ``DAF_stack``; what never runs (:data:`DEAD`) is dropped."""
    theirs = Released(state_dict, "the authors' DAF_stack")
    own = model.state_dict()
    out: dict[str, Tensor] = {}
    for name in list(theirs):
        value = theirs.take(name)
        if re.fullmatch(DEAD, name):
            continue
        ours = _renamed(name)
        if ours is None or ours not in own:
            raise ValueError(f"{name!r} is no part of the authors' DAF_stack")
        out[ours] = value.flatten(1) if own[ours].dim() == 2 and value.dim() == 4 else value
    return theirs.close(out)


def _renamed(name: str) -> str | None:
    """Our name of one of theirs; scales are counted from the finest on."""
    trunk: list[tuple[str, str]] = [
        (r"resnext\.layer0\.0\.(.*)", r"encoder.model.stem.0.conv.\1"),
        (r"resnext\.layer0\.1\.(.*)", r"encoder.model.stem.0.norm.\1"),
    ]
    for pattern, into in trunk:
        if found := re.fullmatch(pattern, name):
            return found.expand(into)
    if found := re.fullmatch(r"resnext\.layer(\d)\.(?:1\.)?(\d+)\.(conv|bn)(\d)\.(.*)", name):
        stage, block, kind, number, last = found.groups()
        part = {"conv": "conv", "bn": "norm"}[kind]
        return f"encoder.model.stages.{int(stage) - 1}.blocks.{block}.conv{number}.{part}.{last}"
    if found := re.fullmatch(r"resnext\.layer(\d)\.(?:1\.)?(\d+)\.downsample\.(\d)\.(.*)", name):
        part = ("conv", "norm")[int(found[3])]
        return f"encoder.model.stages.{int(found[1]) - 1}.blocks.{found[2]}.shortcut.conv.{part}.{found[4]}"
    if found := re.fullmatch(r"down(\d)\.(.*)", name):
        return f"down.{int(found[1]) - 1}.{found[2]}"
    if found := re.fullmatch(r"fuse1\.fuse_attn\.(.*)", name):
        return f"fuse.{found[1]}"
    if found := re.fullmatch(r"predict(\d)(_2)?\.(.*)", name):
        return f"{'refined' if found[2] else 'coarse'}_heads.{int(found[1]) - 1}.{found[3]}"
    if found := re.fullmatch(r"semanticModule_(\d)_1\.(enc\d|dec\d)\.(?:encode|decode)\.(.*)", name):
        return f"semantic.{int(found[1]) - 1}.{found[2]}.{found[3]}"
    if found := re.fullmatch(r"conv_sem_(\d)_(\d)\.(.*)", name):
        return f"stages.{int(found[1]) - 1}.{4 - int(found[2])}.semantic.{found[3]}"
    if found := re.fullmatch(r"conv8_(1?)(\d)\.(.*)", name):
        return f"stages.{int(bool(found[1]))}.{4 - int(found[2])}.out.{found[3]}"
    if found := re.fullmatch(r"([pc]am)_attention_(\d)_(\d)\.attn\.(\d)\.(.*)", name):
        kind = {"pam": "position", "cam": "channel"}[found[1]]
        at, last = int(found[4]), found[5]
        where = f"stages.{int(found[2]) - 1}.{int(found[3]) - 1}.{kind}"
        if at != 3:
            return f"{where}_in.{at}.{last}" if at < 3 else f"{where}_out.{at - 4}.{last}"
        last = re.sub(r"(query|key|value)_conv", lambda m: m[1][0] if m[1] != "value" else "v", last)
        return f"{where}.{last}"
    return None


register_models(
    "multi-scale-self-guided-attention",
    DAF,
    {"daf_resnext101": dict(in_chans=1)},
    params={"daf_resnext101": 103_556_063},  # the released class has 104,511,475, 955,412 of which never run
    source="sinAshish/Multi-Scale-Attention",
    convert=convert,  # type: ignore[arg-type]
    task="segment",
)

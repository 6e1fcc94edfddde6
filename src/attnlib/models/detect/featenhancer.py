"""FeatEnHancer: dark images made better for whoever reads them, trained by nothing but the reader's loss.

Hashmi et al., 2023, "FeatEnHancer: Enhancing Hierarchical Features for Object Detection and Beyond Under Low-Light
Vision", arXiv 2308.03594. The image and what two convolutions with strides make of it, a quarter and an eighth a side,
go through one small convolutional net. The features of the quarter and those of the image, brought to one grid, are
mixed by attention over scales (:mod:`attnlib.nn.gates.scale_attention`) and added to the image's; with those of the
eighth they give maps of ``tanh`` by which the image is changed:

    ``y = x + sum_i A_i``,   or with ``curve="quadratic"``   ``x_i = x_{i-1} + A_i x_{i-1} (1 - x_{i-1})``.

The first is what the released code does, the second what the paper's figure shows (Guo et al., 2020, "Zero-DCE", arXiv
2001.06826).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_divides, check_int, check_type, describe
from ...nn.gates.scale_attention import attend_scales
from ...nn.released import Released, Rule
from ..build import register_models
from ..protocol import TaskModel
from .pan import check_images

CURVES = ("sum", "quadratic")
#: Fewer pixels a side leave nothing at an eighth.
LEAST = 15


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) at another size, linear between pixels, corner on corner."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


class ScaleAggregation(nn.Module):
    """Features of an image (B, C, H, W) and of its quarter -> the first, plus both mixed at an eighth and enlarged.

    Args:
        dim: channels.
        num_heads: of the attention over both scales.
    """

    def __init__(self, dim: int = 24, num_heads: int = 8):
        super().__init__()
        check_int("dim", dim, least=1)
        check_divides("num_heads", num_heads, "dim", dim)
        self.dim, self.num_heads = dim, num_heads
        self.fine = nn.Sequential(nn.Conv2d(dim, dim, 7, 4), nn.Conv2d(dim, dim, 3, 2))
        self.coarse = nn.Conv2d(dim, dim, 3, 2)

    def scales(self, x: Tensor, quarter: Tensor) -> Tensor:
        """(B, 2, h, w, C): what is mixed, the coarse one last, with which both are compared."""
        check_axes("x", x, B=None, C=self.dim, H=None, W=None)
        check_axes("quarter", quarter, B=len(x), C=self.dim, H=None, W=None)
        fine, coarse = self.fine(x), self.coarse(quarter)
        if fine.shape != coarse.shape:
            raise ValueError(
                f"quarter must be what a 7 x 7 convolution of stride 4 leaves of x; from {tuple(x.shape[2:])} and "
                f"{tuple(quarter.shape[2:])} pixels come {tuple(fine.shape[2:])} and {tuple(coarse.shape[2:])}"
            )
        return torch.stack([fine, coarse], 1).permute(0, 1, 3, 4, 2)

    def forward(self, x: Tensor, quarter: Tensor) -> Tensor:
        """(B, C, H, W)."""
        mixed = attend_scales(self.scales(x, quarter), 1, self.num_heads).permute(0, 3, 1, 2)
        return x + enlarged(mixed, x.shape[2:])


class FeatEnHancer(nn.Module):
    """Images (B, in_chans, H, W) -> the same, to be read by any model, whose loss trains both.

    Args:
        in_chans: channels of images.
        dim: width of the net.
        curves: maps by which the image is changed.
        num_heads: of the attention over scales; divides ``curves * in_chans``.
        curve: ``"sum"`` adds the maps, ``"quadratic"`` applies one curve after the other, for images in [0, 1].

    Raises:
        ValueError: images below 15 pixels a side.

    >>> FeatEnHancer()(torch.rand(1, 3, 33, 40)).shape
    torch.Size([1, 3, 33, 40])
    """

    def __init__(self, in_chans: int = 3, dim: int = 32, curves: int = 8, num_heads: int = 8, curve: str = "sum"):
        super().__init__()
        self.in_chans, self.curves = check_int("in_chans", in_chans, least=1), check_int("curves", curves, least=1)
        check_int("dim", dim, least=1)
        check_choice("curve", curve, CURVES)
        self.curve = curve
        out = curves * in_chans

        def conv(width: int, into: int) -> nn.Conv2d:
            return nn.Conv2d(width, into, 3, 1, 1)

        self.quarter = nn.Conv2d(in_chans, in_chans, 7, 4)
        self.eighth = nn.Conv2d(in_chans, in_chans, 3, 2)
        self.down = nn.ModuleList([conv(in_chans, dim), *(conv(dim, dim) for _ in range(3))])
        self.up = nn.ModuleList([conv(2 * dim, dim), conv(2 * dim, dim), conv(2 * dim, out)])
        self.aggregate = ScaleAggregation(out, num_heads)
        self.fuse = nn.Sequential(conv(2 * out, dim), conv(dim, out))

    def features(self, x: Tensor) -> Tensor:
        """The net of all scales: (B, in_chans, H, W) -> (B, curves * in_chans, H, W), before the last ReLU."""
        held = []
        for layer in self.down:
            x = layer(x).relu()
            held.append(x)
        x = held.pop()
        for layer in self.up[:-1]:
            x = layer(torch.cat([held.pop(), x], 1)).relu()
        made: Tensor = self.up[-1](torch.cat([held.pop(), x], 1))
        return made

    def maps(self, x: Tensor) -> Tensor:
        """(B, curves, in_chans, H, W) in (-1, 1): what the image is changed by."""
        check_images("x", x, self.in_chans)
        if min(x.shape[2:]) < LEAST:
            raise ValueError(f"x must be {LEAST} pixels a side at least, got {tuple(x.shape[2:])}")
        quarter = self.quarter(x)
        far = self.features(self.eighth(quarter))
        near = self.aggregate(self.features(x).relu(), self.features(quarter).relu())
        return self.fuse(torch.cat([near, enlarged(far, x.shape[2:])], 1)).tanh().unflatten(1, (self.curves, -1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the same."""
        maps = self.maps(x)
        if self.curve == "sum":
            return x + maps.sum(1)
        for a in maps.unbind(1):
            x = x + a * x * (1 - x)
        return x


class Enhanced(TaskModel):
    """A model behind an enhancer: ``model(between(enhancer(x)))``; the model's own loss trains both.

    Args:
        model: takes images; where it is to be trained it has a ``loss``.
        enhancer: images to images; a :class:`FeatEnHancer` by default.
        between: what the model wants done to images, such as normalisation.

    >>> model = Enhanced(nn.Conv2d(3, 2, 1))
    >>> model(torch.rand(1, 3, 20, 20)).shape
    torch.Size([1, 2, 20, 20])
    """

    def __init__(
        self, model: nn.Module, enhancer: nn.Module | None = None, between: Callable[[Tensor], Tensor] | None = None
    ):
        super().__init__()
        check_type("model", model, nn.Module)
        if enhancer is not None:
            check_type("enhancer", enhancer, nn.Module)
        if between is not None and not callable(between):
            raise TypeError(f"between must be a function of images, or None, got {describe(between)}")
        self.enhancer = FeatEnHancer() if enhancer is None else enhancer
        self.model, self.between = model, between

    def enhanced(self, x: Tensor) -> Tensor:
        """What the model reads."""
        made: Tensor = self.enhancer(x)
        return made if self.between is None else self.between(made)

    def forward(self, x: Tensor, *more: Any, **settings: Any) -> Any:
        """What the model says; ``more`` and ``settings`` are handed on."""
        return self.model(self.enhanced(x), *more, **settings)

    def loss(self, prediction: Any, target: Any) -> dict[str, Tensor]:
        """The model's own terms."""
        if not hasattr(self.model, "loss"):
            raise TypeError(f"model has no loss(prediction, target): {type(self.model).__name__}")
        model: Any = self.model
        terms: dict[str, Tensor] = model.loss(prediction, target)
        return terms

    def predict(self, x: Tensor, *more: Any, **settings: Any) -> Any:
        """The model's own answer."""
        answer: Any = getattr(self.model, "predict", self.model)
        return answer(self.enhanced(x), *more, **settings)


def convert(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """From the authors' ``FeatEnHancer``."""
    theirs = Released(state_dict, "the authors' FeatEnHancer")
    names = {"quarter_conv": "quarter", "hexa_conv": "eighth", "ue_conv8": "fuse.0", "ue_conv9": "fuse.1"}
    names |= {f"e_conv{i + 1}": f"down.{i}" for i in range(4)} | {f"e_conv{i + 5}": f"up.{i}" for i in range(3)}
    for i in (1, 2):
        names[rf"scale_aware_aggregation\.query_conv{i}"] = f"aggregate.fine.{i - 1}"
    names[r"scale_aware_aggregation\.key_conv"] = "aggregate.coarse"
    rules: dict[str, Rule] = {rf"{old}\.(weight|bias)": rf"{new}.\1" for old, new in names.items()}
    return theirs.close(theirs.renamed(rules))


register_models(
    "featenhancer",
    FeatEnHancer,
    {"featenhancer": {}},
    params={"featenhancer": 139_400},
    source="khurramHashmi/FeatEnHancer",
    convert=convert,
    task="restore",
)

__all__ = ["Enhanced", "FeatEnHancer", "ScaleAggregation", "convert", "enlarged"]

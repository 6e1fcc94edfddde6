"""What restorers are trained against: discriminators, their losses, and distances between features.

- Losses of a discriminator and of what it judges: hinge (Lim and Ye, 2017, arXiv 1705.02894), least squares (Mao et
  al., 2017, arXiv 1611.04076), logistic (Goodfellow et al., 2014, arXiv 1406.2661, the form that does not saturate).
- :class:`PatchDiscriminator`: Isola et al., 2017, arXiv 1611.07004: one score for every patch.
- :class:`PartDiscriminator`: of small crops, with the convolutions of StyleGAN2 (Karras et al., 2019, arXiv
  1912.04958), whose maps also tell textures (:func:`gram`; Gatys et al., 2015, arXiv 1508.06576).
- :class:`PerceptualLoss`: Johnson et al., 2016, arXiv 1603.08155, and with unit vectors Zhang et al., 2018, arXiv
  1801.03924, on any net of features that the user gives. :class:`LPIPS` is the latter on VGG-16 (Simonyan and
  Zisserman, 2014, arXiv 1409.1556) with weights of channels.
- :class:`AdversarialModel`: a task model with a discriminator, which takes turns with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_float, check_int, check_ints, check_real, check_type, describe
from ...nn.released import Released, Rule
from ...types import stats_dtype
from ..protocol import Step, TaskModel, split_batch, trained

KINDS = ("hinge", "least-squares", "logistic")


def _scores(name: str, scores: Any) -> Tensor:
    check_float(name, scores)
    if not scores.numel():
        raise ValueError(f"{name} must hold at least one score, got {describe(scores)}")
    return scores.to(stats_dtype(scores.dtype))


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """What a discriminator makes small: scores of what is real high, of what is not low.

    ``hinge``: ``mean relu(1 - r) + mean relu(1 + f)``; ``least-squares``: ``mean (r - 1)^2 + mean f^2``; ``logistic``:
    ``mean softplus(-r) + mean softplus(f)``.

    Args:
        real, fake: scores of any shape.
        kind: one of ``KINDS``.

    >>> float(discriminator_loss(torch.tensor([2.0]), torch.tensor([-0.5])))
    0.5
    """
    check_choice("kind", kind, KINDS)
    r, f = _scores("real", real), _scores("fake", fake)
    if kind == "hinge":
        return F.relu(1 - r).mean() + F.relu(1 + f).mean()
    if kind == "least-squares":
        return (r - 1).square().mean() + f.square().mean()
    return F.softplus(-r).mean() + F.softplus(f).mean()


def generator_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """What a generator makes small: ``-mean f`` (hinge), ``mean (f - 1)^2``, or ``mean softplus(-f)``.

    Args:
        fake: scores of what it made.
        kind: one of ``KINDS``.
    """
    check_choice("kind", kind, KINDS)
    f = _scores("fake", fake)
    if kind == "hinge":
        return -f.mean()
    return (f - 1).square().mean() if kind == "least-squares" else F.softplus(-f).mean()


def adaptive_weight(loss: Tensor, adversarial: Tensor, last: Tensor, most: float = 1e4) -> Tensor:
    """``|d loss / d w| / |d adversarial / d w|`` at one weight w, at most ``most``: of Esser et al., arXiv 2012.09841.

    Args:
        loss, adversarial: numbers that depend on ``last``; their graphs are kept.
        last: the weight, by custom of the last layer.
    """
    check_real("most", most, above=0)
    pulls = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (loss, adversarial)]
    return (pulls[0] / (pulls[1] + 1e-4)).clamp(0, most).detach()


class ActNorm2d(nn.Module):
    """``scale (x + loc)`` per channel, which the first batch of a training sets to mean 0 and deviation 1.

    Kingma and Dhariwal, 2018, arXiv 1807.03039, section 3.1. ``initialized`` is saved: a model that is loaded is not
    set anew.

    Args:
        dim: channels.

    >>> norm = ActNorm2d(3)
    >>> y = norm(torch.randn(4, 3, 5, 5) * 7 + 2)
    >>> bool(y.mean().abs() < 1e-5), bool((y.std() - 1).abs() < 0.02), int(norm.initialized)
    (True, True, 1)
    """

    initialized: Tensor

    def __init__(self, dim: int):
        super().__init__()
        check_int("dim", dim, least=1)
        self.loc, self.scale = nn.Parameter(torch.zeros(1, dim, 1, 1)), nn.Parameter(torch.ones(1, dim, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) to the same.

        Raises:
            ValueError: a first batch of one place only, which has no deviation.
        """
        if self.training and not bool(self.initialized):
            if x.numel() == x.shape[1]:
                raise ValueError(f"x of shape {tuple(x.shape)} has one place per channel, and so no deviation to set")
            with torch.no_grad():
                held = x.to(stats_dtype(x.dtype))
                std, mean = torch.std_mean(held, (0, 2, 3), keepdim=True)
                self.loc.copy_(-mean)
                self.scale.copy_(1 / (std + 1e-6))
                self.initialized.fill_(1)
        return self.scale * (x + self.loc)


class PatchDiscriminator(nn.Module):
    """Images (B, in_chans, H, W) to a score for every patch, (B, 1, h, w).

    Convolutions of ``kernel`` with a norm (not behind the first) and LeakyReLU(0.2), then one to a single channel.

    Args:
        in_chans: channels of images, with all that is judged beside them.
        dims: channels of the layers.
        strides: of the layers; all 2 by default.
        kernel: sides of all convolutions.
        norm: BatchNorm behind all but the first, ``"actnorm"`` for :class:`ActNorm2d` there, or none.
        std: of normal initial weights, norms about 1; torch's own start by default.

    Raises:
        ValueError: images that leave no patch.

    >>> PatchDiscriminator(3, (8, 16), (2, 1))(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 1, 6, 6])
    """

    def __init__(
        self, in_chans: int = 3, dims: Sequence[int] = (64, 128, 256, 512), strides: Sequence[int] | None = None,
        kernel: int = 4, norm: bool | str = True, std: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_chans = check_int("in_chans", in_chans, least=1)
        dims = check_ints("dims", dims, least=1)
        steps = (2,) * len(dims) if strides is None else check_ints("strides", strides, least=1)
        if not dims or len(steps) != len(dims):
            raise ValueError(f"strides must hold one for each of dims={tuple(dims)}, got {tuple(steps)}")
        check_int("kernel", kernel, least=1)
        check_choice("norm", norm, (True, False, "actnorm"))
        act = norm == "actnorm"
        layers: list[nn.Module] = []
        for i, (before, dim, step) in enumerate(zip((in_chans, *dims), dims, steps, strict=False)):
            held = bool(norm) and i > 0
            layers.append(nn.Conv2d(before, dim, kernel, step, 1, bias=act or not held))
            behind = [ActNorm2d(dim) if act else nn.BatchNorm2d(dim)] if held else []
            layers += [*behind, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(dims[-1], 1, kernel, 1, 1))
        if std is not None:
            check_real("std", std, above=0)
            for m in self.layers:
                if isinstance(m, nn.Conv2d):
                    nn.init.normal_(m.weight, 0.0, std)
                elif isinstance(m, nn.BatchNorm2d):
                    nn.init.normal_(m.weight, 1.0, std)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W), got {describe(x)}")
        sides = list(x.shape[2:])
        for m in self.layers:
            if isinstance(m, nn.Conv2d):
                sides = [(n + 2 - m.kernel_size[0]) // m.stride[0] + 1 for n in sides]
                if min(sides) < 1:
                    raise ValueError(f"x of {tuple(x.shape[2:])} pixels is too small for this discriminator")
        return self.layers(x)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From RestoreFormer's ``NLayerDiscriminator`` or ``NLayerDiscriminator_v1``, with either norm."""
        theirs = Released(state_dict, "RestoreFormer's NLayerDiscriminator")
        count = sum(re.fullmatch(r"body\.\d+\.0\.weight", name) is not None for name in theirs)
        at = {"head": 0, **{f"body.{i}": 2 + 3 * i for i in range(count)}, "beforlast": 2 + 3 * count}
        rules: dict[str, Rule] = {r"main\.(\d+)\.(\w+)": r"layers.\1.\2"}
        for part, first in {**at, "final": 5 + 3 * count}.items():
            for i in range(2):
                rules[rf"{re.escape(part)}\.{i}\.(\w+)"] = rf"layers.{first + i}.\1"
        return theirs.close(theirs.renamed(rules))


class _EqualConv(nn.Module):
    """A 3 x 3 convolution whose weights are N(0, 1) and divided by the root of their fan-in when they are used.

    With ``down`` maps are smoothed by (1, 3, 3, 1) along each side and halved. With ``act`` the bias comes before
    ``sqrt(2) leaky_relu(., 0.2)``.
    """

    def __init__(self, dim: int, out_dim: int, down: bool = False, act: bool = True):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out_dim, dim, 3, 3)), nn.Parameter(torch.zeros(out_dim))
        self.down, self.act, self.scale = down, act, (9 * dim) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
            dim = x.shape[1]
            x = F.conv2d(F.pad(x, (2, 2, 2, 2)), (row[:, None] * row).expand(dim, 1, 4, 4), groups=dim)
        y = F.conv2d(x, self.weight * self.scale, self.bias, 2 if self.down else 1, 0 if self.down else 1)
        return F.leaky_relu(y, 0.2) * 2**0.5 if self.act else y


class PartDiscriminator(nn.Module):
    """Crops (B, in_chans, h, w) to scores (B, 1, h // 4, w // 4).

    Args:
        in_chans: channels of crops.
        dims: of the maps at full size, at a half and at a quarter.

    >>> PartDiscriminator(3, (4, 8, 8))(torch.zeros(2, 3, 10, 12)).shape
    torch.Size([2, 1, 2, 3])
    """

    def __init__(self, in_chans: int = 3, dims: Sequence[int] = (64, 128, 256)):
        super().__init__()
        self.in_chans, dims = check_int("in_chans", in_chans, least=1), check_ints("dims", dims, least=1)
        if len(dims) != 3:
            raise ValueError(f"dims must hold three widths, got {tuple(dims)}")
        first, second, third = dims
        self.first = _EqualConv(in_chans, first)
        self.middle = nn.Sequential(_EqualConv(first, second, down=True), _EqualConv(second, second))
        self.coarse = nn.Sequential(_EqualConv(second, third, down=True), _EqualConv(third, third))
        self.last = _EqualConv(third, 1, act=False)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps at a half and at a quarter, and the scores."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must be crops (B, {self.in_chans}, h, w), got {describe(x)}")
        middle = self.middle(self.first(x))
        coarse = self.coarse(middle)
        return middle, coarse, self.last(coarse)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[2]

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``FacialComponentDiscriminator``, with or without buffers of the smoothing."""
        theirs = Released(state_dict, "the authors' FacialComponentDiscriminator")
        parts = {"conv1": "first", "conv2": "middle.0", "conv3": "middle.1", "conv4": "coarse.0", "conv5": "coarse.1"}
        rules: dict[str, Rule] = {r"final_conv\.0\.(weight|bias)": r"last.\1"}
        for part, ours in parts.items():  # the convolution, and behind it the bias of its activation
            rules |= {rf"{part}\.\d\.weight": f"{ours}.weight", rf"{part}\.\d\.bias": f"{ours}.bias"}
        theirs.leave(r"conv[24]\.0\.kernel", because="the smoothing is a constant")
        return theirs.close(theirs.renamed(rules))


def gram(x: Tensor) -> Tensor:
    """(B, C, H, W) to how channels go together over all places: ``f f^T / (C H W)``, (B, C, C)."""
    flat = x.flatten(2)
    return flat @ flat.mT / (flat.shape[1] * flat.shape[2])


class PerceptualLoss(nn.Module):
    """Distance of two images in the maps of a net: a weighted sum of means over places.

    Args:
        features: images to one map (B, C, *grid) or several; kept in evaluation, its parameters never get a gradient.
        weights: of the maps; 1 by default.
        distance: ``"l1"`` or ``"l2"`` (squares).
        unit: bring the vector of every place to length one first.
        mean, std: of the channels of images, which are taken off before the net sees them.
        style: of squared distances of :func:`gram` matrices of the same maps, a term of its own (:meth:`terms`).

    >>> loss = PerceptualLoss(nn.Conv2d(3, 4, 3))
    >>> x = torch.rand(1, 3, 8, 8)
    >>> float(loss(x, x)), float(loss(x, 1 - x)) > 0
    (0.0, True)
    """

    def __init__(
        self, features: nn.Module, weights: Sequence[float] | None = None, distance: str = "l1", unit: bool = False,
        mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,), style: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        check_type("features", features, nn.Module, "a net that gives maps of images")
        check_choice("distance", distance, ("l1", "l2"))
        self.weights = None if weights is None else [check_real(f"weights[{i}]", w, least=0) for i, w in
                                                     enumerate(weights)]  # fmt: skip
        self.distance, self.unit, self.style = distance, unit, check_real("style", style, least=0)
        self.features = features.eval()
        self.mean = tuple(check_real(f"mean[{i}]", m) for i, m in enumerate(mean))
        self.std = tuple(check_real(f"std[{i}]", s, above=0) for i, s in enumerate(std))

    def train(self, mode: bool = True) -> PerceptualLoss:
        super().train(mode)
        self.features.eval()
        return self

    def maps(self, x: Tensor) -> list[Tensor]:
        """Maps of images (B, C, H, W)."""
        held = {k: v.detach() for k, v in [*self.features.named_parameters(), *self.features.named_buffers()]}
        mean, std = (x.new_tensor(t).view(1, -1, 1, 1) for t in (self.mean, self.std))
        given = (x - mean) / std
        found = torch.func.functional_call(self.features, held, (given,))
        several = [found] if isinstance(found, Tensor) else list(found)
        if self.unit:
            several = [m / (m.square().sum(1, keepdim=True).sqrt() + 1e-10) for m in several]
        return several

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """A number, the sum of :meth:`terms`."""
        return torch.stack(list(self.terms(x, target).values())).sum()

    def terms(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``{"distance"}``, and ``"style"`` where it has a weight, of images of one shape.

        No gradient reaches ``target``.
        """
        check_float("x", x)
        if not isinstance(target, Tensor) or target.shape != x.shape:
            raise ValueError(f"target must be images {tuple(x.shape)}, got {describe(target)}")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if x.dim() != 4 or len(numbers) not in (1, x.shape[1]):
                raise ValueError(f"x must be images (B, C, H, W), {name} being for {len(numbers)}, got {describe(x)}")
        ours = self.maps(x)
        with torch.no_grad():
            theirs = self.maps(target.to(x.dtype))
        weights = [1.0] * len(ours) if self.weights is None else self.weights
        if len(weights) != len(ours):
            raise ValueError(f"weights holds {len(weights)}, but features gives {len(ours)} maps")
        pairs = enumerate(zip(weights, ours, theirs, strict=True))
        found = {"distance": torch.stack([w * self.apart(i, a, b) for i, (w, a, b) in pairs]).sum()}
        if self.style:
            apart = [F.mse_loss(gram(a), gram(b)) for a, b in zip(ours, theirs, strict=True)]
            found["style"] = self.style * torch.stack(apart).sum()
        return found

    def apart(self, index: int, first: Tensor, second: Tensor) -> Tensor:
        """Distance of two maps, the ``index``-th of the net."""
        return (F.l1_loss if self.distance == "l1" else F.mse_loss)(first, second)


class VGGMaps(nn.Module):
    """Images (B, 3, H, W) to what VGG-16 has behind every group of 3 x 3 convolutions, before its halving.

    Args:
        dims: channels of the groups.
        depths: convolutions of the groups.

    >>> [tuple(m.shape) for m in VGGMaps((4, 8), (1, 2))(torch.zeros(1, 3, 8, 9))]
    [(1, 4, 8, 9), (1, 8, 4, 4)]
    """

    def __init__(self, dims: Sequence[int] = (64, 128, 256, 512, 512), depths: Sequence[int] = (2, 2, 3, 3, 3)):
        super().__init__()
        self.dims, depths = check_ints("dims", dims, least=1), check_ints("depths", depths, least=1)
        if len(depths) != len(self.dims) or not depths:
            raise ValueError(f"depths must hold one for each of dims={tuple(self.dims)}, got {tuple(depths)}")
        self.groups = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(dim if i else before, dim, 3, padding=1) for i in range(depth))
            for before, dim, depth in zip((3, *self.dims), self.dims, depths, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to maps, finest first; sides must be ``2 ** (groups - 1)`` or more."""
        least = 2 ** (len(self.dims) - 1)
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < least:
            raise ValueError(f"x must be images (B, 3, H, W) of {least} pixels a side at least, got {describe(x)}")
        maps: list[Tensor] = []
        for group in self.groups:
            x = F.max_pool2d(x, 2) if maps else x
            for conv in group:  # type: ignore[attr-defined]
                x = conv(x).relu()
            maps.append(x)
        return maps

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From torchvision's ``vgg16`` (its ``features``) or the ``vgg16`` of LPIPS; classifiers are left out."""
        theirs = Released(state_dict, "VGG-16")
        theirs.leave(r"classifier\..*", because="maps come before it")
        rules: dict[str, Rule] = {}
        at = 0
        for g, group in enumerate(self.groups):
            for c in range(len(group)):  # type: ignore[arg-type]
                rules[rf"(?:features|slice{g + 1})\.{at}\.(weight|bias)"] = rf"groups.{g}.{c}.\1"
                at += 2
            at += 1
        return theirs.close(theirs.renamed(rules))


class LPIPS(PerceptualLoss):
    """Learned perceptual distance: per place, squares of differences of unit vectors, weighed channel by channel.

    ``sum_k mean_places sum_c w_kc (a_kc - b_kc)^2``. Weights of the net and of the channels come with the release
    (:meth:`convert_state_dict`); without them channels weigh 1 and the net is random.

    Args:
        features: gives one map per entry of ``dims``; :class:`VGGMaps` by default.
        dims: channels of its maps.
        style: as of :class:`PerceptualLoss`, over unit vectors.

    Images lie within -1 and 1.

    >>> loss = LPIPS(VGGMaps((4, 8), (1, 1)), (4, 8))
    >>> x = torch.rand(1, 3, 8, 8)
    >>> float(loss(x, x)), float(loss(x, -x)) > 0
    (0.0, True)
    """

    def __init__(
        self, features: nn.Module | None = None, dims: Sequence[int] = (64, 128, 256, 512, 512), style: float = 0.0
    ):
        features = VGGMaps(dims) if features is None else features
        mean, std = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        super().__init__(features, None, "l2", True, mean, std, style)
        self.dims = check_ints("dims", dims, least=1)
        for i, dim in enumerate(self.dims):
            self.register_buffer(f"channels{i}", torch.ones(dim))

    def maps(self, x: Tensor) -> list[Tensor]:
        found = super().maps(x)
        if [m.shape[1] for m in found] != list(self.dims):
            raise ValueError(
                f"dims={tuple(self.dims)} must be the channels of what features gives, {[m.shape[1] for m in found]}"
            )
        return found

    def apart(self, index: int, first: Tensor, second: Tensor) -> Tensor:
        weights: Tensor = getattr(self, f"channels{index}")
        apart = (first - second).square().mean((0, 2, 3))
        return (apart * weights.to(apart.dtype)).sum()

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the ``LPIPS`` of RestoreFormer and VQGAN, over VGG-16.

        Of a file that holds channels alone, as it is released, the net stays as it is.
        """
        theirs = Released(state_dict, "LPIPS")
        theirs.leave(r"scaling_layer\.(shift|scale)", because="mean and std are constants")
        out = theirs.renamed(
            {r"lin(\d)\.model\.\d\.weight": lambda found, value: {f"channels{found[1]}": value.flatten()}}
        )
        net: Any = self.features
        if any(name.startswith("net.") for name in theirs):
            out |= theirs.parts(r"net\.(.*)", "features", net.convert_state_dict)
        else:
            out |= {k: v for k, v in self.state_dict().items() if k.startswith("features.")}
        return theirs.close(out)


class AdversarialModel(TaskModel):
    """A model whose images a discriminator judges, if it has one; both are updated with every batch, in turns.

    The discriminator comes first, and what it sees was made before; the generator's terms are :meth:`loss` and
    ``"adversarial"``. A subclass says what is an image in its predictions and targets.

    Args:
        discriminator: images to scores; ``None``: the model trains without.
        gan_kind: of ``KINDS``.
        gan_weight: of the generator's term.
        judge_weight: of the discriminator's loss.
        gan_start: part of the training (:meth:`set_progress`) before which there is no discriminator.
        judge_kind: of the discriminator's loss, where it is another than the generator's ``gan_kind``.
    """

    progress: float

    def __init__(
        self, discriminator: nn.Module | None = None, gan_kind: str = "hinge", gan_weight: float = 1.0,
        judge_weight: float = 0.5, gan_start: float = 0.0, judge_kind: str | None = None,
    ):  # fmt: skip
        super().__init__()
        if discriminator is not None:
            check_type("discriminator", discriminator, nn.Module)
        check_choice("gan_kind", gan_kind, KINDS)
        check_choice("judge_kind", judge_kind, (None, *KINDS))
        self.discriminator, self.gan_kind, self.judge_kind = discriminator, gan_kind, judge_kind or gan_kind
        self.gan_weight = check_real("gan_weight", gan_weight, least=0)
        self.judge_weight = check_real("judge_weight", judge_weight, above=0)
        self.gan_start = check_real("gan_start", gan_start, least=0, most=1)
        self.progress = 0.0

    def set_progress(self, progress: float) -> None:
        """How much of the training lies behind, 0 to 1; what changes over it changes by this only."""
        self.progress = check_real("progress", progress, least=0, most=1)

    def image_of(self, prediction: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The image that is judged; the prediction itself, by default."""
        return prediction

    def truth_of(self, target: Any) -> Tensor:
        """The image that is right; the target itself, by default."""
        return target

    def shown(self, image: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """What the discriminator sees of an image and the inputs it was made of; the image alone, by default."""
        return image

    def pull(self, terms: Mapping[str, Tensor], adversarial: Tensor) -> Tensor | float:
        """The weight of the adversarial term beside the terms of the loss; ``gan_weight``, by default."""
        return self.gan_weight

    def generator_params(self) -> list[nn.Parameter]:
        """What the generator's step updates: all but the discriminator's."""
        judge = {id(p) for p in self.discriminator.parameters()} if self.discriminator is not None else set()
        return [p for p in trained(self) if id(p) not in judge]

    def steps(self, batch: Mapping[str, Any]) -> Iterator[Step]:
        """``"discriminator"``, then ``"generator"``; without a discriminator ``"generator"`` alone."""
        inputs, target = split_batch(self, batch)
        made: list[Any] = []

        def terms() -> dict[str, Tensor]:
            return self.loss(made[0], target)

        judge = self.discriminator
        if judge is None or self.progress < self.gan_start:
            params = self.generator_params()
            yield Step("generator", params, lambda: self.loss(self(**inputs), target))
            return
        made.append(self(**inputs))  # once: the discriminator's update changes nothing in it
        image = self.image_of(made[0], inputs)
        truth = self.truth_of(target)

        def judged() -> dict[str, Tensor]:
            fake = judge(self.shown(image.detach(), inputs))
            real = judge(self.shown(truth.to(image.dtype), inputs))
            return {"discriminator": self.judge_weight * discriminator_loss(real, fake, self.judge_kind)}

        def fooled() -> dict[str, Tensor]:
            adversarial = generator_loss(judge(self.shown(image, inputs)), self.gan_kind)
            found = terms()
            return {**found, "adversarial": self.pull(found, adversarial) * adversarial}

        yield Step("discriminator", trained(judge), judged)
        yield Step("generator", self.generator_params(), fooled)

"""What restorers are trained against: discriminators, their losses, and distances between features.

- Losses of a discriminator and of what it judges: hinge (Lim and Ye, 2017, arXiv 1705.02894), least squares (Mao et
  al., 2017, arXiv 1611.04076), logistic (Goodfellow et al., 2014, arXiv 1406.2661, the form that does not saturate).
- :class:`PatchDiscriminator`: Isola et al., 2017, arXiv 1611.07004: one score for every patch.
- :class:`PartDiscriminator`: of small crops, with the convolutions of StyleGAN2 (Karras et al., 2019, arXiv
  1912.04958), whose maps also tell textures (:func:`gram`; Gatys et al., 2015, arXiv 1508.06576).
- :class:`PerceptualLoss`: Johnson et al., 2016, arXiv 1603.08155, and with unit vectors Zhang et al., 2018, arXiv
  1801.03924, on any net of features that the user gives.
- :class:`AdversarialModel`: a task model with a discriminator, which takes turns with it.
"""

from __future__ import annotations

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


class PatchDiscriminator(nn.Module):
    """Images (B, in_chans, H, W) to a score for every patch, (B, 1, h, w).

    Convolutions of ``kernel`` with BatchNorm (not behind the first) and LeakyReLU(0.2), then one to a single channel.

    Args:
        in_chans: channels of images, with all that is judged beside them.
        dims: channels of the layers.
        strides: of the layers; all 2 by default.
        kernel: sides of all convolutions.
        norm: BatchNorm behind all but the first.
        std: of normal initial weights, norms about 1; torch's own start by default.

    Raises:
        ValueError: images that leave no patch.

    >>> PatchDiscriminator(3, (8, 16), (2, 1))(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 1, 6, 6])
    """

    def __init__(
        self, in_chans: int = 3, dims: Sequence[int] = (64, 128, 256, 512), strides: Sequence[int] | None = None,
        kernel: int = 4, norm: bool = True, std: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_chans = check_int("in_chans", in_chans, least=1)
        dims = check_ints("dims", dims, least=1)
        steps = (2,) * len(dims) if strides is None else check_ints("strides", strides, least=1)
        if not dims or len(steps) != len(dims):
            raise ValueError(f"strides must hold one for each of dims={tuple(dims)}, got {tuple(steps)}")
        check_int("kernel", kernel, least=1)
        layers: list[nn.Module] = []
        for i, (before, dim, step) in enumerate(zip((in_chans, *dims), dims, steps, strict=False)):
            held = norm and i > 0
            layers.append(nn.Conv2d(before, dim, kernel, step, 1, bias=not held))
            layers += [*([nn.BatchNorm2d(dim)] if held else []), nn.LeakyReLU(0.2)]
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

    >>> loss = PerceptualLoss(nn.Conv2d(3, 4, 3))
    >>> x = torch.rand(1, 3, 8, 8)
    >>> float(loss(x, x)), float(loss(x, 1 - x)) > 0
    (0.0, True)
    """

    def __init__(
        self, features: nn.Module, weights: Sequence[float] | None = None, distance: str = "l1", unit: bool = False,
        mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,),
    ):  # fmt: skip
        super().__init__()
        check_type("features", features, nn.Module, "a net that gives maps of images")
        check_choice("distance", distance, ("l1", "l2"))
        self.weights = None if weights is None else [check_real(f"weights[{i}]", w, least=0) for i, w in
                                                     enumerate(weights)]  # fmt: skip
        self.distance, self.unit = distance, unit
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
        """A number, of images of one shape; no gradient reaches ``target``."""
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
        measure = F.l1_loss if self.distance == "l1" else F.mse_loss
        terms = [w * measure(a, b) for w, a, b in zip(weights, ours, theirs, strict=True)]
        return torch.stack(terms).sum()


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
    """

    progress: float

    def __init__(
        self, discriminator: nn.Module | None = None, gan_kind: str = "hinge", gan_weight: float = 1.0,
        judge_weight: float = 0.5, gan_start: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if discriminator is not None:
            check_type("discriminator", discriminator, nn.Module)
        check_choice("gan_kind", gan_kind, KINDS)
        self.discriminator, self.gan_kind = discriminator, gan_kind
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
            return {"discriminator": self.judge_weight * discriminator_loss(real, fake, self.gan_kind)}

        def fooled() -> dict[str, Tensor]:
            adversarial = generator_loss(judge(self.shown(image, inputs)), self.gan_kind)
            found = terms()
            return {**found, "adversarial": self.pull(found, adversarial) * adversarial}

        yield Step("discriminator", trained(judge), judged)
        yield Step("generator", self.generator_params(), fooled)

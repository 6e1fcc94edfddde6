r"""Metamers in one pass (NeuroFovea; Deza, Jonnalagadda and Eckstein, 2019): texture where the eye does not look.

An image ``I`` and noise ``Z`` that has its colours are encoded, ``f = E(I)`` and ``n = E(Z)``. Within each pooling
region ``i`` (a log-polar window, :func:`attnlib.grids.log_polar_windows`) the noise takes the mean and deviation of the
image, channel by channel, and is mixed in; a decoder makes pixels of it:

``g = (1 - alpha_i) f + alpha_i (std_i(f) (n - mean_i(n)) / std_i(n) + mean_i(f))``, ``I' = D(g)``.

``alpha_i = tanh(d r_i / 2)`` grows with the region's radius ``r_i`` in degrees and is 0 in the fovea. With alpha 0
everywhere the output is ``D(E(I))``, the reference, which tells what the decoder loses. Regions overlap: released is
that the later one overwrites; ``overlap="blend"`` weighs them by their windows instead, so that no order matters.

``E`` is AdaIN's VGG-19 up to relu4_1 and ``D`` its mirror. Their weights are the authors' to give:
``FoveatedTransfer.released(encoder_path, decoder_path)`` loads their files. Any other encoder and decoder serve as
well; :func:`encoder` and :func:`decoder` make narrow and shallow ones of the same build.

What differs from the release (ArturoDeza/NeuroFovea_PyTorch): windows are computed, for any size and fixation, not read
from pictures, and stand in another order; areas are divided by pi, where the release divides by 3.14
(``compat="authors"``); batches; no final resizing to 256 pixels. A region of fewer than two cells of features is
refused, where theirs becomes NaN.

Reference: Deza, Jonnalagadda, Eckstein, 2019, "Towards Metamerism via Foveated Style Transfer", arXiv 1705.10041.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_int, check_real, check_type, checked
from ...files import read_file, state_dict_in
from ...grids import LogPolarWindows

#: Convolutions of VGG-19 between pools, and the widths of their outputs in units of the first.
_CONVS, _WIDTHS = (2, 2, 4), (1, 2, 4, 8)
#: A cell belongs to the region whose window weighs more than this.
INSIDE = 1e-3
OVERLAPS = ("overwrite", "blend")


def _conv(dim: int, out: int) -> list[nn.Module]:
    return [nn.ReflectionPad2d(1), nn.Conv2d(dim, out, 3)]


@checked
def encoder(width: int = 64, pools: int = 3) -> nn.Sequential:
    """AdaIN's VGG-19 up to the first ReLU behind its last pool; 64 and 3 are the released one, up to relu4_1.

    >>> encoder(4, pools=2)(torch.zeros(1, 3, 16, 24)).shape
    torch.Size([1, 16, 4, 6])
    """
    check_int("width", width, least=1)
    check_int("pools", pools, least=1, most=3)
    layers: list[nn.Module] = [nn.Conv2d(3, 3, 1)]
    dim = 3
    for stage in range(pools):
        for _ in range(_CONVS[stage]):
            layers += [*_conv(dim, width * _WIDTHS[stage]), nn.ReLU()]
            dim = width * _WIDTHS[stage]
        layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
    return nn.Sequential(*layers, *_conv(dim, width * _WIDTHS[pools]), nn.ReLU())


@checked
def decoder(width: int = 64, pools: int = 3) -> nn.Sequential:
    """The mirror of :func:`encoder`, with nearest upsampling for its pools."""
    check_int("width", width, least=1)
    check_int("pools", pools, least=1, most=3)
    layers: list[nn.Module] = []
    for stage in reversed(range(pools)):
        dim = width * _WIDTHS[stage]
        layers += [*_conv(width * _WIDTHS[stage + 1], dim), nn.ReLU(), nn.Upsample(scale_factor=2, mode="nearest")]
        for _ in range(_CONVS[stage] - 1):
            layers += [*_conv(dim, dim), nn.ReLU()]
    return nn.Sequential(*layers, *_conv(width, 3))


def coral(source: Tensor, target: Tensor) -> Tensor:
    """``source`` (B, 3, H, W) with the colours of ``target``: mean, deviation and correlations of channels.

    Of standardised pixels ``X`` the matrix of correlations is ``X X^T + 1``, as released: the one keeps it invertible.
    """
    check_axes("source", source, B=None, channels=None, H=None, W=None)
    check_axes("target", target, B=source.shape[0], channels=source.shape[1], H=None, W=None)

    def standard(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.flatten(2)
        mean, std = flat.mean(2, keepdim=True), flat.std(2, keepdim=True)
        if bool((std == 0).any()):
            raise ValueError("source and target must vary in every channel; one is constant")
        return (flat - mean) / std, mean, std

    def root(x: Tensor, power: float) -> Tensor:
        values, vectors = torch.linalg.eigh(x @ x.mT + torch.eye(x.shape[1], dtype=x.dtype, device=x.device))
        return vectors * values.pow(power).unsqueeze(1) @ vectors.mT

    (a, _, _), (b, mean, std) = standard(source), standard(target)
    return (root(b, 0.5) @ (root(a, -0.5) @ a) * std + mean).view_as(source)


def texture_share(
    windows: LogPolarWindows, side: int, degrees: float = 26.0, rate: float = 1.281, compat: str | None = None
) -> Tensor:
    """(K,) alpha of each region, ``tanh(rate r / 2)`` with ``r`` in degrees; none for the fovea.

    Args:
        windows: with areas in cells of the image.
        side: of the image in cells.
        degrees: of visual angle that the side takes.
        rate: ``d``, fitted to observers.
        compat: ``"authors"`` divides areas by 3.14 instead of pi.
    """
    check_int("side", side, least=1)
    check_real("degrees", degrees, above=0)
    check_real("rate", rate, least=0)
    check_choice("compat", compat, (None, "authors"))
    radius = (windows.area / (3.14 if compat else math.pi)).sqrt() * (degrees / side)
    share = torch.tanh(radius * (rate / 2))
    share[0] = 0
    return share


class FoveatedTransfer(nn.Module):
    """The foveated texture transform: images to metamers, in one pass.

    Args:
        encoder: (B, 3, H, W) to features (B, C, h, w).
        decoder: features to (B, 3, H, W).
        overlap: ``"overwrite"``: where regions overlap the last of them says it, as released; ``"blend"``: their mean
            by the weights of windows.

    >>> from attnlib.grids import log_polar_windows
    >>> transfer = FoveatedTransfer(encoder(2, pools=1), decoder(2, pools=1)).eval()
    >>> windows = log_polar_windows((64, 64), 0.8, fovea=6, reduce=2)
    >>> transfer(torch.rand(1, 3, 64, 64), windows).shape
    torch.Size([1, 3, 64, 64])
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, overlap: str = "overwrite"):
        super().__init__()
        check_choice("overlap", overlap, OVERLAPS)
        self.encoder, self.decoder, self.overlap = encoder, decoder, overlap

    @classmethod
    def released(
        cls, encoder_path: str | Path, decoder_path: str | Path, overlap: str = "overwrite"
    ) -> FoveatedTransfer:
        """The authors' weights: ``vgg_normalised.pth`` and ``decoder-content-similar.pth`` of their archives.

        Raises:
            FileNotFoundError: a file is not there.
            RuntimeError: it holds other weights.
        """
        parts = encoder(), decoder()
        for part, path in zip(parts, (encoder_path, decoder_path), strict=True):
            if not Path(path).is_file():
                raise FileNotFoundError(
                    f"no weights at {path}: the authors' script download_models_and_stimuli.sh has them"
                )
            found = state_dict_in(read_file(path), str(path))
            part.load_state_dict(released_encoder(found) if part is parts[0] else found)
        return cls(*parts, overlap=overlap).eval()

    def reference(self, images: Tensor) -> Tensor:
        """``D(E(I))`` within [0, 1]."""
        check_axes("images", images, B=None, channels=3, H=None, W=None)
        return self.decoder(self.encoder(images)).clamp(0, 1)

    def forward(
        self, images: Tensor, windows: LogPolarWindows, share: Tensor | None = None, noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Metamers of images (B, 3, H, W) in [0, 1].

        Args:
            images: with the sides that the windows are for.
            windows: on the grid of features (``reduce=``).
            share: (K,) alpha of each; :func:`texture_share` of the height by default.
            noise: (B, 3, H, W), of normal numbers; it takes the images' colours.
            generator: of noise that is not given.

        Raises:
            ValueError: windows of another grid, of fewer than two cells, or shares that are not one for each.
        """
        check_axes("images", images, B=None, channels=3, H=None, W=None)
        check_type("windows", windows, LogPolarWindows)
        if share is None:
            share = texture_share(windows, images.shape[2])
        if noise is None:
            noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        check_axes("noise", noise, B=images.shape[0], channels=3, H=images.shape[2], W=images.shape[3])
        features = self.encoder(images)
        return self.decoder(self.mix(features, self.encoder(coral(noise, images)), windows, share)).clamp(0, 1)

    def mix(self, features: Tensor, noise: Tensor, windows: LogPolarWindows, share: Tensor) -> Tensor:
        """``g`` of features of the image and of the noise, (B, C, h, w) both."""
        weights = windows.weights.to(features).flatten(1)
        if windows.weights.shape[1:] != features.shape[2:]:
            raise ValueError(
                f"windows lie on a grid of {tuple(windows.weights.shape[1:])}, features on {tuple(features.shape[2:])}"
            )
        check_axes("share", share, windows=len(weights))
        f, n = features.flatten(2).mT, noise.flatten(2).mT
        inside = (weights > INSIDE).to(f)
        (mean_f, std_f), (mean_n, std_n) = region_statistics(f, inside), region_statistics(n, inside)
        alpha = share.to(f)
        ratio = alpha[:, None] * std_f / std_n
        rest = alpha[:, None] * mean_f - ratio * mean_n
        if self.overlap == "blend":
            held = (weights / weights.sum(0)).mT
            out = f * (held @ (1 - alpha))[:, None] + n * (held @ ratio) + held @ rest
        else:
            last = (inside * torch.arange(1, len(inside) + 1).to(f)[:, None]).amax(0).long() - 1
            out = f * (1 - alpha[last])[:, None] + n * ratio[:, last] + rest[:, last]
            out = out * (last >= 0)[:, None]  # nothing is written where no region is, as released
        return out.mT.view_as(features)


def region_statistics(x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, ``sqrt(var + 1e-5)`` of the unbiased variance, of (B, P, C) in regions (K, P): (B, K, C)."""
    count = inside.sum(1, keepdim=True)
    if int(count.min()) < 2:
        raise ValueError(f"windows of fewer than two cells have no deviation: {int((count < 2).sum())} of {len(count)}")
    middle = x.mean(1, keepdim=True)
    x = x - middle  # sums of squares do not cancel
    mean = inside @ x / count
    var = (inside @ x.square() - count * mean.square()) / (count - 1)
    return mean + middle, (var.clamp_min(0) + 1e-5).sqrt()


def released_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of the authors' VGG-19 is used: its modules up to relu4_1, number 30; convolutions behind are left out."""
    return {k: v for k, v in state.items() if int(k.split(".")[0]) <= 30}


def descend(
    encoder: nn.Module, images: Tensor, windows: LogPolarWindows, start: Tensor, steps: int = 100, lr: float = 0.02,
    until: float = 0.0,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """The older way, hundreds of passes: pixels descend (Adam) until their statistics are those of the images.

    Args:
        encoder: whose features' means and deviations in each window are matched.
        images: (B, 3, H, W).
        windows: on the grid of features.
        start: (B, 3, H, W) pixels to begin with.
        steps: most steps.
        lr: step size.
        until: end when :func:`statistic_loss` is at most this.

    Returns:
        Images in [0, 1], and the loss before every step and at the end.
    """
    check_int("steps", steps, least=0)
    check_real("lr", lr, above=0)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    losses = []
    for step in range(steps + 1):
        loss = statistic_loss(encoder, x.clamp(0, 1), images, windows)
        losses.append(float(loss.detach()))
        if step == steps or losses[-1] <= until:
            break
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
    return x.detach().clamp(0, 1), losses


def statistic_loss(encoder: nn.Module, x: Tensor, images: Tensor, windows: LogPolarWindows) -> Tensor:
    """Mean squared difference of means and deviations of features in windows, over the variance of the features."""
    inside = (windows.weights.flatten(1) > INSIDE).to(images)
    with torch.no_grad():
        features = encoder(images).flatten(2).mT
        want = region_statistics(features, inside)
    have = region_statistics(encoder(x).flatten(2).mT, inside)
    off = sum((a - b).square().mean() for a, b in zip(have, want, strict=True))
    return off / features.var()  # type: ignore[return-value]

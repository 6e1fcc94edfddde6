"""YONOS: super-resolution by a diffusion model in one step, learned from models of smaller factors.

Noroozi et al., 2024, "You Only Need One Step: Fast Super-Resolution with Stable Diffusion via Scale Distillation",
arXiv 2401.17258. With z the latents of a picture, ``z_t = alpha_t z + sigma_t eps``, and ``c_s`` the latents of the
picture made s times smaller and brought back to its size, a model of factor s says what is clean, ``x(z_t, c_s, t)``:

1. The first, of a small factor, learns from pictures: ``w(t) |x(z_t, c_s, t) - z|^2``.
2. The next learns from it at the *same* picture, noise and time, ``w(t) |x(z_t, c_2s, t) - sg x'(z_t, c_s, t)|^2``, and
   starts from its weights; and so on: 2, 4, 8.
3. One step is ``x(eps, c, T)``. The denoiser is kept, and the decoder of latents learns from what that step gives.

There is no code, and we read the paper at second hand: w, the start from the teacher, and the terms of the decoder's
stage (L1, features, a discriminator) are arguments. One step from pure noise needs a schedule whose last step keeps no
signal; Stable Diffusion's keeps some, and is refused (:func:`zero_terminal_snr` mends it). Noise is not predicted:
there it says nothing of what is clean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import (
    check_axes,
    check_choice,
    check_float,
    check_index,
    check_int,
    check_real,
    check_type,
    describe,
    readable,
)
from ...nn.layers import smoothed
from ...types import stats_dtype
from ..protocol import Step, answering, trained
from ..restore.adversarial import AdversarialModel

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "snr": lambda snr: snr,
    "velocity": lambda snr: snr + 1,  # the squared error of v
    "truncated": lambda snr: snr.clamp(min=1),
}


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """``alpha^2`` (T,) with a last step of pure noise, the first as it was; Lin et al., 2023, arXiv 2305.08891.

    >>> float(zero_terminal_snr(torch.linspace(0.99, 0.01, 10))[-1])
    0.0
    """
    check_axes("alphas_cumprod", alphas_cumprod, T=None)
    check_float("alphas_cumprod", alphas_cumprod)
    if readable(alphas_cumprod) and not (len(alphas_cumprod) > 1 and bool(alphas_cumprod[0] > alphas_cumprod[-1])):
        raise ValueError(f"alphas_cumprod must fall from its first to its last step, got {describe(alphas_cumprod)}")
    root = alphas_cumprod.double().sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square().to(alphas_cumprod.dtype)


def levels(schedule: Any) -> Tensor:
    """``alpha^2`` (T,) of a scheduler, or as given; checked, with a last step that keeps no signal.

    Raises:
        TypeError: no schedule.
        ValueError: levels that do not fall from at most 1, or a last step that keeps signal.
    """
    found = getattr(schedule, "alphas_cumprod", schedule)
    if not isinstance(found, Tensor) or found.dim() != 1 or not found.is_floating_point() or len(found) < 2:
        raise TypeError(f"schedule must be alphas_cumprod (T,) or a scheduler that has them, got {describe(found)}")
    if readable(found):
        if not bool(found.isfinite().all()) or float(found.max()) > 1 or float(found.min()) < 0:
            raise ValueError("schedule must hold alphas_cumprod from 0 to 1")
        if not bool((found.diff() < 0).all()):
            raise ValueError("schedule must hold alphas_cumprod that fall from step to step")
        if float(found[-1]) > 1e-6:
            raise ValueError(
                f"schedule keeps signal at its last step, alphas_cumprod[-1]={float(found[-1]):.2g}: one step from "
                "pure noise needs 0; see zero_terminal_snr(alphas_cumprod)"
            )
    return found.detach().double()


def resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, *grid) of one or two axes at another size, bicubic, smoothed where it gets smaller."""
    flat = x.unsqueeze(2) if x.dim() == 3 else x
    sides = (1, *size) if x.dim() == 3 else size
    smaller = any(a < b for a, b in zip(sides, flat.shape[2:], strict=True))
    y = smoothed(flat, sides, "bicubic") if smaller else F.interpolate(flat, sides, mode="bicubic", align_corners=False)
    return y.squeeze(2) if x.dim() == 3 else y


def smaller(x: Tensor, factor: int) -> Tensor:
    """(B, C, *grid), every side ``factor`` times smaller; the degradation by default."""
    return resized(x, tuple(n // factor for n in x.shape[2:]))


class OneStepUpscaler(AdversarialModel):
    """Pictures (B, C, *grid) to pictures ``factor`` times as large, in one step.

    Batches of training hold ``"target"``, large pictures, and if wished ``"low"``, small ones (made of the target
    otherwise), ``"condition"``, ``"noise"`` and ``"timesteps"`` (drawn otherwise).

    Args:
        denoiser: as those of diffusers: called with noisy latents and their condition side by side, (B, 2 L, *grid),
            and timesteps (B,), and ``encoder_hidden_states`` where there is a text; gives a tensor, a tuple, or what
            has a ``sample``.
        schedule: a scheduler, or its ``alphas_cumprod`` (T,).
        factor: s.
        autoencoder: pictures to latents and back, ``encode`` and ``decode`` as diffusers' have them; ``None``: pictures
            are their own latents. Its encoder is never trained.
        prediction: what the denoiser gives: ``"v"`` (``alpha eps - sigma z``) or ``"x0"``.
        teacher: a model of a smaller factor, which is kept as it is; ``None``: learn from pictures.
        weight: w, of ``WEIGHTS`` or a function of the signal-to-noise ratio.
        stage: ``"denoiser"``, or ``"decoder"``: only the autoencoder's decoder learns.
        down: from a picture and a factor to a smaller one.
        perceptual: distance of two pictures, for the decoder's stage.
        l1, perceptual_weight: weights of its terms.
        discriminator, gan_weight, gan_start: of its adversarial term.

    Raises:
        ValueError: a schedule that keeps signal at its last step, a teacher of no smaller factor, a decoder's stage
            without a decoder.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv = nn.Conv2d(6, 3, 3, padding=1)
    ...     def forward(self, z, t): return self.conv(z)
    >>> model = OneStepUpscaler(Net(), zero_terminal_snr(torch.linspace(0.99, 0.01, 10)), 2)
    >>> model(torch.zeros(1, 3, 6, 5)).shape
    torch.Size([1, 3, 12, 10])
    >>> model.student(4).factor
    4
    """

    def __init__(
        self, denoiser: nn.Module, schedule: Any, factor: int, *, autoencoder: nn.Module | None = None,
        prediction: str = "v", teacher: OneStepUpscaler | None = None, weight: str | Callable[[Tensor], Tensor] = "one",
        stage: str = "denoiser", down: Callable[[Tensor, int], Tensor] = smaller, perceptual: nn.Module | None = None,
        l1: float = 1.0, perceptual_weight: float = 1.0, discriminator: nn.Module | None = None,
        gan_weight: float = 0.1, gan_start: float = 0.0,
    ):  # fmt: skip
        super().__init__(discriminator, "hinge", gan_weight, 0.5, gan_start)
        check_type("denoiser", denoiser, nn.Module)
        self.factor = check_int("factor", factor, least=2)
        check_choice("prediction", prediction, ("v", "x0"))
        check_choice("stage", stage, ("denoiser", "decoder"))
        if not callable(weight):
            check_choice("weight", weight, WEIGHTS)
        if teacher is not None:
            check_type("teacher", teacher, OneStepUpscaler)
            if teacher.factor >= factor:
                raise ValueError(f"teacher is of factor {teacher.factor}; it must be smaller than factor={factor}")
        self.l1 = check_real("l1", l1, least=0)
        self.perceptual_weight = check_real("perceptual_weight", perceptual_weight, least=0)
        self.denoiser, self.autoencoder, self.teacher, self.perceptual = denoiser, autoencoder, teacher, perceptual
        self.prediction, self.weight, self.stage, self.down = prediction, weight, stage, down
        self.alphas = levels(schedule)  # no buffer: half precision of a model is not that of its schedule
        if stage == "decoder" and not self.decoder_params():
            raise ValueError("stage='decoder' needs an autoencoder whose `decoder` has parameters to train")

    # ---- latents

    @property
    def latent_scale(self) -> float:
        """What the autoencoder's latents are multiplied by."""
        return float(getattr(getattr(self.autoencoder, "config", None), "scaling_factor", None) or 1.0)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents of pictures."""
        if self.autoencoder is None:
            return x
        found: Any = self.autoencoder.encode(x)  # type: ignore[operator]
        found = getattr(found, "latent_dist", found)
        found = found.mode() if hasattr(found, "mode") and not isinstance(found, Tensor) else found
        return found * self.latent_scale

    def decode(self, z: Tensor) -> Tensor:
        """Pictures of latents."""
        if self.autoencoder is None:
            return z
        return _tensor(self.autoencoder.decode(z / self.latent_scale))  # type: ignore[operator]

    def decoder_params(self) -> list[nn.Parameter]:
        """What the decoder's stage trains."""
        parts = [getattr(self.autoencoder, name, None) for name in ("decoder", "post_quant_conv")]
        return trained(*(p for p in parts if isinstance(p, nn.Module)))

    # ---- what is clean

    def hint(self, low: Tensor, size: tuple[int, ...]) -> Tensor:
        """Latents of small pictures, brought to ``size`` first."""
        return self.encode(resized(low, size))

    def mixed(self, z: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha z + sigma noise``."""
        alpha, sigma = self._levels(timesteps, z)
        return alpha * z + sigma * noise

    def clean(self, z: Tensor, hint: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
        """Latents without noise, of noisy ones (B, L, *grid) at timesteps (B,)."""
        more = {} if condition is None else {"encoder_hidden_states": condition}
        found = _tensor(self.denoiser(torch.cat([z, hint], 1), timesteps, **more))
        if found.shape != z.shape:
            raise ValueError(f"denoiser must give {tuple(z.shape)}, one for each latent, got {describe(found)}")
        if self.prediction == "x0":
            return found
        alpha, sigma = self._levels(timesteps, z)
        return alpha * z - sigma * found

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        square = self._squares(timesteps, like).view(-1, *[1] * (like.dim() - 1))
        return square.sqrt().to(like.dtype), (1 - square).sqrt().to(like.dtype)

    def _squares(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return self.alphas.to(timesteps.device, stats_dtype(like.dtype))[timesteps]

    def one_step(self, low: Tensor, noise: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Latents, from pure noise; ``noise=None`` is the same noise always."""
        size = tuple(n * self.factor for n in low.shape[2:])
        hint = self.hint(low, size)
        if noise is None:
            drawn = torch.randn(hint.shape, generator=torch.Generator().manual_seed(0))
            noise = drawn.to(hint)
        else:
            _check_like_latents("noise", noise, hint)
        last = torch.full((low.shape[0],), len(self.alphas) - 1, device=low.device)
        return self.clean(noise, hint, last, condition)

    def forward(self, low: Tensor, noise: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """(B, C, *grid) -> (B, C, *(factor * grid)).

        Args:
            low: small pictures.
            noise: latents; always the same by default.
            condition: for ``encoder_hidden_states``.
        """
        check_float("low", low)
        if low.dim() not in (3, 4) or not low.shape[2:].numel():
            raise ValueError(f"low must be pictures (B, C, *grid) of one or two axes, got {describe(low)}")
        if self.stage == "decoder":
            with torch.no_grad():
                z = self.one_step(low, noise, condition)
        else:
            z = self.one_step(low, noise, condition)
        return self.decode(z)

    # ---- training

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Terms of pictures, of the decoder's stage: ``{"l1"}``, and ``"perceptual"`` where there is one."""
        if not isinstance(target, Tensor) or target.shape != prediction.shape:
            raise ValueError(f"target must be pictures {tuple(prediction.shape)}, got {describe(target)}")
        target = target.to(prediction.dtype)
        terms = {"l1": self.l1 * F.l1_loss(prediction, target)}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual_weight * self.perceptual(prediction, target)
        return terms

    def denoiser_loss(
        self, target: Tensor, *, low: Tensor | None = None, noise: Tensor | None = None,
        timesteps: Tensor | None = None, condition: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """``{"clean"}``: the weighed error against the picture's latents, or against the teacher's answer.

        Args:
            target: (B, C, *grid) large pictures, sides multiples of the factor.
            low: small pictures, made of the target by default; the teacher's are always.
            noise, timesteps: drawn by default, once for both models.
            condition: for ``encoder_hidden_states`` of both.
        """
        check_float("target", target)
        if target.dim() not in (3, 4) or not target.shape[2:].numel():
            raise ValueError(f"target must be pictures (B, C, *grid) of one or two axes, got {describe(target)}")
        if any(n % self.factor for n in target.shape[2:]):
            raise ValueError(f"target has sides {tuple(target.shape[2:])}; they must be multiples of {self.factor}")
        size = tuple(target.shape[2:])
        if low is None:
            low = self.down(target, self.factor)
        want = (*target.shape[:2], *(n // self.factor for n in size))
        if not isinstance(low, Tensor) or tuple(low.shape) != want:
            raise ValueError(f"low must be the target {self.factor} times smaller, {want}, got {describe(low)}")
        z, hint = self.encode(target), self.hint(low, size)
        if noise is None:
            noise = torch.randn_like(z)
        if timesteps is None:
            timesteps = torch.randint(len(self.alphas), (len(z),), device=z.device)
        _check_like_latents("noise", noise, z)
        check_index("timesteps", timesteps, (len(z),), len(self.alphas), "step")
        noisy = self.mixed(z, noise, timesteps)
        right = z
        if self.teacher is not None:
            right = self.teacher.taught(target, noisy, timesteps, condition)
        square = (self.clean(noisy, hint, timesteps, condition) - right).to(stats_dtype(z.dtype)).square()
        level = self._squares(timesteps, square)
        snr = level / (1 - level).clamp(min=1e-12)
        weigh = self.weight if callable(self.weight) else WEIGHTS[self.weight]
        return {"clean": (weigh(snr) * square.flatten(1).mean(1)).mean()}

    @answering
    def taught(self, target: Tensor, noisy: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
        """What this model says of noisy latents, as in evaluation, by its own smaller picture of the target."""
        hint = self.hint(self.down(target, self.factor), tuple(target.shape[2:]))
        return self.clean(noisy, hint, timesteps, condition)

    def generator_params(self) -> list[nn.Parameter]:
        return self.decoder_params() if self.stage == "decoder" else trained(self.denoiser)

    def steps(self, batch: Mapping[str, Any]) -> Iterator[Step]:
        """``"denoiser"``; in the decoder's stage ``"discriminator"``, if there is one, and ``"generator"``."""
        check_type("batch", batch, Mapping, "a mapping from names to inputs, with a 'target'")
        if "target" not in batch:
            raise ValueError(f"batch has no 'target', got {sorted(batch)}")
        if self.stage == "denoiser":
            yield Step("denoiser", self.generator_params(), lambda: self.denoiser_loss(**batch))
            return
        given = {k: v for k, v in batch.items() if k != "timesteps"}
        given.setdefault("low", self.down(batch["target"], self.factor))
        yield from super().steps(given)

    # ---- stages

    def student(self, factor: int | None = None, **settings: Any) -> OneStepUpscaler:
        """The model of the next stage, twice this one's factor by default: it starts as this one, and learns from it.

        Both share an autoencoder. This one's own teacher is let go.
        """
        given: dict[str, Any] = dict(
            autoencoder=self.autoencoder, prediction=self.prediction, weight=self.weight, down=self.down
        )
        factor = 2 * self.factor if factor is None else factor
        made = OneStepUpscaler(copy.deepcopy(self.denoiser), self.alphas, factor, teacher=self, **{**given, **settings})
        self.teacher = None  # not before the settings of the next were taken
        return made

    def decoder_stage(self, **settings: Any) -> OneStepUpscaler:
        """The last stage: the same denoiser, kept as it is, and a decoder that learns; ``settings`` of its loss."""
        given: dict[str, Any] = dict(autoencoder=self.autoencoder, prediction=self.prediction, down=self.down)
        return OneStepUpscaler(self.denoiser, self.alphas, self.factor, stage="decoder", **{**given, **settings})


def _check_like_latents(name: str, given: Any, latents: Tensor) -> None:
    if not isinstance(given, Tensor) or given.shape != latents.shape:
        raise ValueError(f"{name} must be of the shape of latents, {tuple(latents.shape)}, got {describe(given)}")


def _tensor(found: Any) -> Tensor:
    found = getattr(found, "sample", found)
    return found[0] if isinstance(found, tuple) else found

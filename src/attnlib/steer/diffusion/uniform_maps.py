"""Uniform attention maps (Mo et al., 2024): a denoiser that does not listen to its text, for inversion and editing.

Cross-attention gets the map ``1 / T`` for every query and text token: the layer then adds the same vector, the mean
value, to all pixels, and the predicted noise hardly depends on how the prompt fits the image. DDIM inversion, which
assumes that neighbouring steps predict the same noise, errs less under it.

Editing runs three latents side by side: source and target with their text under classifier-free guidance, and the
source again under uniform maps. Where source and target predict different clean images the edit stands, elsewhere the
target takes the clean image of the uniform branch (:func:`edit_mask`, :func:`blend`, :func:`masked_edit`).

::

    with attnlib.attach(unet, UniformMaps(pass_name="uniform")) as session:
        plain = noise_predictor(unet, text, uncond, guidance=7.5)
        uniform = noise_predictor(unet, uncond, session=session, pass_name="uniform")
        path = ddim_invert(uniform, scheduler, latents)
        edited, _ = masked_edit(plain, uniform, scheduler, path[-1].expand(2, -1, -1, -1), path[-1])
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_int, check_real, shaped
from ...hooks.intervention import Intervention
from ...hooks.site import Site
from .invert import Predict, as_output, check_levels, clean_and_noise, fresh


class UniformMaps(Intervention):
    """Replace the maps of cross-attention by uniform ones; values are still computed from the text.

    The queries are set to zero, which is what a uniform map means: whatever else is attached sees uniform weights.

    Args:
        rows: names of the batch rows to make uniform; ``None`` for all.
        steps: denoising steps at which to act (numbers, a ``range``); ``None`` for every call.
        pass_name: act only in the pass of this name (see ``session.at``); ``None`` for every pass.
        layers: numbers or name patterns; ``None`` for all cross-attention.
        padding: count text tokens that the model masks too, as the authors do; otherwise the map is uniform over the
            tokens that the model may read. Without a mask, the usual case in diffusers, both are the same.
        compat: ``"authors"`` gives every text token 1/77, also where there are not 77 of them.

    Raises:
        ValueError: ``steps`` were given but the call says no step, or rows without names.

    What differs from the authors' code: ``1 / T`` instead of ``1 / 77`` (unless ``compat``), and rows by name instead
    of by the size of the batch (which there means Stable Diffusion 1's 8 heads).

    Reference: Mo et al., 2024, arXiv 2411.19652.

    >>> UniformMaps(rows=("uncond",), steps=range(10)).kinds
    ('cross',)
    """

    name: ClassVar[str] = "uniform-attention-maps"
    kinds: ClassVar[tuple[str, ...]] = ("cross",)

    def __init__(
        self,
        rows: Sequence[str] | None = None,
        steps: Collection[int] | None = None,
        pass_name: str | None = None,
        layers: Sequence[int | str] | None = None,
        padding: bool = True,
        compat: str | None = None,
    ):
        check_choice("compat", compat, (None, "authors"))
        if isinstance(rows, str):
            raise TypeError(f"rows must be a sequence of names, got the string {rows!r}; write rows=({rows!r},)")
        if isinstance(steps, (int, str)):
            raise TypeError(f"steps must be a collection of numbers, got {steps!r}; write steps=({steps!r},)")
        self.rows = None if rows is None else tuple(rows)
        self.steps = None if steps is None else frozenset(steps)
        self.pass_name, self.layers, self.padding, self.compat = pass_name, layers, padding, compat

    @property
    def identity(self) -> bool:
        return self.rows == () or self.steps == frozenset() or self.layers == []

    def _acts(self, site: Site) -> bool:
        if self.pass_name is not None and site.pass_name != self.pass_name:
            return False
        if self.steps is None:
            return True
        if site.step is None:
            raise ValueError(
                f"UniformMaps acts at {len(self.steps)} chosen steps, but layer {site.layer} ({site.name}) is not told "
                "the step of this call; run the denoiser inside `with session.at(step=i)`"
            )
        return site.step in self.steps

    def around_attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, call: Callable[..., Tensor]) -> Tensor:
        if not self._acts(site):
            return call(q, k, v)
        chosen = None if self.rows is None else site.rows_named(self.rows, q.device).view(-1, 1, 1, 1)
        if chosen is not None and not bool(chosen.any()):
            return call(q, k, v)
        masked = site.mask is not None and (site.mask.allowed is not None or site.mask.bias is not None)
        if self.padding and masked:
            every = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            nothing = torch.zeros(1, 1, 1, 1, dtype=q.dtype, device=q.device)
            uniform = self._weighed(call(torch.zeros_like(q), k, v, mask=every, bias=nothing), k)
            return uniform if chosen is None else torch.where(chosen, uniform, call(q, k, v))
        out = call(torch.zeros_like(q) if chosen is None else q.masked_fill(chosen, 0.0), k, v)
        if self.compat is None:
            return out
        return self._weighed(out, k) if chosen is None else torch.where(chosen, self._weighed(out, k), out)

    def _weighed(self, out: Tensor, k: Tensor) -> Tensor:
        """The mean of the values, or with ``compat`` their sum over 77."""
        return out if self.compat is None else out * (k.shape[2] / 77)


@shaped(x="float (...)")
def quantile(x: Tensor, q: float) -> Tensor:
    """The ``q``-quantile of all elements, of any number (``torch.quantile`` stops at 16 million).

    >>> float(quantile(torch.tensor([0.0, 1.0, 3.0]), 0.75))
    2.0
    """
    check_real("q", q, least=0, most=1)
    if not x.numel():
        raise ValueError(f"x must hold numbers, got {tuple(x.shape)}")
    ordered = x.flatten().sort().values
    at = q * (len(ordered) - 1)
    low = int(at)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], at - low)


@shaped(source="float (C, H, W)", target="float (C, H, W)")
def edit_mask(source: Tensor, target: Tensor, q: float, radius: int = 0, twice: bool = True) -> Tensor:
    """Where two predicted clean images differ, by a threshold at a quantile of their difference.

    Args:
        source: (C, H, W) clean image of the source branch.
        target: (C, H, W) clean image of the target branch.
        q: quantile in [0, 1].
        radius: the mask grows by so many pixels.
        twice: as the authors do, compare what exceeds the threshold with the threshold again, so that only differences
            beyond twice the threshold count; ``False`` compares the differences themselves.

    Returns:
        (C, H, W) boolean, True where the edit stands.

    >>> edit_mask(torch.tensor([[[0.0, 1.0, 5.0]]]), torch.zeros(1, 1, 3), 0.5).tolist()
    [[[False, False, True]]]
    """
    if not 0.0 <= q <= 1.0 or radius < 0:
        raise ValueError(f"q must lie in [0, 1] and radius be at least 0, got q={q}, radius={radius}")
    difference = (source - target).abs()
    threshold = quantile(difference, q)
    excess = (difference - threshold).clamp(min=0) if twice else difference
    mask = excess > threshold
    if radius:
        mask = F.max_pool2d(mask.float(), 2 * radius + 1, stride=1, padding=radius) > 0
    return mask


@shaped(source="float (C, H, W)", target="float (C, H, W)", uniform="float (C, H, W)", mask="bool (C, H, W)")
def blend(source: Tensor, target: Tensor, uniform: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Clean images of source and target after the exchange with the uniform branch.

    Outside the mask the target takes the uniform branch's image, inside it the source does. All are (C, H, W).

    Returns:
        ``(source, target)``.
    """
    return torch.where(mask, uniform, source), torch.where(mask, target, uniform)


@torch.no_grad()
def masked_edit(
    predict: Predict,
    predict_uniform: Predict,
    scheduler: Any,
    latents: Tensor,
    uniform_latents: Tensor,
    steps: int = 50,
    q: float = 0.5,
    below: int = 200,
    radius: int = 0,
    twice: bool = True,
    ramp: int | None = None,
    blend_source: bool = True,
    path: Sequence[Tensor] | None = None,
    offsets: Sequence[Tensor] | None = None,
    uniform_waits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample source and target while a branch with uniform maps keeps what the edit does not touch.

    At timesteps between 0 and ``below`` (both excluded) :func:`edit_mask`, with a quantile that grows linearly from 0
    to ``q`` over the steps, and :func:`blend` act on the predicted clean images; the step then goes on with the noise
    as it was predicted.

    Args:
        predict: noise (or velocity, as the scheduler says) of (2, C, H, W), source and target, guidance included.
        predict_uniform: the same of (1, C, H, W) under uniform maps.
        scheduler: a diffusers scheduler; its noise levels are used.
        latents: (2, C, H, W) noise of source and target.
        uniform_latents: (1, C, H, W) noise of the uniform branch.
        steps: denoising steps.
        q: quantile of the last step; the authors' script takes 0.5, their function 0.7.
        below: timestep from which on the images are blended; 200 in their script, 400 in their function.
        radius: growth of the mask; 0 in their script, 1 in their editor.
        twice: see :func:`edit_mask`.
        ramp: steps over which the quantile grows to ``q``; ``steps`` by default, 50 in the authors' code whatever
            ``steps``.
        blend_source: the source takes the uniform branch's image inside the mask, as in the authors' MasaCtrl editor;
            their Prompt-to-Prompt editor leaves it.
        path: latents of an inversion, see :func:`attnlib.steer.diffusion.invert.ddim_invert`; the source then starts
            every step from its own.
        offsets: (1 or 2, C, H, W) for each step, the first of which is added to the source after it, see
            :func:`attnlib.steer.diffusion.invert.inversion_offsets`.
        uniform_waits: the uniform branch stands still outside the timesteps of the blending, as in the authors'
            Prompt-to-Prompt editor with Direct Inversion.

    Returns:
        ``(latents (2, C, H, W), uniform latents (1, C, H, W))``, clean.

    Raises:
        ValueError: batches of other sizes, or a scheduler that clips, or of a flow model.

    Reference: Mo et al., 2024, arXiv 2411.19652, section 3.
    """
    if len(latents) != 2 or len(uniform_latents) != 1:
        raise ValueError(
            f"latents must be source and target (2, C, H, W) and uniform_latents (1, C, H, W), got "
            f"{tuple(latents.shape)} and {tuple(uniform_latents.shape)}"
        )
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q must lie in [0, 1], got {q}")
    ramp = steps if ramp is None else check_int("ramp", ramp, least=steps)
    if path is not None and len(path) != steps + 1:
        raise ValueError(f"path must hold {steps + 1} latents, the clean ones first; got {len(path)}")
    if offsets is not None and len(offsets) != steps:
        raise ValueError(f"offsets must be one for each of {steps} steps, got {len(offsets)}")
    forward, kind = fresh(scheduler, steps), check_levels(scheduler)
    for i, t in enumerate(forward.timesteps):
        if path is not None:
            latents = torch.cat([path[-1 - i].to(latents), latents[1:]])
        output, output_uniform = predict(latents, t), predict_uniform(uniform_latents, t)
        after = forward.step(output_uniform, t, uniform_latents)
        inside = 0 < int(t) < below
        if inside:
            clean, alpha = forward.step(output, t, latents).pred_original_sample, forward.alphas_cumprod[t]
            mask = edit_mask(clean[0], clean[1], q * i / max(ramp - 1, 1), radius, twice)
            source, target = blend(clean[0], clean[1], after.pred_original_sample[0], mask)
            _, noise = clean_and_noise(output, latents, alpha, kind)
            clean = torch.stack([source if blend_source else clean[0], target])
            # The same noise beside another clean image: what the scheduler steps back from.
            latents, output = forward.add_noise(clean, noise, t), as_output(clean, noise, alpha, kind)
        latents = forward.step(output, t, latents).prev_sample
        if offsets is not None:
            latents = torch.cat([latents[:1] + offsets[i][:1].to(latents), latents[1:]])
        if inside or not uniform_waits:
            uniform_latents = after.prev_sample
    return latents, uniform_latents

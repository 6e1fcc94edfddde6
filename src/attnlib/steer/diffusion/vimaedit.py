"""ViMAEdit: an image edited by its prompt, led by an estimate of how the edit would look, noised where it changes.

Prompt-to-prompt from a source whose clean latents are known, so that nothing is inverted:

- every predicted clean image is moved by what is wrong about the source's, whose row so ends at its latents exactly
  (:func:`attnlib.steer.diffusion.invert.exact_source`);
- an image prompt (IP-Adapter) is given as the embedding of the source and, for the edit, moved by the difference of the
  texts (:func:`target_embedding`); text, image and self-attention are the source's for three shares of the steps;
- where the edited words look, spread along self-attention (:func:`spread`), decides which latents may differ, and
  where noise is added at each step (:func:`masked_ddim_step`).

::

    v = target_embedding(image_features, text_features[:1], text_features[1:])  # of one CLIP
    zeros = torch.zeros_like(v)
    both = torch.stack([torch.cat([zeros, zeros]), torch.cat([image_features, v])])  # (2 passes, 2 prompts, D)
    with attnlib.attach(pipe, ViMAEdit(latents, blend=[["cat"], ["dog"]])):
        pipe(["a cat on a bench", "a dog on a bench"], ip_adapter_image_embeds=[both.flatten(0, 1)[:, None]])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_float, check_int, check_real, shaped
from ...hooks.denoiser import CallSite
from ...hooks.intervention import Intervention
from ...hooks.maps import Maps
from ...hooks.pipelines import Stepped
from ...hooks.site import Site
from .edit import Edited, PromptToPrompt, Share, blend_mask, bounds, check_share
from .invert import as_output, check_levels, clean_and_noise, exact_source
from .maps import refine


@shaped(image="float (1, D)", source="float (1, D)", target="float (B, D)")
def target_embedding(image: Tensor, source: Tensor, target: Tensor, strength: float = 1.0) -> Tensor:
    """How an edited image would be embedded: ``v + s (t' - t)``, (B, D), texts scaled to the length of ``v``.

    Args:
        image: (1, D) features of the source image.
        source: (1, D) features of its prompt, of the same CLIP.
        target: (B, D) features of the edited prompts.
        strength: s; 1 in the released code, which has no such factor.

    >>> target_embedding(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).tolist()
    [[0.0, 2.0]]
    """
    size = image.norm()
    source, target = (t * size / t.norm(dim=-1, keepdim=True) for t in (source, target))
    return image + strength * (target - source)


@shaped(maps="float (..., T, h, w)", between="float (..., M, H, W)")
def spread(maps: Tensor, between: Tensor, order: int = 5, gamma: float = 0.5) -> Tensor:
    """Maps of words spread along self-attention: ``m <- gamma m + (1 - gamma) S m``, so often as ``order`` says.

    Args:
        maps: (..., T, h, w), brought to the sides of ``between`` by the nearest place.
        between: (..., H W, H, W) of ``Maps(of="image")``: key, then query place.
        order: how often.
        gamma: share that stays.

    Returns:
        (..., T, H, W).
    """
    check_int("order", order, least=0)
    check_real("gamma", gamma, least=0, most=1)
    lead = maps.shape[:-3]
    wide = F.interpolate(maps.reshape(-1, *maps.shape[-3:]), size=between.shape[-2:]).unflatten(0, lead or (1,))
    wide = wide if lead else wide[0]
    for _ in range(order):
        wide = gamma * wide + (1 - gamma) * refine(wide, between)
    return wide


def masked_ddim_step(
    clean: Tensor, latents: Tensor, alpha: Tensor | float, before: Tensor | float, mask: Tensor, noise: Tensor,
    eta: float = 1.0,
) -> Tensor:  # fmt: skip
    """A step of DDIM that is noisy inside a mask and deterministic outside.

    Args:
        clean: (B, ...) predicted clean images.
        latents: (B, ...) at this step.
        alpha: share of the clean image's variance at this step, and
        before: at the one that it leads to.
        mask: broadcastable to (B, ...), where noise is added.
        noise: broadcastable to (B, ...).
        eta: 0 for none, 1 for that of DDPM.
    """
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (alpha, before))
    variance = ((1 - b) / (1 - a) * (1 - a / b)).clamp(min=0)
    sigma = eta * mask.to(latents) * variance.sqrt().to(latents)
    scale = ((1 - b.to(latents) - sigma**2) / (1 - a).to(latents)).clamp(min=0).sqrt()
    return (b.sqrt().to(latents) - a.sqrt().to(latents) * scale) * clean + scale * latents + sigma * noise


class ViMAEdit(PromptToPrompt):
    """Edits of an image whose clean latents are given, beside it in one call of a pipeline.

    The pipeline has ``DDIMScheduler`` (eta 0) or ``DPMSolverMultistepScheduler`` (dpmsolver++), and an IP-Adapter where
    an image prompt is to lead.

    Args:
        source: (1, C, H, W) clean latents of the source image, or one for each image per prompt.
        edit, cross, self_maps, weights, layers, self_resolution, compat: see :class:`attnlib.steer.PromptToPrompt`.
        image_maps: share of the steps at which attention to the image prompt is the source's.
        blend: words, one list of them or a list for each prompt, at whose places the edit may differ; ``None`` for
            everywhere, without noise.
        thresholds: of the spread maps stretched over [0, 1]: where latents differ, and where noise is added.
        order, gamma: see :func:`spread`.
        blend_from: share of the steps from which on maps are added up and latents blended.
        resolution: of the maps of text.
        between_resolution: of the self-attention along which they are spread.
        eta: of the noise inside the mask.
        source_guidance: weight of classifier-free guidance of the source's row; the pipeline's is that of the edits.
        seed: of the noise, the same for all rows; the pipeline's generator is left alone.

    Raises:
        ValueError: as :class:`attnlib.steer.PromptToPrompt`; another scheduler, a flow model, source latents of another
            shape.

    Reference: Wang et al., 2024, arXiv 2410.10496.

    >>> ViMAEdit(torch.zeros(1, 4, 8, 8)).thresholds
    (0.5, 0.8)
    """

    name: ClassVar[str] = "vimaedit"
    sees_references = True

    def __init__(
        self,
        source: Tensor,
        edit: str | None = "refine",
        cross: Share | Mapping[str | None, Share] = 0.4,
        self_maps: Share = 0.6,
        image_maps: Share = 0.1,
        weights: Mapping[str, float] | None = None,
        blend: Sequence[Any] | None = None,
        thresholds: Sequence[float] = (0.5, 0.8),
        order: int = 5,
        gamma: float = 0.5,
        blend_from: float = 0.2,
        resolution: int | Sequence[int] = 16,
        between_resolution: int | Sequence[int] = 32,
        eta: float = 1.0,
        source_guidance: float = 1.0,
        seed: int = 0,
        layers: Sequence[int | str] | None = None,
        self_resolution: int = 32,
        compat: str | None = None,
    ):
        check_choice("compat", compat, (None, "authors"))
        super().__init__(
            edit, cross, self_maps, weights, blend, None, thresholds, blend_from, resolution, layers, self_resolution,
            True, compat,
        )  # fmt: skip
        check_float("source", source)
        if source.dim() != 4 or not bool(source.isfinite().all()):
            raise ValueError(f"source must be finite latents (1, C, H, W), got {tuple(source.shape)}")
        self.source = source
        self.image_maps = check_share("image_maps", image_maps)
        self.order = check_int("order", order, least=0)
        self.gamma = check_real("gamma", gamma, least=0, most=1)
        self.eta = check_real("eta", eta, least=0, most=1)
        self.source_guidance = check_real("source_guidance", source_guidance)
        self.seed = check_int("seed", seed)
        self.between = Maps(between_resolution, of="image", gradient=False)

    @property
    def companions(self) -> Sequence[Intervention]:
        return () if self.blend is None else (self.maps, self.between)

    # ---- maps

    def _acts(self, site: Site) -> bool:
        if site.reference is None:
            return super()._acts(site)
        low, high = bounds(self.image_maps, self.session.notes[self, "plan"]["steps"])
        return low <= site.step < high and site.n_queries <= self.self_resolution**2  # type: ignore[operator]

    def on_weights(self, site: Site, weights: Tensor, rows: Tensor) -> Tensor:
        edited = self._edited(site)
        if site.reference is None or edited is None or not self._acts(site):
            return super().on_weights(site, weights, rows)
        new = list(weights.unbind(0))
        for row, source, _ in edited.edits:
            new[row] = weights[source]
        return torch.stack(new)

    # ---- the step

    def _run(self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        notes, scheduler = self.session.notes, site.sampling.pipe.scheduler
        kind = type(scheduler).__name__
        if kind not in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
            raise ValueError(
                f"ViMAEdit takes steps of DDIMScheduler or DPMSolverMultistepScheduler, the pipeline has {kind}"
            )
        prediction = check_levels(scheduler)
        if kind != "DDIMScheduler" and scheduler.config.algorithm_type != "dpmsolver++":
            raise ValueError(f"ViMAEdit needs algorithm_type='dpmsolver++', got {scheduler.config.algorithm_type!r}")
        rows, prompts = site.rows, site.prompts
        assert rows is not None and prompts is not None and site.step is not None
        edited = Edited.of(rows, prompts, "ViMAEdit")
        first = [k for k, p in enumerate(edited.prompts) if p == 0]
        main = inputs[site.main]
        if self.source.shape[1:] != main.shape[1:] or len(self.source) not in (1, len(first)):
            raise ValueError(
                f"source must be the clean latents of 1 or {len(first)} images, {tuple(main.shape[1:])} each, got "
                f"{tuple(self.source.shape)}"
            )
        if (self, "noise") not in notes:
            notes[self, "noise"] = torch.Generator().manual_seed(self.seed)
        source = self.source.to(main).expand(len(first), -1, -1, -1)
        out = self._guided(call(inputs), rows, edited, first)
        guidance = float(site.sampling.pipe.guidance_scale) if "uncond" in rows else 1.0
        out = self._moved(site, out, main, source, edited, guidance, prediction)
        if self.blend is not None:
            self._look(site)
        return out

    def _guided(self, out: Tensor, rows: Sequence[str], edited: Edited, first: list[int]) -> Tensor:
        """The source's rows all say what its own weight of guidance makes of them."""
        if "uncond" not in rows:
            return out
        free = [i for i, row in enumerate(rows) if row == "uncond"]
        out = out.clone()
        for k in first:
            base, cond = out[free[k]].clone(), out[edited.index[k]].clone()
            out[free[k]] = out[edited.index[k]] = base + self.source_guidance * (cond - base)
        return out

    def _moved(
        self, site: CallSite, out: Tensor, main: Tensor, source: Tensor, edited: Edited, guidance: float, kind: str
    ) -> Tensor:
        """Predictions moved so that the source's clean image is the one that is known."""
        scheduler = site.sampling.pipe.scheduler
        alpha = _share_of(scheduler, site)
        latents = main[list(edited.index)]
        free = [i for i, row in enumerate(site.rows or ()) if row == "uncond"]
        prediction = cond = out[list(edited.index)]
        if free:
            prediction = out[free] + guidance * (cond - out[free])
        clean, _ = clean_and_noise(prediction, latents, alpha, kind)
        new = clean.clone()
        for image in range(len(source)):
            mine = [k for k, s in enumerate(edited.source) if s == edited.source[image]]
            new[mine] = exact_source(clean[mine], source[image : image + 1])
        high, low = (torch.as_tensor(x, dtype=torch.float64) ** 0.5 for x in (alpha, 1 - alpha))
        noise = (latents - high.to(latents) * new) / low.to(latents)
        delta = as_output(new, noise, alpha, kind) - prediction
        out = out.clone()
        out[list(edited.index)] = out[list(edited.index)] + delta
        if free:
            out[free] = out[free] + delta
        return out

    def _look(self, site: CallSite) -> None:
        assert site.rows is not None and site.prompts is not None and site.step is not None
        notes, plan = self.session.notes, self.session.notes[self, "plan"]
        edited = Edited.of(site.rows, site.prompts, "ViMAEdit")
        index = list(edited.index)
        text, between = self.maps.take()[index].float(), self.between.take()[index].float()
        start, counter = int(self.blend_from * plan["steps"]), site.step + 1
        total = notes.get((self, "maps"))
        if counter >= start:
            word = self._of_words(text, plan["blend"], edited)
            seen = spread(word[:, None], between, self.order, self.gamma)[:, 0]
            total = self._added(site.step, seen)
        source, kind = list(edited.source), check_levels(site.sampling.pipe.scheduler)

        def step(stepped: Stepped) -> Tensor:
            x, size = stepped.after, stepped.after.shape[-2:]
            if total is None:
                return x
            if self.eta:
                where = blend_mask(total, size, self.thresholds[1], pool=0, how="range")
                where = where | where[source]
                for k in set(source):  # noise in the source's row where there is some in one of its edits
                    where[k] = where[[n for n, s in enumerate(source) if s == k]].any(0)
                if bool(where.any()):
                    x = self._noisy(stepped, where[:, None], kind)
            mask = blend_mask(total, size, self.thresholds[0], pool=0, how="range")
            return torch.where((mask | mask[source])[:, None], x, x[source])

        self._amend(site, step)

    def _noisy(self, stepped: Stepped, where: Tensor, kind: str) -> Tensor:
        """The step again, with noise inside the mask."""
        scheduler, latents = stepped.scheduler, stepped.before
        generator = self.session.notes[self, "noise"]
        noise = torch.randn((1, *latents.shape[1:]), generator=generator).to(latents)
        if type(scheduler).__name__ == "DDIMScheduler":
            t = int(stepped.timestep)
            earlier = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
            alpha = scheduler.alphas_cumprod[t]
            before = scheduler.alphas_cumprod[earlier] if earlier >= 0 else scheduler.final_alpha_cumprod
            clean, _ = clean_and_noise(stepped.output, latents, alpha, kind)
            return masked_ddim_step(clean, latents, alpha, before, where, noise, self.eta)
        noisy = _noisy_dpm_step(scheduler, latents, noise)
        return torch.where(where, noisy.to(latents), stepped.after)


def _share_of(scheduler: Any, site: CallSite) -> float:
    """The share of the clean image's variance at the step that runs."""
    if type(scheduler).__name__ == "DDIMScheduler":
        return float(scheduler.alphas_cumprod[int(torch.as_tensor(site.timestep).flatten()[0])])
    sigma = float(scheduler.sigmas[site.step])  # type: ignore[index]
    return 1 / (1 + sigma**2)


def _noisy_dpm_step(scheduler: Any, latents: Tensor, noise: Tensor) -> Tensor:
    """The step that a DPM-Solver++ scheduler just took, taken by its stochastic variant."""
    again = copy.copy(scheduler)
    again._internal_dict = type(scheduler.config)({**scheduler.config, "algorithm_type": "sde-dpmsolver++"})
    again._step_index = here = scheduler.step_index - 1
    steps, config = len(scheduler.timesteps), scheduler.config
    last = here == steps - 1 and (
        config.euler_at_final or (config.lower_order_final and steps < 15) or config.final_sigmas_type == "zero"
    )
    outputs, x = scheduler.model_outputs, latents.float()
    if config.solver_order == 1 or here == 0 or last:
        return again.dpm_solver_first_order_update(outputs[-1], sample=x, noise=noise.float())
    if config.solver_order == 2 or here == 1 or (here == steps - 2 and config.lower_order_final and steps < 15):
        return again.multistep_dpm_solver_second_order_update(outputs, sample=x, noise=noise.float())
    raise ValueError("ViMAEdit adds noise to steps of DPM-Solver++ of order 1 or 2; set solver_order")

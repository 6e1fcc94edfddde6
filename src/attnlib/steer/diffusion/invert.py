"""From an image back to the noise that it could have come from, and what keeps sampling on its way back.

Inversions run a sampler's equation the other way (:func:`invert` takes the one that fits the scheduler):

- :func:`ddim_invert`, for models of noise or velocity (``prediction_type`` epsilon or v_prediction);
- :func:`dpm_invert`, DPM-Solver++ of first or second order;
- :func:`flow_invert`, Euler steps of a flow model.

Each gives the latents of every step, the clean ones first. Sampling under guidance leaves that path;
:func:`null_text` learns, step by step, an embedding of the empty prompt that brings it back (:class:`NullText` hands
them to a pipeline), :func:`inversion_offsets` adds what is missing, and :func:`exact_source` needs no path at all: the
clean image of the source is known, so predictions are moved by what was wrong about it.

::

    denoise = denoiser(pipe.unet)
    text, empty = pipe.encode_prompt("a cat", "cpu", 1, True)[:2]
    path = ddim_invert(noise_predictor(pipe.unet, text), pipe.scheduler, latents, 50)
    learnt = null_text(denoise, pipe.scheduler, path, text, empty)
    with attnlib.attach(pipe, NullText(learnt)):
        again = pipe("a cat", latents=path[-1], num_inference_steps=50)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real, check_tensors, checked
from ...hooks.denoiser import CallSite, with_gradient
from ...hooks.intervention import Intervention
from ...hooks.session import Session
from ...types import stats_dtype

#: ``predict(latents (B, C, H, W), timestep) -> (B, C, H, W)``: noise, or whatever the scheduler's model predicts.
Predict = Callable[[Tensor, Any], Tensor]

#: ``denoise(latents (B, C, H, W), timestep, text (B or 1, T, D)) -> (B, C, H, W)``, with gradient where it is wanted.
Denoise = Callable[[Tensor, Any, Tensor], Tensor]

PREDICTIONS = ("epsilon", "v_prediction")


# ---- denoisers as functions


@checked
def denoiser(model: nn.Module, conditions: Mapping[str, Any] | None = None) -> Denoise:
    """A denoiser as ``denoise(latents, timestep, text)``.

    Args:
        model: a diffusers model that is called as ``model(latents, t, encoder_hidden_states=...)``.
        conditions: more named arguments of every call (``added_cond_kwargs`` of SDXL, ...).
    """
    given = dict(conditions or {})

    def denoise(latents: Tensor, timestep: Any, text: Tensor) -> Tensor:
        context = text.expand(len(latents), -1, -1)
        return model(latents, timestep, encoder_hidden_states=context, **given).sample

    return denoise


@checked
def noise_predictor(
    model: nn.Module,
    text: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 7.5,
    session: Session | None = None,
    pass_name: str | None = None,
) -> Predict:
    """A denoiser with its text as ``predict(latents, timestep)``.

    Args:
        model: a diffusers UNet, called as ``model(latents, t, encoder_hidden_states=...)``.
        text: (B or 1, T, C) text embeddings.
        uncond: (1 or B, T, C) embeddings of the empty prompt; with them, ``uncond + guidance (cond - uncond)``.
        guidance: weight of classifier-free guidance.
        session: an attached session, told that its calls belong to ``pass_name``.
        pass_name: name of the pass.

    Returns:
        The function; it computes without gradient.
    """

    @torch.no_grad()
    def predict(latents: Tensor, timestep: Any) -> Tensor:
        context = text.expand(len(latents), -1, -1)
        inputs = latents
        if uncond is not None:
            context = torch.cat([uncond.expand(len(latents), -1, -1), context])
            inputs = torch.cat([latents, latents])
        with nullcontext() if session is None else session.at(pass_name=pass_name):
            out = model(inputs, timestep, encoder_hidden_states=context).sample
        if uncond is None:
            return out
        base, cond = out.chunk(2)
        return base + guidance * (cond - base)

    return predict


# ---- noise levels


def check_levels(scheduler: Any) -> str:
    """What the model of a scheduler predicts, of :data:`PREDICTIONS`.

    Raises:
        ValueError: a flow model, another prediction, or clean images that are clipped, which no step can be inverted.
    """
    config = getattr(scheduler, "config", None)
    if config is None:
        raise TypeError(f"scheduler must be one of diffusers, got {type(scheduler).__name__}")
    kind = config.get("prediction_type", "epsilon")
    if is_flow(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} belongs to a flow model, which predicts no noise; noise or velocity of a "
            f"diffusion (prediction_type {' or '.join(map(repr, PREDICTIONS))}) is needed here; flow_invert inverts "
            "flow models"
        )
    if kind not in PREDICTIONS:
        raise ValueError(
            f"scheduler must predict noise or velocity (prediction_type {' or '.join(map(repr, PREDICTIONS))}), got "
            f"{kind!r}"
        )
    if config.get("clip_sample", False) or config.get("thresholding", False):
        raise ValueError(
            "scheduler clips its clean images, so that steps cannot be inverted; make one with clip_sample=False and "
            "thresholding=False"
        )
    return kind


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler belongs to a flow model: no noise levels of a diffusion."""
    config = scheduler.config
    flow = config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction"
    return bool(flow) or getattr(scheduler, "alphas_cumprod", None) is None


def fresh(scheduler: Any, steps: int, kind: str = "DDIMScheduler", **changes: Any) -> Any:
    """A scheduler of class ``kind`` and of the same noise, its steps set; the caller's own stays as it is."""
    import diffusers

    check_levels(scheduler)
    config = scheduler.config
    check_int("steps", steps, least=1, most=config.num_train_timesteps)
    # Without the private keys, by which diffusers would undo what a pipeline has set (steps_offset).
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    new = getattr(diffusers, kind).from_config({**settings, **changes})
    new.set_timesteps(steps)
    return new


def clean_and_noise(output: Tensor, latents: Tensor, alpha: Tensor | float, kind: str) -> tuple[Tensor, Tensor]:
    """The clean image and the noise that a prediction means, both (B, ...).

    Args:
        output: what the model predicts.
        latents: what it predicts it of, ``sqrt(alpha) x_0 + sqrt(1 - alpha) e``.
        alpha: the share of the clean image's variance.
        kind: ``"epsilon"`` for noise, ``"v_prediction"`` for ``sqrt(alpha) e - sqrt(1 - alpha) x_0``.

    >>> x, e = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    >>> [round(t.item(), 5) for t in clean_and_noise(0.8 * e - 0.6 * x, 0.8 * x + 0.6 * e, 0.64, "v_prediction")]
    [2.0, 1.0]
    """
    check_choice("kind", kind, PREDICTIONS)
    high, low = _levels(alpha, latents)
    if kind == "epsilon":
        return (latents - low * output) / high, output
    return high * latents - low * output, high * output + low * latents


def as_output(clean: Tensor, noise: Tensor, alpha: Tensor | float, kind: str) -> Tensor:
    """What a model would have to predict for a clean image and a noise, see :func:`clean_and_noise`."""
    check_choice("kind", kind, PREDICTIONS)
    high, low = _levels(alpha, clean)
    return noise if kind == "epsilon" else high * noise - low * clean


def _levels(alpha: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
    a = torch.as_tensor(alpha, dtype=torch.float64)
    return (a**0.5).to(like), ((1 - a) ** 0.5).to(like)


def exact_source(clean: Tensor, source: Tensor) -> Tensor:
    """Predicted clean images (B, ...), moved so that the first is the source's: what was wrong there is taken off all.

    >>> exact_source(torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0]])).flatten().tolist()
    [2.0, 6.0]
    """
    if source.shape != clean[:1].shape:
        raise ValueError(f"source must be one clean image {tuple(clean[:1].shape)}, got {tuple(source.shape)}")
    moved = clean + (source - clean[:1])
    return torch.cat([source.to(moved).expand_as(moved[:1]), moved[1:]])


# ---- inversions


def ddim_invert(predict: Predict, scheduler: Any, latents: Tensor, steps: int = 50) -> list[Tensor]:
    """The noise from which deterministic sampling would come back to ``latents``, under what is predicted.

    A step to more noise takes the prediction that the step back would take, for the timestep that it leads to, but of
    the latents from which it starts. What a model of velocity says is taken for that timestep, too.

    Args:
        predict: see :func:`noise_predictor`; what the scheduler's model predicts, noise or velocity.
        scheduler: a diffusers scheduler; its noise levels are used.
        latents: (B, C, H, W) clean latents.
        steps: denoising steps.

    Returns:
        ``steps + 1`` latents, the clean ones first.

    Raises:
        ValueError: a scheduler that clips, of a flow model, or of one that predicts something else.

    Reference: Song et al., 2021, arXiv 2010.02502, section 4.3.
    """
    kind = check_levels(scheduler)
    inverse = fresh(scheduler, steps, "DDIMInverseScheduler", prediction_type="epsilon")
    path = [latents]
    for t in inverse.timesteps:
        _, noise = clean_and_noise(predict(path[-1], t), path[-1], inverse.alphas_cumprod[t], kind)
        path.append(inverse.step(noise, t, path[-1]).prev_sample)
    return path


def ddim_sample(predict: Predict, scheduler: Any, latents: Tensor, steps: int = 50) -> Tensor:
    """Deterministic sampling from noise ``latents`` (B, C, H, W); arguments as in :func:`ddim_invert`."""
    forward = fresh(scheduler, steps)
    for t in forward.timesteps:
        latents = forward.step(predict(latents, t), t, latents).prev_sample
    return latents


def _dpm(order: int) -> dict[str, Any]:
    check_int("order", order, least=1, most=2)
    return {"algorithm_type": "dpmsolver++", "solver_order": order}


def dpm_invert(predict: Predict, scheduler: Any, latents: Tensor, steps: int = 20, order: int = 2) -> list[Tensor]:
    """Inversion by DPM-Solver++, for :func:`dpm_sample` and pipelines with ``DPMSolverMultistepScheduler``.

    Args:
        predict, scheduler, latents, steps: see :func:`ddim_invert`.
        order: 1 or 2, how many predictions a step is made of.

    Returns:
        ``steps + 1`` latents, the clean ones first.

    Reference: Lu et al., 2022, arXiv 2211.01095.
    """
    inverse = fresh(scheduler, steps, "DPMSolverMultistepInverseScheduler", **_dpm(order))
    path = [latents]
    for t in inverse.timesteps:
        path.append(inverse.step(predict(path[-1], t), t, path[-1]).prev_sample)
    return path


def dpm_sample(predict: Predict, scheduler: Any, latents: Tensor, steps: int = 20, order: int = 2) -> Tensor:
    """Sampling by DPM-Solver++ from noise ``latents`` (B, C, H, W); arguments as in :func:`dpm_invert`."""
    forward = fresh(scheduler, steps, "DPMSolverMultistepScheduler", **_dpm(order))
    for t in forward.timesteps:
        latents = forward.step(predict(latents, t), t, latents).prev_sample
    return latents


def flow_invert(predict: Predict, scheduler: Any, latents: Tensor, steps: int = 50) -> list[Tensor]:
    """Euler steps of a flow model from clean ``latents`` to noise: ``x += (s' - s) v(x, s)``, s the share of noise.

    Args:
        predict: velocity ``noise - clean``, as flow models of diffusers give it; see :func:`noise_predictor`.
        scheduler: ``FlowMatchEulerDiscreteScheduler``.
        latents, steps: see :func:`ddim_invert`.

    Raises:
        ValueError: another scheduler, or one whose shift depends on the size of the image.
    """
    import diffusers

    kind = type(scheduler).__name__
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"flow_invert follows FlowMatchEulerDiscreteScheduler of flow models, got {kind}")
    if scheduler.config.get("use_dynamic_shifting", False):
        raise ValueError("the scheduler shifts its steps by the size of the image; make one with a fixed shift")
    check_int("steps", steps, least=1)
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    forward = diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings)
    forward.set_timesteps(steps)
    levels = forward.sigmas.flip(0)  # 0 first
    path, total = [latents], forward.config.num_train_timesteps
    for low, high in zip(levels[:-1], levels[1:], strict=True):
        path.append(path[-1] + (high - low).to(latents) * predict(path[-1], low * total))
    return path


#: Schedulers that :func:`invert` knows, and how.
INVERSES: dict[str, Callable[..., list[Tensor]]] = {
    "DDIMScheduler": ddim_invert,
    "DPMSolverMultistepScheduler": dpm_invert,
    "FlowMatchEulerDiscreteScheduler": flow_invert,
}


def invert(predict: Predict, scheduler: Any, latents: Tensor, steps: int = 50) -> list[Tensor]:
    """The inversion that fits a scheduler.

    Args:
        predict, scheduler, latents, steps: see :func:`ddim_invert`.

    Returns:
        ``steps + 1`` latents, the clean ones first.

    Raises:
        ValueError: a scheduler whose steps have no inverse here.
    """
    kind = type(scheduler).__name__
    if kind not in INVERSES:
        raise ValueError(
            f"{kind} has no inverse here; {', '.join(INVERSES)} have one: give the pipeline such a scheduler, e.g. "
            "DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    if kind == "DPMSolverMultistepScheduler":
        algorithm, order = scheduler.config.algorithm_type, scheduler.config.solver_order
        if algorithm != "dpmsolver++" or order > 2:
            raise ValueError(
                f"the scheduler samples by {algorithm} of order {order}, which has no inverse here; dpmsolver++ of "
                "order 1 or 2 has"
            )
        return dpm_invert(predict, scheduler, latents, steps, order)
    return INVERSES[kind](predict, scheduler, latents, steps)


@torch.no_grad()
def inversion_offsets(
    predict: Predict, scheduler: Any, path: Sequence[Tensor], batch: int = 2, scale: float = 1.0, every: int = 1
) -> list[Tensor]:
    """How far sampling misses an inversion, step by step (Direct Inversion).

    Step i starts where step i - 1 ended plus its offset, so that with all of them sampling goes back along ``path``.

    Args:
        predict: of (``batch``, C, H, W) as the editing will predict, guidance included.
        scheduler: a diffusers scheduler; its noise levels are used.
        path: the latents of :func:`ddim_invert`, the clean ones first.
        batch: latents that are sampled side by side.
        scale: share of each offset that is used.
        every: use one offset in so many, the others are zero.

    Returns:
        ``len(path) - 1`` offsets (``batch``, C, H, W), for ``masked_edit(offsets=...)``.

    Reference: Ju et al., 2023, arXiv 2310.01506.
    """
    check_int("every", every, least=1)
    _check_path(path)
    forward = fresh(scheduler, len(path) - 1)
    offsets, latents = [], path[-1].expand(batch, -1, -1, -1)
    for i, t in enumerate(forward.timesteps):
        back = forward.step(predict(latents, t), t, latents).prev_sample
        offset = scale * (path[-2 - i] - back) if i % every == 0 else torch.zeros_like(back)
        offsets.append(offset)
        latents = back + offset
    return offsets


def _check_path(path: Sequence[Tensor]) -> None:
    if len(path) < 2:
        raise ValueError(f"path must hold at least two latents, got {len(path)}")


# ---- null text


def null_step(
    denoise: Denoise,
    forward: Any,
    step: int,
    latents: Tensor,
    target: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guidance: float,
    inner: int,
    lr: float,
    decay: float,
    stop: float | None,
    growth: float,
) -> Tensor:
    """The embedding of the empty prompt (1, T, D) at one step; see :func:`null_text`.

    Args:
        forward: a DDIM scheduler whose steps are set.
        step: denoising step.
        latents: (1, C, H, W) where sampling stands.
        target: (1, C, H, W) where the step ought to lead.
        cond: (1, C, H, W) what is predicted there under the prompt.
    """
    t = forward.timesteps[step]
    with with_gradient():
        latents, target, cond = latents.detach().clone(), target.detach().clone(), cond.detach().clone()
        learnt = uncond.detach().clone().to(stats_dtype(uncond.dtype)).requires_grad_()
        optimizer = torch.optim.Adam([learnt], lr=lr * (1 - decay * step))
        for _ in range(inner):
            base = denoise(latents, t, learnt.to(uncond.dtype))
            back = forward.step(base + guidance * (cond - base), t, latents).prev_sample
            loss = F.mse_loss(back, target)
            if not bool(loss.isfinite()):
                raise ValueError(f"at step {step} the loss of the empty prompt's embedding is not finite")
            (learnt.grad,) = torch.autograd.grad(loss, learnt)
            optimizer.step()
            if stop is not None and float(loss.detach()) < stop + growth * step:
                break
    return learnt.detach().to(uncond.dtype)


def null_text(
    denoise: Denoise,
    scheduler: Any,
    path: Sequence[Tensor],
    text: Tensor,
    uncond: Tensor,
    guidance: float = 7.5,
    inner: int = 10,
    lr: float = 1e-2,
    decay: float = 0.01,
    stop: float | None = 1e-5,
    growth: float = 2e-5,
    carry: bool = True,
) -> list[Tensor]:
    """An embedding of the empty prompt for each step, so that guided sampling goes back along an inversion.

    At each step Adam (of rate ``lr (1 - decay step)``) makes ``|step(z) - path|^2`` small, and sampling goes on from
    where the step then leads.

    Args:
        denoise: see :func:`denoiser`; its parameters get no gradient.
        scheduler: a diffusers scheduler; its noise levels are used, by DDIM's steps.
        path: the latents of :func:`ddim_invert`, (1, C, H, W) each, the clean ones first.
        text: (1, T, D) of the prompt.
        uncond: (1, T, D) of the empty prompt.
        guidance: weight of classifier-free guidance.
        inner: at most so many moves at a step.
        lr, decay: the rate.
        stop: no more moves at step i once the loss was less than ``stop + growth i``; ``None`` for all of them.
        growth: see ``stop``.
        carry: a step begins with the embedding of the step before; otherwise with ``uncond``.

    Returns:
        ``len(path) - 1`` embeddings (1, T, D), in the order of denoising.

    Reference: Mokady et al., 2023, arXiv 2211.09794.
    """
    check_int("inner", inner, least=0)
    check_real("lr", lr, above=0)
    _check_path(path)
    forward = fresh(scheduler, len(path) - 1)
    latents, found, start = path[-1], [], uncond
    for i, t in enumerate(forward.timesteps):
        with torch.no_grad():
            cond = denoise(latents, t, text)
        learnt = null_step(
            denoise, forward, i, latents, path[-2 - i], cond, start, guidance, inner, lr, decay, stop, growth
        )
        found.append(learnt)
        start = learnt if carry else uncond
        with torch.no_grad():
            base = denoise(latents, t, learnt)
            latents = forward.step(base + guidance * (cond - base), t, latents).prev_sample
    return found


class NullText(Intervention):
    """A pipeline's unconditional rows read an embedding of the empty prompt of their own at each step.

    Args:
        embeddings: of each step, (1, T, D) or one for each image; from :func:`null_text`.

    Raises:
        ValueError: when the pipeline is called, other steps than there are embeddings, embeddings of another shape, or
            no guidance.

    Reference: Mokady et al., 2023, arXiv 2211.09794.

    >>> NullText([]).identity
    True
    """

    name: ClassVar[str] = "null-text"

    def __init__(self, embeddings: Sequence[Tensor]):
        self.embeddings = check_tensors("embeddings", embeddings)

    @property
    def identity(self) -> bool:
        return not self.embeddings

    def on_attach(self, session: Any) -> None:
        if session.sampling is None:
            raise ValueError(
                f"NullText follows the steps of a pipeline, and {type(session.model).__name__} was attached to by "
                "itself; attach to the pipeline: attach(pipe, ...)"
            )

    def around_denoiser(
        self, site: CallSite, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        if site.step is None:
            return call(inputs)
        if site.steps != len(self.embeddings):
            raise ValueError(f"NullText has {len(self.embeddings)} embeddings, but there are {site.steps} steps")
        if site.rows is None:
            raise ValueError(
                "NullText changes unconditional rows, and which these are is not known; say it: attach(pipe, ..., "
                "rows=('uncond', 'cond'))"
            )
        index = [i for i, row in enumerate(site.rows) if row == "uncond"]
        if not index:
            if "cond" in site.rows and getattr(site.sampling.pipe, "do_classifier_free_guidance", False) is False:
                raise ValueError("NullText changes unconditional rows, but the pipeline runs without guidance")
            return call(inputs)
        return call({**inputs, "encoder_hidden_states": self._put(inputs["encoder_hidden_states"], site.step, index)})

    def _put(self, context: Tensor, step: int, index: list[int]) -> Tensor:
        new = self.embeddings[step]
        if new.dim() != 3 or new.shape[1:] != context.shape[1:] or len(new) not in (1, len(index)):
            raise ValueError(
                f"embeddings must be (1 or {len(index)}, {context.shape[1]}, {context.shape[2]}), got "
                f"{tuple(new.shape)}"
            )
        at = torch.as_tensor(index, device=context.device)
        return context.index_copy(0, at, new.to(context).expand(len(index), -1, -1))

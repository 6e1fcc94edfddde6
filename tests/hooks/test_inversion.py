"""Inversions of diffusions and flows, the embeddings of null-text inversion, and the source kept exactly."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402

import attnlib  # noqa: E402
from attnlib.steer import NullText  # noqa: E402
from attnlib.steer.diffusion.invert import (  # noqa: E402
    as_output,
    clean_and_noise,
    ddim_invert,
    ddim_sample,
    denoiser,
    dpm_invert,
    dpm_sample,
    exact_source,
    flow_invert,
    fresh,
    invert,
    noise_predictor,
    null_text,
)
from hooks import pipes  # noqa: E402

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def texts(pipe):
    with torch.no_grad():
        return pipe.encode_prompt(PROMPT, "cpu", 1, True)[:2]


def plan(name="DDIMScheduler", **changes):
    clip = {"clip_sample": False, "set_alpha_to_one": False} if name == "DDIMScheduler" else {}
    return pipes.scheduler(name, **clip, **changes)


def smooth(latents, t):
    """A model that predicts much the same noise at neighbouring steps."""
    return 0.3 * torch.tanh(latents) + 0.1 * torch.cos(3 * latents) + 0.0002 * float(t)


def velocity(scheduler, noise_of):
    def predict(latents, t):
        a, noise = scheduler.alphas_cumprod[t].double(), noise_of(latents, t)
        return a**0.5 * noise - (1 - a) ** 0.5 * (latents - (1 - a) ** 0.5 * noise) / a**0.5

    return predict


@pytest.mark.parametrize("kind", ["ddim", "dpm1", "dpm2", "flow"])
def test_inverting_and_sampling_come_back_the_closer_the_more_steps(kind):
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def error(steps):
        if kind == "ddim":
            path = ddim_invert(smooth, plan(), z, steps)
            back = ddim_sample(smooth, plan(), path[-1], steps)
        elif kind == "flow":
            flow = FlowMatchEulerDiscreteScheduler(shift=2.0)
            path = flow_invert(smooth, flow, z, steps)
            flow.set_timesteps(steps)
            back = path[-1]
            for t in flow.timesteps:
                back = flow.step(smooth(back, t), t, back).prev_sample
        else:
            order = int(kind[-1])
            path = dpm_invert(smooth, plan("DPMSolverMultistepScheduler"), z, steps, order)
            back = dpm_sample(smooth, plan("DPMSolverMultistepScheduler"), path[-1], steps, order)
        assert len(path) == steps + 1 and torch.equal(path[0], z) and (path[-1] - z).abs().max() > 0.1
        return float((back - z).square().mean() ** 0.5)

    few, many = error(10), error(40)
    assert many < 0.4 * few and many < 0.2


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_noise_and_velocity_invert_alike(kind):
    z = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    found = []
    for prediction in ("epsilon", "v_prediction"):
        name = "DDIMScheduler" if kind == "ddim" else "DPMSolverMultistepScheduler"
        scheduler = plan(name, prediction_type=prediction)
        predict = smooth if prediction == "epsilon" else velocity(scheduler, smooth)
        found.append(invert(predict, scheduler, z, 10)[-1])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)  # noise levels are float32 in diffusers
    x, e = torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)
    for prediction in ("epsilon", "v_prediction"):
        latents = 0.3**0.5 * x + 0.7**0.5 * e
        clean, noise = clean_and_noise(as_output(x, e, 0.3, prediction), latents, 0.3, prediction)
        torch.testing.assert_close(clean, x, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(noise, e, atol=1e-12, rtol=1e-12)


def test_the_inversion_fits_the_scheduler_and_the_callers_is_left(pipe):
    z = torch.randn(1, 4, 4, 4)
    scheduler = plan("DPMSolverMultistepScheduler", solver_order=1)
    before = dict(scheduler.config)
    assert torch.equal(invert(smooth, scheduler, z, 5)[-1], dpm_invert(smooth, scheduler, z, 5, 1)[-1])
    assert torch.equal(invert(smooth, plan(), z, 5)[-1], ddim_invert(smooth, plan(), z, 5)[-1])
    flow = FlowMatchEulerDiscreteScheduler()
    assert torch.equal(invert(smooth, flow, z, 5)[-1], flow_invert(smooth, flow, z, 5)[-1])
    assert dict(scheduler.config) == before and scheduler.num_inference_steps is None


def test_ddim_inversion_of_a_pipeline_by_hand(pipe, texts):
    """From the equation; and the pipeline, without guidance, samples back from it."""
    text, _ = texts
    z = torch.randn(1, 4, 16, 16)
    path = ddim_invert(noise_predictor(pipe.unet, text), pipe.scheduler, z, 4)
    levels, x = pipe.scheduler.alphas_cumprod, z
    with torch.no_grad():
        for low, high in ((0, 1), (1, 251), (251, 501), (501, 751)):
            a, b = levels[low], levels[high]
            e = pipe.unet(x, high, encoder_hidden_states=text).sample
            x = b**0.5 * (x - (1 - a) ** 0.5 * e) / a**0.5 + (1 - b) ** 0.5 * e
    torch.testing.assert_close(path[-1], x, atol=1e-5, rtol=1e-5)
    assert len(path) == 5 and (path[-1] - z).abs().max() > 0.3
    again = pipes.sample(pipe, PROMPT, guidance_scale=1.0, latents=path[-1])
    torch.testing.assert_close(
        again, ddim_sample(noise_predictor(pipe.unet, text), pipe.scheduler, path[-1], 4), atol=1e-5, rtol=1e-5
    )


def google(denoise, scheduler, path, text, uncond, guidance, inner, stop):
    """Null-text optimisation as its authors write it down."""
    forward, found, z = fresh(scheduler, len(path) - 1), [], path[-1]
    for i, t in enumerate(forward.timesteps):
        uncond = uncond.clone().detach().requires_grad_()
        optimizer = torch.optim.Adam([uncond], lr=1e-2 * (1.0 - i / 100.0))
        cond = denoise(z, t, text).detach()
        for _ in range(inner):
            base = denoise(z, t, uncond)
            loss = (forward.step(base + guidance * (cond - base), t, z).prev_sample - path[-2 - i]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < stop + i * 2e-5:
                break
        found.append(uncond.detach())
        base = denoise(z, t, uncond).detach()
        z = forward.step(base + guidance * (cond - base), t, z).prev_sample
    return found


def toy(latents, t, text):
    mean = text.mean(1)[:, :3, None, None]
    return torch.tanh(latents * (1 + mean)) + 0.1 * mean.expand_as(latents)


@pytest.mark.parametrize("stop", [0.0, 0.05])
def test_null_text_is_its_authors(stop):
    torch.manual_seed(0)
    z, text, empty = torch.randn(1, 3, 4, 4), torch.randn(1, 5, 6), torch.randn(1, 5, 6)
    path = ddim_invert(lambda x, t: toy(x, t, text), plan(), z, 5)
    ours = null_text(toy, plan(), path, text, empty, 7.5, inner=8, stop=stop)
    theirs = google(toy, plan(), path, text, empty, 7.5, 8, stop)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.equal(ours[0], ours[1]) and not torch.equal(ours[0], empty)


def test_learnt_embeddings_bring_a_pipeline_back(pipe, texts):
    """Guided sampling leaves the path; with the embeddings it stays nearer, and each step begins anew without carry."""
    text, empty = texts
    z = torch.randn(1, 4, 16, 16)
    state = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    path = ddim_invert(noise_predictor(pipe.unet, text), pipe.scheduler, z, 3)
    random = torch.get_rng_state()
    learnt = null_text(denoiser(pipe.unet), pipe.scheduler, path, text, empty, inner=6, lr=0.1, stop=None)
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in pipe.unet.parameters())
    assert all(torch.equal(p, state[n]) for n, p in pipe.unet.named_parameters())
    given = dict(steps=3, latents=path[-1], guidance_scale=7.5)
    plain = pipes.sample(pipe, PROMPT, **given)
    with attnlib.attach(pipe, NullText(learnt)):
        near = pipes.sample(pipe, PROMPT, **given)
        pair = pipes.sample(pipe, PROMPT, **{**given, "latents": path[-1].repeat(2, 1, 1, 1)}, num_images_per_prompt=2)
    # The same by diffusers' own callback.
    embeds = list(learnt[1:])

    def callback(pipe, step, timestep, values):
        return {"prompt_embeds": torch.cat([embeds.pop(0), text])} if embeds else {}

    by_hand = pipe(
        prompt_embeds=text, negative_prompt_embeds=learnt[0], num_inference_steps=3, latents=path[-1],
        guidance_scale=7.5, output_type="latent", callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).images  # fmt: skip
    torch.testing.assert_close(near, by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pair, near.repeat(2, 1, 1, 1), atol=1e-4, rtol=1e-4)
    assert (near - z).square().mean() < 0.9 * (plain - z).square().mean()
    assert torch.equal(pipes.sample(pipe, PROMPT, **given), plain)
    again = null_text(denoiser(pipe.unet), pipe.scheduler, path, text, empty, inner=0, carry=False)
    assert all(torch.equal(e, empty) for e in again)


def test_the_source_is_exact_and_the_others_keep_their_difference():
    clean, source = torch.randn(3, 2, 2), torch.randn(1, 2, 2)
    moved = exact_source(clean, source)
    assert torch.equal(moved[0], source[0])
    torch.testing.assert_close(moved[1:] - moved[:1], clean[1:] - clean[:1])
    with pytest.raises(ValueError, match="one clean image"):
        exact_source(clean, source[0])


def test_bad_input(pipe, texts):
    z, (text, empty) = torch.randn(1, 4, 4, 4), texts
    flow = FlowMatchEulerDiscreteScheduler()
    for call in (ddim_invert, dpm_invert, ddim_sample, dpm_sample):
        with pytest.raises(ValueError, match="flow model, which predicts no noise"):
            call(smooth, flow, z, 3)
    with pytest.raises(ValueError, match="flow model, which predicts no noise"):
        null_text(denoiser(pipe.unet), flow, [z, z], text, empty)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no inverse here"):
        invert(smooth, pipes.scheduler("EulerDiscreteScheduler"), z)
    with pytest.raises(ValueError, match="dpmsolver\\+\\+ of order 3, which has no inverse"):
        invert(smooth, plan("DPMSolverMultistepScheduler", solver_order=3), z)
    with pytest.raises(ValueError, match="flow_invert follows"):
        flow_invert(smooth, plan(), z)
    with pytest.raises(ValueError, match="by the size of the image"):
        flow_invert(smooth, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), z)
    with pytest.raises(ValueError, match="clip_sample=False"):
        ddim_invert(smooth, pipes.scheduler(clip_sample=True), z)
    with pytest.raises(TypeError, match="scheduler must be one of diffusers"):
        ddim_invert(smooth, 3, z)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1 and at most 1000"):
        ddim_invert(smooth, plan(), z, 0)
    with pytest.raises(ValueError, match="kind='noise' is not possible"):
        clean_and_noise(z, z, 0.5, "noise")
    with pytest.raises(TypeError, match="model must be"):
        denoiser(pipe)
    with pytest.raises(ValueError, match="order must be"):
        dpm_invert(smooth, plan(), z, 3, order=3)
    with pytest.raises(ValueError, match="at least two latents"):
        null_text(denoiser(pipe.unet), pipe.scheduler, [z], text, empty)
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, NullText([empty]))
    for it, match, given in (
        (NullText([empty]), "1 embeddings, but there are 2 steps", {}),
        (NullText([empty[:, :5]] * 2), "embeddings must be", {}),
        (NullText([empty] * 2), "without guidance", {"guidance_scale": 1.0}),
    ):
        with attnlib.attach(pipe, it), pytest.raises(ValueError, match=match):
            pipes.sample(pipe, PROMPT, steps=2, **given)

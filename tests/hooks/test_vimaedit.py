"""ViMAEdit: the authors' steps, masks and embeddings from a fixture, and whole pipelines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.steer import ViMAEdit  # noqa: E402
from attnlib.steer.diffusion.edit import blend_mask  # noqa: E402
from attnlib.steer.diffusion.invert import clean_and_noise, exact_source  # noqa: E402
from attnlib.steer.diffusion.vimaedit import (  # noqa: E402
    _noisy_dpm_step,
    masked_ddim_step,
    spread,
    target_embedding,
)
from hooks import pipes  # noqa: E402

RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "vimaedit.safetensors")
CAT, RED = "a cat on a bench", "a red cat on a bench"


def plan(name="DDIMScheduler", **changes):
    clip = {"clip_sample": False} if name == "DDIMScheduler" else {}
    return pipes.scheduler(name, **clip, **changes)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    return pipes.stable_diffusion(folder, model=pipes.unet(size=8), plan=plan(steps_offset=1))


def editor(source, **changes):
    settings = dict(blend=["cat"], resolution=8, between_resolution=8, thresholds=(0.3, 0.5), blend_from=0.0)
    return ViMAEdit(source, **{**settings, **changes})


# ---- the authors' functions


def noise_of(x, t):
    out = torch.tanh(torch.einsum("bchw,cd->bdhw", x, RECORDED["W"]) + 0.001 * float(t))
    return torch.cat([out[:1], out[1:] + 0.2])


@pytest.mark.parametrize("case", ["ddim", "dpm", "dpm1"])
def test_steps_are_the_authors(case):
    """Exact source and masked noise, six steps."""
    name = "DDIMScheduler" if case == "ddim" else "DPMSolverMultistepScheduler"
    scheduler = plan(name, **({} if case == "ddim" else {"solver_order": 2 if case == "dpm" else 1}))
    scheduler.set_timesteps(6)
    z = RECORDED[case + ".start"].repeat(2, 1, 1, 1)
    for i, t in enumerate(scheduler.timesteps):
        if case == "ddim":
            alpha = scheduler.alphas_cumprod[t]
        else:
            alpha = 1 / (1 + scheduler.sigmas[i] ** 2)
        clean, _ = clean_and_noise(noise_of(z, t), z, alpha, "epsilon")
        clean = exact_source(clean, RECORDED["x0"])
        output = (z - alpha**0.5 * clean) / (1 - alpha) ** 0.5
        noise, mask = RECORDED[case + ".noise"][i], RECORDED[case + ".mask"][i : i + 1]
        after = scheduler.step(output, t, z).prev_sample
        if case == "ddim":
            earlier = int(t) - 1000 // 6
            before = scheduler.alphas_cumprod[earlier] if earlier >= 0 else scheduler.final_alpha_cumprod
            new = masked_ddim_step(clean, z, alpha, before, mask, noise)
            assert mask.any() or torch.allclose(new, after, atol=1e-5)
        else:
            new = torch.where(mask, _noisy_dpm_step(scheduler, z, noise), after) if mask.any() else after
        torch.testing.assert_close(new, RECORDED[case + ".z"][i], atol=1e-5, rtol=1e-5)
        z = new
    torch.testing.assert_close(z[:1], RECORDED["x0"], atol=1e-5, rtol=1e-5)


def test_noise_everywhere_is_ddim_with_eta():
    scheduler, x = plan(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    scheduler.set_timesteps(10)
    t, output, noise = scheduler.timesteps[4], torch.randn_like(x), torch.randn_like(x)
    a, b = scheduler.alphas_cumprod[t].double(), scheduler.alphas_cumprod[t - 100].double()
    clean, _ = clean_and_noise(output, x, a, "epsilon")
    for mask, eta in ((True, 1.0), (False, 0.0), (True, 0.4)):
        theirs = scheduler.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        ours = masked_ddim_step(clean, x, a, b, torch.tensor(mask), noise, eta if mask else 1.0)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # noise levels are float32 in diffusers


def test_spread_masks_are_the_authors():
    between = RECORDED["spread.between"].transpose(1, 2).unflatten(2, (8, 8))  # key, query place
    words = torch.stack([RECORDED["spread.maps"][0, 2], RECORDED["spread.maps"][1, 3]])[:, None]
    ours = spread(words, between)[:, 0]
    torch.testing.assert_close(ours, RECORDED["spread.map"], atol=1e-6, rtol=1e-5)
    for name, threshold in (("low", 0.5), ("high", 0.8)):
        assert torch.equal(blend_mask(ours, (8, 8), threshold, 0, "range"), RECORDED["spread." + name].bool())
    for same in (spread(words, between, order=0), spread(words, between, gamma=1.0)):
        assert torch.equal(same, words.repeat_interleave(2, -1).repeat_interleave(2, -2))
    ones = spread(torch.ones(1, 1, 8, 8), between[:1])
    torch.testing.assert_close(ones, torch.ones(1, 1, 8, 8))  # rows sum to one: mass is bounded


def test_target_embeddings_are_the_authors():
    v, t = RECORDED["v"], RECORDED["t"]
    torch.testing.assert_close(target_embedding(v, t[:1], t[1:]), RECORDED["v_edit"], atol=1e-6, rtol=1e-6)
    assert torch.equal(target_embedding(v, t[:1], t[:1]), v) and torch.equal(target_embedding(v, t[:1], t[1:], 0.0), v)


# ---- whole pipelines


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_source_comes_back_whatever_the_prompts(name, prediction, tmp_path):
    pipe = pipes.stable_diffusion(str(tmp_path), model=pipes.unet(size=8), plan=plan(name, prediction_type=prediction))
    source, noise = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 8, 8)
    state = torch.get_rng_state()
    given = dict(steps=3, latents=noise, num_images_per_prompt=2)
    with attnlib.attach(pipe, editor(source, eta=1.0)):
        got = pipes.sample(pipe, [CAT, RED], **given)
        assert torch.equal(pipes.sample(pipe, [CAT, RED], **given), got)  # noise of its own, anew each time
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got[:2], source.expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)
    assert (got[2:] - source).abs().max() > 1e-2
    with attnlib.attach(pipe, editor(source, eta=0.0)):
        assert not torch.equal(pipes.sample(pipe, [CAT, RED], **given)[2:], got[2:])


def test_a_pipeline_is_the_loop_by_hand(pipe):
    """Without maps: exact source, its own guidance, deterministic steps."""
    source, noise = torch.randn(1, 4, 8, 8), torch.randn(2, 4, 8, 8)
    it = ViMAEdit(source, cross=0.0, self_maps=0.0, image_maps=0.0)
    plain = pipes.sample(pipe, [CAT, RED], steps=3, latents=noise)
    with attnlib.attach(pipe, it):
        got = pipes.sample(pipe, [CAT, RED], steps=3, latents=noise)
    assert torch.equal(pipes.sample(pipe, [CAT, RED], steps=3, latents=noise), plain)
    z = noise[:1].repeat(2, 1, 1, 1)
    with torch.no_grad():
        text, empty = pipe.encode_prompt([CAT, RED], "cpu", 1, True)[:2]
        pipe.scheduler.set_timesteps(3)
        for t in pipe.scheduler.timesteps:
            a = pipe.scheduler.alphas_cumprod[t]
            base, cond = pipe.unet(torch.cat([z, z]), t, encoder_hidden_states=torch.cat([empty, text])).sample.chunk(2)
            scale = torch.tensor([1.0, 7.5]).view(2, 1, 1, 1)
            clean, _ = clean_and_noise(base + scale * (cond - base), z, a, "epsilon")
            clean = source + clean - clean[:1]
            z = pipe.scheduler.step((z - a**0.5 * clean) / (1 - a) ** 0.5, t, z).prev_sample
    torch.testing.assert_close(got, z, atol=1e-4, rtol=1e-4)


def test_image_maps_are_the_sources_for_their_share(tmp_path):
    """An IP-Adapter's attention: the edit's weights of the image prompt are the source's at first steps only."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe = pipes.stable_diffusion(str(tmp_path), model=pipes.unet(size=8), plan=plan(steps_offset=1))
    torch.manual_seed(0)
    processors = {}
    for name, old in pipe.unet.attn_processors.items():
        processors[name] = old
        if "attn2" in name:
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            processors[name] = IPAdapterAttnProcessor2_0(width, 16, num_tokens=(2,), scale=1.0)
    pipe.unet.set_attn_processor(processors)
    seen = []

    class Look(attnlib.hooks.Probe):
        kinds = ("cross",)
        sees_references = True

        def probe(self, site):
            return None if site.reference is None else (torch.arange(site.n_queries), None)

        def observe(self, site, weights, rows, allowed):
            seen.append((site.step, weights))

    images = torch.randn(2, 1, 2, 16).repeat(2, 1, 1, 1)

    class Images(attnlib.hooks.Intervention):
        def around_denoiser(self, site, inputs, call):
            return call({**inputs, "encoder_hidden_states": (inputs["encoder_hidden_states"], [images])})

    source = torch.randn(1, 4, 8, 8)
    with attnlib.attach(pipe, ViMAEdit(source, image_maps=0.5), Look(), Images()):
        got = pipes.sample(pipe, [CAT, RED], steps=2)
    torch.testing.assert_close(got[:1], source, atol=1e-4, rtol=1e-4)
    assert {step for step, _ in seen} == {0, 1}
    for step, weights in seen:
        assert torch.equal(weights[2], weights[3]) == (step == 0)


def test_half_precision_and_an_exception_in_mid_step(tmp_path):
    pipe = pipes.stable_diffusion(str(tmp_path), model=pipes.unet(size=8), plan=plan()).to(torch.bfloat16)
    source = torch.randn(1, 4, 8, 8)
    plain = pipes.sample(pipe, [CAT, RED], steps=2)
    with attnlib.attach(pipe, editor(source)):
        got = pipes.sample(pipe, [CAT, RED], steps=2)
    assert got.isfinite().all() and got.dtype == torch.bfloat16 and (got[0] - source[0]).abs().max() < 0.1

    class Fails(ViMAEdit):
        def _moved(self, *given):
            raise RuntimeError("in mid-step")

    with attnlib.attach(pipe, Fails(source)), pytest.raises(RuntimeError, match="in mid-step"):
        pipes.sample(pipe, [CAT, RED], steps=2)
    assert torch.equal(pipes.sample(pipe, [CAT, RED], steps=2), plain)


def test_bad_input(pipe, tmp_path):
    source = torch.randn(1, 4, 8, 8)

    def fails(it, match, prompts=(CAT, RED), pipe=pipe):
        with attnlib.attach(pipe, it), pytest.raises(ValueError, match=match):
            pipes.sample(pipe, list(prompts), steps=2)

    fails(ViMAEdit(source[..., :4]), "clean latents of 1 or 1 images")
    fails(ViMAEdit(source), "at least one edit", (CAT,))
    fails(ViMAEdit(source, edit="replace"), "as many words for replacement")
    euler = pipes.stable_diffusion(
        str(tmp_path), model=pipes.unet(size=8), plan=pipes.scheduler("EulerDiscreteScheduler")
    )
    fails(ViMAEdit(source), "the pipeline has EulerDiscreteScheduler", pipe=euler)
    sde = plan("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    fails(
        ViMAEdit(source), "needs algorithm_type",
        pipe=pipes.stable_diffusion(str(tmp_path), model=pipes.unet(size=8), plan=sde),
    )  # fmt: skip
    with pytest.raises(ValueError, match="finite latents"):
        ViMAEdit(source * float("nan"))
    with pytest.raises(ValueError, match="eta must"):
        ViMAEdit(source, eta=2.0)
    with pytest.raises(ValueError, match="image_maps must"):
        ViMAEdit(source, image_maps=-0.1)

"""What users do with pipelines, every technique attached: nothing but the technique's own change shows."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from hooks import pipes  # noqa: E402
from hooks.test_pairs_of_denoisers import EDITS, LOOKS, MAKE  # noqa: E402

PROMPTS = ["a red circle and a blue square", "a red circle and a blue square"]


@pytest.fixture(scope="module")
def pipe(folder):
    return pipes.stable_diffusion(folder, model=pipes.unet(size=8))


def draw(pipe, name, **given):
    """Two images; of what edits, a source and its edit."""
    if name in EDITS:
        return pipes.sample(pipe, PROMPTS, **{"steps": 2, **given})
    return pipes.sample(pipe, **{"steps": 2, "num_images_per_prompt": 2, **given})


@pytest.mark.parametrize("name", MAKE)
def test_calls_do_not_remember_one_another_and_draw_no_random_numbers(name, pipe):
    plain = draw(pipe, name)
    with attnlib.attach(pipe, MAKE[name]()):
        torch.manual_seed(5)
        first = draw(pipe, name)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        assert torch.equal(state, torch.get_rng_state()), "the global random state moved"
        assert torch.equal(draw(pipe, name), first), "a second call is another one"
        assert torch.equal(first, plain) == (name in LOOKS)
    assert torch.equal(draw(pipe, name), plain)
    assert not any(p.grad is not None for p in pipe.unet.parameters())


@pytest.mark.parametrize("name", MAKE)
def test_an_exception_in_mid_step_leaves_the_pipeline_plain(name, pipe):
    plain = draw(pipe, name)

    def fail(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), attnlib.attach(pipe, MAKE[name]()):
        draw(pipe, name, callback_on_step_end=fail)
    assert torch.equal(draw(pipe, name), plain)


@pytest.mark.parametrize("name", MAKE)
def test_copies_and_pickles_of_a_technique_are_new_ones(name, pipe):
    technique = MAKE[name]()
    with attnlib.attach(pipe, technique):
        want = draw(pipe, name)
        inside = copy.deepcopy(technique)
    twin = copy.deepcopy(technique)
    for other in (inside, twin):
        with attnlib.attach(pipe, other):
            assert torch.equal(draw(pipe, name), want)
    try:
        sent = pickle.dumps(technique)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        assert "lambda" in str(error) or "local" in str(error), error  # functions that the table gives
        return
    with attnlib.attach(pipe, pickle.loads(sent)):
        assert torch.equal(draw(pipe, name), want)


#: Ways in which pipelines are called or set up, each beside the plain pipeline under the same.
WAYS = {
    "no guidance": dict(guidance_scale=1.0),
    "another scheduler": dict(plan="UniPCMultistepScheduler"),
    "scaled inputs": dict(plan="EulerDiscreteScheduler"),
    "two evaluations a step": dict(plan="HeunDiscreteScheduler"),
    "guidance rescaled": dict(guidance_rescale=0.5),
    "bfloat16": dict(dtype=torch.bfloat16),
    "channels last": dict(layout=torch.channels_last),
    "frozen in inference mode": dict(mode=torch.inference_mode),
}


#: Ways that a technique refuses, and what it says.
REFUSED = {
    ("HarmoniCa", "two evaluations a step"): "table has 2 steps, and the pipeline takes 3",
    ("LearntPrompt", "two evaluations a step"): "LearntPrompt has embeddings of 2 steps, there are 3",
    ("NullText", "two evaluations a step"): "NullText has 2 embeddings, but there are 3 steps",
    ("NullText", "no guidance"): "NullText changes unconditional rows, but the pipeline runs without guidance",
    ("PrimeComposer", "two evaluations a step"): "paths have 2 steps, the pipeline takes 3",
    ("ViMAEdit", "another scheduler"): "takes steps of DDIMScheduler or DPMSolverMultistepScheduler, the pipeline has",
    ("ViMAEdit", "scaled inputs"): "takes steps of DDIMScheduler or DPMSolverMultistepScheduler, the pipeline has",
    ("ViMAEdit", "two evaluations a step"): "takes steps of DDIMScheduler or DPMSolverMultistepScheduler, the",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKE)
def test_ways_of_calling(name, way, folder):
    given = dict(WAYS[way])
    plan, dtype, layout, mode = (given.pop(k, None) for k in ("plan", "dtype", "layout", "mode"))
    settings = {} if plan is None else dict(plan=pipes.scheduler(plan))
    pipe = pipes.stable_diffusion(folder, model=pipes.unet(size=8), **settings)
    if dtype is not None:
        pipe.to(dtype)
    if layout is not None:
        pipe.unet.to(memory_format=layout)
    if mode is not None:
        pipe.unet.requires_grad_(False)
    technique = MAKE[name]()
    if isinstance(technique, torch.nn.Module) and dtype is not None:
        technique.to(dtype)
    with (mode or torch.no_grad)():
        plain = draw(pipe, name, **given)
        with attnlib.attach(pipe, technique):
            if (name, way) in REFUSED:
                with pytest.raises(ValueError, match=REFUSED[name, way]):
                    draw(pipe, name, **given)
                got = plain
            else:
                got = draw(pipe, name, **given)
        assert got.dtype == plain.dtype and got.shape == plain.shape and bool(got.isfinite().all())
        assert torch.equal(draw(pipe, name, **given), plain)


def test_pipelines_that_a_technique_does_not_fit_are_told_in_words(pipe, folder):
    """Of the kind that ended in a size that does not match, or in nothing at all."""
    video = pipes.animatediff(pipe)
    pag = pipes.stable_diffusion(folder, "StableDiffusionPAGPipeline", pipes.unet(size=8))
    by_image = pipes.stable_diffusion(
        folder, "StableDiffusionInstructPix2PixPipeline", pipes.unet(size=8, in_channels=8)
    )
    xl = pipes.sdxl(folder)
    small, image = dict(height=8, width=8), dict(image=torch.rand(1, 3, 8, 8))
    for other, given, names, match in (
        (video, dict(num_frames=2, **small), ("AStar", "DynamicPrompt", "AnyMaker"), "denoises videos"),
        (by_image, image, ("CUpscale", "StructuredGuidance", "MIPAdapter", "LearntPrompt"), "has no encode_prompt"),
        (pag, small, ("AttendExcite", "DynamicPrompt", "RealCustom"), "call the pipeline with pag_scale=0"),
        (xl, small, ("LearntPrompt",), "embeddings are of 1 text encoders, and StableDiffusionXLPipeline has 2"),
        (xl, small, ("CustomContrast",), "semantic tokens of width 16, and UNet2DConditionModel reads text of"),
    ):
        for name in names:
            with attnlib.attach(other, MAKE[name]()), pytest.raises((TypeError, ValueError), match=match):
                draw(other, name, **given)


def test_rows_of_videos_are_known_where_a_pipeline_makes_one_whatever_it_is_asked(pipe):
    video = pipes.animatediff(pipe)
    seen = []

    class See(attnlib.hooks.Intervention):
        def around_denoiser(self, site, inputs, call):
            seen.append((site.rows, site.prompts))
            return call(inputs)

    with attnlib.attach(video, See()):
        pipes.sample(video, steps=1, num_frames=2, num_videos_per_prompt=2, height=8, width=8)
    assert seen == [(("uncond", "cond"), (0, 0))]

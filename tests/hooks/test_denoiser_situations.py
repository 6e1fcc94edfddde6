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
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tokenizer"))


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
    ("LearntPrompt", "two evaluations a step"): "LearntPrompt has embeddings of 2 steps, there are 3",
    ("NullText", "two evaluations a step"): "NullText has 2 embeddings, but there are 3 steps",
    ("NullText", "no guidance"): "NullText changes unconditional rows, but the pipeline runs without guidance",
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

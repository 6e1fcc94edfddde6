"""PrimeComposer: the authors' attention from a fixture, and whole pipelines."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.steer import PrimeComposer  # noqa: E402
from attnlib.steer.diffusion.invert import ddim_invert, dpm_invert, noise_predictor  # noqa: E402
from attnlib.steer.diffusion.primecomposer import confine, inject, places  # noqa: E402
from hooks import pipes  # noqa: E402

RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "primecomposer.safetensors")
PROMPT, STEPS = "a red circle on a bench", 4
MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:6, 1:5] = True
MASK[2, 1] = False
SHIFT = (1, 2)


@pytest.fixture(scope="module")
def pipe(folder):
    return pipes.stable_diffusion(folder, model=pipes.unet(size=8))


@pytest.fixture(scope="module")
def paths(pipe):
    torch.manual_seed(0)
    with torch.no_grad():
        empty = pipe.encode_prompt("", "cpu", 1, False)[0]
    predict = noise_predictor(pipe.unet, empty)
    return [ddim_invert(predict, pipe.scheduler, torch.randn(1, 4, 8, 8), STEPS) for _ in range(2)]


def composer(paths, **changes):
    return PrimeComposer(*paths, **{**dict(mask=MASK, shift=SHIFT, words=("circle",), inject=0.5), **changes})


def draw(pipe, it, steps=STEPS, prompt=PROMPT, **given):
    given = {"guidance_scale": 2.5, "latents": it.start(), **given}
    with attnlib.attach(pipe, it):
        return pipes.sample(pipe, prompt, steps=steps, **given)


# ---- the authors' functions


def wave(seed, *shape):
    count = math.prod(shape)
    return torch.sin(torch.arange(count, dtype=torch.float64) * (0.7 + 0.01 * seed) + seed).view(shape)


def weights(seed, context):
    shapes = ((8, 8), (8, context), (8, context))
    return [wave(seed + i, *shape) * (2 / shape[1] ** 0.5) for i, shape in enumerate(shapes)]


def heads(x, weight):
    return (x @ weight.T).unflatten(-1, (2, 4)).transpose(1, 2)


def test_attention_is_the_authors():
    """Correlation, as they release it, injection with the rows last, and the region constraint that they never call."""
    mask = RECORDED["mask"].bool().repeat_interleave(8, 0).repeat_interleave(8, 1)
    own, there = places(mask, (8, 8), (-8, 0))
    assert own == RECORDED["own"].tolist() and there == RECORDED["there"].tolist()
    wq, wk, wv = weights(1, 8)
    x = wave(11, 4, 64, 8)
    logits = heads(x[2:], wq) @ heads(x[2:3], wk)[:, :, own].transpose(-1, -2) * 0.5
    out = (logits.softmax(-1) @ heads(x[2:3], wv)[:, :, own]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(logits[1], RECORDED["logits"], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(out, RECORDED["correlation"][:2], atol=1e-9, rtol=1e-9)
    x = wave(17, 2, 64, 8)
    scores, values = heads(x, wq) @ heads(x, wk).transpose(-1, -2) * 0.5, heads(x, wv)
    new = torch.stack([scores[0], inject(scores[1], RECORDED["logits"], there)])
    out = (new.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, RECORDED["injected"], atol=1e-9, rtol=1e-9)
    assert torch.equal(new[1][:, there], RECORDED["logits"].transpose(-1, -2))  # the row wins
    others = [i for i in range(64) if i not in there]
    assert torch.equal(new[1][:, others][..., there], RECORDED["logits"][:, others])
    wq, wk, wv = weights(5, 1024)
    context = wave(23, 2, 77, 1024)
    scores, values = heads(x, wq) @ heads(context, wk).transpose(-1, -2) * 0.5, heads(context, wv)
    new = torch.stack([scores[0], confine(scores[1], there, [2, 5])])
    out = (new.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, RECORDED["confined"], atol=1e-9, rtol=1e-9)
    chances = new[1].softmax(-1)
    assert (chances[:, others][..., [2, 5]] == 0).all() and (chances[:, there][..., [2, 5]] > 0).all()
    torch.testing.assert_close(chances.sum(-1), torch.ones_like(chances[..., 0]))


def test_places_on_coarser_grids_and_beyond_the_frame():
    assert places(MASK, (4, 4), (2, 2)) == ([5, 6, 9, 10], [10, 11, 14, 15])
    assert places(MASK, (8, 8), (4, 0))[1] == [n + 32 for n in places(MASK, (8, 8))[0] if n < 32]
    thin = torch.zeros(8, 8, dtype=torch.bool)
    thin[3] = True
    assert places(thin, (4, 4)) == ([], [])
    with pytest.raises(ValueError, match="no sides that a grid"):
        places(MASK, (5, 5))
    with pytest.raises(ValueError, match="are of 1 places, but 2"):
        inject(torch.zeros(2, 2), torch.zeros(2, 1), [0, 1])


# ---- whole pipelines


class Look(attnlib.hooks.Probe):
    """What a layer's attention is called with, run by run."""

    kinds = ("self", "cross")

    def __init__(self):
        self.seen = []

    def probe(self, site):
        return None

    def around_attention(self, site, q, k, v, call):
        self.seen.append((site, q, k, v))
        return call(q, k, v)


@pytest.mark.parametrize("compat", [None, "authors"])
def test_logits_of_the_composite_reach_the_generation(compat, pipe, paths):
    """Of one layer: what was recorded by hand stands in the columns, then in the rows, of conditional rows only."""
    it, look, scores = composer(paths, compat=compat, words=None), Look(), []

    class Scores(attnlib.hooks.Probe):
        kinds = ("self",)

        def probe(self, site):
            return None

        def on_scores(self, site, s, rows):
            scores.append((site, s))
            return s

    with attnlib.attach(pipe, look, it, Scores()):
        pipes.sample(pipe, PROMPT, steps=STEPS, latents=it.start(), guidance_scale=2.5)
    first = [(s, q, k) for s, q, k, _ in look.seen if s.step == 0 and s.layer == 0]
    assert [len(q) for _, q, _ in first] == [2, 2]  # composite and reference, then the two of guidance
    (site, q, k), _ = first
    own, there = places(MASK, (8, 8), SHIFT)
    truth = q[1 if compat else 0] @ k[1, :, own].transpose(-1, -2) * site.scale
    got = next(s for place, s in scores if place.layer == 0 and len(s) == 2 and s.shape[-1] == 64)
    torch.testing.assert_close(got[1][:, there], truth.transpose(-1, -2), atol=1e-5, rtol=1e-5)
    others = [i for i in range(64) if i not in there]
    torch.testing.assert_close(got[1][:, others][..., there], truth[:, others], atol=1e-5, rtol=1e-5)
    # Until int(0.5 * 4 + 1 - 1) steps; then the model runs once a step.
    counts = [sum(s.step == n and s.layer == 0 for s, *_ in look.seen) for n in range(STEPS)]
    assert counts == [2, 2, 1, 1]


def test_composites_are_the_background_with_the_object_pasted(pipe, paths):
    it, seen = composer(paths, words=None, refresh=False), []

    class Whole(attnlib.hooks.Intervention):
        def around_denoiser(self, site, inputs, call):
            seen.append((site.step, inputs[site.main]))
            return call(inputs)

    with attnlib.attach(pipe, it, Whole()):
        pipes.sample(pipe, PROMPT, steps=STEPS, latents=it.start(), guidance_scale=2.5)
    background, reference = paths
    for step, main in [s for n, s in enumerate(seen) if n in (0, 2)]:
        truth = background[-1 - step].clone()
        own, there = places(MASK, (8, 8), SHIFT)
        truth.view(1, 4, 64)[..., there] = reference[-1 - step].view(1, 4, 64)[..., own]
        assert torch.equal(main[:1], truth) and torch.equal(main[1:], reference[-1 - step])


def test_blended_noise_is_the_authors_equation(pipe, paths):
    """``u' + s (c - u) + s (c - c')``, with and without injection, at the injected steps alone."""
    inner, outer = [], []

    class Kept(attnlib.hooks.Intervention):
        def __init__(self, seen):
            self.seen = seen

        def around_denoiser(self, site, inputs, call):
            out = call(inputs)
            self.seen.append((site.step, out))
            return out

    it = composer(paths, blend=True)
    with attnlib.attach(pipe, Kept(outer), it, Kept(inner)):
        pipes.sample(pipe, PROMPT, steps=STEPS, latents=it.start(), guidance_scale=2.5)
    assert [step for step, _ in inner] == [0, 0, 0, 1, 1, 1, 2, 3] and len(outer) == STEPS
    for step, found in outer:
        runs = [out for n, out in inner if n == step][-2:]
        if step > 1:
            assert torch.equal(found, runs[-1])
            continue
        (u, c), (plain_u, plain_c) = runs
        truth = plain_u + 2.5 * (c - u) + 2.5 * (c - plain_c)
        torch.testing.assert_close(found[0] + 2.5 * (found[1] - found[0]), truth, atol=1e-5, rtol=1e-5)
        assert (c - plain_c).abs().max() > 1e-4
    one = composer(paths, blend=True)
    assert torch.equal(draw(pipe, one, guidance_scale=1.0), draw(pipe, composer(paths), guidance_scale=1.0))


def test_outside_the_box_is_the_background_and_the_object_the_references(pipe, paths):
    background, reference = paths
    steps = []

    def keep(pipe, step, timestep, values):
        steps.append(values["latents"])
        return {}

    it = composer(paths, paste=0.8, keep=0.5)
    final = draw(pipe, it, callback_on_step_end=keep)
    top, left, bottom, right = it.box
    assert it.box == (3, 3, 7, 7)
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[top:bottom, left:right] = False
    own, there = places(MASK, (8, 8), SHIFT)
    for n, z in enumerate(steps, 1):
        same = torch.equal(z[..., outside], background[-1 - n][..., outside])
        assert same == (n < int(0.8 * STEPS))
        object_kept = torch.equal(z.flatten(2)[..., there], reference[-1 - n].flatten(2)[..., own])
        assert object_kept == (n < int(0.5 * STEPS))
    assert torch.equal(steps[-1], final)


def test_nothing_injected_is_sampling_and_pasting(pipe, paths):
    background, _ = paths
    it = composer(paths, inject=0.0, keep=0.0, words=None)
    state = torch.get_rng_state()
    got = draw(pipe, it)

    def paste(pipe, step, timestep, values):
        z, n = values["latents"].clone(), step + 1
        if n < int(0.8 * STEPS):
            new = background[-1 - n].clone()
            new[..., 3:7, 3:7] = z[..., 3:7, 3:7]
            z = new
        return {"latents": z}

    given = dict(steps=STEPS, latents=it.start(), guidance_scale=2.5)
    assert torch.equal(pipes.sample(pipe, PROMPT, callback_on_step_end=paste, **given), got)
    nothing = composer(paths, inject=0.0, keep=0.0, paste=0.0, words=None)
    plain = pipes.sample(pipe, PROMPT, **given)
    assert torch.equal(draw(pipe, nothing), plain) and torch.equal(pipes.sample(pipe, PROMPT, **given), plain)
    assert not torch.equal(draw(pipe, composer(paths, keep=0.0, words=None)), got)
    assert not torch.equal(draw(pipe, composer(paths, inject=0.0, keep=0.0)), got)  # the words' region
    assert torch.equal(torch.get_rng_state(), state)
    # Noise of the background, of the object where it goes, and fresh noise around it within the box.
    start = it.start()
    assert torch.equal(start[..., :3, :], background[-1][..., :3, :]) and torch.equal(start, it.start())
    assert not torch.equal(start, it.start(seed=1))


def test_two_images_dpm_sdxl_and_half_precision(tmp_path, paths):
    solver = pipes.scheduler("DPMSolverMultistepScheduler")
    pipe = pipes.stable_diffusion(str(tmp_path), model=pipes.unet(size=8), plan=solver)
    with torch.no_grad():
        predict = noise_predictor(pipe.unet, pipe.encode_prompt("", "cpu", 1, False)[0])
    both = [dpm_invert(predict, solver, torch.randn(1, 4, 8, 8), 2) for _ in range(2)]
    it = composer(both, inject=1.0)
    two = draw(pipe, it, 2, latents=it.start().repeat(2, 1, 1, 1), num_images_per_prompt=2)
    torch.testing.assert_close(two, draw(pipe, it, 2).repeat(2, 1, 1, 1), atol=1e-4, rtol=1e-4)
    half = pipes.stable_diffusion(str(tmp_path), model=pipes.unet(size=8)).to(torch.bfloat16)
    got = draw(half, composer(paths), latents=composer(paths).start().bfloat16())
    assert got.isfinite().all() and got.dtype == torch.bfloat16
    xl = pipes.sdxl(str(tmp_path))
    wide = [[z.repeat(1, 1, 2, 2) for z in path] for path in paths]
    it = PrimeComposer(*wide, mask=MASK.repeat_interleave(2, 0).repeat_interleave(2, 1), words=("circle",), inject=1.0)
    assert draw(xl, it, height=16, width=16).isfinite().all()


def test_an_exception_in_mid_step_leaves_the_pipeline(pipe, paths):
    plain = pipes.sample(pipe, PROMPT, steps=STEPS)

    class Fails(PrimeComposer):
        def edit_rows(self, site):
            raise RuntimeError("in mid-step")

    with attnlib.attach(pipe, Fails(*paths, mask=MASK)), pytest.raises(RuntimeError, match="in mid-step"):
        pipes.sample(pipe, PROMPT, steps=STEPS)
    assert torch.equal(pipes.sample(pipe, PROMPT, steps=STEPS), plain)


def test_bad_input(pipe, paths):
    def fails(it, match, **given):
        with pytest.raises(ValueError, match=match):
            draw(pipe, it, **given)

    fails(composer(paths), "paths have 4 steps, the pipeline takes 3", steps=3)
    fails(composer(paths, words=("frog",)), "'frog' is not in the prompt")
    fails(composer(paths), "paths hold latents", height=16, width=16, latents=torch.randn(1, 4, 16, 16))
    with pytest.raises(ValueError, match="not empty"):
        composer(paths, mask=torch.zeros(8, 8))
    with pytest.raises(ValueError, match="mask must be \\(8, 8\\)"):
        composer(paths, mask=torch.ones(4, 4))
    with pytest.raises(ValueError, match="out of the picture"):
        composer(paths, shift=(20, 0))
    with pytest.raises(ValueError, match="box must be"):
        composer(paths, box=(0, 0, 9, 8))
    with pytest.raises(ValueError, match="as many steps"):
        PrimeComposer(paths[0], paths[1][:-1], MASK)
    with pytest.raises(ValueError, match="one picture each"):
        PrimeComposer(paths[0], [torch.zeros(1, 4, 4, 4)] * 5, MASK)
    with pytest.raises(ValueError, match=r"at\[0\] must be"):
        inject(torch.zeros(2, 2), torch.zeros(2, 1), [5])
    with pytest.raises(ValueError, match=r"inside\[0\] must be"):
        confine(torch.zeros(2, 2), [3], [0])
    with pytest.raises(ValueError, match="inject must"):
        composer(paths, inject=1.5)
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, composer(paths))

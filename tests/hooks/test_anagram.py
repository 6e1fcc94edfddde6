"""Anagrams: the authors' arithmetic and views from a fixture, and whole pipelines of pixels."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from doubles import doubles  # noqa: E402

import attnlib  # noqa: E402
from attnlib.hooks import Maps  # noqa: E402
from attnlib.steer import Anagram, TiledDenoiser  # noqa: E402
from attnlib.steer.diffusion import anagram, tiles  # noqa: E402
from hooks import pipes  # noqa: E402
from hooks.models import Watch  # noqa: E402

RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "anagram-mtl.safetensors")
WORDS = [[2], [1, 3]]
VIEWS = {
    "identity": tiles.identity_view, "flipped": tiles.flipped, "mirrored": lambda: tiles.flipped(-1),
    "quarter": lambda: tiles.rotated(90), "half": tiles.rotated, "negated": tiles.negated, "skewed": tiles.skewed,
    "circle": tiles.inner_circle, "hinge": tiles.square_hinge, "patches": lambda: tiles.patches(4, 3),
    "jigsaw": tiles.jigsaw,
}  # fmt: skip


# ---- views


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_orthogonal_at_every_size(name):
    """The inverse of a view is one, at sizes of pictures and of maps; noise keeps its inner products."""
    view = VIEWS[name]()
    for side in (16, 32, 64):
        tiles.check_orthogonal(view, (side, side))
        x = torch.randn(2, 6, side, side)
        assert torch.equal(view.inverse(view.view(x)), x) and torch.equal(view.view(view.inverse(x)), x)
        assert (name == "identity") == torch.equal(view.view(x), x)


def test_views_are_the_authors():
    def shows(view, side):
        return view.view(torch.arange(side * side).view(1, side, side)).flatten()

    assert torch.equal(shows(tiles.inner_circle(), 64), RECORDED["circle"].long())
    assert torch.equal(shows(tiles.square_hinge(), 64), RECORDED["hinge"].long())
    for seed in (4522, 0, 7):
        assert torch.equal(shows(tiles.jigsaw(seed), 32), RECORDED[f"jigsaw{seed}"].long())
    at = torch.arange(24 * 20).view(1, 24, 20)
    assert torch.equal(tiles.skewed().view(at)[0], RECORDED["skew"].long())
    assert torch.equal(tiles.flipped().view(at)[0], RECORDED["flip"].long())
    x, y = RECORDED["negate.x"], RECORDED["negate.y"]
    assert torch.equal(torch.cat([tiles.negated().inverse(x[:3]), tiles.negated().inverse(x[3:], True)]), y)


def test_pieces_of_a_puzzle_fit_wherever_they_may_go():
    pieces = torch.from_numpy(tiles.jigsaw_pieces(64))
    count = pieces.flatten().bincount()
    assert all(len(set(count[some].tolist())) == 1 for some in ([0, 1, 2, 3], [4, 5, 6, 7], list(range(8, 16))))
    turned = pieces // 4 * 4 + (pieces % 4 + 1) % 4
    assert torch.equal(pieces.rot90(), turned)  # a quarter turn of the puzzle is the puzzle
    assert torch.equal((pieces == 8)[:, :48], (pieces == 12)[:, 16:])  # both of an edge have one shape
    orders = {
        tuple(tiles.jigsaw(seed).view(torch.arange(256.0).view(1, 16, 16)).flatten().tolist()) for seed in range(9)
    }
    assert len(orders) > 7


class Blur:
    def view(self, x):
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1)

    inverse = view


class Scale:
    def view(self, x):
        return 2 * x

    def inverse(self, x):
        return x / 2


@pytest.mark.parametrize("view", [Blur(), Scale(), tiles.View(lambda h, w: torch.zeros(h, w).long())])
def test_views_that_are_not_orthogonal_are_refused(view):
    pipe, _ = pipes.deepfloyd()
    with pytest.raises(ValueError, match="is not orthogonal"):
        attnlib.attach(pipe, Anagram([tiles.identity_view(), view], ["a", "b"], step_size=0))


# ---- the three parts


@pytest.mark.parametrize("t", [2, 3])
def test_parts_are_the_authors(t):
    scores, noise = RECORDED[f"mix{t}.scores"][:, None], RECORDED[f"mix{t}.noise"][:, None]
    for step in (0, 12):
        shares = anagram.balance(scores, step, 30)
        torch.testing.assert_close(shares[:, 0], RECORDED[f"mix{t}.{step}.alpha"], atol=1e-12, rtol=1e-9)
        factor = anagram.rectification(noise, shares)
        torch.testing.assert_close(factor, RECORDED[f"mix{t}.{step}.c"], atol=1e-12, rtol=1e-9)
    maps = RECORDED[f"loss{t}.maps"].clone().requires_grad_()
    loss = anagram.anti_segregation(maps)
    (slope,) = torch.autograd.grad(loss, maps)
    torch.testing.assert_close(loss[None], RECORDED[f"loss{t}.value"], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(slope, RECORDED[f"loss{t}.slope"], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.3, 0.9, 1.0])
def test_merged_noise_keeps_its_variance(rho):
    """Whatever the views agree on; 0.3 under 0.6 and 0.4 is 0.815 without the factor."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 200_000, generator=g, dtype=torch.float64)
    noise = torch.stack([a, rho * a + (1 - rho**2) ** 0.5 * b])
    shares = torch.tensor([[0.6], [0.4]], dtype=torch.float64)
    mean = (noise * shares[..., None]).sum(0)
    assert (mean * anagram.rectification(noise, shares)).std().item() == pytest.approx(1, abs=0.01)
    if rho == 0.3:
        assert mean.std().item() == pytest.approx(0.815, abs=0.005)


def test_balance_and_the_loss_at_their_ends():
    low = anagram.balance(torch.tensor([[0.1, -1.0], [0.3, 0.3]]), 15, 30)
    assert torch.isfinite(low).all() and (low[0] > low[1]).all() and torch.allclose(low.sum(0), torch.ones(2))
    late = anagram.balance(torch.tensor([[0.1], [0.3]]), 29, 30)
    assert late[0, 0] > low[0, 0]
    for t in (2, 3, 4):
        assert anagram.anti_segregation(torch.rand(1, 5, 5).expand(t, 5, 5)).item() == pytest.approx(0.05 * (t - 1))
    at = torch.arange(16.0)
    blobs = [torch.exp(-((at[:, None] - y) ** 2 + (at - x) ** 2) / 30) for y, x in ((5, 5), (10, 10))]
    maps = torch.stack(blobs).requires_grad_()
    (slope,) = torch.autograd.grad(anagram.anti_segregation(maps), maps)
    moved = maps - 0.05 * slope / slope.abs().max()
    assert anagram.overlap(moved[0], moved[1]) > anagram.overlap(maps[0], maps[1])


# ---- whole pipelines


@pytest.fixture(scope="module")
def floyd():
    return pipes.deepfloyd()


def draw(pipe, given, steps=3, **more):
    settings = dict(num_inference_steps=steps, output_type="pt", generator=torch.Generator().manual_seed(3))
    return pipe(**{**settings, **given, **more}).images


def texts(given, count=2):
    first = given["prompt_embeds"][0]
    return [first, *torch.randn(count - 1, *first.shape, generator=torch.Generator().manual_seed(9))]


def test_one_view_is_the_pipeline(floyd):
    """With a scorer and rectification; and the pipeline afterwards, after an exception too."""
    pipe, given = floyd
    state, plain = torch.get_rng_state(), draw(*floyd)
    it = Anagram([tiles.identity_view()], texts(given, 1), scorer=lambda x, prompt, t: torch.full((len(x),), 0.2))
    with attnlib.attach(pipe, it):
        torch.testing.assert_close(draw(*floyd), plain, atol=1e-6, rtol=1e-6)
    two = Anagram([tiles.identity_view(), tiles.rotated()], texts(given), words=WORDS, resolution=4)
    with attnlib.attach(pipe, two), pytest.raises(RuntimeError, match="in the middle"):
        handle = pipe.unet.mid_block.register_forward_hook(broken)
        try:
            draw(*floyd)
        finally:
            handle.remove()
    assert torch.equal(draw(*floyd), plain) and torch.equal(torch.get_rng_state(), state)


def broken(*args):
    raise RuntimeError("in the middle")


def score(x, prompt, t):
    assert x.min() > -4 and x.shape[1] == 3
    return 0.2 + 0.1 * torch.tanh(x[:, 0].mean((1, 2)))


def by_hand(pipe, given, views, prompts, scorer, rectify, step_size, steps=3, guidance=7.0):
    """The authors' loop, from the equations, in float64."""
    plan, c = pipe.scheduler, 3
    plan.set_timesteps(steps)
    text = torch.cat([given["negative_prompt_embeds"].expand(len(views), -1, -1), torch.stack(prompts)]).double()
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, c, 8, 8, generator=g, dtype=torch.float64) * plan.init_noise_sigma
    maps = Maps(4)
    with attnlib.attach(pipe.unet, maps):
        for i, t in enumerate(plan.timesteps):
            if i and step_size:
                leaf = x.clone().requires_grad_()
                seen = torch.cat([v.view(leaf) for v in views])
                pipe.unet(torch.cat([seen] * 2), t, encoder_hidden_states=text)
                found = maps.take()[len(views) :]
                a = [v.inverse(found[n, WORDS[n]].sum(0)[None], True)[0] for n, v in enumerate(views)]
                x = x - step_size * torch.autograd.grad(anagram.anti_segregation(torch.stack(a)), leaf)[0]
            with torch.no_grad():
                seen = torch.cat([v.view(x) for v in views])
                out = pipe.unet(torch.cat([seen] * 2), t, encoder_hidden_states=text).sample
            u, w = out.chunk(2)
            guided = u[:, :c] + guidance * (w[:, :c] - u[:, :c])
            noise = torch.cat([v.inverse(e[None]) for v, e in zip(views, guided, strict=True)])
            spread = torch.cat([v.inverse(b[None, c:], True) for v, b in zip(views, w, strict=True)])
            alpha = torch.full((len(views),), 1 / len(views), dtype=torch.float64)
            if scorer is not None:
                s = torch.cat([scorer(v.view(x) / 2 + 0.5, None, t) for v in views])
                alpha = s ** (-1 - i / steps)
                alpha = alpha / alpha.sum()
            square = (alpha**2).sum()
            for m in range(len(views)):
                for n in range(m + 1, len(views)):
                    square = square + 2 * (noise[m] * noise[n]).mean() * alpha[m] * alpha[n]
            factor = square**-0.5 if rectify else 1.0
            each = alpha.view(-1, 1, 1, 1)
            merged = torch.cat([factor * (each * noise).sum(0, keepdim=True), (each * spread).sum(0, keepdim=True)], 1)
            if plan.config.variance_type not in ("learned", "learned_range"):
                merged = merged[:, :c]
            x = plan.step(merged, t, x, generator=g).prev_sample
    return x


@pytest.mark.parametrize(
    ("scorer", "rectify", "step_size"), [(score, True, 5.0), (None, True, 0.0), (score, False, 0.0), (None, False, 5.0)]
)
def test_a_pipeline_of_pixels_is_the_equations(scorer, rectify, step_size):
    pipe, given = pipes.deepfloyd()
    pipe.unet.double()
    views = [tiles.identity_view(), tiles.jigsaw()]
    prompts = texts(given)
    truth = by_hand(pipe, given, views, prompts, scorer, rectify, step_size)
    it = Anagram(views, prompts, scorer, rectify, step_size, words=WORDS, resolution=4)
    double = {n: t.double() for n, t in given.items() if isinstance(t, torch.Tensor)}
    with attnlib.attach(pipe, it):
        got = draw(pipe, {**given, **double}, guidance_scale=7.0)
    torch.testing.assert_close(got, truth, atol=1e-9, rtol=1e-9)


def test_two_pictures_in_half_precision_and_without_guidance(floyd):
    pipe, given = floyd
    views = [tiles.flipped(), tiles.negated()]
    watch = Watch([0])
    with attnlib.attach(pipe, Anagram(views, texts(given), score, words=WORDS, resolution=4), watch):
        pair = draw(*floyd, num_images_per_prompt=2)
        assert torch.equal(pair, draw(*floyd, num_images_per_prompt=2))
    assert pair.shape == (2, 3, 8, 8) and pair.isfinite().all() and not torch.equal(pair[0], pair[1])
    assert watch.calls[0][0].rows == ("uncond", "uncond", "cond", "cond") * 2
    with attnlib.attach(pipe, Anagram(views, texts(given), words=WORDS, resolution=4)):
        assert draw(*floyd, guidance_scale=1.0).isfinite().all()
    half, given = pipes.deepfloyd()
    half.unet.to(torch.bfloat16)
    low = {n: t.bfloat16() for n, t in given.items() if isinstance(t, torch.Tensor)}
    with attnlib.attach(half, Anagram(views, texts(given), words=WORDS, resolution=4)):
        assert draw(half, {**given, **low}).isfinite().all()


def test_the_second_stage():
    """The small picture stands behind the noisy one and is viewed with it; variances stay those of the mean."""
    from diffusers import DDPMScheduler, IFSuperResolutionPipeline, UNet2DConditionModel

    with doubles():
        first, given = pipes.deepfloyd()
        torch.manual_seed(1)
        config = {**first.unet.config, "in_channels": 6, "class_embed_type": "timestep"}
        pipe = IFSuperResolutionPipeline(
            tokenizer=None, text_encoder=None, unet=UNet2DConditionModel.from_config(config).eval(),
            safety_checker=None, feature_extractor=None, watermarker=None, scheduler=first.scheduler,
            image_noising_scheduler=DDPMScheduler(), requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        given = {**given, "image": torch.rand(1, 3, 4, 4), "noise_level": 50}
        plain, one = draw(pipe, given), given["prompt_embeds"][0]
        assert plain.dtype == torch.float64
        views = [tiles.identity_view()] * 2
        with attnlib.attach(pipe, Anagram(views, [one, one], rectify=False, step_size=0)):
            torch.testing.assert_close(draw(pipe, given), plain, atol=1e-9, rtol=1e-9)
        views = [tiles.identity_view(), tiles.negated()]
        with attnlib.attach(pipe, Anagram(views, texts(given), score, step_size=0)):
            got = draw(pipe, given)
        assert got.shape == plain.shape and got.isfinite().all() and not torch.equal(got, plain)


def test_bad_input(floyd, tmp_path):
    pipe, given = floyd
    views, two = [tiles.identity_view(), tiles.rotated()], texts(given)

    def fails(it, match, error=ValueError, **more):
        with attnlib.attach(pipe, it), pytest.raises(error, match=match):
            draw(*floyd, **more)

    fails(Anagram(views, two), "give the numbers of its word's tokens")
    fails(Anagram(views, [two[0], two[1][:3]], step_size=0), "embeddings of prompts must be")
    many = {n: t.repeat(2, 1, 1) for n, t in given.items() if "embeds" in n}
    fails(Anagram(views, two, step_size=0), "an anagram is one picture of all prompts", **many)
    fails(Anagram(views, two, lambda *a: torch.tensor([float("nan")]), step_size=0), "scorer must give")
    fails(
        Anagram(views, two, words=WORDS, resolution=5),
        "no attention to the text was seen at resolution 5",
        RuntimeError,
    )
    with pytest.raises(ValueError, match="denoises latents of an autoencoder"):
        attnlib.attach(pipes.stable_diffusion(str(tmp_path)), Anagram(views, ["a cat", "a dog"]))
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, Anagram(views, two))
    with pytest.raises(ValueError, match="on parts of a picture"):
        attnlib.attach(pipe, Anagram(views, two), TiledDenoiser())
    with pytest.raises(ValueError, match="one for each of 2 views"):
        Anagram(views, two[:1])
    with pytest.raises(TypeError, match=r"prompts\[1\] must be"):
        Anagram(views, [two[0], 3])
    with pytest.raises(ValueError, match=r"noise must be \(T, B, ...\)"):
        anagram.rectification(torch.ones(2, 1, 4), torch.ones(3, 1))
    with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
        anagram.balance(torch.ones(2, 1), 0, 0)
    with pytest.raises(TypeError, match="order must be"):
        tiles.View("upside down")
    with pytest.raises(TypeError, match="must have view"):
        tiles.check_orthogonal("rotate", (8, 8))
    with pytest.raises(ValueError, match="multiple of 90"):
        tiles.rotated(45)
    with pytest.raises(ValueError, match="square pictures"):
        tiles.jigsaw().view(torch.randn(1, 12, 16))

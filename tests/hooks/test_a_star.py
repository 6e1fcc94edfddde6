"""A-STAR and Attend-and-Excite in whole pipelines: losses, the engine, and what is refused."""

import copy
import sys

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Maps, with_gradient  # noqa: E402
from attnlib.steer import AStar, AttendExcite, LatentUpdate  # noqa: E402
from attnlib.steer.diffusion import a_star  # noqa: E402
from hooks import pipes  # noqa: E402

PROMPT = "a red circle and a blue square"
WORDS = ("circle", "square")
AT = [[3], [7]]  # their tokens


def astar(words=WORDS, **settings):
    return AStar(words, **{"targets": None, "resolution": 8, **settings})


# ---- the losses


def overlap(a, b):
    """Oracle, place by place."""
    both = sum(min(x, y) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    return both / (a.sum() + b.sum()).item()


def test_losses_are_the_equations():
    torch.manual_seed(0)
    maps, regions = torch.rand(3, 4, 5, dtype=torch.float64), (torch.rand(3, 4, 5) > 0.5).double()
    pairs = sum(overlap(maps[m], maps[n]) for m in range(3) for n in range(m + 1, 3))
    assert a_star.segregation(maps).item() == pytest.approx(pairs, abs=1e-12)
    kept = [overlap(maps[m], regions[m]) for m in range(3)]
    assert a_star.retention(maps, regions).item() == pytest.approx(sum(1 - o for o in kept), abs=1e-12)
    assert a_star.retention(maps, regions, "dice").item() == pytest.approx(sum(1 - 2 * o for o in kept), abs=1e-12)
    least = min(maps[m].max().item() for m in range(3))
    assert a_star.excitation(maps).item() == pytest.approx(1 - least, abs=1e-12)


def test_ends_of_the_losses():
    one = torch.zeros(1, 4, 4)
    one[0, :2] = 1
    disjoint, equal = torch.cat([one, 1 - one]), torch.cat([one, one])
    assert a_star.segregation(disjoint).item() == 0 and a_star.segregation(equal).item() == 0.5
    assert a_star.segregation(torch.cat([equal, one])).item() == 1.5  # three pairs
    # Binary maps that are their regions: the least of this normaliser is a half.
    assert a_star.retention(disjoint, disjoint).item() == 1.0 and a_star.retention(one, one).item() == 0.5
    assert a_star.retention(one, 1 - one).item() == 1.0 and a_star.retention(one, one, "dice").item() == 0.0
    torch.manual_seed(0)
    for _ in range(20):
        maps, regions = torch.rand(2, 4, 4), torch.rand(2, 4, 4) > 0.4
        assert 1.0 <= a_star.retention(maps, regions).item() <= 2.0
        assert 0.0 <= a_star.segregation(maps).item() <= 0.5


def test_a_move_lowers_the_loss_of_a_toy_attention():
    """Linear attention of places to two words, moved along the slope."""
    torch.manual_seed(0)
    z, words = torch.randn(4, 4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def loss(z):
        maps = torch.softmax(torch.einsum("hwc,mc->mhw", z, words), 0)
        return a_star.segregation(maps) + a_star.retention(maps, maps.detach() > 0.5)

    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf)
    assert loss(z - 0.1 * slope) < loss(z)


def test_a_range_of_the_loss_is_what_targets_are_shares_of():
    it = astar(segregation=2.0, retention=3.0)
    assert it.score(1.0, AT, {}, 0) == pytest.approx(1.0)  # two subjects, one pair
    memory = {"region": torch.ones(2, 2, 2)}
    assert it.score(3.0, AT, memory, 1) == 0.0 and it.score(7.0, AT, memory, 1) == 1.0
    it = astar(normalizer="dice", segregation=0.0)
    assert it.score(1.0, AT, memory, 1) == 0.5 and it.score(1.0, AT, {}, 0) == 0.0


# ---- the whole loop, held to one by hand


def noise(count=1, seed=3):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


def by_hand(pipe, loss, sizes, moves, resolution=8, steps=4, guidance=7.5):
    """A loop of sampling in which latents are moved; ``loss(maps, memory)`` of (T, h, w)."""
    pipe.scheduler.set_timesteps(steps)
    text, empty = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    z, memory = noise() * pipe.scheduler.init_noise_sigma, {}
    maps = Maps(resolution)
    with attnlib.attach(pipe.unet, maps), torch.no_grad():
        for i, t in enumerate(pipe.scheduler.timesteps):
            for n in range(moves(i)):
                with torch.enable_grad():
                    leaf = z.clone().requires_grad_()
                    pipe.unet(pipe.scheduler.scale_model_input(leaf, t), t, text)
                    found = maps.take()[0]
                    (slope,) = torch.autograd.grad(loss(found, memory), leaf)
                if n == moves(i) - 1:
                    memory["last"] = found.detach()
                z = z - sizes[i] * slope
            u, c = pipe.unet(
                pipe.scheduler.scale_model_input(torch.cat([z, z]), t), t, torch.cat([empty, text])
            ).sample.chunk(2)
            if "after" in memory:
                pipe.unet(pipe.scheduler.scale_model_input(z, t), t, text)
                memory["last"] = maps.take()[0]
            z = pipe.scheduler.step(u + guidance * (c - u), t, z).prev_sample
    return z


def word_maps(found):
    """Softmax over the words alone, then the blur of the released code, as it is written there."""
    words = (found[1:-1] * 100).softmax(0)
    picked = torch.stack([words[t - 1] for (t,) in AT])
    at = torch.arange(3.0, dtype=found.dtype) - 1
    kernel = torch.exp(-((at[:, None] / 1.0) ** 2)) * torch.exp(-((at / 1.0) ** 2))
    padded = torch.nn.functional.pad(picked[:, None], (1, 1, 1, 1), mode="reflect")
    return torch.nn.functional.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIM", {}),
        ("EulerDiscrete", {"normalizer": "dice", "kept": "after"}),
        ("DDIM", {"relative": False, "threshold": 0.02}),
    ],
    ids=["default", "after", "absolute"],
)
def test_a_star_in_a_pipeline_is_the_loop_by_hand(folder, name, settings):
    pipe = pipes.stable_diffusion(folder, plan=pipes.scheduler(name + "Scheduler")).to(torch.float64)
    size, steps = 40.0, 4
    sizes = [size * (1 - 0.5 * i / 3) ** 0.5 for i in range(steps)]
    dice, relative = settings.get("normalizer") == "dice", settings.get("relative", True)
    threshold = settings.get("threshold", 0.5)

    def loss(found, memory):
        memory.update({"after": True} if settings.get("kept") == "after" else {})
        maps = word_maps(found)
        total = torch.minimum(maps[0], maps[1]).sum() / (maps[0] + maps[1]).sum()
        if "last" in memory:
            past = word_maps(memory["last"])
            top = past.amax((1, 2), keepdim=True) if relative else 1.0
            for a, b in zip(maps, (past / top > threshold).double(), strict=True):
                total = total + 1 - (2 if dice else 1) * torch.minimum(a, b).sum() / (a + b).sum()
        return total

    truth = by_hand(pipe, loss, sizes, lambda i: int(i < 3))
    plain = pipes.sample(pipe, latents=noise())
    torch.manual_seed(4)
    state = torch.get_rng_state()
    with attnlib.attach(pipe, astar(step_size=size, steps=3, **settings)):
        got = pipes.sample(pipe, latents=noise())
        assert torch.equal(pipes.sample(pipe, latents=noise()), got)  # nothing is left over from one call to the next
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got, truth, atol=1e-9, rtol=1e-9)
    assert (got - plain).abs().max() > 1e-3 and torch.equal(pipes.sample(pipe, latents=noise()), plain)


def test_attend_and_excite_is_the_pipeline_of_diffusers(folder, monkeypatch):
    """With its steps of repeated moves, two images of one prompt that stop by themselves."""
    from diffusers import StableDiffusionAttendAndExcitePipeline
    from diffusers.models.attention_processor import AttnProcessor2_0

    module = sys.modules[StableDiffusionAttendAndExcitePipeline.__module__]

    class Exactly(module.GaussianSmoothing):  # theirs is rounded to float32
        def __init__(self):
            super().__init__()
            line = torch.exp(-((torch.arange(3.0, dtype=torch.float64) - 1) ** 2))
            exact = torch.outer(line, line)[None, None] / line.sum() ** 2
            torch.testing.assert_close(self.weight, exact.float())
            self.weight = exact

    monkeypatch.setattr(module, "GaussianSmoothing", Exactly)
    model = pipes.unet()
    ours = pipes.stable_diffusion(folder, model=model).to(torch.float64)
    theirs = pipes.quiet(
        StableDiffusionAttendAndExcitePipeline(
            **{n: c for n, c in ours.components.items() if n != "image_encoder"}, requires_safety_checker=False
        )
    )
    targets, steps = {0: 0.97, 2: 0.93}, 4
    given = dict(num_images_per_prompt=2, steps=steps, latents=noise(2))
    indices = AT[0] + AT[1]
    truth = pipes.sample(
        theirs, PROMPT, token_indices=indices, max_iter_to_alter=3, scale_factor=60, attn_res=(8, 8),
        thresholds={s: 1 - value for s, value in targets.items()}, **given,
    )  # fmt: skip
    model.set_attn_processor(AttnProcessor2_0())  # the one of theirs ends in no kernel
    plain = pipes.sample(ours, PROMPT, **given)
    excite = AttendExcite(WORDS, step_size=60, steps=3, targets=targets, resolution=8)
    with attnlib.attach(ours, excite):
        got = pipes.sample(ours, PROMPT, **given)
    torch.testing.assert_close(got, truth, atol=1e-9, rtol=1e-9)
    assert (truth - plain).abs().max() > 0.05


def test_repeated_moves_stop_at_the_target(pipe):
    class Count(AStar):
        def loss(self, maps, spans, memory, step):
            looks.append(step)
            return super().loss(maps, spans, memory, step)

    def run(**settings):
        looks.clear()
        with attnlib.attach(pipe, Count(WORDS, resolution=8, steps=0, **settings)):
            pipes.sample(pipe, steps=3)
        return [looks.count(step) for step in range(3)]

    looks = []
    # A look, four moves of which the first needs no look of its own, and a last look.
    assert run(targets={1: 0.0}, inner=4) == [0, 5, 0]
    assert run(targets={1: 1.0}, inner=4) == [0, 1, 0]  # it is there already


def test_two_prompts_have_their_own_words_and_losses(folder):
    pipe = pipes.stable_diffusion(folder).to(torch.float64)
    words = [["circle", "square"], [[2], [5]]]
    prompts = [PROMPT, "a dog and a cat"]
    with attnlib.attach(pipe, astar(words, step_size=50.0)):
        both = pipes.sample(pipe, prompts, steps=2, latents=noise(2))
    for i, prompt in enumerate(prompts):
        with attnlib.attach(pipe, astar(words[i], step_size=50.0)):
            alone = pipes.sample(pipe, prompt, steps=2, latents=noise(2)[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-9, rtol=1e-9)


def test_two_images_without_guidance_and_in_half_precision(folder):
    pipe = pipes.stable_diffusion(folder)
    start = noise(2).float()
    given = dict(steps=2, guidance_scale=1.0, latents=start, num_images_per_prompt=2)
    plain = pipes.sample(pipe, **given)
    with attnlib.attach(pipe, astar(step_size=50.0)):
        full = pipes.sample(pipe, **given)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(full, plain, strict=True))
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    base = pipes.sample(half, **{**given, "latents": start.bfloat16()})
    with attnlib.attach(half, astar(step_size=50.0)):
        moved = pipes.sample(half, **{**given, "latents": start.bfloat16()})
    assert moved.dtype == torch.bfloat16 and moved.isfinite().all()
    assert (moved.float() - full).norm() < (base.float() - full).norm()


def test_in_inference_mode_and_with_checkpointed_blocks(pipe):
    with attnlib.attach(pipe, astar(step_size=50.0)):
        truth = pipes.sample(pipe, steps=2)
        with torch.inference_mode():
            torch.testing.assert_close(pipes.sample(pipe, steps=2), truth, atol=1e-6, rtol=1e-5)
    other = copy.deepcopy(pipe)
    other.unet.enable_gradient_checkpointing()
    with attnlib.attach(other, astar(step_size=50.0)):
        torch.testing.assert_close(pipes.sample(other, steps=2), truth, atol=1e-5, rtol=1e-4)


def test_other_pipelines(folder):
    """Conditions beside the latents, pooled conditions of SDXL, and joint attention."""
    pipe = pipes.stable_diffusion(folder, "StableDiffusionInpaintPipeline", model=pipes.unet(in_channels=9))
    given = dict(image=torch.rand(1, 3, 16, 16), mask_image=torch.ones(1, 1, 16, 16), height=16, width=16, steps=2)
    plain = pipes.sample(pipe, PROMPT, **given)
    with attnlib.attach(pipe, astar(step_size=50.0)):
        assert (pipes.sample(pipe, PROMPT, **given) - plain).abs().max() > 1e-3

    pipe = pipes.sdxl(folder)
    plain = pipes.sample(pipe, PROMPT, steps=2, height=16, width=16)
    with attnlib.attach(pipe, astar(step_size=50.0)):
        assert (pipes.sample(pipe, PROMPT, steps=2, height=16, width=16) - plain).abs().max() > 1e-3

    pipe, given = pipes.sd3()
    plain = pipes.sample(pipe, None, steps=2, **given)
    it = AStar([[1], [3]], resolution=4, targets=None, step_size=500.0)
    with attnlib.attach(pipe, it):
        moved = pipes.sample(pipe, None, steps=2, **given)
        assert (moved - plain).abs().max() > 1e-5
    pipe, given = pipes.flux()
    plain = pipes.sample(pipe, None, steps=2, **given)
    it = AStar([[1], [3]], resolution=4, targets=None, step_size=500.0)
    with attnlib.attach(pipe, it):
        assert (pipes.sample(pipe, None, steps=2, **given) - plain).abs().max() > 1e-6


def test_nothing_to_do_is_the_pipeline_bit_for_bit(pipe):
    plain = pipes.sample(pipe)
    idle = AttendExcite(WORDS, step_size=0.0)
    for same in (astar(step_size=0.0), astar(segregation=0.0, retention=0.0), astar(steps=0), idle):
        with attnlib.attach(pipe, same) as session:
            assert not session.attached and torch.equal(pipes.sample(pipe), plain)
    with attnlib.attach(pipe, astar(steps=[9])) as session:  # no such step
        assert torch.equal(pipes.sample(pipe), plain)


def test_an_exception_in_a_move_leaves_the_pipeline(pipe):
    class Breaks(LatentUpdate):
        def loss(self, maps, spans, memory, step):
            if step == 2:
                raise ZeroDivisionError
            return maps["text"].square().sum()

    plain = pipes.sample(pipe)
    with pytest.raises(ZeroDivisionError), attnlib.attach(pipe, Breaks(WORDS, resolution=8)):
        pipes.sample(pipe)
    assert torch.equal(pipes.sample(pipe), plain)


def test_a_loss_of_other_maps(pipe):
    """Of attention between places, beside that to the text, in the same engine."""

    class Both(LatentUpdate):
        reads = ("text", "image")

        def loss(self, maps, spans, memory, step):
            assert maps["image"].shape == (64, 8, 8) and maps["text"].shape == (77, 8, 8)
            spread = a_star.of_spans(maps["text"], spans).flatten(1) @ maps["image"].flatten(1)
            return spread.square().sum()

    plain = pipes.sample(pipe, steps=2)
    with attnlib.attach(pipe, Both(WORDS, resolution=8, step_size=1e4)):
        assert (pipes.sample(pipe, steps=2) - plain).abs().max() > 1e-4


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (dict(words="circle"), TypeError, "words must be a sequence"),
        (dict(words=[3, 7]), TypeError, "a sequence of them"),
        (dict(words=["circle"]), ValueError, "must name at least two"),
        (dict(words=[["circle"], ["dog", "cat"]]), ValueError, "must name at least two"),
        (dict(threshold=1.0), ValueError, "threshold"),
        (dict(normalizer="max"), ValueError, "normalizer='max'"),
        (dict(kept="never"), ValueError, "kept='never'"),
        (dict(step_size=-1.0), ValueError, "step_size"),
        (dict(step_range=(1.0,)), ValueError, "step_range must be two numbers"),
        (dict(sigma=0.0), ValueError, "sigma"),
    ],
)
def test_bad_settings(settings, error, match):
    with pytest.raises(error, match=match):
        astar(**{"words": WORDS, **settings})


def test_bad_words_and_models(pipe, folder):
    def fails(it, match, error=ValueError, prompt=PROMPT, **given):
        with attnlib.attach(pipe, it), pytest.raises(error, match=match):
            pipes.sample(pipe, prompt, steps=1, **given)

    fails(astar(("circle", "zebra")), "word 'zebra' is not in the prompt 'a red circle and a blue square'")
    fails(astar(("circle", "a")), "word 'a' is 2 times in the prompt")
    fails(astar(("circle", "dog")), "'dog' lies beyond the 77 tokens", prompt="a circle " + "of " * 80 + "dog")
    fails(astar([[3], [80]]), r"spans holds \[80\], but the maps are of tokens 0 to 76")
    fails(astar([["circle", "square"], ["dog", "cat"]]), "for each of 1 prompts")
    fails(astar(resolution=32), "no attention to the text was seen at resolution 32", RuntimeError)
    text = torch.randn(1, 77, 16)
    fails(
        astar(), "the pipeline was given embeddings and no prompt", prompt=None, prompt_embeds=text,
        negative_prompt_embeds=text,
    )  # fmt: skip
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, astar())
    with pytest.raises(ValueError, match="Maps acts on cross/joint attention, but nothing of this model fits"):
        attnlib.attach(pipes.dit(), astar())
    with pytest.raises(ValueError, match="both move the latents"):
        attnlib.attach(pipe, astar(), AttendExcite(WORDS))
    with attnlib.attach(pipe, astar()):
        pass
    assert "forward" not in pipe.unet.__dict__


def test_rows_that_cannot_run_alone_and_videos_are_refused(folder):

    pag = pipes.stable_diffusion(folder, cls="StableDiffusionPAGPipeline")
    with attnlib.attach(pag, AStar(("circle", "square"))):
        pipes.sample(pag, steps=1, pag_scale=0)
        with pytest.raises(ValueError, match="pag_scale=0"):
            pipes.sample(pag, steps=1)
    video = pipes.animatediff(pag)
    with attnlib.attach(video, AStar(("circle", "square"))), pytest.raises(ValueError, match="denoises videos"):
        pipes.sample(video, steps=1, num_frames=2, height=16, width=16)


def test_updates_that_are_not_finite_are_refused(pipe):
    class Bad(LatentUpdate):
        def __init__(self, kind):
            super().__init__(WORDS, resolution=8, step_size=1e38)
            self.kind = kind

        def loss(self, maps, spans, memory, step):
            total = maps["text"][3].sum()
            if self.kind == "loss":
                return total / 0
            return (total - total).sqrt() if self.kind == "slope" else maps["text"][3, 0, 0] * 1e8

    for kind, match in (
        ("loss", "step 0 the loss is not finite"), ("slope", "step 0 the slope of its loss is not finite"),
        ("latents", "the moved latents are not finite"),
    ):  # fmt: skip
        with attnlib.attach(pipe, Bad(kind)), pytest.raises(ValueError, match=match):
            pipes.sample(pipe, steps=1)


def test_gradients_reach_through_what_is_attached_behind(pipe):
    """Stacked with a technique that changes attention: it acts in the passes with gradient too."""
    from attnlib.steer import SoftPAG

    with attnlib.attach(pipe, SoftPAG(0.5, rows=("cond",))):
        softened = pipes.sample(pipe, steps=2)
    with attnlib.attach(pipe, astar(step_size=50.0)):
        moved = pipes.sample(pipe, steps=2)
    with attnlib.attach(pipe, astar(step_size=50.0), SoftPAG(0.5, rows=("cond",))):
        both = pipes.sample(pipe, steps=2)
    assert min((both - softened).abs().max(), (both - moved).abs().max()) > 1e-3
    with torch.no_grad(), with_gradient():
        assert torch.is_grad_enabled()

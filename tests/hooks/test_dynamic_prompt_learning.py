"""Dynamic prompt learning: the authors' losses from a fixture, their loop by hand, and whole pipelines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.hooks import Maps  # noqa: E402
from attnlib.steer import DynamicPrompt, LearntPrompt, LocatedPrompt, PromptToPrompt  # noqa: E402
from attnlib.steer.diffusion.dynamic_prompt import (  # noqa: E402
    background_mask,
    balance,
    disjointness,
    leakage,
    misplaced,
    outside,
    profile_divergence,
    unbound,
)
from attnlib.steer.diffusion.invert import ddim_invert, noise_predictor  # noqa: E402
from hooks import pipes  # noqa: E402

RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "dynamic-prompt-learning.safetensors")
LOCATED = load_file(Path(__file__).parent.parent / "fixtures" / "dpl-located.safetensors")
PROMPT, WORDS, SPANS = "a red circle and a blue square", ("circle", "square"), [[3], [7]]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    found = pipes.stable_diffusion(str(tmp_path_factory.mktemp("tokenizer")), model=pipes.unet(size=8))
    with torch.no_grad():  # words that matter
        found.text_encoder.get_input_embeddings().weight.mul_(20)
    return found


def learner(**changes):
    settings = dict(words=WORDS, inner=3, lr=0.05, beta=(-1.0, 0.7, 0.9), resolution=8)
    return DynamicPrompt(**{**settings, **changes})


# ---- the authors' functions


def test_losses_and_slopes_are_the_authors():
    maps, spans = RECORDED["maps"].clone().requires_grad_(), [[2], [5], [7]]
    nouns = maps[[2, 5, 7]]
    found = {
        f"balance.{how}.{blur}": balance(maps, spans, 0.5 if blur == "blur" else 0.0, how=how, compat="authors")
        for how in ("max", "mean")
        for blur in ("blur", "sharp")
    }
    found |= {"disjoint": disjointness(nouns), "background_loss": leakage(nouns, RECORDED["background"])}
    for name, loss in found.items():
        (slope,) = torch.autograd.grad(loss, maps, retain_graph=True)
        # Their blur's weights are float32.
        exact = 1e-6 if "blur" in name else 1e-9
        torch.testing.assert_close(loss, RECORDED[name].reshape(()), atol=exact, rtol=exact)
        torch.testing.assert_close(slope, RECORDED[name + ".grad"], atol=1e-5 if "blur" in name else 1e-9, rtol=1e-5)
    gauss = balance(maps, spans)
    assert (
        abs(float(gauss.detach() - found["balance.max.blur"].detach())) > 1e-3
    )  # the Gaussian that they name is narrower


def test_losses_of_masks_are_the_authors():
    """Those of their scripts for segmented and for detected objects, and their slopes."""
    maps, masks = LOCATED["maps"].clone().requires_grad_(), LOCATED["masks"]
    nouns, adjectives = maps[[3, 6]], maps[[2, 5]]
    found = {
        "segments/misplaced": misplaced(nouns, masks), "boxes/misplaced": misplaced(nouns, masks, "boxes"),
        "segments/outside": outside(nouns, masks), "boxes/outside": outside(nouns, masks),
        "segments/profiles": profile_divergence(nouns, masks), "segments/unbound": unbound(nouns, adjectives),
        "boxes/disjoint": disjointness(nouns),
    }  # fmt: skip
    for name, loss in found.items():
        (slope,) = torch.autograd.grad(loss, maps, retain_graph=True)
        torch.testing.assert_close(loss, LOCATED[name].reshape(()), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(slope[[2, 3, 5, 6]], LOCATED[name + ".grad"], atol=1e-9, rtol=1e-9)
        assert not bool(slope[[0, 1, 4, 7, 8]].any())


def test_losses_at_their_ends():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert disjointness(torch.stack([one, other])) == 0 and disjointness(torch.stack([one, 3 * one])) == 1
    assert disjointness(one[None]) == 0
    assert leakage(one[None], other) == 0 and leakage(one[None], one) == 1
    peak = torch.zeros(4, 3, 3)
    peak[2, 1, 1] = 1
    assert balance(peak, [[2]], 0.0) < 1e-6 < balance(peak, [[1]], 0.0) <= 1


def test_the_background_is_what_no_cluster_of_a_noun_covers():
    """Clusters and nouns as in the authors' function: those that are no noun's are the background."""
    clusters, cross, nouns = RECORDED["clusters"], RECORDED["cross"], RECORDED["nouns"]
    flat = clusters.flatten()
    between = (flat[:, None] == flat[None]).double()
    between = (between / between.sum(1, keepdim=True)).T.unflatten(1, clusters.shape)
    mask = background_mask(between, cross, clusters=5)
    assert torch.equal(mask.bool(), (nouns == -1)[clusters]) and 0 < mask.mean() < 1
    state = torch.get_rng_state()
    assert torch.equal(background_mask(between, cross, clusters=5, seed=4), mask)
    assert torch.equal(torch.get_rng_state(), state)
    for bad, match in ((dict(clusters=0), "clusters must be"), (dict(restarts=0), "restarts must be")):
        with pytest.raises(ValueError, match=match):
            background_mask(between, cross, **bad)
    with pytest.raises(ValueError, match="must divide the grid"):
        background_mask(between, cross[:, :3])
    with pytest.raises(ValueError, match="must hold 1024 places"):
        background_mask(between[:5], cross)


# ---- whole pipelines


def by_hand(pipe, noise, steps, path, background, inner, lr, null_inner):
    """The authors' loop: the embedding table is optimised, and all rows but the nouns' put back."""
    encoder = pipe.text_encoder
    table = encoder.get_input_embeddings().weight
    kept = table.detach().clone()
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    nouns, found, empties, z = ids[0, [3, 7]], [], [], noise
    encode = lambda: encoder(ids)[0]  # noqa: E731
    with torch.no_grad():
        empty = pipe.encode_prompt("", "cpu", 1, False)[0]
    maps = Maps(8)
    pipe.scheduler.set_timesteps(steps)
    for i, t in enumerate(pipe.scheduler.timesteps):
        optimizer = torch.optim.AdamW([table], lr=lr)
        limits = [b * torch.exp(torch.tensor(-i / a)) for a, b in ((25.0, 0.1), (50.0, 0.7), (25.0, 0.9))]
        for _ in range(inner):
            with attnlib.attach(pipe.unet, maps):
                pipe.unet(z, t, encoder_hidden_states=encode())
                seen = maps.take()[0]
            each = [balance(seen, SPANS), leakage(seen[[3, 7]], background), disjointness(seen[[3, 7]])]
            if all(loss < limit for loss, limit in zip(each, limits, strict=True)):
                break
            optimizer.zero_grad()
            (each[0] + 0.05 * each[1] + 0.05 * each[2]).backward()
            optimizer.step()
            with torch.no_grad():
                rows = torch.ones(len(table), dtype=torch.bool)
                rows[nouns] = False
                table[rows] = kept[rows]
        found.append(table.detach()[nouns].clone())
        with torch.no_grad():
            text = encode()
            cond = pipe.unet(z, t, encoder_hidden_states=text).sample
        learnt = empty.clone().requires_grad_()
        adam = torch.optim.Adam([learnt], lr=1e-2 * (1 - i / 100))
        for _ in range(null_inner):
            base = pipe.unet(z, t, encoder_hidden_states=learnt).sample
            back = pipe.scheduler.step(base + 7.5 * (cond - base), t, z).prev_sample
            adam.zero_grad()
            (back - path[-2 - i]).square().mean().backward()
            adam.step()
        empties.append(learnt.detach())
        with torch.no_grad():
            base = pipe.unet(z, t, encoder_hidden_states=learnt).sample
            z = pipe.scheduler.step(base + 7.5 * (cond - base), t, z).prev_sample
    with torch.no_grad():
        table.copy_(kept)
    for p in (*encoder.parameters(), *pipe.unet.parameters()):
        p.grad = None
    return found, empties, z


def test_a_pipeline_is_the_loop_by_hand(tmp_path):
    """Nouns and empty prompts of every step, and the latents; nothing of the model is written to."""
    pipe = pipes.stable_diffusion(str(tmp_path), model=pipes.unet(size=8)).to(torch.float64)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(20)
        text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    background = torch.zeros(8, 8, dtype=torch.float64)
    background[:, :3] = 1
    path = ddim_invert(noise_predictor(pipe.unet, text), pipe.scheduler, torch.randn(1, 4, 8, 8).double(), 2)
    it = learner(background=background, path=path, beta=(0.1, 0.7, 0.9), null_inner=3)
    table = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    given, state = dict(steps=2, latents=path[-1]), torch.get_rng_state()
    plain = pipes.sample(pipe, PROMPT, **given)
    with attnlib.attach(pipe, it) as session:
        got = pipes.sample(pipe, PROMPT, **given)
        assert session.results["dynamic-prompt-learning"] is it.embeddings
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, table)
    assert torch.equal(pipes.sample(pipe, PROMPT, **given), plain)
    tokens, empties, z = by_hand(pipe, path[-1], 2, path, background, 3, 0.05, 3)
    for step in range(2):
        # What is learnt is float32, as in the authors' code; theirs here is float64.
        torch.testing.assert_close(it.embeddings[step][0][0].double(), tokens[step], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(it.empty[step], empties[step], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, z, atol=1e-4, rtol=1e-4)
    first = table[pipe.tokenizer(PROMPT).input_ids[3]]
    assert (it.embeddings[0][0][0, 0] - first).abs().max() > 0.05 and not torch.equal(*[e[0] for e in it.embeddings])
    # Handed to the pipeline again they give the same, and an edit beside it.
    with attnlib.attach(pipe, LearntPrompt.of(it)):
        torch.testing.assert_close(pipes.sample(pipe, PROMPT, **given), got, atol=1e-9, rtol=1e-9)
    prompts = [PROMPT, "a red cat and a blue square"]
    given["latents"] = path[-1].repeat(2, 1, 1, 1)
    with attnlib.attach(pipe, LearntPrompt.of(it), PromptToPrompt("replace", 0.5, 0.5)):
        pair = pipes.sample(pipe, prompts, **given)
    torch.testing.assert_close(pair[:1], got, atol=1e-6, rtol=1e-6)
    with attnlib.attach(pipe, PromptToPrompt("replace", 0.5, 0.5)):
        assert (pipes.sample(pipe, prompts, **given)[1] - pair[1]).abs().max() > 1e-4


def test_losses_below_their_thresholds_move_nothing(pipe):
    plain = pipes.sample(pipe, PROMPT, steps=2)
    low = dict(beta=(9.0, 9.0, 9.0))
    with attnlib.attach(pipe, learner(**low)):
        torch.testing.assert_close(pipes.sample(pipe, PROMPT, steps=2), plain, atol=1e-5, rtol=1e-5)
    with attnlib.attach(pipe, learner(inner=0)) as session:
        assert not session.attached and torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)
    it = learner()
    with attnlib.attach(pipe, it):
        moved = pipes.sample(pipe, PROMPT, steps=2)
        assert torch.equal(pipes.sample(pipe, PROMPT, steps=2), moved)  # a call starts afresh
    assert (moved - plain).abs().max() > 1e-3 and len(it.embeddings) == 2
    assert it.thresholds(5)["disjoint"] == pytest.approx(0.9 * 2.718281828**-0.2)
    late = DynamicPrompt(WORDS, background=torch.eye(8), background_from=3)
    assert "background" not in late.thresholds(2) and late.thresholds(3)["background"] == 0.7
    assert late.inner == 21 and late.weights == (1.0, 0.05, 0.05)


def test_nouns_learn_to_look_at_their_masks(pipe):
    """One step of AdamW by hand on the weighted losses; what is below its threshold, or never asks, moves nothing."""
    masks = torch.zeros(2, 8, 8)
    masks[0, :4], masks[1, 4:] = 1, 1
    settings = dict(
        words=WORDS, masks=masks, adjectives=True, weights=(1.0, 0.5, 0.2, 0.3, 2.0), beta=(0.0,) * 5, lr=0.05, inner=1,
        resolution=8,
    )  # fmt: skip
    noise = torch.randn(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(1)
    t = pipe.scheduler.timesteps[0]
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    table = pipe.text_encoder.get_input_embeddings().weight
    for kind in ("segments", "boxes"):
        it = LocatedPrompt(kind=kind, **settings)
        with attnlib.attach(pipe, it):
            pipes.sample(pipe, PROMPT, steps=1, latents=noise)
        own, seen = table.detach()[ids[0, [3, 7]]].clone().requires_grad_(), Maps(8)

        def put(module, args, out, own=own):
            return out.index_copy(1, torch.tensor([3, 7]), own[None])

        handle = pipe.text_encoder.get_input_embeddings().register_forward_hook(put)
        with attnlib.attach(pipe.unet, seen):
            pipe.unet(noise, t, encoder_hidden_states=pipe.text_encoder(ids)[0])
            maps = seen.take()[0]
        handle.remove()
        nouns = maps[[3, 7]]
        loss = misplaced(nouns, masks, kind) + 0.5 * outside(nouns, masks) + 0.2 * profile_divergence(nouns, masks)
        loss = loss + 0.3 * disjointness(nouns) + 2 * unbound(nouns, maps[[2, 6]])
        (own.grad,) = torch.autograd.grad(loss, [own])
        torch.optim.AdamW([own], lr=0.05).step()
        torch.testing.assert_close(it.embeddings[0][0][0], own.detach(), atol=1e-5, rtol=1e-4)
        assert (own.detach() - table[ids[0, [3, 7]]]).abs().max() > 0.01
    plain = pipes.sample(pipe, PROMPT, steps=1, latents=noise)
    low = dict(beta=(9.0, 9.0, -9.0, -9.0, 9.0))
    with attnlib.attach(pipe, LocatedPrompt(**{**settings, **low})):
        torch.testing.assert_close(pipes.sample(pipe, PROMPT, steps=1, latents=noise), plain, atol=1e-5, rtol=1e-5)
    assert LocatedPrompt(**{**settings, "weights": (0.0, 0.0, 1.0, 1.0, 1.0)}).identity
    assert LocatedPrompt(WORDS, masks).thresholds(25) == pytest.approx(
        {"misplaced": 0.7 * 2.718281828**-0.5, "outside": 0.7 / 2.718281828}
    )


def test_prompts_and_images_learn_by_themselves(pipe):
    other = "a cat and a dog"
    noise = torch.randn(4, 4, 8, 8)
    with attnlib.attach(pipe, learner(words=[list(WORDS), ["cat"]])):
        four = pipes.sample(pipe, [PROMPT, other], steps=1, num_images_per_prompt=2, latents=noise)
    for prompt, words, rows in ((PROMPT, WORDS, [0, 1]), (other, ["cat"], [2, 3])):
        with attnlib.attach(pipe, learner(words=words)):
            two = pipes.sample(pipe, prompt, steps=1, num_images_per_prompt=2, latents=noise[rows])
        torch.testing.assert_close(four[rows], two, atol=1e-4, rtol=1e-4)


def test_sdxl_other_schedulers_and_half_precision(tmp_path):
    xl = pipes.sdxl(str(tmp_path))
    euler = pipes.stable_diffusion(
        str(tmp_path), model=pipes.unet(size=8), plan=pipes.scheduler("EulerDiscreteScheduler")
    )
    half = pipes.stable_diffusion(str(tmp_path), model=pipes.unet(size=8)).to(torch.bfloat16)
    for pipe, given in ((xl, dict(height=16, width=16)), (euler, {}), (half, {})):
        plain = pipes.sample(pipe, PROMPT, steps=1, **given)
        with torch.inference_mode(), attnlib.attach(pipe, learner(lr=2.0)):
            got = pipes.sample(pipe, PROMPT, steps=1, **given)
        assert got.isfinite().all() and got.dtype == plain.dtype and not torch.equal(got, plain)


def test_an_exception_in_mid_step_leaves_the_pipeline(pipe):
    plain = pipes.sample(pipe, PROMPT, steps=1)

    class Fails(DynamicPrompt):
        def losses(self, *given):
            raise RuntimeError("in mid-step")

    with attnlib.attach(pipe, Fails(WORDS, resolution=8)), pytest.raises(RuntimeError, match="in mid-step"):
        pipes.sample(pipe, PROMPT, steps=1)
    assert torch.equal(pipes.sample(pipe, PROMPT, steps=1), plain)
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_bad_input(pipe):
    def fails(it, match, error=ValueError, prompt=PROMPT, steps=2, **given):
        with attnlib.attach(pipe, it), pytest.raises(error, match=match):
            pipes.sample(pipe, prompt, steps=steps, **given)

    path = [torch.randn(1, 4, 8, 8)] * 3
    one = torch.ones(1, 4, 4)
    fails(LocatedPrompt(WORDS, one, resolution=8), "masks hold 1 objects, the prompt has 2 words")
    fails(learner(words=("frog",)), "'frog' is not in the prompt")
    fails(learner(words=("dog",)), "beyond the 77 tokens", prompt="a circle " + "in " * 80 + "of a dog")
    fails(learner(resolution=5), "no attention to the text was seen", error=RuntimeError)
    fails(learner(path=path), "path has 2 steps, the pipeline takes 3", steps=3)
    fails(learner(path=path), "one image under guidance", num_images_per_prompt=2)
    fails(learner(path=path), "one image under guidance", guidance_scale=1.0)
    text = torch.randn(1, 77, 16)
    fails(learner(), "given embeddings and no prompt", prompt=None, prompt_embeds=text, negative_prompt_embeds=text)
    fails(LearntPrompt(WORDS, [[torch.zeros(1, 2, 16)]] * 3), "embeddings of 3 steps, there are 2")
    fails(LearntPrompt(WORDS, [[torch.zeros(1, 3, 16)]] * 2), "hold 3 tokens, the words .* have 2")
    fails(LearntPrompt(("frog",), [[torch.zeros(1, 1, 16)]] * 2), "'frog' is not in the prompt")
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, learner())
    with pytest.raises(ValueError, match="background must be masks"):
        learner(background=torch.zeros(8, 8))
    with pytest.raises(ValueError, match="alpha must be three numbers"):
        learner(alpha=(1.0,))
    with pytest.raises(TypeError, match="words must be words"):
        LearntPrompt([[2]], [])
    with pytest.raises(ValueError, match="empty holds 1 embeddings, and there are 2"):
        LearntPrompt(WORDS, [[torch.zeros(1, 2, 16)]] * 2, [torch.zeros(1, 77, 16)])
    for wrong, match in (
        (dict(masks=torch.zeros(1, 4, 4)), "none of them empty"), (dict(masks=torch.ones(4, 4)), "masks must be"),
        (dict(kind="boxed"), "kind='boxed'"), (dict(weights=(1.0,)), "weights must be five numbers"),
        (dict(adjectives=3), "adjectives"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            LocatedPrompt(**{"words": ("cat",), "masks": one, **wrong})

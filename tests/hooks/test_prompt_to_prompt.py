"""Prompt-to-prompt: the authors' matrices, controllers and masks from a fixture, and whole pipelines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.steer import PromptToPrompt  # noqa: E402
from attnlib.steer.diffusion.edit import Edited, blend_mask, refinement, replacement, word_tokens  # noqa: E402
from hooks import pipes  # noqa: E402

RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "prompt-to-prompt.safetensors")
CAT, DOG, RED = "a cat on a bench", "a dog on a bench", "a red cat on a bench"
REPLACED = [
    ("a red cat and a blue square", "a red dog and a green square"),
    (CAT, "a tabby on a bench"),
    ("a tabby on a bench in red", "a cat on a bench in bluish"),
]
REFINED = [
    (CAT, "a red cat on a blue bench"),
    ("a red cat on a blue bench", CAT),
    ("a cat and a dog", "a dog and a cat wearing a crown"),
]
KEPT = (0, 1, 3, 5, 6, 9)


# ---- the authors' functions


def test_matrices_of_replacement_are_the_authors(pipe):
    for n, (source, target) in enumerate(REPLACED):
        theirs = torch.zeros(77, 77)
        i, j = RECORDED[f"replace{n}.index"].long().unbind(1)
        theirs[i, j] = RECORDED[f"replace{n}.value"]
        assert torch.equal(replacement(pipe.tokenizer, source, target, compat="authors"), theirs)
        ours = replacement(pipe.tokenizer, source, target)
        assert torch.allclose(ours.sum(1), torch.ones(77))  # no weight is lost
        same = len(pipe.tokenizer(source)["input_ids"]) == len(pipe.tokenizer(target)["input_ids"])
        assert torch.equal(ours, theirs) == same
    # A word of one token for one of five: what follows keeps its weight, four tokens on.
    assert word_tokens(pipe.tokenizer, "a tabby on") == [[1], [2, 3, 4, 5, 6], [7]]
    ours = replacement(pipe.tokenizer, *REPLACED[1])
    assert torch.equal(ours[2, 2:7], torch.full((5,), 0.2)) and ours[3, 7] == 1 and ours[72, 76] == 1
    assert torch.equal(ours[73:, -1], torch.ones(4))


def test_alignments_of_refinement_are_the_authors(pipe):
    for n, (source, target) in enumerate(REFINED):
        index, found = refinement(pipe.tokenizer, source, target)
        assert torch.equal(found, RECORDED[f"refine{n}.found"])
        kept = found > 0
        assert torch.equal(index[kept], RECORDED[f"refine{n}.index"].long()[kept]) and not kept.all() == (n != 1)


CASES = {
    "replace": (PromptToPrompt("replace", cross=0.5, self_maps=0.4), DOG),
    "words": (PromptToPrompt("replace", {None: (0.2, 0.6), "dog": 0.9}, (0.1, 0.5)), DOG),
    "refine": (PromptToPrompt("refine", cross=0.8), RED),
    "reweight": (PromptToPrompt("refine", 0.6, weights={"red": 2.5, "bench": -1.0}), RED),
}


@pytest.mark.parametrize("case", CASES)
def test_maps_are_those_of_the_authors_controllers(case, pipe):
    """What the layers of a batch of two prompts are given, at steps of ten."""
    it, edit = CASES[case]

    class Sampled(Exception):
        pass

    found = {}

    class Look(attnlib.hooks.Intervention):
        def around_denoiser(self, site, inputs, call):
            n = len(it.session.sites)
            for step in range(10):
                for kind, maps in (("cross", RECORDED["cross"]), ("self", RECORDED["self"])):
                    here = it.session.sites[[s.kind for s in it.session.sites].index(kind)].but(
                        step=step, rows=("uncond",) * 2 + ("cond",) * 2, prompts=(0, 1, 0, 1), n_keys=maps.shape[-1]
                    )
                    weights = torch.cat([maps[:2], maps[:2]])
                    new = it.on_weights(here, weights, torch.arange(6))
                    assert torch.equal(new[:3], weights[:3])
                    edited = it.edit_rows(here) is None
                    assert edited or torch.equal(new, weights)
                    found[kind, step] = new[3]
            assert n
            raise Sampled

    with attnlib.attach(pipe, it, Look()), pytest.raises(Sampled):
        pipes.sample(pipe, [CAT, edit], steps=10)
    for kind in ("cross", "self"):
        for n, step in enumerate(KEPT):
            torch.testing.assert_close(found[kind, step], RECORDED[f"{case}.{kind}"][n, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["plain", "minus"])
def test_blended_latents_are_the_authors(case):
    maps, x = RECORDED["blend.maps"], RECORDED["blend.x"]
    tokens = {"cat": [2], "dog": [2], "bench": [5]}
    of = lambda words: torch.stack([maps[n, tokens[w]].sum(0) for n, w in enumerate(words)])  # noqa: E731
    mask = blend_mask(of(["cat", "dog"]), (32, 32), 0.5)
    mask = mask | mask[:1]
    if case == "minus":
        away = blend_mask(of(["bench", "bench"]), (32, 32), 0.6, pool=0)
        mask = mask & ~(away | away[:1])
    torch.testing.assert_close(torch.where(mask[:, None], x, x[:1]), RECORDED[f"blend.{case}"], atol=1e-6, rtol=1e-6)


# ---- whole pipelines


def by_hand(pipe, prompts, it, noise, steps, guidance):
    """The loop of the paper with processors of its own."""
    store, now = [], {"step": 0}
    index, found = (t[None] for t in refinement(pipe.tokenizer, *prompts))
    weights = torch.ones(77, dtype=noise.dtype)
    weights[2] = 1.5

    class Controlled:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            split = lambda t: t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
            q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
            p = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
            if encoder_hidden_states is not None:
                if now["step"] < int(0.6 * (steps + 1)):
                    f = found[0].to(p)
                    p[3] = (p[2][..., index[0]] * f + p[3] * (1 - f)) * weights
                if p.shape[2] == 64:
                    store.append(p[2:].mean(1))
            elif now["step"] < int(0.5 * steps) and p.shape[2] <= 64:
                p[3] = p[2]
            return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))

    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Controlled())
    text, empty = pipe.encode_prompt(prompts, "cpu", 1, True)[:2]
    pipe.scheduler.set_timesteps(steps)
    z, total = noise[:1].repeat(2, 1, 1, 1), 0
    for i, t in enumerate(pipe.scheduler.timesteps):
        now["step"] = i
        store.clear()
        base, cond = pipe.unet(torch.cat([z, z]), t, encoder_hidden_states=torch.cat([empty, text])).sample.chunk(2)
        z = pipe.scheduler.step(base + guidance * (cond - base), t, z).prev_sample
        total = total + torch.stack(store).mean(0)
        if i >= int(0.3 * steps):
            words = torch.stack([total[0, :, 2], total[1, :, 3]]).unflatten(1, (8, 8))
            wide = torch.nn.functional.max_pool2d(words[:, None], 3, 1, 1)
            wide = torch.nn.functional.interpolate(wide, (16, 16))
            mask = wide / wide.amax((2, 3), keepdim=True) > 0.6
            z = torch.cat([z[:1], torch.where(mask[:1] | mask[1:], z[1:], z[:1])])
            assert 0.05 < (mask[0] | mask[1]).double().mean() < 0.95
    pipe.unet.set_attn_processor(before)
    return z


@pytest.mark.parametrize("plan", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_pipeline_is_the_loop_by_hand(plan, tmp_path):
    settings = {"clip_sample": False, "steps_offset": 1} if plan == "DDIMScheduler" else {}
    pipe = pipes.stable_diffusion(str(tmp_path), plan=pipes.scheduler(plan, **settings)).to(torch.float64)
    prompts, steps = [CAT, RED], 4
    it = PromptToPrompt(
        "refine", 0.6, 0.5, weights={"red": 1.5}, blend=[["cat"], ["cat"]], thresholds=(0.6, 0.3), blend_from=0.3,
        resolution=8, self_resolution=8,
    )  # fmt: skip
    noise = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    given = dict(steps=steps, guidance_scale=5.0, latents=noise)
    plain = pipes.sample(pipe, prompts, **given)
    with attnlib.attach(pipe, it):
        got = pipes.sample(pipe, prompts, **given)
    assert torch.equal(pipes.sample(pipe, prompts, **given), plain)
    if plan == "EulerDiscreteScheduler":
        alone = pipes.sample(pipe, CAT, **{**given, "latents": noise[:1]})
        torch.testing.assert_close(got[:1], alone, atol=1e-9, rtol=1e-9)
        return
    with torch.no_grad():
        truth = by_hand(pipe, prompts, it, noise, steps, 5.0)
    torch.testing.assert_close(got, truth, atol=1e-9, rtol=1e-9)
    assert (got[1] - plain[1]).abs().max() > 1e-2


def test_two_images_of_three_prompts_each_have_their_source(pipe):
    """Pairs as alone; the source is what it is without edits."""
    noise = torch.randn(2, 4, 16, 16)
    it = lambda: PromptToPrompt("refine", 0.7, 0.6, blend=["cat"], resolution=8, thresholds=(0.5, 0.3))  # noqa: E731
    with attnlib.attach(pipe, it()):
        three = pipes.sample(
            pipe, [CAT, RED, "a blue cat on a bench"], steps=2, num_images_per_prompt=2,
            latents=torch.cat([noise, torch.randn(4, 4, 16, 16)]),
        )  # fmt: skip
        alone = [pipes.sample(pipe, [CAT, RED], steps=2, latents=noise[[n, n]]) for n in range(2)]
    for n in range(2):
        torch.testing.assert_close(three[[n, 2 + n]], alone[n], atol=1e-4, rtol=1e-4)
    plain = pipes.sample(pipe, CAT, steps=2, latents=noise[:1])
    torch.testing.assert_close(three[:1], plain, atol=1e-4, rtol=1e-4)


def test_nothing_to_do_is_the_pipeline_and_all_steps_give_the_source(pipe):
    noise = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)
    prompts, state = [CAT, DOG], torch.get_rng_state()
    plain = pipes.sample(pipe, prompts, steps=2, latents=noise)
    with attnlib.attach(pipe, PromptToPrompt(cross=0.0, self_maps=0.0)):
        assert torch.equal(pipes.sample(pipe, prompts, steps=2, latents=noise), plain)
    # The same noise for both, whatever is drawn.
    with attnlib.attach(pipe, PromptToPrompt(cross=0.0, self_maps=0.0)):
        drawn = pipes.sample(pipe, prompts, steps=2)
    alone = pipes.sample(
        pipe, DOG, steps=2, latents=torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(3))[:1]
    )
    torch.testing.assert_close(drawn[1:], alone, atol=1e-4, rtol=1e-4)
    with attnlib.attach(pipe, PromptToPrompt(share_noise=False, cross=0.0, self_maps=0.0)):
        assert torch.equal(pipes.sample(pipe, prompts, steps=2), pipes.sample(pipe, prompts, steps=2))
    # Everything outside of an empty place is the source's.
    with attnlib.attach(
        pipe, PromptToPrompt(blend=[["cat"], ["dog"]], blend_from=0.0, thresholds=(2.0, 0.3), resolution=8)
    ):
        same = pipes.sample(pipe, prompts, steps=2, latents=noise)
    assert torch.equal(same[0], same[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_an_exception_in_mid_step_leaves_the_pipeline(pipe):
    plain = pipes.sample(pipe, [CAT, DOG], steps=2)

    class Fails(PromptToPrompt):
        def carried(self, *given):
            raise RuntimeError("in mid-step")

    with attnlib.attach(pipe, Fails()), pytest.raises(RuntimeError, match="in mid-step"):
        pipes.sample(pipe, [CAT, DOG], steps=2)
    assert torch.equal(pipes.sample(pipe, [CAT, DOG], steps=2), plain)


def test_sdxl_and_half_precision(tmp_path):
    xl = pipes.sdxl(str(tmp_path))
    given = dict(steps=2, height=16, width=16)
    half = pipes.stable_diffusion(str(tmp_path)).to(torch.bfloat16)
    for pipe, more in ((xl, given), (half, dict(steps=2))):
        plain = pipes.sample(pipe, [CAT, DOG], **more)
        with attnlib.attach(pipe, PromptToPrompt(blend=[["cat"], ["dog"]], resolution=8)):
            got = pipes.sample(pipe, [CAT, DOG], **more)
        assert got.isfinite().all() and got.dtype == plain.dtype and not torch.equal(got[1], plain[1])


def test_bad_input(pipe):
    def fails(it, match, prompts=(CAT, DOG), error=ValueError, **given):
        with attnlib.attach(pipe, it), pytest.raises(error, match=match):
            pipes.sample(pipe, list(prompts), steps=2, **given)

    fails(PromptToPrompt("replace"), "as many words for replacement; the source .* has 5, .* has 6", (CAT, RED))
    fails(PromptToPrompt(), "at least one edit of it", (CAT,))
    fails(PromptToPrompt(weights={"frog": 2.0}), "'frog' is not in the prompt")
    fails(PromptToPrompt(cross={"frog": 0.3}), "'frog' is not in the prompt")
    fails(PromptToPrompt(blend=["cat"], resolution=8), "'cat' is not in the prompt")
    fails(PromptToPrompt(blend=[["cat"]], resolution=8), "a list of them for each of 2 prompts")
    fails(
        PromptToPrompt(blend=[["cat"], ["dog"]], resolution=5), "no attention to the text was seen", error=RuntimeError
    )
    text = torch.randn(2, 77, 16)
    with attnlib.attach(pipe, PromptToPrompt()), pytest.raises(ValueError, match="given embeddings and no prompt"):
        pipes.sample(pipe, None, steps=1, prompt_embeds=text, negative_prompt_embeds=text)
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, PromptToPrompt())
    with pytest.raises(ValueError, match="does not hold the source of all of them"):
        Edited.of(("cond", "cond"), (1, 2), "PromptToPrompt")
    with pytest.raises(ValueError, match="edit="):
        PromptToPrompt("swap")
    with pytest.raises(ValueError, match="cross must be"):
        PromptToPrompt(cross=1.5)
    with pytest.raises(ValueError, match="two shares in order"):
        PromptToPrompt(self_maps=(0.5, 0.1))
    with pytest.raises(ValueError, match="name its words"):
        PromptToPrompt(subtract=["bench"])
    with pytest.raises(TypeError, match="blend must be a sequence of words"):
        PromptToPrompt(blend="cat")
    with pytest.raises(ValueError, match="blend must hold words"):
        PromptToPrompt(blend=[])
    with pytest.raises(TypeError, match="weights must be of words"):
        PromptToPrompt(weights={3: 2.0})

"""Structured diffusion guidance: the authors' attention from a fixture, and whole pipelines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models import attention_processor as processors  # noqa: E402

import attnlib  # noqa: E402
from attnlib.steer import StructuredGuidance  # noqa: E402
from attnlib.steer.diffusion.structured_guidance import paste  # noqa: E402
from hooks import pipes  # noqa: E402
from hooks.models import Watch  # noqa: E402

PROMPT = "a red circle and a blue square"
PHRASES = ["a red circle", "a blue square"]
SPANS = {"a red circle": [1, 2, 3], "a blue square": [5, 6, 7]}
RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "structured-diffusion-guidance.safetensors")


# ---- the authors' attention


def authors_layer():
    attn = processors.Attention(query_dim=8, cross_attention_dim=12, heads=2, dim_head=4).double().eval()
    weights = {n.removeprefix("weights."): p for n, p in RECORDED.items() if n.startswith("weights.")}
    attn.load_state_dict(weights, strict=True)
    return attn


def pasted():
    """The embeddings of each phrase in the prompt's, and of all of them: per prompt (J, 2, 9, 12)."""
    full, (one, two) = RECORDED["full"], RECORDED["phrases"]
    first = torch.stack([paste(f, p, [1, 2, 3], [1, 2, 3]) for f, p in zip(full, one, strict=True)])
    second = torch.stack([paste(f, p, [5, 6], [1, 2]) for f, p in zip(full, two, strict=True)])
    whole = torch.stack([paste(f, p, [5, 6], [1, 2]) for f, p in zip(first, two, strict=True)])
    return full, first, second, whole


def test_pasted_rows_are_the_authors():
    full, first, second, whole = pasted()
    for n, ours in enumerate((full, first, second)):
        assert torch.equal(ours, RECORDED[f"phrases.v{n}"])
    for n, ours in enumerate((whole, first, second)):  # pasting wrote into the first
        assert torch.equal(ours, RECORDED[f"conjunction.k{n}"])
    assert torch.equal(whole, RECORDED["conjunction.v"])
    # Only rows of the span differ.
    assert (first != full).any(-1).sum(1).tolist() == [3, 3] and torch.equal(first[:, 4:], full[:, 4:])
    with pytest.raises(ValueError, match="as many tokens, got 1 and 2"):
        paste(full[0], full[0], [1], [1, 2])


@pytest.mark.parametrize("mode", ["phrases", "conjunction"])
def test_outputs_and_gradients_are_the_authors(mode):
    full, first, second, whole = pasted()
    some = (
        (torch.stack([full, first, second]).mean(0),)
        if mode == "phrases"
        else (whole, torch.stack([whole, first, second]))
    )

    class Given(StructuredGuidance):
        def on_attach(self, session):
            pass

        def around_denoiser(self, site, inputs, call):
            return call(inputs)

        def variants(self, site):
            return tuple(torch.cat([t, t], -3) for t in some)

    attn, x = authors_layer(), RECORDED["x"].clone().requires_grad_()
    context = torch.cat([RECORDED["uncond"], full])
    rows = ("uncond",) * 2 + ("cond",) * 2
    with attnlib.attach(attn, Given(PHRASES, mode=mode), rows=rows):
        out = attn(x, encoder_hidden_states=context)
    (slope,) = torch.autograd.grad((out * RECORDED["grad"]).sum(), x)
    torch.testing.assert_close(out, RECORDED[f"{mode}.out"], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(slope, RECORDED[f"{mode}.grad"], atol=1e-12, rtol=1e-9)
    plain = attn(x, encoder_hidden_states=context)
    torch.testing.assert_close(plain, RECORDED["plain.out"], atol=1e-12, rtol=1e-9)
    assert torch.equal(out[:2], plain[:2]) and (out[2:] - plain[2:]).abs().max() > 1e-3


# ---- whole pipelines


def embedding(pipe, text):
    return pipe.encode_prompt(text, "cpu", 1, False)[0][0]


def variants(pipe, prompt=PROMPT, phrases=PHRASES):
    full = embedding(pipe, prompt)
    found, whole = [full], full
    for phrase in phrases:
        at = SPANS[phrase]
        alone = embedding(pipe, phrase)
        new = full.clone()
        new[at] = alone[1 : 1 + len(at)]
        found.append(new)
        whole = whole.clone()
        whole[at] = alone[1 : 1 + len(at)]
    return torch.stack(found), whole


def test_values_are_those_of_the_mean_embedding_in_a_pipeline(pipe):
    """Two prompts, two images of each; unconditional rows and the second prompt, without phrases, keep their bits."""
    given = dict(steps=1, num_images_per_prompt=2)
    prompts = [PROMPT, "a dog"]
    plain, mine = Watch([1]), Watch([1])
    with attnlib.attach(pipe, plain):
        pipes.sample(pipe, prompts, **given)
    with attnlib.attach(pipe, StructuredGuidance([PHRASES, []]), mine):
        pipes.sample(pipe, prompts, **given)
    (site, q, k, v, _), (_, q1, k1, v1, out) = plain.calls[0], mine.calls[0]
    assert torch.equal(q, q1) and torch.equal(k, k1)
    same = [i for i in range(8) if i not in (4, 5)]
    assert torch.equal(v[same], v1[same]) and (v[4:6] - v1[4:6]).abs().max() > 1e-3
    # The mean of the outputs of all variants, one by one.
    every, _ = variants(pipe)
    attn = site.module
    weights = (q[4] @ k[4].transpose(-1, -2) * site.scale).softmax(-1)
    each = [weights @ attn.to_v(c).unflatten(-1, (site.heads, -1)).transpose(0, 1) for c in every]
    torch.testing.assert_close(out[4], torch.stack(each).mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compat", [None, "authors"])
def test_conjunction_in_a_pipeline(pipe, compat):
    plain, mine = Watch([1]), Watch([1])
    with attnlib.attach(pipe, plain):
        pipes.sample(pipe, PROMPT, steps=1)
    it = StructuredGuidance(PHRASES, mode="conjunction", compat=compat)
    outs = []
    watch = Watch([1])
    watch.on_output = lambda site, out: (outs.append(out), out)[1]
    with attnlib.attach(pipe, it, mine):
        pipes.sample(pipe, PROMPT, steps=1)
    assert len(mine.calls) == 3  # keys of the prompt, and of each phrase
    site, q, k, v, out = plain.calls[0]
    every, whole = variants(pipe)
    keys = [whole if compat and n == 0 else c for n, c in enumerate(every)]
    split = lambda t: t.unflatten(-1, (site.heads, -1)).transpose(0, 1)  # noqa: E731
    values = split(site.module.to_v(whole))
    for (_, _, k1, v1, got), c in zip(mine.calls, keys, strict=True):
        truth = (q[1] @ split(site.module.to_k(c)).transpose(-1, -2) * site.scale).softmax(-1) @ values
        torch.testing.assert_close(got[1], truth, atol=1e-5, rtol=1e-5)
        assert torch.equal(k1[0], k[0]) and torch.equal(v1[0], v[0]) and torch.equal(got[0], out[0])


def test_nothing_to_do_is_the_pipeline(pipe):
    plain, state = pipes.sample(pipe, steps=2), torch.get_rng_state()
    with attnlib.attach(pipe, StructuredGuidance([])) as session:
        assert not session.attached and torch.equal(pipes.sample(pipe, steps=2), plain)
    # The whole prompt is no phrase of it.
    with attnlib.attach(pipe, StructuredGuidance(parser=lambda text: [text.upper(), "of"])):
        assert torch.equal(pipes.sample(pipe, "A red circle", steps=2), pipes.sample(pipe, "A red circle", steps=2))
    with attnlib.attach(pipe, StructuredGuidance(PHRASES)):
        changed = pipes.sample(pipe, steps=2)
        assert torch.equal(pipes.sample(pipe, steps=2), changed)
    assert (changed - plain).abs().max() > 1e-4 and torch.equal(pipes.sample(pipe, steps=2), plain)
    assert torch.equal(torch.get_rng_state(), state)
    with attnlib.attach(pipe, StructuredGuidance(parser=lambda text: PHRASES)):
        assert torch.equal(pipes.sample(pipe, steps=2), changed)


def test_both_encoders_of_sdxl_and_half_precision(tmp_path, pipe):
    xl = pipes.sdxl(str(tmp_path))
    given = dict(steps=1, height=16, width=16)
    plain = pipes.sample(xl, PROMPT, **given)
    with attnlib.attach(xl, StructuredGuidance(PHRASES)):
        assert (pipes.sample(xl, PROMPT, **given) - plain).abs().max() > 1e-5
    half = pipes.stable_diffusion(str(tmp_path)).to(torch.bfloat16)
    plain = pipes.sample(half, steps=1)
    for mode in ("phrases", "conjunction"):
        with attnlib.attach(half, StructuredGuidance(PHRASES, mode=mode)):
            got = pipes.sample(half, steps=1)
        assert got.dtype == torch.bfloat16 and got.isfinite().all() and not torch.equal(got, plain)


def test_bad_input(pipe):
    def fails(it, match, error=ValueError, prompt=PROMPT, **given):
        with attnlib.attach(pipe, it), pytest.raises(error, match=match):
            pipes.sample(pipe, prompt, steps=1, **given)

    fails(StructuredGuidance(["a green cat"]), "'a green cat' is not in the prompt")
    fails(StructuredGuidance([["a red circle"], ["a dog"]]), "for each of 1 prompts")
    fails(StructuredGuidance(["of a dog"]), "beyond the 77 tokens", prompt="a circle " + "in " * 80 + "of a dog")
    fails(StructuredGuidance(parser=lambda text: ["two dogs"]), "which is not in the prompt")
    fails(
        StructuredGuidance([["a red circle"], []], mode="conjunction"), "as many phrases of every prompt",
        prompt=[PROMPT, "a dog"],
    )  # fmt: skip
    text = torch.randn(1, 77, 16)
    fails(
        StructuredGuidance(PHRASES), "given embeddings and no prompt", prompt=None, prompt_embeds=text,
        negative_prompt_embeds=text,
    )  # fmt: skip
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, StructuredGuidance(PHRASES))
    with pytest.raises(ValueError, match="acts on cross attention, but nothing of this model fits"):
        attnlib.attach(pipes.dit(), StructuredGuidance(PHRASES))
    with pytest.raises(ValueError, match="either phrases of the prompt, or a parser"):
        StructuredGuidance()
    with pytest.raises(TypeError, match="sequence of phrases"):
        StructuredGuidance("a red circle")
    with pytest.raises(ValueError, match="mode='mean'"):
        StructuredGuidance(PHRASES, mode="mean")

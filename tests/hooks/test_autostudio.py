"""AutoStudio: the authors' attention and layouts from a fixture, whole pipelines, latents of subjects, turns."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models import attention_processor as processors  # noqa: E402

import attnlib  # noqa: E402
from attnlib.steer import AutoStudio, Scene, Studio, Subject, SubjectLatents  # noqa: E402
from attnlib.steer.diffusion.autostudio import compose, layout_weights  # noqa: E402
from attnlib.steer.diffusion.references import ReferenceMaps  # noqa: E402
from hooks import pipes  # noqa: E402

RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "autostudio.safetensors")
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
SCENE = Scene("a bench", [Subject("a red circle", LEFT, "circle"), Subject("a blue square", RIGHT, "square")])


# ---- the authors' code


class Given(AutoStudio):
    """Texts as they are given, and a grid that the layer's tokens do not say."""

    def on_attach(self, session):
        pass

    def around_denoiser(self, site, inputs, call):
        return call(inputs)

    def texts(self):
        return RECORDED["texts"][1:]


@pytest.mark.parametrize("name, have", [("all", [1, 1]), ("one", [0, 1])])
def test_attention_is_the_authors(name, have, monkeypatch):
    """Both halves, conditional rows first, as they have them; the background of images, too."""
    monkeypatch.setattr("attnlib.steer.diffusion.autostudio.image_grid", lambda site: (4, 8))
    weights = {n[8:]: p for n, p in RECORDED.items() if n.startswith("weights.")}
    attn = processors.Attention(query_dim=8, cross_attention_dim=12, heads=2, dim_head=4).eval()
    attn.load_state_dict({n: p for n, p in weights.items() if not n.startswith("processor.")}, strict=True)
    maps = ReferenceMaps(12, 8)
    maps.load_state_dict({n[10:]: p for n, p in weights.items() if n.startswith("processor.")}, strict=True)
    it = Given({"": maps}, scale=0.7, compat="authors")
    it.layers, it.at = None, lambda site: it.maps[0]
    it.stage(SCENE, tuple(RECORDED["mask"]))
    it.refer(RECORDED["images"][None, 2:], RECORDED["empty"][None], have)
    context = torch.cat([RECORDED["texts"][:1], RECORDED["negative"]])
    with torch.no_grad(), attnlib.attach(attn, it, rows=("cond", "uncond")):
        out = attn(RECORDED["x"], encoder_hidden_states=context)
    torch.testing.assert_close(out, RECORDED[f"{name}.out"], atol=1e-5, rtol=1e-5)
    if name == "one":  # ours leaves the subject without a reference out of both halves
        it.compat = None
        with torch.no_grad(), attnlib.attach(attn, it, rows=("cond", "uncond")):
            ours = attn(RECORDED["x"], encoder_hidden_states=context)
        torch.testing.assert_close(ours[0], out[0], atol=1e-5, rtol=1e-5)
        assert (ours[1] - out[1]).abs().max() > 1e-3
    with torch.no_grad():  # behind their last step of branches the prompt alone is read
        plain = attn(RECORDED["x"], encoder_hidden_states=context)
    torch.testing.assert_close(plain, RECORDED["after.out"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, fuse", [("run", (1.2, 0)), ("default", (1, 0)), ("both", (0.5, 0.25))])
def test_layouts_are_the_authors(name, fuse):
    boxes = [
        (x / 32, y / 24, (x + w) / 32, (y + h) / 24) for x, y, w, h in ((2, 4, 12, 15), (10, 2, 15, 20), (25, 10, 5, 6))
    ]
    text, image = layout_weights(boxes, (24, 32), fuse[0], 0.3, fuse[1], compat="authors")
    truth = RECORDED[f"layout.{name}"]
    torch.testing.assert_close(text, truth[0])
    torch.testing.assert_close(image, truth[1])
    ours, same = layout_weights(boxes, (24, 32), fuse[0], 0.3, fuse[1])
    assert torch.equal(same, image) and (ours >= 0).all()
    torch.testing.assert_close(ours.sum(0), torch.ones(24, 32))
    assert bool((text < -0.1).any()) == (fuse[0] + 0.3 > 1.1)  # theirs is negative in boxes


# ---- whole pipelines


def studio(pipe, scene=SCENE, have=(True, True), seed=0, weights=None, **settings):
    it = AutoStudio.of(pipe.unet, **settings).stage(scene, weights)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in it.maps.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    width = pipe.unet.config.cross_attention_dim
    return it if have is None else it.refer(torch.randn(1, len(scene.subjects), 3, width), have=have)


def draw(pipe, it, prompt=None, steps=2, **given):
    prompt = prompt or SCENE.prompt
    if it is None:
        return pipes.sample(pipe, prompt, steps=steps, **given)
    with attnlib.attach(pipe, it):
        return pipes.sample(pipe, prompt, steps=steps, **given)


def test_branches_that_add_nothing_are_the_pipeline(pipe):
    plain = draw(pipe, None)
    # The whole prompt alone.
    alone = torch.zeros(4, 4, 4)
    alone[0] = 1
    assert torch.equal(draw(pipe, studio(pipe, have=None, weights=(alone, alone * 0))), plain)
    # The same text everywhere, with weights that sum to one.
    same = Scene(SCENE.prompt, [Subject(SCENE.prompt, s.box) for s in SCENE.subjects])
    torch.testing.assert_close(draw(pipe, studio(pipe, same, have=None)), plain, atol=1e-5, rtol=1e-5)
    # Subjects without references, and no strength.
    texts = draw(pipe, studio(pipe, have=None))
    assert (texts - plain).abs().max() > 1e-4
    torch.testing.assert_close(draw(pipe, studio(pipe, have=(False, False))), texts, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(draw(pipe, studio(pipe, scale=0.0)), texts, atol=1e-6, rtol=1e-6)
    assert (draw(pipe, studio(pipe)) - texts).abs().max() > 1e-4
    # Branches of the first step alone.
    early = draw(pipe, studio(pipe, step_range=(0.0, 0.5)))
    assert not torch.equal(early, draw(pipe, studio(pipe))) and torch.equal(draw(pipe, None), plain)


class Look(attnlib.hooks.Intervention):
    kinds, layers = ("cross",), ["down_blocks.0*"]

    def __init__(self):
        self.calls = []

    def around_attention(self, site, q, k, v, call):
        self.calls.append((site, q, k, v, call(q, k, v)))
        return self.calls[-1][-1]


def looked(pipe, it, **given):
    look = Look()
    with attnlib.attach(pipe, look, it):
        pipes.sample(pipe, SCENE.prompt, steps=1, **given)
    return look.calls[0]


def test_a_layer_is_the_equation(pipe):
    """Two images; texts and references by the layer's own maps, both halves."""
    it = studio(pipe, scale=0.7, background=0.5)
    site, q, k, v, out = looked(pipe, it, num_images_per_prompt=2)
    text, image = (w.flatten(1) for w in layout_weights([LEFT, RIGHT], (16, 16), background=0.5))
    attend = torch.nn.functional.scaled_dot_product_attention
    module, (images, empty) = site.module, it.tokens()
    maps = it.at(site)

    def branch(row, tokens, to_k, to_v):
        keys, values = (f(tokens).unflatten(-1, (site.heads, -1)).transpose(0, 1) for f in (to_k, to_v))
        return attend(q[row : row + 1], keys[None], values[None])[0]

    names = ["a bench", "a red circle", "a blue square"]
    contexts = [pipe.encode_prompt(name, "cpu", 1, False)[0][0] for name in names]
    for row in range(4):
        whole = attend(q[row : row + 1], k[row : row + 1], v[row : row + 1])[0]
        if row >= 2:
            parts = [whole, *(branch(row, c, module.to_k, module.to_v) for c in contexts)]
            truth = sum(w[:, None] * part for w, part in zip(text, parts, strict=True))
            truth = truth + 0.7 * image[1][:, None] * parts[1]
        else:
            truth = whole + 0.7 * image[1][:, None] * whole
        for s in range(2):
            e = images[0, s] if row >= 2 else empty[0, s]
            truth = truth + 0.7 * image[2 + s][:, None] * branch(row, e, maps.to_k_ip, maps.to_v_ip)
        torch.testing.assert_close(out[row], truth, atol=1e-5, rtol=1e-5)


def test_another_subject_changes_no_bit_where_it_is_not(pipe):
    other = Scene("a bench", [SCENE.subjects[0], Subject("a green dog", RIGHT, "square")])
    one, two = looked(pipe, studio(pipe))[-1], looked(pipe, studio(pipe, other))[-1]
    left = (torch.arange(16) < 8).expand(16, 16).flatten()
    assert torch.equal(one[:, :, left], two[:, :, left]) and (one[1][:, ~left] - two[1][:, ~left]).abs().max() > 1e-3


def test_other_pipelines(pipe, tmp_path):
    before = pipe.scheduler
    pipe.scheduler = pipes.scheduler("EulerDiscreteScheduler")
    assert draw(pipe, studio(pipe), guidance_scale=1.0).isfinite().all()
    pipe.scheduler = before
    half = pipes.stable_diffusion(str(tmp_path)).to(torch.bfloat16)
    got = draw(half, studio(half), steps=1)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    xl, given = pipes.sdxl(str(tmp_path)), dict(steps=1, height=16, width=16)
    assert (draw(xl, studio(xl), **given) - draw(xl, None, **given)).abs().max() > 1e-5

    class Fails(attnlib.hooks.Intervention):
        kinds, layers = ("cross",), ["up_blocks.1*"]

        def on_output(self, site, out):
            raise RuntimeError("stop")

    plain = draw(pipe, None)
    with attnlib.attach(pipe, studio(pipe, have=None), Fails()), pytest.raises(RuntimeError, match="stop"):
        pipes.sample(pipe, SCENE.prompt, steps=1)
    assert torch.equal(draw(pipe, None), plain)


# ---- latents of subjects


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_subjects_lead_the_first_steps(pipe, name):
    """What the denoiser reads, and what the scheduler steps on from."""
    before = pipe.scheduler
    pipe.scheduler = pipes.scheduler(name)
    clean, mask, read = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.zeros(16, 16), []
    mask[2:9, 3:12] = 1

    class Reads(attnlib.hooks.Intervention):
        def around_denoiser(self, site, inputs, call):
            read.append(inputs["sample"] / site.sampling.scale)
            return call(inputs)

    try:
        with attnlib.attach(pipe, Reads()):
            plain = pipes.sample(pipe, SCENE.prompt, steps=3)
        state = torch.get_rng_state()
        with attnlib.attach(pipe, SubjectLatents(clean, mask, steps=2), Reads()):
            led = pipes.sample(pipe, SCENE.prompt, steps=3)
        assert torch.equal(torch.get_rng_state(), state)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        first = pipe.scheduler.add_noise(clean[None], noise, pipe.scheduler.timesteps[:1])
        truth = read[0] * (1 - mask) + mask * (0.2 * read[0] + 0.8 * first)
        torch.testing.assert_close(read[3], truth, atol=1e-5, rtol=1e-5)
        assert (led - plain).abs().max() > 1e-2
        with attnlib.attach(pipe, SubjectLatents(clean, mask, share=0.0)) as session:
            assert not session.acting("around_denoiser") and torch.equal(
                pipes.sample(pipe, SCENE.prompt, steps=3), plain
            )
        # All of it, at every step: the last step goes on from the clean latents with its noise.
        if name == "DDIMScheduler":
            with attnlib.attach(pipe, SubjectLatents(clean, mask * 0 + 1, steps=3, share=1.0), Reads()):
                pipes.sample(pipe, SCENE.prompt, steps=3)
            last = pipe.scheduler.add_noise(clean[None], noise, pipe.scheduler.timesteps[2:])
            torch.testing.assert_close(read[-1], last.expand(2, -1, -1, -1), atol=1e-5, rtol=1e-5)
    finally:
        pipe.scheduler = before


def test_subjects_are_cut_out_and_fitted():
    pictures, masks = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8)
    masks[0, 2:6, 1:3], masks[1, 0:4, 0:4] = 1, 1  # four high and two wide; four by four
    pictures[0][:, 2:6, 1:3], pictures[1][:, 0:4, 0:4] = 1.0, 2.0
    out, taken = compose(pictures, masks, [(0, 0, 0.5, 0.5), (0.25, 0.25, 1, 1)], (16, 16))
    assert taken[:8, :4].all() and not taken[:8, 4:8][:4].any()  # proportions stay, in the corner
    assert torch.equal(out[:, :8, :4], torch.ones(3, 8, 4))  # what was first stays
    assert taken[4:16, 4:16].all() and torch.equal(out[:, 8:16, 4:16], torch.full((3, 8, 12), 2.0))
    with pytest.raises(ValueError, match="nothing is cut out"):
        compose(pictures, masks * 0, [LEFT, RIGHT], (16, 16))


# ---- turns


def test_subjects_are_remembered_from_turn_to_turn(pipe):
    it = studio(pipe, have=None)
    asked, looked_over = [], []

    def direct(said, scenes):
        asked.append((said, len(scenes)))
        return Scene(said, [Subject("a circle", RIGHT, "circle"), Subject("a dog", (0, 0, 0.25, 1))])

    def review(scene):
        looked_over.append(scene)
        moved = [Subject(s.prompt, LEFT, s.name) if s.name else s for s in scene.subjects]
        return None if len(looked_over) % 2 == 0 else Scene(scene.background, moved)

    def remember(picture, subject):
        return torch.full((3, 16), 0.5) if subject.name == "circle" else None

    team = Studio(pipe, it, direct, review, remember=remember)
    given = dict(num_inference_steps=1, output_type="latent")
    team.turn("a bench", generator=torch.Generator().manual_seed(0), **given)
    assert list(team.references) == ["circle"] and not it.references
    assert team.scenes[0].subjects[0].box == LEFT
    one = team.turn("a crown", generator=torch.Generator().manual_seed(0), **given)
    assert asked == [("a bench", 0), ("a crown", 1)] and it.have == [True, False] and len(looked_over) == 4
    team.references.clear()
    two = team.turn("a crown", generator=torch.Generator().manual_seed(0), **given)
    assert (one - two).abs().max() > 1e-5
    with pytest.raises(TypeError, match="direct must be a function"):
        Studio(pipe, it, "a language model")
    with pytest.raises(TypeError, match="what direct gives"):
        Studio(pipe, it, lambda said, scenes: said).turn("a bench")


def test_bad_input(pipe):
    def fails(it, match, error=ValueError, **given):
        with pytest.raises(error, match=match):
            draw(pipe, it, **given)

    fails(AutoStudio.of(pipe.unet), "has no scene", RuntimeError)
    fails(studio(pipe).refer(torch.randn(1, 3, 3, 16)), "3 references for 2 subjects")
    fails(studio(pipe), "called with 2 prompts", prompt=["a dog", "a cat"])
    with pytest.raises(ValueError, match="no subjects"):
        AutoStudio.of(pipe.unet).stage(Scene("a bench"))
    with pytest.raises(ValueError, match=r"weights must be \(2 \+ 2, H, W\)"):
        studio(pipe, weights=(torch.ones(3, 4, 4), torch.ones(4, 4, 4)))
    with pytest.raises(TypeError, match=r"weights\[0\] must be a torch.Tensor, got .text."):
        studio(pipe, weights=("text", "image"))
    with pytest.raises(TypeError, match=r"subjects\[0\] must be Subject, got 'a dog'"):
        Scene("a bench", ["a dog"])
    with pytest.raises(ValueError, match="box must be"):
        Subject("a dog", (0.5, 0, 0.2, 1))
    with pytest.raises(ValueError, match="have must say it of each of 2"):
        studio(pipe, have=[True])
    with pytest.raises(ValueError, match="attach to the pipeline"):
        attnlib.attach(pipe.unet, studio(pipe))
    with pytest.raises(ValueError, match="stage one scene"):
        attnlib.attach(pipe, studio(pipe), studio(pipe))
    with pytest.raises(ValueError, match="both move the latents"):
        some = SubjectLatents(torch.zeros(4, 16, 16), torch.ones(16, 16))
        attnlib.attach(pipe, some, attnlib.steer.AStar(("circle", "square")))
    with pytest.raises(ValueError, match="latents must be"):
        SubjectLatents(torch.zeros(4, 16, 16), torch.ones(8, 8))
    fails(SubjectLatents(torch.zeros(4, 8, 8), torch.ones(8, 8)), "denoises 1 of")

"""RealCustom and RealCustom++: the authors' attention, masks and projectors from a fixture, and whole pipelines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models import attention_processor as processors  # noqa: E402

import attnlib  # noqa: E402
from attnlib.steer import RealCustom  # noqa: E402
from attnlib.steer.diffusion.realcustom import (  # noqa: E402
    AdaptiveScoring,
    CrossScaleProjector,
    cascaded_guidance,
    guidance_mask,
    keep_best,
)
from attnlib.steer.diffusion.references import ReferenceMaps  # noqa: E402
from hooks import pipes  # noqa: E402

PROMPT = "a red circle and a blue square"
RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "realcustom-plus-plus.safetensors")
GUIDED = load_file(Path(__file__).parent.parent / "fixtures" / "realcustom-guidance.safetensors")


def part(prefix):
    return {name[len(prefix) :]: t for name, t in RECORDED.items() if name.startswith(prefix)}


# ---- the authors' code


class Given(RealCustom):
    """Masks as they are given, at the layer's own grid or at half of it."""

    def around_denoiser(self, site, inputs, call):
        return call(inputs)

    def weigh(self, site, q, out):
        from attnlib.steer.diffusion.regions import resized

        return resized(self.mask, (4, 8)).flatten(-2)


def authors_layer(mask):
    weights = part("attn.weights.")
    attn = processors.Attention(query_dim=8, cross_attention_dim=12, heads=2, dim_head=4).eval()
    attn.load_state_dict({n: p for n, p in weights.items() if "vision" not in n}, strict=True)
    it = Given({"": ReferenceMaps(12, 8)}, ["circle"] * mask.shape[1])
    left = it.load_authors({f".{n}": p for n, p in weights.items() if "vision" in n} | {
        "encoder_hidden_states_vision_projection.x": mask})  # fmt: skip
    assert list(left) == ["x"]
    it.mask, it.layers = mask, None
    it.at = lambda site: it.maps[0]
    return attn, it


@pytest.mark.parametrize(
    "name, mask, tokens",
    [
        ("text", None, "e"),
        ("whole", "ones", "e"),
        ("masked", "mask", "e"),
        ("halved", "half", "e"),
        ("two", "mask2", "e2"),
    ],
)
def test_attention_and_gradients_are_the_authors(name, mask, tokens):
    r = part("attn.")
    some = torch.zeros(2, 1, 4, 8) if mask is None else torch.ones(2, 1, 4, 8) if mask == "ones" else r[mask]
    attn, it = authors_layer(some)
    e = r[tokens]
    it.refer(e[:, None] if e.dim() == 3 else e)
    x = r["x"].clone().requires_grad_()
    with attnlib.attach(attn, it, rows=("cond", "cond")):
        out = attn(x, encoder_hidden_states=r["c"])
    (slope,) = torch.autograd.grad((out * r["grad"]).sum(), x)
    torch.testing.assert_close(out, r[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slope, r[name + ".grad"], atol=1e-5, rtol=1e-5)


def test_masks_are_the_authors():
    maps = [t[:, :, 2:4].mean(1).sum(1) for _, t in sorted(part("mask.cross.").items())]
    between = [t[:, 0] for _, t in sorted(part("mask.self.").items())]
    recorded = part("mask.out.")
    assert len(recorded) == 40
    for mode, truth in recorded.items():
        words = mode.split("+")
        pairs = next((w for w in words if w.startswith("selfmap")), None)
        if words[0] == "none":  # their code does not refine a mean that it leaves as it is
            pairs = None
        keep = "threshold" if "threshold" in words else "top"
        got = guidance_mask(
            maps, (4, 6), 0.25, "mean" if words[0] == "none" else words[0], keep,
            "binary" in words, between if pairs else (), None if pairs is None else pairs[8:] or "mean",
        )  # fmt: skip
        torch.testing.assert_close(got, truth[:, 0], atol=1e-12, rtol=1e-9, msg=lambda m, mode=mode: f"{mode}: {m}")
        if "threshold" not in words:
            assert ((got != 0).flatten(1).sum(1) == 6).all()  # floor(0.25 * 24)


def test_maps_between_places_of_another_size_are_stretched_as_the_authors():
    maps, between = ([GUIDED[f"{of}/{i}"] for i in (0, 1)] for of in ("cross", "self"))
    for name, truth in GUIDED.items():
        if not name.startswith("mask/"):
            continue
        words = name.removeprefix("mask/").split("+")
        how = next((w[8:] for w in words if w.startswith("selfmap")), "mean")
        got = guidance_mask(
            maps, (6, 4), 0.25, words[0], binary="binary" in words, between=between, self_maps=how, compat="authors"
        )
        torch.testing.assert_close(got, truth, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="weights of 24 places"):
        guidance_mask(maps, (6, 4), between=between)


def test_guidance_by_text_and_references_is_the_authors():
    u, t, b, mask = (GUIDED[name] for name in ("uncond", "text", "both", "mask"))
    given = {
        "none": dict(text=t, text_scale=3.0), "none_direct": {},
        "naive": dict(text=t, text_scale=3.0, rescale=0.7, mask=mask),
        "naive_global": dict(text=t, text_scale=3.0, rescale=0.7), "naive_global_direct": dict(rescale=0.7),
    }  # fmt: skip
    for mode, settings in given.items():
        torch.testing.assert_close(
            cascaded_guidance(u, b, scale=5.0, **settings), GUIDED[f"cascade/{mode}"], atol=1e-12, rtol=1e-12
        )
    for wrong, match in (
        (dict(text=t[:1]), r"text must be \(2, 3, 4, 5\)"), (dict(mask=mask), "text is None"),
        (dict(text_scale=1.0), "text is None"), (dict(rescale=2.0), "rescale"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            cascaded_guidance(u, b, **wrong)


def test_masks_depend_on_the_word_alone_and_keep_so_many_places():
    generator = torch.Generator().manual_seed(0)
    for scope in (0.1, 0.25, 0.29, 0.5, 1.0):
        mask = guidance_mask([torch.rand(3, 10, 10, generator=generator)], (10, 10), scope, binary=True)
        assert mask.flatten(1).sum(1).tolist() == [round(scope * 100)] * 3
    with pytest.raises(ValueError, match="strategy='best'"):
        guidance_mask([mask], (5, 5), strategy="best")
    with pytest.raises(ValueError, match="weights of 25 places"):
        guidance_mask([mask], (5, 5), between=[torch.ones(3, 16, 16)])
    with pytest.raises(ValueError, match="maps is empty"):
        guidance_mask([], (5, 5))


@pytest.mark.parametrize("name", ["deep", "scaled", "shallow"])
def test_projectors_are_the_authors(name):
    r = part(f"{name}.")
    settings = dict(adaptive_scale=name == "scaled", shallow=name == "shallow")
    project = CrossScaleProjector(8, 6, head_dim=4, compat="authors", **settings).double()
    project.load_state_dict(part(f"{name}.weights."), strict=True)
    shallow = [r[f"shallow.{i}"] for i in range(3)] if name == "shallow" else ()
    deep = r["deep"].requires_grad_()
    out = project(deep, r["local"], shallow)
    (slope,) = torch.autograd.grad((out * r["grad"]).sum(), deep)
    torch.testing.assert_close(out, r["out"], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(slope, r["slope"], atol=1e-12, rtol=1e-9)
    if name == "shallow":  # the release leaves the fusion with the crops out
        project.compat = None
        ours = project(deep, r["local"], shallow)
        assert torch.equal(ours[:, 4:], out[:, 4:]) and (ours[:, :4] - out[:, :4]).abs().max() > 0.1
        with pytest.raises(ValueError, match="shallow=True, but 0 shallow"):
            project(deep, r["local"])
        with pytest.raises(ValueError, match="crops has 4 channels .* dim=8"):
            project(deep, r["local"][..., :4], shallow)


def test_the_released_projector_has_its_size():
    with torch.device("meta"):
        count = sum(p.numel() for p in CrossScaleProjector().parameters())
    mlp = 2176 * 8704 + 8704 + 8704 * 2048 + 2048 + 2048 * 2048 + 2048 + 2 * 2048
    assert count == 4 * 2176 + 3 * 2176**2 + mlp + 2176 * 2048 + 2048


# ---- adaptive scoring


def test_so_many_tokens_are_kept_and_scores_learn():
    torch.manual_seed(0)
    score = AdaptiveScoring(8, 6, hidden=5).double()
    text, visual, tokens = (torch.randn(2, n, w, dtype=torch.float64) for n, w in ((7, 8), (9, 8), (20, 6)))
    tokens = tokens[:, None]
    # At the start all tokens score alike: all of them are read as they are.
    torch.testing.assert_close(keep_best(tokens, score(text, visual, tokens, 0.3), 1.0), tokens)
    torch.nn.init.normal_(score.feature.weight)
    s = score(text, visual, tokens, 0.3)
    truth = 0
    for w, reader, source in ((0.3, score.text, text), (0.7, score.visual, visual)):
        every = torch.einsum("bnd,brtd->brnt", reader(source), score.feature(tokens)) * 5**-0.5
        truth = truth + w * every.mean(2).softmax(-1)
    torch.testing.assert_close(s, truth, atol=1e-12, rtol=1e-9)
    for ratio, count in ((0.3, 6), (0.29, 5), (0.8, 16), (1.0, 20)):
        kept = keep_best(tokens, s, ratio)
        assert kept.shape == (2, 1, count, 6)
        for b in range(2):
            best = s[b, 0].argsort(descending=True)[:count].sort().values
            torch.testing.assert_close(kept[b, 0], tokens[b, 0, best] * 20 * s[b, 0, best, None])
    for p in score.parameters():
        (slope,) = torch.autograd.grad(keep_best(tokens, score(text, visual, tokens, 0.3), 0.5).square().sum(), p)
        assert slope.abs().max() > 0
    with pytest.raises(ValueError, match="keeps none of 20 tokens"):
        keep_best(tokens, s, 0.04)
    with pytest.raises(ValueError, match="visual has 6 channels .* dim=8"):
        score(text, tokens[:, 0], tokens, 0.3)


# ---- whole pipelines


def custom(pipe, words=("circle",), seed=0, **settings):
    it = RealCustom.of(pipe.unet, words=list(words), **settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in it.maps.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return it.refer(torch.randn(1, len(words), 3, 16))


class Count(attnlib.hooks.Intervention):
    """Rows of every run of the model."""

    def __init__(self):
        self.rows = []

    def around_denoiser(self, site, inputs, call):
        self.rows.append((site.step, site.rows))
        return call(inputs)


def test_a_guided_step_runs_three_rows_and_a_later_one_two(pipe):
    count = Count()
    with attnlib.attach(pipe, custom(pipe, guided_steps=1), count):
        pipes.sample(pipe, PROMPT, steps=3)
    both = ("uncond", "cond")
    assert count.rows == [(0, ("cond",)), (0, both), (1, both), (2, both)]
    count = Count()
    with attnlib.attach(pipe, custom(pipe, guided_steps=None), count):
        pipes.sample(pipe, PROMPT, steps=2)
    assert [sum(len(rows) for step, rows in count.rows if step == s) for s in (0, 1)] == [3, 3]


def test_the_mask_is_that_of_the_words(pipe):
    """Two prompts, two images of each, two references; masks from the plain maps of each image."""
    prompts = [PROMPT, "a dog and a blue square"]
    words = [["circle", "square"], ["dog", "square"]]
    kept = {}

    class Layers(attnlib.hooks.Maps):
        def keep(self, grid, whole, where):
            kept.setdefault("maps", []).append(whole)

    given = dict(steps=1, num_images_per_prompt=2)
    with attnlib.attach(pipe, Layers(gradient=False)):
        pipes.sample(pipe, prompts, **given)
    it = custom(pipe, ["circle", "square"])
    it.words = words
    with attnlib.attach(pipe, it):
        pipes.sample(pipe, prompts, **given)
        masks = it.session.notes[it, "masks"]
    tokens = [[[3], [7]], [[2], [6]]]
    for image in range(4):
        for r in range(2):
            some = [m[4 + image, tokens[image // 2][r]].sum(0) for m in kept["maps"]]
            torch.testing.assert_close(masks[image, r], guidance_mask(some, (8, 8)), atol=1e-5, rtol=1e-5)
    assert ((masks > 0).flatten(2).sum(2) <= 16).all()


def test_one_layer_acts_inside_the_mask_only(pipe):
    """The text's output plus the masked branch, in both halves of guidance."""
    seen = []

    class Look(attnlib.hooks.Intervention):
        kinds, layers = ("cross",), ["down_blocks.0*"]

        def around_attention(self, site, q, k, v, call):
            out = call(q, k, v)
            seen.append((site, q, k, v, out))
            return out

    it = custom(pipe)
    with attnlib.attach(pipe, Look(), it):
        pipes.sample(pipe, PROMPT, steps=1)
        mask = it.session.notes[it, "masks"][0, 0]
    site, q, k, v, out = seen[-1]
    text = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    from attnlib.steer.diffusion.regions import resized

    w = resized(mask, (16, 16)).flatten()
    images, empty = it.tokens()
    maps = it.at(site)
    for row, e in ((0, empty[0, 0]), (1, images[0, 0])):
        bk, bv = (f(e).unflatten(-1, (site.heads, -1)).transpose(0, 1) for f in (maps.to_k_ip, maps.to_v_ip))
        branch = torch.nn.functional.scaled_dot_product_attention(q[row : row + 1], bk[None], bv[None])[0]
        torch.testing.assert_close(out[row], text[row] + w[:, None] * branch, atol=1e-5, rtol=1e-5)
        assert torch.equal(out[row][:, w == 0], text[row][:, w == 0]) and (w == 0).any()


def test_nothing_to_do_and_everything_to_do(tmp_path):
    """No strength is the pipeline; a mask of ones is an IP-Adapter; calls start afresh; scoring begins as none."""
    from attnlib.steer.diffusion.references import ReferenceBranches

    pipe = pipes.stable_diffusion(str(tmp_path)).to(torch.float64)
    plain, state = pipes.sample(pipe, PROMPT, steps=2), torch.get_rng_state()
    off = custom(pipe, scale=0.0)
    torch.set_rng_state(state)
    with attnlib.attach(pipe, off) as session:
        assert not session.attached and torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)
    on = custom(pipe, scope=1.0, binary=True)
    torch.set_rng_state(state)
    with attnlib.attach(pipe, on):
        whole = pipes.sample(pipe, PROMPT, steps=2)
        assert torch.equal(pipes.sample(pipe, PROMPT, steps=2), whole)
    ip = ReferenceBranches.of(pipe.unet)
    ip.maps.load_state_dict(on.maps.state_dict())
    with attnlib.attach(pipe, ip.refer(on._images)):
        torch.testing.assert_close(pipes.sample(pipe, PROMPT, steps=2), whole, atol=1e-9, rtol=1e-9)
    scored = custom(pipe, scope=1.0, binary=True, scoring=True, hidden=4, ratio=1.0, guided_steps=None)
    torch.set_rng_state(state)
    with attnlib.attach(pipe, scored):
        torch.testing.assert_close(pipes.sample(pipe, PROMPT, steps=2), whole, atol=1e-9, rtol=1e-9)
    scored.ratio = 0.5  # one of three tokens
    with attnlib.attach(pipe, scored):
        fewer = pipes.sample(pipe, PROMPT, steps=2)
    assert (fewer - whole).abs().max() > 1e-4 and (fewer - plain).abs().max() > 1e-4
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(pipes.sample(pipe, PROMPT, steps=2), plain)


def test_maps_and_scoring_learn_and_are_kept(pipe):
    """Everywhere, as an IP-Adapter does; the model's own weights stay."""
    it = custom(pipe, scoring=True, hidden=4, ratio_range=(1.0, 1.0))
    own = [p.clone() for p in pipe.unet.parameters()]
    for p in it.trained():
        p.requires_grad_()
    pipe.unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 16, generator=generator)
    optimizer = torch.optim.Adam(it.trained(), 1e-2)
    losses = []
    with attnlib.attach(pipe.unet, it, rows=("cond", "cond")):
        for _ in range(3):
            out = pipe.unet(x, 500, encoder_hidden_states=text).sample
            losses.append(out.square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in it.maps.parameters())
            optimizer.step()
    pipe.unet.requires_grad_(True)
    assert losses[-1] < losses[0] and all(torch.equal(a, b) for a, b in zip(own, pipe.unet.parameters(), strict=True))
    assert it.scoring[0].feature.weight.abs().max() > 0
    other = custom(pipe, scoring=True, hidden=4)
    other.load_state_dict(it.state_dict(), strict=True)
    other.refer(it._images)
    drawn = []
    for one in (it.requires_grad_(False), other.requires_grad_(False)):
        with attnlib.attach(pipe, one):
            drawn.append(pipes.sample(pipe, PROMPT, steps=1))
    assert torch.equal(*drawn)


def test_other_settings_and_pipelines(pipe, tmp_path):
    """Self-attention refines maps; SDXL, bfloat16, no guidance, Euler; detaching after an exception in mid-step."""
    plain = pipes.sample(pipe, PROMPT, steps=1)
    seen = []
    for settings in (dict(self_maps="mean"), dict(strategy="max_norm"), dict(keep="threshold")):
        with attnlib.attach(pipe, custom(pipe, **settings)):
            seen.append(pipes.sample(pipe, PROMPT, steps=1))
    assert all((one - plain).abs().max() > 1e-5 for one in seen)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    before = pipe.scheduler
    pipe.scheduler = pipes.scheduler("EulerDiscreteScheduler")
    with attnlib.attach(pipe, custom(pipe)):
        free = pipes.sample(pipe, PROMPT, steps=2, guidance_scale=1.0)
    pipe.scheduler = before
    assert free.isfinite().all()
    half = pipes.stable_diffusion(str(tmp_path)).to(torch.bfloat16)
    with attnlib.attach(half, custom(half)):
        got = pipes.sample(half, PROMPT, steps=1)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    xl = pipes.sdxl(str(tmp_path))
    it = RealCustom.of(xl.unet, words=["circle"]).refer(torch.randn(1, 1, 3, 32))
    with attnlib.attach(xl, it):
        got = pipes.sample(xl, PROMPT, steps=1, height=16, width=16)
    assert (got - pipes.sample(xl, PROMPT, steps=1, height=16, width=16)).abs().max() > 1e-5

    class Fails(attnlib.hooks.Intervention):
        kinds, layers = ("cross",), ["up_blocks.1*"]

        def on_output(self, site, out):
            raise RuntimeError("stop")

    it = custom(pipe)
    with attnlib.attach(pipe, it, Fails()), pytest.raises(RuntimeError, match="stop"):
        pipes.sample(pipe, PROMPT, steps=1)
    assert not it._guiding and torch.equal(pipes.sample(pipe, PROMPT, steps=1), plain)


def test_bad_input(pipe):
    def fails(it, match, error=ValueError, **given):
        with attnlib.attach(pipe, it), pytest.raises(error, match=match):
            pipes.sample(pipe, PROMPT, steps=1, **given)

    fails(custom(pipe, ["cat"]), "'cat' is not in the prompt")
    two = custom(pipe, ["circle", "square"])
    two.words = ["circle"]
    fails(two, "one for each of 2 references, got 1")
    fails(RealCustom.of(pipe.unet, words=["circle"]), "no references", RuntimeError)
    alone = dict(timestep=5, encoder_hidden_states=torch.zeros(1, 7, 16))
    with attnlib.attach(pipe.unet, custom(pipe)), torch.no_grad():
        with pytest.raises(ValueError, match="attach to the pipeline"):
            pipe.unet(torch.zeros(1, 4, 16, 16), **alone)
    with pytest.raises(ValueError, match="AStar runs some pictures by themselves"):
        attnlib.attach(pipe, custom(pipe), attnlib.steer.AStar(("circle", "square")))
    with pytest.raises(ValueError, match="makes without the references"):
        attnlib.attach(pipe, custom(pipe), attnlib.cache.StepCache(attnlib.cache.steps.every(2)))
    with pytest.raises(ValueError, match="give both references to one"):
        attnlib.attach(pipe, custom(pipe), custom(pipe))
    with pytest.raises(TypeError, match="word of each reference"):
        RealCustom.of(pipe.unet, words="circle")
    with pytest.raises(ValueError, match=r"ratio_range must be \(least, most\) in order"):
        custom(pipe, ratio_range=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="keep='all'"):
        custom(pipe, keep="all")
    with pytest.raises(ValueError, match="state_dict lacks"):
        custom(pipe).load_authors({"x": torch.zeros(1)})

"""Processors of diffusers with more than one source: image prompts, added keys, two streams, one projection for two."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusers.models import attention_processor as processors  # noqa: E402

import attnlib  # noqa: E402
from attnlib.grids import Layout  # noqa: E402
from attnlib.hooks import Intervention, Maps, Record  # noqa: E402
from hooks import pipes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class See(Intervention):
    """Notes what passes; with ``zero``, the outputs of one branch of image prompts become zeros."""

    sees_references = True

    def __init__(self, zero=None, kinds=("cross", "joint"), references=True):
        self.zero, self.kinds, self.sees_references, self.seen = zero, kinds, references, []

    def around_attention(self, site, q, k, v, call):
        self.seen.append(site)
        out = call(q, k, v)
        return out * 0 if self.zero is not None and site.reference == self.zero else out


def latents(pipe, steps=2, batch=2, seed=3, **given):
    shape = (batch, pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    torch.manual_seed(seed)
    return pipe(
        latents=torch.randn(shape), num_inference_steps=steps, num_images_per_prompt=batch, output_type="latent",
        prompt="a red circle", guidance_scale=3.0, **given,
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A pipeline with two IP-Adapters, and what it is called with."""
    pipe = pipes.stable_diffusion(tmp_path_factory.mktemp("words"))
    pipe.unet._load_ip_adapter_weights([pipes.ip_state(pipe.unet), pipes.ip_state(pipe.unet, seed=8)])
    embeds = [torch.randn(2, 2, 6), torch.randn(2, 1, 6)]  # without and with guidance, images, width
    return pipe, {"ip_adapter_image_embeds": embeds}


def masks():
    one = torch.zeros(1, 2, 16, 16)
    one[:, 0, :, :8] = 1
    one[:, 1, :, 8:] = 1
    return {"cross_attention_kwargs": {"ip_adapter_masks": [one, torch.ones(1, 1, 16, 16)]}}


def old_processors(unet, scale):
    """The same weights in processors that multiply by hand."""
    made = {}
    for name, new in unet.attn_processors.items():
        if not hasattr(new, "to_k_ip"):
            made[name] = processors.AttnProcessor()
            continue
        made[name] = processors.IPAdapterAttnProcessor(new.hidden_size, new.cross_attention_dim, new.num_tokens)
        made[name].load_state_dict(new.state_dict())
        made[name].scale = list(scale)
    unet.set_attn_processor(dict(made))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_branches_of_image_prompts(adapted, masked, old):
    pipe, given = adapted
    given = {**given, **(masks() if masked else {})}
    held = dict(pipe.unet.attn_processors)
    pipe.set_ip_adapter_scale([[0.7, 0.5] if masked else 0.7, 0.4])
    try:
        if old:
            old_processors(pipe.unet, [[0.7, 0.5] if masked else 0.7, 0.4])
        plain = latents(pipe, **given)
        text, all_ = See(references=False), See()
        with attnlib.attach(pipe, text):
            assert torch.equal(latents(pipe, **given), plain)
        with attnlib.attach(pipe, all_):
            assert torch.equal(latents(pipe, **given), plain)
        assert all(s.reference is None and s.k_layout == Layout((("text", 77),)) for s in text.seen)
        here = [s for s in all_.seen if s.layer == all_.seen[0].layer and s.step == 0]
        want = [None, (0, 0), (0, 1), (1, 0)] if masked else [None, (0, None), (1, None)]
        assert [s.reference for s in here] == want
        assert here[1].k_layout == Layout((("reference", 4 if masked else (2, 4)),))
        assert all(s.rows == ("uncond", "uncond", "cond", "cond") for s in here)
        # Zeros of one branch are a scale of zero.
        with attnlib.attach(pipe, See(zero=(0, 1) if masked else (0, None))):
            without = latents(pipe, **given)
        assert not torch.allclose(without, plain, atol=1e-4)
        for p in pipe.unet.attn_processors.values():
            if hasattr(p, "scale"):
                p.scale = [[0.7, 0.0], 0.4] if masked else [0.0, 0.4]
        torch.testing.assert_close(without, latents(pipe, **given), atol=1e-5, rtol=1e-5)
        # A scale of zero makes no call.
        skips = See()
        with attnlib.attach(pipe, skips):
            latents(pipe, **given)
        if not masked:
            assert {s.reference for s in skips.seen} == {None, (1, None)}
    finally:
        pipe.unet.set_attn_processor(dict(held))
        pipe.set_ip_adapter_scale([1.0, 1.0])

    class Breaks(See):
        def around_attention(self, site, q, k, v, call):
            return call(q, k, v) if site.reference is None else 1 / 0

    before = latents(pipe, **given)
    with attnlib.attach(pipe, Breaks()), pytest.raises(ZeroDivisionError):
        latents(pipe, **given)
    assert dict(pipe.unet.attn_processors) == held and torch.equal(latents(pipe, **given), before)


def test_scales_per_block_maps_and_sublayers_beside_image_prompts(adapted):
    pipe, given = adapted
    pipe.set_ip_adapter_scale([{"up": {"block_0": [0.0, 1.0]}}, 1.0])
    try:
        plain = latents(pipe, **given)
        see, maps, record = See(), Maps(16), Record(layers=["up_blocks.0*attn2"], rows="all")

        class Sublayer(Intervention):
            kinds = ("cross",)

            def around_sublayer(self, site, hidden, call):
                assert site.n_keys == 77
                return call(hidden)

        with attnlib.attach(pipe, see, maps, record, Sublayer()):
            assert torch.equal(latents(pipe, **given), plain)
            # Maps are of text alone.
            taken = maps.take()
        assert taken.shape == (4, 77, 16, 16)
        torch.testing.assert_close(taken.sum(1), torch.ones(4, 16, 16))
        branches = {s.name: set() for s in see.seen}
        for s in see.seen:
            branches[s.name].add(s.reference)
        zero = {name for name, found in branches.items() if (0, None) not in found}
        assert zero and zero != set(branches) and all((1, None) in found for found in branches.values())
    finally:
        pipe.set_ip_adapter_scale([1.0, 1.0])


def test_image_prompts_of_flux():
    pipe, given = pipes.flux()
    model = pipe.transformer
    torch.manual_seed(1)
    made = {
        name: type(p)() if "single" in name else processors_of_flux()(32, 32, num_tokens=(3, 2), scale=[0.5, 0.8])
        for name, p in model.attn_processors.items()
    }
    model.set_attn_processor(dict(made))
    prompts = [torch.randn(1, 3, 32), torch.randn(1, 2, 32)]
    inputs = dict(
        hidden_states=torch.randn(1, 4, 16), encoder_hidden_states=given["prompt_embeds"],
        pooled_projections=given["pooled_prompt_embeds"], timestep=torch.tensor([0.5]), img_ids=image_ids(2, 2),
        txt_ids=torch.zeros(5, 3), joint_attention_kwargs={"ip_hidden_states": prompts},
    )  # fmt: skip

    @torch.no_grad()
    def predict():
        return model(**inputs)[0]

    plain, see = predict(), See()
    with attnlib.attach(model, see):
        assert torch.equal(predict(), plain)
    assert [s.reference for s in see.seen] == [None, (0, None), (1, None), None]
    assert see.seen[1].q_layout == Layout((("image", (2, 2)),)) and see.seen[1].kind == "cross"
    with attnlib.attach(model, See(zero=(1, None))):
        without = predict()
    made["transformer_blocks.0.attn.processor"].scale = [0.5, 0.0]
    torch.testing.assert_close(without, predict(), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(without, plain, atol=1e-4)

    class Nothing(Intervention):
        kinds = ("joint",)

        def around_sublayer(self, site, hidden, call):
            return torch.zeros_like(hidden)

    with attnlib.attach(model, Nothing()):
        silent = predict()
    inputs["joint_attention_kwargs"] = {"ip_hidden_states": [p + 1 for p in prompts]}
    with attnlib.attach(model, Nothing()):  # what was not run read no image prompt
        assert torch.equal(predict(), silent)


def processors_of_flux():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    return FluxIPAdapterAttnProcessor


def image_ids(h, w):
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()


def test_an_image_prompt_of_stable_diffusion_3():
    pipe, given = pipes.sd3()
    model = pipe.transformer
    torch.manual_seed(1)
    made = {
        name: processors.SD3IPAdapterJointAttnProcessor2_0(16, 6, 8, timesteps_emb_dim=5, scale=0.6)
        for name in model.attn_processors
    }
    model.set_attn_processor(dict(made))
    extra = {"ip_hidden_states": torch.randn(1, 3, 6), "temb": torch.randn(1, 5)}

    @torch.no_grad()
    def predict():
        return model(
            hidden_states=torch.ones(1, 4, 8, 8), encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"], timestep=torch.tensor([5.0]),
            joint_attention_kwargs=dict(extra),
        )[0]  # fmt: skip

    plain, see = predict(), See()
    with attnlib.attach(model, see):
        assert torch.equal(predict(), plain)
    assert [s.reference for s in see.seen] == [None, (0, None)] * 2
    assert see.seen[1].k_layout == Layout((("image", (4, 4)), ("reference", 3)))
    with attnlib.attach(model, See(zero=(0, None))):
        without = predict()
    for p in made.values():
        p.scale = 0.0
    torch.testing.assert_close(without, predict(), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(without, plain, atol=1e-4)


# ---- keys of text before those of the image


@pytest.mark.parametrize("old", [False, True])
def test_added_keys_of_deepfloyd(old):
    pipe, given = pipes.deepfloyd()
    if old:
        pipe.unet.set_attn_processor(processors.AttnAddedKVProcessor())

    def image(given):
        torch.manual_seed(0)
        return pipe(
            **given, num_inference_steps=2, num_images_per_prompt=2, output_type="pt", guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0), height=8, width=8,
        ).images  # fmt: skip

    plain = image(given)
    see, maps = See(), Maps(4)
    with attnlib.attach(pipe, see, maps):
        assert torch.equal(image(given), plain)
        taken = maps.take()
    assert {s.kind for s in see.seen} == {"cross"} and see.seen[0].rows == ("uncond",) * 2 + ("cond",) * 2
    assert see.seen[0].k_layout == Layout((("text", 5), ("image", (4, 4))))
    assert taken.shape == (4, 5, 4, 4) and float(taken.sum(1).max()) < 1  # the image has its share

    # Other text for what is conditioned, by on_context, is another prompt.
    other = torch.randn(1, 5, 10)
    projected = pipe.unet.encoder_hid_proj(other).detach()

    class OtherText(Intervention):
        kinds = ("cross",)

        def on_context(self, site, k, v):
            assert site.k_layout == Layout((("text", 5),))
            rows = site.rows_named(("cond",)).view(-1, 1, 1)
            return torch.where(rows, projected, k), torch.where(rows, projected, v)

    class Sublayer(Intervention):
        kinds = ("cross",)

        def around_sublayer(self, site, hidden, call):
            return call(hidden)

    with attnlib.attach(pipe, OtherText()):
        told = image(given)
    want = image({**given, "prompt_embeds": other})
    assert not torch.allclose(told, plain, atol=1e-4)
    # The text also conditions the time embedding, or does not: here it does not.
    torch.testing.assert_close(told, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="adds its residual by itself"):
        attnlib.attach(pipe, Sublayer())
    assert torch.equal(image(given), plain)


# ---- joint attention


@pytest.fixture(params=["sd3", "flux"])
def joint(request):
    pipe, given = getattr(pipes, request.param)()

    def image():
        return pipe(
            **given, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(1),
            num_images_per_prompt=2 if request.param == "flux" else 1,
        ).images  # fmt: skip

    return pipe, image


def test_around_sublayer_of_two_streams(joint):
    pipe, image = joint
    plain = image()
    seen = []

    class Around(Intervention):
        kinds = ("joint",)

        def __init__(self, text=1.0, image=1.0, copy=False):
            self.text, self.image, self.copy = text, image, copy

        def around_sublayer(self, site, hidden, call):
            seen.append(site)
            out = call(hidden + 0 if self.copy else hidden)
            if self.text == self.image == 1:
                return out
            parts = site.q_layout.split(out)
            return site.q_layout.join({"text": parts["text"] * self.text, "image": parts["image"] * self.image})

    with attnlib.attach(pipe, Around()) as session:
        assert torch.equal(image(), plain)
        assert {s.kind for s in session.attached} == {"joint"}
    order = ("image", "text") if "SD3" in type(pipe.transformer).__name__ else ("text", "image")
    assert seen[0].q_layout.names == order and seen[0].q_layout.size("text") == 5
    with attnlib.attach(pipe, Around(copy=True)):
        torch.testing.assert_close(image(), plain, atol=1e-6, rtol=1e-6)

    # Halving one stream of the first block is halving what the module gives of it.
    first = next(m for n, m in pipe.transformer.named_modules() if n == "transformer_blocks.0.attn")
    for number, factors in enumerate([dict(image=0.5), dict(text=0.5)]):
        half = Around(**factors)
        half.layers = ["transformer_blocks.0.attn"]
        with attnlib.attach(pipe, half):
            got = image()
        hook = first.register_forward_hook(
            lambda m, a, out, number=number: tuple(o / 2 if i == number else o for i, o in enumerate(out))
        )
        want = image()
        hook.remove()
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(got, plain, atol=1e-5)

    class Shorter(Intervention):
        kinds = ("joint",)

        def around_sublayer(self, site, hidden, call):
            return call(hidden[:, 1:])

    with attnlib.attach(pipe, Shorter()), pytest.raises(ValueError, match="takes both streams|must return"):
        image()
    assert torch.equal(image(), plain)


def test_on_context_of_two_streams(joint):
    pipe, image = joint
    plain = image()
    asked = []

    class Context(Intervention):
        kinds = ("joint",)
        layers = ["transformer_blocks.0.attn"]

        def __init__(self, change):
            self.change = change

        def on_context(self, site, k, v):
            asked.append(site.k_layout)
            return self.change(site, k, v)

    with attnlib.attach(pipe, Context(lambda site, k, v: (k, v))):
        assert torch.equal(image(), plain)
    assert {names for layout in asked for names in layout.names} == {"text", "image"}
    assert all(len(layout.names) == 1 for layout in asked)

    def quiet_text(site, k, v):
        return (k, v * 0) if site.k_layout.names == ("text",) else (k, v)

    with attnlib.attach(pipe, Context(quiet_text)):
        got = image()
    attn = pipe.transformer.transformer_blocks[0].attn
    hook = attn.add_v_proj.register_forward_pre_hook(lambda m, args: (args[0] * 0,))
    want = image()
    hook.remove()
    assert torch.equal(got, want) and not torch.allclose(got, plain, atol=1e-5)
    with attnlib.attach(pipe, Context(lambda site, k, v: (k[:, 1:], v[:, 1:]))):
        with pytest.raises(ValueError, match="keeps its"):
            image()


def test_feed_forwards_of_single_stream_blocks():
    pipe, given = pipes.flux()

    def image():
        return pipe(
            **given, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(1)
        ).images

    plain, sites = image(), []

    class FeedForward(Intervention):
        acts_on = ("feed-forward",)

        def __init__(self, factor=1.0, skip=False):
            self.factor, self.skip, self.kept = factor, skip, None

        def around_module(self, site, inputs, call):
            sites.append(site.name)
            if self.skip and self.kept is not None and "single" in site.name:
                return self.kept
            out = call(inputs)
            if "single" in site.name:
                self.kept = out
                return out if self.factor == 1 else out * self.factor
            return out

    with attnlib.attach(pipe, FeedForward()):
        assert torch.equal(image(), plain)
    assert "single_transformer_blocks.0.proj_mlp" in sites and any(name.endswith("ff") for name in sites)
    block = pipe.transformer.single_transformer_blocks[0]
    with attnlib.attach(pipe, FeedForward(0.5)):
        got = image()
    hook = block.act_mlp.register_forward_hook(lambda m, a, out: out * 0.5)
    want = image()
    hook.remove()
    assert torch.equal(got, want) and not torch.allclose(got, plain, atol=1e-6)
    count = []
    block.proj_mlp.register_forward_hook(lambda *a: count.append(1))
    gelu = type(block.act_mlp).forward
    ran = []
    block.act_mlp.forward = lambda x: (ran.append(1), gelu(block.act_mlp, x))[1]
    try:
        with attnlib.attach(pipe, FeedForward(skip=True)):
            image()
    finally:
        del block.act_mlp.forward
    assert len(ran) == 1  # all later calls were skipped
    assert torch.equal(image(), plain)


# ---- keys in any number, and biases


def test_more_keys_and_biases_stay_on_the_kernel(tmp_path_factory, monkeypatch):
    from attnlib.hooks import call as module

    pipe = pipes.stable_diffusion(tmp_path_factory.mktemp("words"))
    plain = pipes.sample(pipe, steps=2, num_images_per_prompt=2)

    class Extend(Intervention):
        kinds = ("self",)

        def __init__(self, how):
            self.how = how

        def around_attention(self, site, q, k, v, call):
            assert site.mask.free
            other = k.flip(0), v.flip(0)
            n, m = q.shape[2], k.shape[2]
            if self.how == "more":
                return call(q, torch.cat([k, other[0]], 2), torch.cat([v, other[1]], 2))
            if self.how == "mask":
                mask = torch.ones(n, 2 * m, dtype=torch.bool)
                return call(q, torch.cat([k, other[0]], 2), torch.cat([v, other[1]], 2), mask=mask)
            if self.how == "fewer":
                return torch.cat([call(part, k, v) for part in q.chunk(2, 2)], 2)
            bias = torch.linspace(-1, 1, m).expand(1, 1, n, m)
            if self.how == "bias":
                return call(q, k, v, bias=bias)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def run(how, *others):
        with attnlib.attach(pipe, Extend(how), *others):
            return pipes.sample(pipe, steps=2, num_images_per_prompt=2)

    longer, biased = run("more"), run("bias")
    torch.testing.assert_close(longer, run("mask"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(biased, run("by hand"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run("fewer"), plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(longer, plain, atol=1e-4) and not torch.allclose(biased, plain, atol=1e-4)
    # Whoever looks sees all of them.
    record = Record(layers=["down_blocks.0*attn1"], rows="all")
    torch.testing.assert_close(run("more", record), longer, atol=1e-6, rtol=1e-6)
    weights = record.results()[0]["weights"]
    assert weights[0].shape[-1] == 512
    monkeypatch.setattr(module, "_full", lambda *a: pytest.fail("a mask was made"))
    with pytest.raises(BaseException, match="a mask was made"):
        run("mask")

    def only_biases(values, n, m):
        assert values.dtype != torch.bool
        return values

    monkeypatch.setattr(module, "_full", only_biases)
    torch.testing.assert_close(run("bias"), biased)
    assert torch.equal(pipes.sample(pipe, steps=2, num_images_per_prompt=2), plain)

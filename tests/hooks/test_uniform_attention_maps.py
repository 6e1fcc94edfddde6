"""Uniform cross-attention on a tiny UNet, inversion and masked editing, held to the authors' functions."""

import pytest
import torch
from parity import Fixture

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, UNet2DConditionModel  # noqa: E402
from diffusers.configuration_utils import ConfigMixin  # noqa: E402
from diffusers.models.attention_processor import Attention  # noqa: E402
from diffusers.models.modeling_utils import ModelMixin  # noqa: E402

import attnlib  # noqa: E402
from attnlib.hooks import Record  # noqa: E402
from attnlib.steer import SoftPAG, UniformMaps  # noqa: E402
from attnlib.steer.diffusion.invert import (  # noqa: E402
    ddim_invert,
    ddim_sample,
    inversion_offsets,
    noise_predictor,
)
from attnlib.steer.diffusion.uniform_maps import blend, edit_mask, masked_edit, quantile  # noqa: E402

FIXTURE = Fixture("uniform-attention-maps")
OPTIONS = Fixture("uniform-attention-maps-options")
T = FIXTURE.tensors


def scheduler(**changes):
    settings = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    return DDIMScheduler(**{**settings, **changes})


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=(2, 4), norm_num_groups=4,
    ).eval()  # fmt: skip


def call(unet, x, text, t=3):
    with torch.no_grad():
        return unet(x, t, encoder_hidden_states=text).sample


# ---- the authors' functions


class OneLayer(ModelMixin, ConfigMixin):
    """A diffusers model that is one cross-attention layer."""

    config_name = "config.json"

    def __init__(self):
        super().__init__()
        self.attn2 = Attention(query_dim=16, cross_attention_dim=3, heads=8, dim_head=2)

    def forward(self, x, context):
        return self.attn2(x, encoder_hidden_states=context)


@pytest.mark.parametrize("rows", [None, ("uniform",)])
def test_a_77th_for_every_token_of_a_short_text(rows):
    """Their number stands in the code: on five tokens the weights of a row sum to 5/77."""
    model, x, text = OneLayer(), torch.randn(2, 4, 16), torch.randn(2, 5, 3)
    to_v, to_out = model.attn2.to_v, model.attn2.to_out[0]
    expected = to_out(to_v(text).sum(1, keepdim=True) / 77).expand(2, 4, 16)
    plain = model(x, text)
    with attnlib.attach(model, UniformMaps(rows=rows, compat="authors"), rows=["uniform", "other"]):
        y = model(x, text)
    torch.testing.assert_close(y[0], expected[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(y[1], expected[1] if rows is None else plain[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["one", "pair", "four"])
def test_layer_equals_the_authors_patched_forward(case):
    """Output and gradients; theirs tells rows apart by the number of maps, ours by name."""
    model = OneLayer()
    model.attn2.load_state_dict(FIXTURE.under("sd"))
    x = {k: v.clone().requires_grad_() for k, v in FIXTURE.under(f"{case}/x").items()}
    with attnlib.attach(model, UniformMaps(rows=("uniform",)), rows=FIXTURE.config[case]):
        y = model(**x)
        (y * T[f"{case}/g"]).sum().backward()
    torch.testing.assert_close(y, T[f"{case}/y"], atol=1e-5, rtol=1e-5)
    for name, expected in FIXTURE.under(f"{case}/dx").items():
        torch.testing.assert_close(x[name].grad, expected, atol=1e-5, rtol=1e-5)
    weights = FIXTURE.under(f"{case}/dw")
    assert "to_v.weight" in weights
    for name, expected in weights.items():
        got = model.attn2.get_parameter(name).grad
        torch.testing.assert_close(got, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=1e-5)


def toy(text):
    """The denoiser of the recordings: two products."""

    def predict(latents, t):
        mixed = torch.einsum("bchw,cd->bdhw", latents, T["loop/W"]) + (text.mean(0) @ T["loop/U"])[:, None, None]
        return torch.tanh(mixed) + 0.001 * float(t) * latents

    return predict


def guided(latents, t, scale=7.5):
    # Source and target carry their own text, and both the empty one as unconditional.
    base = toy(T["loop/empty"])(latents, t)
    cond = torch.cat([toy(T[f"loop/{name}"])(z[None], t) for name, z in zip(("empty", "target"), latents, strict=True)])
    return base + scale * (cond - base)


def test_inversion_equals_the_authors():
    path = ddim_invert(toy(T["loop/empty"]), scheduler(), T["loop/z0"])
    assert len(path) == 51
    torch.testing.assert_close(path[10], T["loop/path10"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(path[-1], T["loop/inverted"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["half", "wide"])
def test_masked_edit_equals_the_authors(case):
    settings = FIXTURE.config[case]
    latents, _ = masked_edit(
        guided, toy(T["loop/empty"]), scheduler(), T["loop/start"].expand(2, -1, -1, -1), T["loop/inverted"],
        q=settings["quantile"], below=settings["recon_t"], radius=settings["dilate_mask"],
    )  # fmt: skip
    expected = T[f"loop/{case}"]
    assert expected.abs().max() < 100 and (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(latents, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


STEPS = 20


def wave(seed, *shape):
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + seed).float().view(shape)


def recorded_path():
    mixed = [T["loop/z0"] * (1 - i / STEPS) + T["loop/inverted"] * (i / STEPS) for i in range(STEPS + 1)]
    return [wave(i, 1, 4, 8, 8) * 0.3 + z for i, z in enumerate(mixed)]


@pytest.mark.parametrize("case", sorted(OPTIONS.config))
def test_options_of_the_authors_editors_equal_theirs(case):
    """20 steps of their 50, a source that follows its inversion, offsets, and their Prompt-to-Prompt editors."""
    more = {
        "reference": dict(path=recorded_path()),
        "offset": dict(offsets=[wave(i, 2, 4, 8, 8) * 0.02 for i in range(STEPS)]),
        "p2p": dict(blend_source=False),
        "direct": dict(
            blend_source=False, offsets=[wave(i, 2, 4, 8, 8) * 0.02 for i in range(STEPS)], uniform_waits=True
        ),
    }.get(case, {})
    predict = (lambda z, t: guided(z, t, 3.0)) if case == "weak" else guided
    settings = dict(steps=STEPS, ramp=50, **OPTIONS.config[case], **more)
    start = T["loop/start"].expand(2, -1, -1, -1)
    latents, uniform = masked_edit(predict, toy(T["loop/empty"]), scheduler(), start, T["loop/inverted"], **settings)
    expected = OPTIONS.tensors[case]
    size = float(expected.abs().max())
    torch.testing.assert_close(latents, expected, atol=1e-5 * size, rtol=1e-5)
    if f"{case}-uniform" in OPTIONS.tensors:
        torch.testing.assert_close(uniform, OPTIONS.tensors[f"{case}-uniform"], atol=1e-5 * size, rtol=1e-5)
    if case != "weak":
        plain = masked_edit(guided, toy(T["loop/empty"]), scheduler(), start, T["loop/inverted"], steps=STEPS)[0]
        assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("case, more", [("full", {}), ("part", {"scale": 0.3}), ("some", {"every": 3})])
def test_offsets_equal_the_authors_and_lead_back(case, more):
    path = recorded_path()
    offsets = inversion_offsets(guided, scheduler(), path, **more)
    assert len(offsets) == STEPS
    expected = OPTIONS.tensors[f"offsets-{case}"]
    torch.testing.assert_close(torch.stack(offsets)[::9, :, :2], expected, atol=1e-5, rtol=1e-5)
    if case == "full":
        edited = masked_edit(
            guided, toy(T["loop/empty"]), scheduler(), path[-1].expand(2, -1, -1, -1), path[-1], steps=STEPS, below=0,
            offsets=offsets,
        )[0]  # fmt: skip
        torch.testing.assert_close(edited[:1], path[0], atol=1e-5, rtol=1e-5)


def test_a_model_of_velocity_is_edited_as_the_same_model_of_noise():
    plan, velocity = scheduler(), scheduler(prediction_type="v_prediction")

    def of_velocity(predict):
        def other(latents, t):
            a, noise = plan.alphas_cumprod[t].double(), predict(latents, t)
            clean = (latents - (1 - a) ** 0.5 * noise) / a**0.5
            return a**0.5 * noise - (1 - a) ** 0.5 * clean

        return other

    double = {name: tensor.double() for name, tensor in T.items() if name.startswith("loop/")}

    def predict(latents, t):
        mixed = torch.einsum("bchw,cd->bdhw", latents, double["loop/W"]) + double["loop/U"].mean(0)[:, None, None]
        return torch.tanh(mixed)

    def both(latents, t):
        return predict(latents, t) + torch.tensor([0.0, 0.3]).view(2, 1, 1, 1)

    z = double["loop/z0"]
    found = []
    for s, wrap in ((plan, lambda f: f), (velocity, of_velocity)):
        path = ddim_invert(wrap(predict), s, z, 10)
        offsets = inversion_offsets(wrap(both), s, path)
        pair = path[-1].expand(2, -1, -1, -1)
        edited = masked_edit(wrap(both), wrap(predict), s, pair, path[-1], steps=10, below=600, offsets=offsets)
        found.append((path[-1], ddim_sample(wrap(predict), s, path[-1], 10), *edited))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)  # noise levels are float32 in diffusers
    assert (found[0][2][0] - found[0][2][1]).abs().max() > 1e-2


def test_bad_options_of_the_editor():
    start, inverted = T["loop/start"].expand(2, -1, -1, -1), T["loop/inverted"]
    for bad, match in (
        (dict(ramp=5), "ramp"),
        (dict(path=[inverted] * 3), "path must hold 21"),
        (dict(offsets=[inverted] * 3), "one for each of 20"),
    ):
        with pytest.raises(ValueError, match=match):
            masked_edit(guided, toy(T["loop/empty"]), scheduler(), start, inverted, steps=STEPS, **bad)
    with pytest.raises(ValueError, match="every"):
        inversion_offsets(guided, scheduler(), [inverted] * 3, every=0)
    with pytest.raises(ValueError, match="at least two"):
        inversion_offsets(guided, scheduler(), [inverted])


# ---- the map


def test_map_is_uniform_and_blind(unet):
    """1 / T everywhere; the layer's output is the mean value, whatever the query and the order of the text."""
    torch.manual_seed(1)
    x, text = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 12)
    record = Record(rows="all", what=("weights",))
    with attnlib.attach(unet, UniformMaps(), record):
        y = call(unet, x, text)
        permuted = call(unet, x, text[:, torch.tensor([3, 1, 4, 0, 2])])
    kinds = [s["weights"][0] for s in record.results().values()]
    cross = [w for w in kinds if w.shape[-1] == 5]
    assert len(cross) == 4 and len(kinds) == 8
    for w in cross:
        torch.testing.assert_close(w, torch.full_like(w, 0.2))
    torch.testing.assert_close(permuted, y, atol=1e-5, rtol=1e-5)
    assert (call(unet, x, text) - y).abs().max() > 1e-3

    class Look(attnlib.hooks.Intervention):
        kinds = ("cross",)

        def around_attention(self, site, q, k, v, call):
            out = call(q, k, v)
            torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-6, rtol=1e-5)
            return out

    with attnlib.attach(unet, Look(), UniformMaps()):
        torch.testing.assert_close(call(unet, x, text), y)


def test_self_attention_is_untouched(unet):
    before = {n: m.processor for n, m in unet.named_modules() if hasattr(m, "processor")}
    with attnlib.attach(unet, UniformMaps()) as session:
        for n, m in unet.named_modules():
            if n in before and n.endswith("attn1"):
                assert m.processor is before[n]
        assert all(s.kind == "cross" for s in session.attached)


@pytest.mark.parametrize("settings", [dict(rows=()), dict(steps=()), dict(pass_name="other"), dict(steps=(7,))])
def test_where_it_does_not_act_the_bits_stay(unet, settings):
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    plain = call(unet, x, text)
    with attnlib.attach(unet, UniformMaps(**settings)) as session, session.at(step=3):
        assert torch.equal(call(unet, x, text), plain)
    assert torch.equal(call(unet, x, text), plain)


def test_rows_steps_and_passes_are_chosen(unet):
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    plain = call(unet, x, text)
    with attnlib.attach(unet, UniformMaps()):
        uniform = call(unet, x, text)
    with attnlib.attach(unet, UniformMaps(rows=("uncond",)), rows=("uncond", "cond")):
        mixed = call(unet, x, text)
    torch.testing.assert_close(mixed, torch.stack([uniform[0], plain[1]]), atol=1e-6, rtol=1e-5)
    with attnlib.attach(unet, UniformMaps(steps=range(2), pass_name="u")) as session:
        for step, name, expected in ((0, "u", uniform), (1, "u", uniform), (2, "u", plain), (0, "v", plain)):
            with session.at(step=step, pass_name=name):
                torch.testing.assert_close(call(unet, x, text), expected, atol=1e-6, rtol=1e-5)


def test_padding_counts_or_not(unet):
    """A masked text token is counted as the authors do, or left out when asked."""
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    mask = torch.tensor([[True, True, True, False, False]])
    with torch.no_grad():
        for padding, reference in ((True, text), (False, text[:, :3])):
            with attnlib.attach(unet, UniformMaps(padding=padding)):
                got = unet(x, 3, encoder_hidden_states=text, encoder_attention_mask=mask).sample
                expected = unet(x, 3, encoder_hidden_states=reference).sample
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_composes_with_guidance_on_self_attention(unet):
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    with attnlib.attach(unet, UniformMaps(), SoftPAG(1.0)):
        both = call(unet, x, text)
    with attnlib.attach(unet, SoftPAG(1.0), UniformMaps()):
        torch.testing.assert_close(call(unet, x, text), both)
    with attnlib.attach(unet, UniformMaps()):
        assert (call(unet, x, text) - both).abs().max() > 1e-4


# ---- inversion and editing


def test_prompts_of_the_same_mean_value_reconstruct_alike(unet):
    """Under uniform maps a text matters through the mean of its values only."""
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    other = text + torch.randn(1, 5, 12)
    other = other - other.mean(1, keepdim=True) + text.mean(1, keepdim=True)
    with attnlib.attach(unet, UniformMaps(pass_name="u")) as session:
        paths = [
            ddim_invert(noise_predictor(unet, t, session=session, pass_name="u"), scheduler(), x, 5)[-1]
            for t in (text, other)
        ]
    torch.testing.assert_close(*paths, atol=1e-5, rtol=1e-5)
    plain = [ddim_invert(noise_predictor(unet, t), scheduler(), x, 5)[-1] for t in (text, other)]
    assert (plain[0] - plain[1]).abs().max() > 10 * (paths[0] - paths[1]).abs().max()


def test_inverting_under_one_text_and_sampling_under_another(unet):
    """With uniform maps mismatched prompts cost less of the image."""
    sharp = UNet2DConditionModel.from_config(unet.config).eval()
    sharp.load_state_dict(unet.state_dict())
    with torch.no_grad():  # maps of a random UNet are nearly uniform already; sharpen them
        for name, module in sharp.named_modules():
            if name.endswith("attn2"):
                for linear in (module.to_q, module.to_k):
                    linear.weight.mul_(6.0)
    torch.manual_seed(5)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 5, 12)
    texts = texts - texts.mean(2, keepdim=True)  # the same mean: only the maps tell them apart
    errors = []
    for interventions in ([], [UniformMaps()]):
        session = attnlib.attach(sharp, *interventions) if interventions else None
        there, back = (noise_predictor(sharp, t) for t in texts)
        again = ddim_sample(back, scheduler(), ddim_invert(there, scheduler(), x, 10)[-1], 10)
        errors.append(float((again - x).square().mean()))
        if session is not None:
            session.detach()
    assert errors[1] < errors[0], errors


def test_mask_and_blend():
    torch.manual_seed(3)
    a, b, u = torch.randn(3, 4, 6, 6)
    for q in (0.0, 0.3, 0.9):
        threshold = torch.quantile((a - b).abs(), q)
        assert torch.equal(edit_mask(a, b, q), (a - b).abs() - threshold > threshold)
        assert torch.equal(edit_mask(a, b, q, twice=False), (a - b).abs() > threshold)
    everywhere = edit_mask(a, a + 1 + torch.rand_like(a), 0.0)
    assert not everywhere.all()  # the least difference is its own quantile and must exceed it twice
    assert edit_mask(a, torch.where(torch.rand_like(a) < 0.1, a, a + 1), 0.0).float().mean() > 0.8
    assert torch.equal(blend(a, b, u, torch.ones_like(a).bool())[1], b)
    nowhere = edit_mask(a, a, 0.5)
    assert not nowhere.any() and torch.equal(blend(a, a, u, nowhere)[1], u)
    grown = edit_mask(a, b, 0.4, radius=1)
    narrow = edit_mask(a, b, 0.4)
    for c, y, x in narrow.nonzero().tolist():
        assert grown[c, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].all()
    assert grown.sum() > narrow.sum()


def test_quantile_is_torchs():
    x = torch.randn(7, 13)
    for q in (0.0, 0.1, 0.5, 0.77, 1.0):
        torch.testing.assert_close(quantile(x, q), torch.quantile(x, q))


def test_editing_a_tiny_pipeline(unet):
    """Three identical branches stay one; a real edit separates source and target."""
    torch.manual_seed(2)
    x, text, empty = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.randn(1, 5, 12)
    with attnlib.attach(unet, UniformMaps(pass_name="uniform")) as session:
        uniform = noise_predictor(unet, empty, session=session, pass_name="uniform")
        noise = ddim_invert(uniform, scheduler(), x, 10)[-1]
        twins = noise.expand(2, -1, -1, -1)
        pair, branch = masked_edit(uniform, uniform, scheduler(), twins, noise, steps=10, below=1000)
        alone = ddim_sample(uniform, scheduler(), noise, 10)
        for z in (pair[:1], pair[1:], branch):
            # Rounding of a batch and of a single row adds up over the steps.
            torch.testing.assert_close(z, alone, atol=5e-5, rtol=1e-4)
        edit = noise_predictor(unet, torch.cat([empty, text]), empty, 7.5, session, "text")
        pair, branch = masked_edit(edit, uniform, scheduler(), twins, noise, steps=10, below=500)
    assert torch.isfinite(pair).all() and (pair[0] - pair[1]).abs().max() > 1e-3


def test_bad_input(unet):
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with pytest.raises(TypeError, match="rows must be a sequence"):
        UniformMaps(rows="uncond")
    with pytest.raises(TypeError, match="steps must be a collection"):
        UniformMaps(steps=3)
    with pytest.raises(ValueError, match="layer 99 does not exist"):
        attnlib.attach(unet, UniformMaps(layers=[99]))
    with attnlib.attach(unet, UniformMaps(steps=(1,))), pytest.raises(ValueError, match="not told the step"):
        call(unet, x, text)
    with attnlib.attach(unet, UniformMaps(rows=("uncond",))), pytest.raises(ValueError, match="have no names"):
        call(unet, x, text)
    with attnlib.attach(unet, UniformMaps()), pytest.raises(ValueError, match="has a session already"):
        attnlib.attach(unet, UniformMaps())
    predict = toy(T["loop/empty"])
    with pytest.raises(ValueError, match="clip_sample=False"):
        ddim_invert(predict, scheduler(clip_sample=True), x)
    with pytest.raises(ValueError, match="must predict noise or velocity"):
        ddim_sample(predict, scheduler(prediction_type="sample"), x)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1 and at most 1000, got 0"):
        ddim_invert(predict, scheduler(), x, 0)
    with pytest.raises(ValueError, match="source and target"):
        masked_edit(predict, predict, scheduler(), x[:1], x[:1])
    with pytest.raises(ValueError, match="q must lie"):
        masked_edit(predict, predict, scheduler(), x, x[:1], q=1.5)
    with pytest.raises(ValueError, match="q must lie"):
        edit_mask(x[0], x[0], -0.1)
    with pytest.raises(ValueError, match=r"source must have shape \(C, H, W\)"):
        edit_mask(x, x, 0.5)


def test_has_no_sites_in_a_text_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="acts on cross attention"):
        attnlib.attach(LlamaForCausalLM(config), UniformMaps())


def test_inside_a_whole_pipeline(unet):
    """Guided sampling by diffusers' own pipeline, uniform maps on the unconditional rows, equals the loop by hand."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=8,
            hidden_size=12,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=12,
        )  # fmt: skip
    )
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=None, unet=unet, scheduler=scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    noise, text, empty = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.randn(1, 5, 12)

    def run():
        return pipe(
            prompt_embeds=text, negative_prompt_embeds=empty, latents=noise, num_inference_steps=4,
            guidance_scale=5.0, output_type="latent",
        ).images  # fmt: skip

    plain = run()
    with attnlib.attach(unet, UniformMaps(rows=("uncond",)), rows=("uncond", "cond")):
        got = run()
        # the pipeline moves its scheduler's timesteps by one
        expected = ddim_sample(noise_predictor(unet, text, empty, 5.0), pipe.scheduler, noise, 4)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got - plain).abs().max() > 1e-3 and torch.equal(run(), plain)

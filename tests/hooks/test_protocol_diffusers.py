"""The protocol on diffusers models: a UNet with guidance rows, joint attention of Flux, and SoftPAG on both."""

import inspect
import sys

import pytest
import torch

from hooks.models import Watch, dense_attention, predict

diffusers = pytest.importorskip("diffusers")

from diffusers import FluxTransformer2DModel, UNet2DConditionModel  # noqa: E402
from diffusers.models import attention_processor as processors  # noqa: E402

import attnlib  # noqa: E402
from attnlib import Layout  # noqa: E402
from attnlib.hooks import Intervention, Record  # noqa: E402
from attnlib.steer import SoftPAG, adaptive_weight, guide, hunt_heads  # noqa: E402


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=(2, 4), norm_num_groups=4,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def unet_inputs():
    torch.manual_seed(1)
    return {"sample": torch.randn(2, 4, 8, 12), "timestep": 3, "encoder_hidden_states": torch.randn(2, 5, 12)}


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def flux_inputs():
    torch.manual_seed(1)
    ids = torch.zeros(12, 3)
    ids[:, 1], ids[:, 2] = torch.arange(12) // 4, torch.arange(12) % 4
    return {
        "hidden_states": torch.randn(2, 12, 4), "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([0.5, 0.5]), "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_no_op_and_detach_give_the_same_bits(name, request):
    model, inputs = request.getfixturevalue(name), request.getfixturevalue(f"{name}_inputs")
    before = predict(model, inputs)
    held = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    marks = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    with attnlib.attach(model, Watch([0])) as session:
        for n, m in model.named_modules():
            if n in held:
                assert (m.processor is held[n]) == (n != session.attached[0].name)
                assert isinstance(m.processor, type(held[n]))
        assert torch.equal(predict(model, inputs), before)
    assert all(m.processor is held[n] for n, m in model.named_modules() if n in held)
    assert marks == {n: sorted(m.__dict__) for n, m in model.named_modules()}
    assert not model._forward_pre_hooks and torch.equal(predict(model, inputs), before)


def test_an_exception_inside_restores_the_model(unet, unet_inputs):
    class Breaks(Intervention):
        def on_output(self, site, out):
            if site.layer == 3:
                raise ZeroDivisionError
            return out * 2

    before = predict(unet, unet_inputs)
    with pytest.raises(ZeroDivisionError), attnlib.attach(unet, Breaks()):
        predict(unet, unet_inputs)
    assert torch.equal(predict(unet, unet_inputs), before)


def test_sites_of_a_unet(unet, unet_inputs):
    watch = Watch()
    with attnlib.attach(unet, watch, rows=("uncond", "cond")) as session:
        predict(unet, unet_inputs)
    assert [s.kind for s in session.sites] == ["self", "cross"] * 4
    image = Layout((("image", (4, 6)),))
    for site, q, k, v, out in watch.calls:
        assert site.rows == ("uncond", "cond") and site.phase is None and site.q_layout == image
        assert site.k_layout == (image if site.kind == "self" else Layout((("text", 5),)))
        assert (site.heads, site.n_queries, site.n_keys) == (q.shape[1], 24, k.shape[2])
        torch.testing.assert_close(out, dense_attention(q, k, v)[0], atol=1e-5, rtol=1e-5)
    assert session.sites[0].name == "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


def step_named(model, step):
    """The step as ``cache_context`` takes it, in releases of diffusers that do."""
    return {"step_index": step} if "step_index" in inspect.signature(type(model).cache_context).parameters else {}


def test_sites_of_joint_attention(flux, flux_inputs):
    watch = Watch()
    with attnlib.attach(flux, watch):
        with flux.cache_context("cond", **step_named(flux, 7)):
            predict(flux, flux_inputs)
        predict(flux, flux_inputs)
    layout = Layout((("text", 5), ("image", (3, 4))))
    assert len(watch.calls) == 4
    for site, *_ in watch.calls:
        assert site.kind == "joint" and site.q_layout == layout and site.k_layout == layout and site.rotary
    assert [(s.pass_name, s.step) for s, *_ in watch.calls] == [("cond", step_named(flux, 7).get("step_index"))] * 2 + [
        (None, None)
    ] * 2


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_recorded_weights_reproduce_the_output(name, request):
    model, inputs = request.getfixturevalue(name), request.getfixturevalue(f"{name}_inputs")
    watch, record = Watch(), Record(rows="all", what=("weights", "entropy"))
    with attnlib.attach(model, record, watch):
        predict(model, inputs)
    for site, q, k, v, out in watch.calls:
        weights = record.results()[site.layer]["weights"][0]
        truth = dense_attention(q, k, v)[1]
        torch.testing.assert_close(weights, truth, atol=1e-6, rtol=1e-5)
        entropy = record.results()[site.layer]["entropy"][0]
        torch.testing.assert_close(entropy, -(truth * truth.log()).sum(-1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights @ v, out, atol=1e-5, rtol=1e-5)


def test_values_from_other_prompts_on_conditioned_rows(unet, unet_inputs):
    """Structured diffusion guidance: keys from the prompt, values from the mean of its variants."""

    class Structured(Intervention):
        kinds = ("cross",)

        def __init__(self, variants):
            self.variants = variants

        def on_context(self, site, k_source, v_source):
            mean = torch.cat([k_source[None], self.variants]).mean(0)
            rows = site.rows_named(["cond"]).view(-1, 1, 1)
            return k_source, torch.where(rows, mean, v_source)

    torch.manual_seed(2)
    variants = torch.randn(3, 2, 5, 12)
    plain, mine = Watch([1]), Watch([1])
    with attnlib.attach(unet, plain):
        base = predict(unet, unet_inputs)
    with attnlib.attach(unet, Structured(variants), mine, rows=("uncond", "cond")):
        changed = predict(unet, unet_inputs)
    attn = unet.get_submodule(plain.calls[0][0].name)
    mean = torch.cat([unet_inputs["encoder_hidden_states"][None], variants]).mean(0)
    values = attn.to_v(mean).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    assert torch.equal(mine.calls[0][2], plain.calls[0][2])
    assert torch.equal(mine.calls[0][3][0], plain.calls[0][3][0])
    torch.testing.assert_close(mine.calls[0][3][1], values[1], atol=1e-6, rtol=1e-5)
    assert torch.equal(changed[0], base[0]) and not torch.allclose(changed[1], base[1], atol=1e-4)


# ---- SoftPAG


def test_softpag_zero_strength_or_no_heads_is_the_model(unet, unet_inputs):
    before = predict(unet, unet_inputs)
    for same in (SoftPAG(0.0), SoftPAG(1.0, heads={}), SoftPAG(1.0, heads=[]), SoftPAG(1.0, heads={0: []})):
        with attnlib.attach(unet, same) as session:
            assert not session.attached and torch.equal(predict(unet, unet_inputs), before)
    assert torch.equal(guide(before, before * 2, weight=0.0), before)
    assert torch.equal(guide(before, before * 2, 0.0, before * 3, 2.0), before * 3 + 2.0 * (before - before * 3))


def test_softpag_blend_equals_the_mixed_map_and_is_affine():
    """Oracle: (1 - u) A + u I applied to v, head by head."""
    from hooks.models import call_site, run

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    plain, weights = dense_attention(q, k, v)
    outs = {}
    for u in (0.25, 0.5, 1.0):
        site = call_site(q, k, causal=False, rows=("uncond", "cond"), q_layout=Layout((("image", (3, 3)),)))
        outs[u] = run(SoftPAG(u, heads=[1, 3], rows=("cond",)), site, q, k, v)
        mixed = weights.clone()
        mixed[1, [1, 3]] = (1 - u) * mixed[1, [1, 3]] + u * torch.eye(9)
        torch.testing.assert_close(outs[u], mixed @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
        assert torch.equal(outs[u][0], plain[0]) and torch.equal(outs[u][:, [0, 2]], plain[:, [0, 2]])
    torch.testing.assert_close(outs[0.5], 0.5 * (plain + outs[1.0]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(outs[0.25] - plain, 0.25 * (outs[1.0] - plain), atol=1e-6, rtol=1e-5)


#: diffusers' processors, with and without classifier-free guidance, and the rows that they see.
GUIDED = {"": ("plain", "perturbed"), "CFG": ("uncond", "plain", "perturbed")}


@pytest.mark.parametrize("guided", GUIDED)
@pytest.mark.parametrize(
    "settings",
    [
        dict(heads=2, dim_head=8),
        dict(heads=3, dim_head=4, norm_num_groups=2),
        dict(heads=1, dim_head=8, residual_connection=True, rescale_output_factor=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_softpag_with_all_heads_is_perturbed_attention_of_diffusers(guided, settings, batch):
    """Gradients too."""
    torch.manual_seed(0)
    attn = processors.Attention(query_dim=16, **settings).eval()
    both = torch.randn(batch, 9, 16).repeat(len(GUIDED[guided]), 1, 1).requires_grad_()
    g = torch.randn(both.shape)
    attn.set_processor(getattr(processors, f"PAG{guided}IdentitySelfAttnProcessor2_0")())
    theirs = attn(both)
    (slope,) = torch.autograd.grad((theirs * g).sum(), both)
    attn.set_processor(processors.AttnProcessor2_0())
    rows = tuple(name for name in GUIDED[guided] for _ in range(batch))
    with attnlib.attach(attn, SoftPAG(1.0, rows=("perturbed",)), rows=rows):
        mine = attn(both)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad((mine * g).sum(), both)[0], slope, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine[:batch], mine[-batch:], atol=1e-3)


def test_guidance_equals_that_of_diffusers():
    from diffusers.pipelines.pag.pag_utils import PAGMixin

    torch.manual_seed(0)
    uncond, pred, perturbed = torch.randn(3, 2, 4)
    pipe = PAGMixin()
    pipe.pag_applied_layers = ["mid"]
    for scale, adaptive in ((3.0, 0.0), (3.0, 0.004), (2.0, 0.01)):
        pipe._pag_scale, pipe._pag_adaptive_scale = scale, adaptive
        for t in (981, 500, 1):
            weight = adaptive_weight(scale, adaptive, t)
            theirs = pipe._apply_perturbed_attention_guidance(torch.cat([pred, perturbed]), False, 0.0, t)
            torch.testing.assert_close(guide(pred, perturbed, weight), theirs)
            theirs = pipe._apply_perturbed_attention_guidance(torch.cat([uncond, pred, perturbed]), True, 5.0, t)
            torch.testing.assert_close(guide(pred, perturbed, weight, uncond, 5.0), theirs)
    assert adaptive_weight(2.0, 0.01, 500) == 0.0 < adaptive_weight(2.0, 0.001, 500) < 2.0
    with pytest.raises(ValueError, match="slope"):
        adaptive_weight(2.0, -1.0, 500)


@pytest.mark.parametrize("guided", GUIDED)
def test_softpag_in_joint_attention_with_rows_of_guidance(guided):
    torch.manual_seed(0)
    attn = processors.Attention(
        query_dim=12, heads=3, dim_head=4, added_kv_proj_dim=12, context_pre_only=False, bias=True,
        processor=processors.JointAttnProcessor2_0(),
    ).eval()  # fmt: skip
    names = GUIDED[guided]
    inputs = {
        "hidden_states": torch.randn(1, 6, 12).repeat(len(names), 1, 1),
        "encoder_hidden_states": torch.randn(1, 4, 12).repeat(len(names), 1, 1),
    }
    with torch.no_grad():
        attn.set_processor(getattr(processors, f"PAG{guided}JointAttnProcessor2_0")())
        theirs = attn(**inputs)
        attn.set_processor(processors.JointAttnProcessor2_0())
        with attnlib.attach(attn, SoftPAG(1.0, rows=("perturbed",), joint="image"), rows=names):
            mine = attn(**inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_softpag_in_joint_attention():
    torch.manual_seed(0)
    attn = processors.Attention(
        query_dim=16, heads=2, dim_head=8, added_kv_proj_dim=16, context_pre_only=False, bias=True,
        processor=processors.JointAttnProcessor2_0(),
    ).eval()  # fmt: skip
    image, text = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    inputs = {"hidden_states": torch.cat([image, image]), "encoder_hidden_states": torch.cat([text, text])}
    rows = ("plain",) * 2 + ("perturbed",) * 2
    with torch.no_grad():
        attn.set_processor(processors.PAGJointAttnProcessor2_0())
        theirs = attn(**inputs)
        attn.set_processor(processors.JointAttnProcessor2_0())
        with attnlib.attach(attn, SoftPAG(1.0, rows=("perturbed",), joint="image"), rows=rows):
            mine = attn(**inputs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        # The other reading: image queries put out their own values; text queries are left alone.
        plain = attn(**inputs)
        with attnlib.attach(attn, SoftPAG(1.0, rows=("perturbed",)), rows=rows):
            full = attn(**inputs)
        torch.testing.assert_close(full[0][2:], attn.to_out[0](attn.to_v(image)), atol=1e-6, rtol=1e-5)
        assert torch.equal(full[0][:2], plain[0][:2]) and torch.equal(full[1], plain[1])


def test_softpag_only_in_its_pass(flux, flux_inputs):
    before = predict(flux, flux_inputs)
    with attnlib.attach(flux, SoftPAG(0.7, heads={1: [0]}, pass_name="perturbed")) as session:
        assert torch.equal(predict(flux, flux_inputs), before)
        with session.at(pass_name="perturbed"):
            perturbed = predict(flux, flux_inputs)
    assert not torch.allclose(perturbed, before, atol=1e-4)
    torch.testing.assert_close(guide(before, perturbed, 2.0), before + 2.0 * (before - perturbed))


def test_softpag_refusals(unet, unet_inputs):
    from hooks.models import call_site, run

    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="3 queries and 5 keys"):
        run(SoftPAG(), call_site(q, k, causal=False), q, k, k)
    with pytest.raises(ValueError, match=r"layer 1 does not exist among self/joint.*\[0, 2, 4, 6\]"):
        attnlib.attach(unet, SoftPAG(heads={1: [0]}))
    with pytest.raises(ValueError, match="strength must lie"):
        SoftPAG(1.5)
    with pytest.raises(ValueError, match="leave layers out"):
        SoftPAG(heads={0: [1]}, layers=[0])
    with pytest.raises(TypeError, match="sequence of names"):
        SoftPAG(rows="cond")
    with pytest.raises(ValueError, match="joint='text'"):
        SoftPAG(joint="text")
    with (
        attnlib.attach(unet, SoftPAG(rows=("cond",))),
        pytest.raises(ValueError, match="rows of the batch have no names"),
    ):
        predict(unet, unet_inputs)


def test_greedy_hunt_finds_the_best_heads_without_repeats():
    worth = {(layer, head): layer + 10 * head for layer in range(3) for head in range(4)}
    seen = []

    def objective(chosen):
        seen.append(len(chosen))
        assert len(set(chosen)) == len(chosen)
        return sum(worth[h] for h in chosen)

    chosen = hunt_heads(list(worth), objective, rounds=2, per_round=3)
    assert set(chosen) == set(sorted(worth, key=worth.get)[-6:]) and chosen[0] == (2, 3)
    assert seen == [1] * 12 + [4] * 9
    with pytest.raises(ValueError, match="need 14 heads, but there are 12"):
        hunt_heads(list(worth), objective, rounds=7, per_round=2)


# ---- bad input


def test_processors_that_cannot_be_intercepted_are_refused():
    x = torch.randn(1, 4, 16)
    attn = processors.Attention(query_dim=16, heads=2, dim_head=8)

    class ByHand(processors.AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            return (attn.to_q(hidden_states) @ attn.to_k(hidden_states).mT).softmax(-1) @ attn.to_v(hidden_states)

    attn.set_processor(ByHand())
    with attnlib.attach(attn, Watch()), pytest.raises(ValueError, match="ByHand did not call"):
        attn(x)

    class Sharpened(processors.AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            q, k, v = (attn.head_to_batch_dim(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
            return torch.bmm(attn.get_attention_scores(q, k) ** 2, v)

    attn.set_processor(Sharpened())
    with attnlib.attach(attn, Watch()), pytest.raises(ValueError, match="does something to its weights"):
        attn(x)
    attn.set_processor(processors.SlicedAttnProcessor(slice_size=1))
    with attnlib.attach(attn, Watch()), pytest.raises(ValueError, match="of 1 heads of its batch at a time, not of 2"):
        attn(x)
    assert "get_attention_scores" not in attn.__dict__

    class Twice(processors.AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            first = super().__call__(attn, hidden_states)
            return first + super().__call__(attn, hidden_states)

    attn.set_processor(Twice())
    with attnlib.attach(attn, Watch()), pytest.raises(ValueError, match="more than once"):
        attn(x)
    assert type(attn.processor) is Twice


def test_one_processor_object_may_serve_many_modules(unet, unet_inputs):
    held = dict(unet.attn_processors)
    before = predict(unet, unet_inputs)
    unet.set_attn_processor(processors.AttnProcessor2_0())
    watch = Watch()
    try:
        with attnlib.attach(unet, watch):
            assert torch.equal(predict(unet, unet_inputs), before)
        assert sorted(s.layer for s, *_ in watch.calls) == list(range(8))
    finally:
        unet.set_attn_processor(held)


def test_masks_are_read(unet):
    torch.manual_seed(0)
    attn = processors.Attention(query_dim=16, heads=2, dim_head=8, cross_attention_dim=16).eval()
    x, c = torch.randn(2, 4, 16), torch.randn(2, 5, 16)
    mask = torch.zeros(2, 1, 5)
    mask[1, :, 3:] = -10000.0
    record = Record(rows="all")
    with attnlib.attach(attn, record):
        attn(x, encoder_hidden_states=c, attention_mask=mask)
    weights = record.results()[0]["weights"][0]
    assert weights[1, :, :, 3:].abs().max() == 0 and weights[0, :, :, 3:].min() > 0


def test_missing_pieces_are_named(unet, unet_inputs, monkeypatch):
    with attnlib.attach(unet, Watch(), rows=("cond",)), pytest.raises(ValueError, match="got a batch of 2"):
        predict(unet, unet_inputs)

    class Evict(Intervention):
        def on_cache(self, site, q, k, v):
            return None

    with pytest.raises(ValueError, match="on_cache, which is missing for diffusers models"):
        attnlib.attach(unet, Evict())
    with pytest.raises(ValueError, match="part='nowhere'"):
        attnlib.attach(unet, Watch(), part="nowhere")
    with attnlib.attach(unet, Watch(), part="mid_block") as session:
        assert [s.name for s in session.sites] == [
            f"mid_block.attentions.0.transformer_blocks.0.attn{i}" for i in (1, 2)
        ]
    with pytest.raises(TypeError, match="has no attention"):
        attnlib.attach(unet.time_embedding, Watch())
    with pytest.raises(TypeError, match="pipe.unet"):
        attnlib.attach(diffusers.DDPMPipeline(unet=None, scheduler=None), Watch())
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_processor", None)
    with pytest.raises(ImportError, match=r"pip install 'attnlib\[hf\]'"):
        attnlib.attach(unet, Watch())

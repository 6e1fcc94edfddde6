"""The protocol on video and joint-attention denoisers of diffusers: grids of rank three, both orders of streams."""

import inspect

import pytest
import torch

from hooks.models import Watch, dense_attention, predict

diffusers = pytest.importorskip("diffusers")

import attnlib  # noqa: E402
from attnlib import Layout, masks  # noqa: E402
from attnlib.hooks import Intervention, Record  # noqa: E402
from attnlib.steer import SoftPAG  # noqa: E402

VIDEO = (2, 3, 2)  # frames, height, width of the tokens


def wan(image_dim=None):
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=24, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32, image_dim=image_dim,
        added_kv_proj_dim=24 if image_dim else None,
    )  # fmt: skip


def wan_inputs(batch=2):
    return {
        "hidden_states": torch.randn(batch, 4, 2, 6, 4), "timestep": torch.tensor([10] * batch),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
    }  # fmt: skip


def wan_image_inputs():
    # The processor counts 512 text tokens from the end; what stands before them is the image.
    return {**wan_inputs(), "encoder_hidden_states": torch.randn(2, 512, 16),
            "encoder_hidden_states_image": torch.randn(2, 7, 8)}  # fmt: skip


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip


def ltx_inputs():
    return {
        "hidden_states": torch.randn(2, 12, 4), "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([10, 10]), "num_frames": 2, "height": 3, "width": 2,
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }  # fmt: skip


def cogvideox():
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=4, sample_height=6, sample_frames=5, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=5,
    )  # fmt: skip


def cogvideox_inputs():
    return {
        "hidden_states": torch.randn(2, 2, 4, 6, 4), "encoder_hidden_states": torch.randn(2, 5, 8),
        "timestep": torch.tensor([10, 10]),
    }  # fmt: skip


def hunyuan():
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4), guidance_embeds=True,
    )  # fmt: skip


def hunyuan_inputs():
    return {
        "hidden_states": torch.randn(2, 4, 2, 6, 4), "timestep": torch.tensor([10, 10]),
        "encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 8),
        "encoder_attention_mask": torch.ones(2, 5), "guidance": torch.tensor([6.0, 6.0]),
    }  # fmt: skip


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,),
    )  # fmt: skip


def sd3_inputs():
    return {
        "hidden_states": torch.randn(2, 4, 6, 4), "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([10, 10]),
    }  # fmt: skip


video, text, image = ("image", VIDEO), ("text", 5), ("image", (3, 2))
SELF, CROSS = ("self", (video,), (video,)), ("cross", (video,), (text,))
MODELS = {
    "wan": (wan, wan_inputs, [SELF, CROSS] * 2),
    "wan-image": (
        lambda: wan(8), wan_image_inputs,
        [SELF, ("cross", (video,), (("image", 7),)), ("cross", (video,), (("text", 512),))] * 2,
    ),
    "ltx": (ltx, ltx_inputs, [SELF, CROSS] * 2),
    "cogvideox": (cogvideox, cogvideox_inputs, [("joint", (text, video), (text, video))] * 2),
    "hunyuan": (
        hunyuan, hunyuan_inputs, [("self", (text,), (text,))] + [("joint", (video, text), (video, text))] * 2
    ),
    "sd3": (
        sd3, sd3_inputs,
        [("joint", (image, text), (image, text)), ("self", (image,), (image,)),
         ("joint", (image, text), (image, text))],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    make, inputs, sites = MODELS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    torch.manual_seed(1)
    return model, inputs(), sites


def stage(name, fn, layers=None, kinds=("self", "cross", "joint")):
    made = type("Stage", (Intervention,), {name: lambda self, *args: fn(*args)})()
    made.layers, made.kinds = layers, kinds
    return made


def test_no_op_and_detach_give_the_same_bits(case):
    model, inputs, _ = case
    before = predict(model, inputs)
    held = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    marks = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    with attnlib.attach(model, Watch([0])) as session:
        for n, m in model.named_modules():
            if n in held:
                assert (m.processor is held[n]) == (n != session.attached[0].name)
        assert torch.equal(predict(model, inputs), before)
    with attnlib.attach(model, Watch(), Record(rows="all")):
        assert torch.equal(predict(model, inputs), before)
    assert all(m.processor is held[n] for n, m in model.named_modules() if n in held)
    assert marks == {n: sorted(m.__dict__) for n, m in model.named_modules()}
    assert torch.equal(predict(model, inputs), before)


def test_sites_layouts_and_weights(case):
    model, inputs, sites = case
    watch, record = Watch(), Record(rows="all")
    with attnlib.attach(model, record, watch, rows=("uncond", "cond")):
        predict(model, inputs)
    found = [(s.kind, s.q_layout, s.k_layout) for s, *_ in watch.calls]
    assert found == [(kind, Layout(q), Layout(k)) for kind, q, k in sites]
    per_layer = {}
    for site, q, k, v, out in watch.calls:
        assert site.rows == ("uncond", "cond") and site.n_queries == q.shape[2] and site.n_keys == k.shape[2]
        weights = record.results()[_key(record, site)]["weights"][per_layer.setdefault(site.layer, 0)]
        per_layer[site.layer] += 1
        allowed = site.mask.allowed
        bias = 0 if site.mask.bias is None else site.mask.bias
        scores = (q @ k.transpose(-1, -2) * site.scale + bias).masked_fill(
            ~allowed if allowed is not None else torch.tensor(False), float("-inf")
        )
        torch.testing.assert_close(weights, scores.softmax(-1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(weights @ v, out, atol=1e-5, rtol=1e-5)


def _key(record, site):
    return site.layer if site.layer in record.results() else f"{site.layer} {site.kind}"


def test_masks_on_the_grid_of_a_video(case):
    """Each frame reads itself: a mask made from the layout, whatever the order of streams."""
    model, inputs, _ = case
    seen = []

    def by_frame(site, q, k, v, call):
        start, stop = site.q_layout.span("image")
        slot = torch.arange(q.shape[2])
        inside, size = (slot >= start) & (slot < stop), 6  # tokens of a frame
        frame = torch.where(inside, (slot - start) // size, -1)
        allowed = (frame[:, None] == frame) | ~inside[:, None] | ~inside
        out = call(q, k, v, mask=allowed)
        torch.testing.assert_close(out, dense_attention(q, k, v, allowed)[0], atol=1e-5, rtol=1e-5)
        seen.append(site.layer)
        return out

    kinds = ("self", "joint")
    edit = stage("around_attention", by_frame, kinds=kinds)
    edit.wants = lambda site: "refiner" not in site.name  # type: ignore[method-assign]
    with attnlib.attach(model, edit):
        predict(model, inputs)
    assert seen


def test_steps_passes_and_softpag(case):
    model, inputs, _ = case
    before = predict(model, inputs)

    class Steps(Watch):
        def __init__(self):
            super().__init__()
            self.steps = []

        def on_step(self, step):
            self.steps.append(step)

    steps = Steps()
    with attnlib.attach(model, steps, SoftPAG(1.0, pass_name="perturbed", layers=[0])) as session:
        for step in range(2):
            for name in ("cond", "perturbed"):
                with session.at(step=step, pass_name=name):
                    out = predict(model, inputs)
                    assert torch.equal(out, before) == (name == "cond")
    assert steps.steps == [0, 1]
    half = len(steps.calls) // 2
    assert {(s.step, s.pass_name) for s, *_ in steps.calls[:half]} == {(0, "cond"), (0, "perturbed")}
    assert {s.step for s, *_ in steps.calls[half:]} == {1}


def test_sublayers_and_block_inputs(case):
    model, inputs, sites = case
    before = predict(model, inputs)
    same = stage("around_sublayer", lambda site, h, call: call(h))
    with attnlib.attach(model, same):
        assert torch.equal(predict(model, inputs), before)
    layer = model.get_submodule(attnlib.attach(model, same).attached[1].name)
    _detach(model)
    with attnlib.attach(model, stage("around_sublayer", lambda site, h, call: call(h) * 0, [1])):
        silent = predict(model, inputs)
    last = [*layer.to_out[0].parameters()]
    if getattr(layer, "to_add_out", None) is not None:
        last += layer.to_add_out.parameters()
    held = [p.clone() for p in last]
    with torch.no_grad():
        for p in last:
            p.zero_()
        want = predict(model, inputs)
        for p, q in zip(last, held, strict=True):
            p.copy_(q)
    torch.testing.assert_close(silent, want, atol=1e-6, rtol=1e-5)
    seen = {}

    def look(site, hidden):
        seen[site.layer] = hidden
        return None

    with attnlib.attach(model, stage("on_block_input", look)):
        assert torch.equal(predict(model, inputs), before)
    assert all(h.dim() == 3 for h in seen.values()) and len(seen) >= 2
    with attnlib.attach(model, stage("on_block_input", lambda site, h: h * 2, [max(seen)])):
        assert not torch.allclose(predict(model, inputs), before, atol=1e-4)


def _detach(model):
    from attnlib.hooks import session as core

    core._sessions[model].detach()


def test_cache_context_of_a_pipeline_names_passes_and_steps():
    torch.manual_seed(0)
    model, inputs = wan().eval(), wan_inputs()
    takes_step = "step_index" in inspect.signature(type(model).cache_context).parameters  # not in older diffusers
    watch = Watch([0])
    with attnlib.attach(model, watch):
        for step in range(2):
            for name in ("cond", "uncond"):
                known = {"step_index": step} if takes_step else {}
                with model.cache_context(name, **known):
                    predict(model, inputs)
    steps = (0, 0, 1, 1) if takes_step else (None,) * 4
    assert [(s.pass_name, s.step) for s, *_ in watch.calls] == list(
        zip(("cond", "uncond", "cond", "uncond"), steps, strict=True)
    )


def test_masks_of_the_library_on_the_tokens_of_a_video():
    torch.manual_seed(0)
    model, inputs = wan().eval(), wan_inputs()
    near = masks.circular_window(VIDEO, 1.5)

    def look(site, q, k, v, call):
        out = call(q, k, v, mask=near)
        torch.testing.assert_close(out, dense_attention(q, k, v, near.dense(12))[0], atol=1e-5, rtol=1e-5)
        return out

    before = predict(model, inputs)
    with attnlib.attach(model, stage("around_attention", look, kinds=("self",))):
        assert not torch.allclose(predict(model, inputs), before, atol=1e-4)

"""DRA-Ctrl: a HunyuanVideo transformer of diffusers that attends by segments, against the authors' transformer."""

import pathlib

import pytest
import torch
from safetensors.torch import load_file

diffusers = pytest.importorskip("diffusers")

from doubles import doubles  # noqa: E402

import attnlib  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from attnlib.steer import DimensionReduction  # noqa: E402
from attnlib.steer.diffusion.dra_ctrl import READS, mixup_frames  # noqa: E402

FIXTURE = load_file(pathlib.Path(__file__).parent.parent / "fixtures" / "dra-ctrl.safetensors")
INPUTS = {key[2:]: value for key, value in FIXTURE.items() if key.startswith("i.")}
#: A frame has 6 tokens, a text 7, 2 of them of the image.
FRAME, TEXT, SHIFT = 6, 7, dict(shift=0.6, shift_from=2)


def build():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=6, pooled_projection_dim=4,
        rope_axes_dim=(2, 4, 4), guidance_embeds=True, image_condition_type="token_replace",
    )  # fmt: skip
    model.load_state_dict({key[2:]: value for key, value in FIXTURE.items() if key.startswith("w.")}, strict=True)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def built():
    with doubles():
        return build().double()


@pytest.fixture
def model(built):
    with doubles():
        yield built


def inputs(**changes):
    given = {name: INPUTS[name] for name in ("hidden_states", "timestep", "encoder_hidden_states",
                                             "pooled_projections", "guidance")}  # fmt: skip
    return {**given, "encoder_attention_mask": INPUTS["mask"], "return_dict": False, **changes}


def run(model, technique, **changes):
    given = inputs(**changes)
    given["hidden_states"] = given["hidden_states"].clone().requires_grad_()
    with attnlib.attach(model, technique):
        out = model(**given)[0]
        out.square().sum().backward()
    return out.detach(), given["hidden_states"].grad


CONDITION = INPUTS["cond"], INPUTS["cmask"]
WHOLE = INPUTS["cond"], torch.ones(2, 7)
CASES = {
    "one": (DimensionReduction(), {}),
    "plain_rope": (DimensionReduction(frame_gap=None), {}),
    "enhanced": (DimensionReduction(**SHIFT), {}),
    "two": (DimensionReduction(condition=CONDITION, compat="authors"), {}),
    "two_full": (DimensionReduction(condition=WHOLE, **SHIFT), {"encoder_attention_mask": torch.ones(2, 7).double()}),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_slopes_are_the_authors(model, name):
    technique, changes = CASES[name]
    out, slope = run(model, technique, **changes)
    torch.testing.assert_close(out, FIXTURE[f"{name}.y"], rtol=0, atol=1e-9)
    torch.testing.assert_close(slope, FIXTURE[f"{name}.g"], rtol=1e-9, atol=1e-9)


def test_a_padded_prompt_does_not_shift_the_other(model):
    """Right by default: what is padded counts for nothing, as if it were not there."""
    out, _ = run(model, DimensionReduction(condition=CONDITION))
    assert (out - FIXTURE["two.y"])[1].abs().max() > 1e-3  # of the sample whose first prompt is padded
    torch.testing.assert_close(out[0], FIXTURE["two.y"][0], rtol=0, atol=1e-9)
    short = {key: value[1:] if isinstance(value, torch.Tensor) else value for key, value in inputs().items()}
    short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :5]
    short["encoder_attention_mask"] = torch.ones(1, 5)
    with torch.no_grad(), attnlib.attach(model, DimensionReduction(condition=(INPUTS["cond"][1:], torch.ones(1, 7)))):
        alone = model(**short)[0]
    torch.testing.assert_close(out[1:], alone, rtol=0, atol=1e-9)


def dense(q, k, v, numbers, there):
    """Segments one by one: the equation."""
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for segment in range(4):
            asks = ((numbers == segment) & there[b]).nonzero().flatten()
            read = torch.tensor([READS[segment][n] == 1 for n in numbers.tolist()]) & there[b]
            if len(asks):
                scores = q[b][:, asks] @ k[b][:, read].mT / q.shape[-1] ** 0.5
                out[b][:, asks] = scores.softmax(-1) @ v[b][:, read]
    return out


@pytest.mark.parametrize("name", ["one", "two"])
def test_every_segment_reads_what_it_may(model, name):
    seen = []

    class See(Intervention):
        kinds = ("joint",)

        def around_attention(self, site, q, k, v, call):
            out = call(q, k, v)
            seen.append((q, k, v, out))
            return out

    condition = CONDITION if name == "two" else None
    with torch.no_grad(), attnlib.attach(model, See(), DimensionReduction(condition=condition)):
        model(**inputs())
    there = torch.cat([torch.ones(2, 24), INPUTS["mask"], *([INPUTS["cmask"]] if condition else [])], 1).bool()
    numbers = torch.tensor([0] * 6 + [1] * 18 + [2] * 7 + [3] * (7 if condition else 0))
    assert len(seen) == 2
    for q, k, v, out in seen:
        torch.testing.assert_close(out, dense(q, k, v, numbers, there), rtol=0, atol=1e-9)


def test_the_condition_never_sees_what_is_generated(model):
    changed = INPUTS["hidden_states"].clone()
    changed[:, :, 1:] += 1.0
    streams = []

    def keep(module, args, kwargs, out):
        streams.append(out[0][:, :FRAME])

    handles = [b.register_forward_hook(keep, with_kwargs=True)
               for b in (*model.transformer_blocks, *model.single_transformer_blocks)]  # fmt: skip
    for hidden in (INPUTS["hidden_states"], changed):
        with torch.no_grad(), attnlib.attach(model, DimensionReduction(condition=CONDITION)):
            model(**inputs(hidden_states=hidden))
    for handle in handles:
        handle.remove()
    for a, b in zip(streams[:2], streams[2:], strict=True):
        assert torch.equal(a, b)


def test_detached_it_is_the_plain_model_and_its_positions_stay(model):
    with torch.no_grad():
        plain = model(**inputs())[0]
        with pytest.raises(RuntimeError, match="stop"), attnlib.attach(model, DimensionReduction(condition=CONDITION)):
            handle = model.proj_out.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(RuntimeError("stop")))
            try:
                model(**inputs())
            finally:
                handle.remove()
        assert torch.equal(model(**inputs())[0], plain)
        base = model.rope(INPUTS["hidden_states"])
        with attnlib.attach(model, DimensionReduction(frame_gap=4)):  # one latent frame apart, as ever
            assert all(torch.equal(a, b) for a, b in zip(model.rope(INPUTS["hidden_states"]), base, strict=True))
        with attnlib.attach(model, DimensionReduction(frame_gap=48)):
            cos, _ = model.rope(INPUTS["hidden_states"])
    torch.testing.assert_close(cos[FRAME, 0], torch.tensor(12.0).cos())  # the second frame stands at 12
    assert torch.equal(cos[:, 2:], base[0][:, 2:])


def test_adapters_act_on_the_condition_and_on_texts_alone():
    from peft import LoraConfig

    model = build()
    given = inputs(**{key: value.float() for key, value in inputs().items() if isinstance(value, torch.Tensor)})
    with torch.no_grad(), attnlib.attach(model, DimensionReduction()):
        plain = model(**given)[0]
    names = ["attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj",
             "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
             "ff_context.net.2", "norm1_context.linear", "norm1.linear", "norm.linear", "proj_mlp",
             "proj_out"]  # fmt: skip
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names))
    with torch.no_grad(), attnlib.attach(model, DimensionReduction()):
        torch.testing.assert_close(model(**given)[0], plain, rtol=0, atol=1e-6)  # their second half is zero
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    seen = {}

    def keep(name):
        return lambda module, args, out: seen.__setitem__(name, (args[0], out))

    layers = {"to_q": model.transformer_blocks[0].attn.to_q, "add": model.transformer_blocks[0].attn.add_q_proj,
              "joint": model.single_transformer_blocks[0].proj_mlp,
              "norm": model.single_transformer_blocks[0].norm.linear}  # fmt: skip
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    with torch.no_grad(), attnlib.attach(model, DimensionReduction()):
        model(**given)
    for handle in handles:
        handle.remove()
    for name, adapted in (("to_q", [slice(0, 6)]), ("joint", [slice(0, 6), slice(24, 31)])):
        x, out = seen[name]
        change = out - layers[name].base_layer(x)
        assert not change[:, 6:24].any() and all(change[:, rows].abs().max() > 1e-3 for rows in adapted)
    x, out = seen["norm"]
    assert torch.equal(out, layers["norm"].base_layer(x))
    x, out = seen["add"]
    assert (out - layers["add"].base_layer(x)).abs().amax(-1).min() > 1e-4  # of texts, everywhere
    with torch.no_grad():
        assert not torch.equal(layers["to_q"](seen["to_q"][0])[:, 6:], seen["to_q"][1][:, 6:])  # detached: everywhere


def test_frames_between_condition_and_target():
    a, b = torch.randn(2, 2, 3, 1, 2, 2).unbind(0)
    clip = mixup_frames(a, b)
    assert clip.shape == (2, 3, 4, 2, 2)
    assert torch.equal(clip[:, :, :1], a) and torch.equal(clip[:, :, -1:], b)
    torch.testing.assert_close(clip[:, :, 1:2], 2 / 3 * a + 1 / 3 * b)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: DimensionReduction(frame_gap=0), ValueError, "frame_gap"),
        (lambda: DimensionReduction(shift=-1.0), ValueError, "shift"),
        (lambda: DimensionReduction(compat="release"), ValueError, "compat"),
        (lambda: DimensionReduction(condition=INPUTS["cond"]), TypeError, "condition must be"),
        (lambda: DimensionReduction(condition=(INPUTS["cond"], torch.ones(2, 3))), ValueError, "its mask must be"),
    ],
)
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_bad_models_and_inputs(model):
    from hooks import pipes

    with pytest.raises(ValueError, match="no HunyuanVideo transformer"):
        attnlib.attach(pipes.flux()[0].transformer, DimensionReduction())
    with pytest.raises(ValueError, match="less than one latent frame"):
        attnlib.attach(model, DimensionReduction(frame_gap=2))
    with attnlib.attach(model, DimensionReduction()), pytest.raises(ValueError, match="two latent frames at least"):
        model(**inputs(hidden_states=INPUTS["hidden_states"][:, :, :1]))
    wrong = (torch.randn(2, 3, 5), torch.ones(2, 3))
    with attnlib.attach(model, DimensionReduction(condition=wrong)), pytest.raises(ValueError, match="do not fit"):
        model(**inputs())

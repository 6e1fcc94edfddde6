"""HiDiffusion: the authors' U-Nets from a fixture, its parts one by one, and whole pipelines."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import ControlNetModel, UNet2DConditionModel  # noqa: E402

import attnlib  # noqa: E402
from attnlib.hooks import Intervention  # noqa: E402
from attnlib.steer import HiDiffusion  # noqa: E402
from attnlib.steer.diffusion import hidiffusion  # noqa: E402
from attnlib.steer.diffusion.hidiffusion import TABLES, Place, Table, merge_windows, shifted_windows  # noqa: E402
from hooks import pipes  # noqa: E402
from hooks.models import Watch  # noqa: E402

RECORDED = load_file(Path(__file__).parent.parent / "fixtures" / "hidiffusion.safetensors")
BOTH = {"ratios": (0.7, 0.3), "aggressive": False}

#: What the tiny pipelines of the tests have.
TINY = Table(
    2, Place("conv", 0), Place("pool", 1), ("down_blocks.0.attentions.*.attn1", "up_blocks.1.attentions.*.attn1"),
    ratios=(0.5, 0.0),
)  # fmt: skip


def draw(pipe, size, count=1, **given):
    """A call of a pipeline for latents of a size, which pipelines themselves want to be multiples of 8."""
    dtype = pipe.unet.dtype
    latents = torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(2)).to(dtype)
    return pipes.sample(pipe, latents=latents, **{"steps": 2, **given})


# ---- the authors' U-Nets


def authors_unet(kind):
    """A tiny U-Net built as that of Stable Diffusion 1.5, or SDXL, with the recorded weights."""
    shape = (
        dict(
            block_out_channels=(4,) * 4, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
        if kind == "sd15"
        else dict(
            block_out_channels=(4,) * 3, down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), transformer_layers_per_block=(1, 2, 1),
            use_linear_projection=True,
        )
    )  # fmt: skip
    model = UNet2DConditionModel(
        sample_size=16, in_channels=2, out_channels=2, layers_per_block=2, norm_num_groups=2, cross_attention_dim=6,
        attention_head_dim=2, **shape,
    ).double().eval()  # fmt: skip
    flat = RECORDED[f"{kind}.weights"].double()
    state = model.state_dict()
    assert sum(p.numel() for p in state.values()) == len(flat)
    parts = flat.split([p.numel() for p in state.values()])
    model.load_state_dict({n: part.view_as(p) for (n, p), part in zip(state.items(), parts, strict=True)})
    return model


@pytest.fixture(scope="module")
def unets():
    return {kind: authors_unet(kind) for kind in ("sd15", "sdxl")}


def inputs(even):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(1, 2, *((24, 24) if even else (25, 33)), generator=g).half().double()
    return x, torch.randn(1, 5, 6, generator=g).half().double()


class Given(HiDiffusion):
    """Shifts as they were drawn in the authors' code."""

    shifts: list

    def draw(self, site):
        return self.shifts.pop(0)


def recorded_sines(module, args, out):
    """Of the time, in float32, as they were: their last bit depends on the machine."""
    torch.testing.assert_close(out, RECORDED["sines500"], atol=1e-4, rtol=0)
    return RECORDED["sines500"]


@pytest.mark.parametrize(
    ("key", "table", "steps", "settings"),
    [
        ("sd15.even.grad", None, 10, {}),
        ("sd15.odd", None, 10, {}),
        ("sdxl.even.grad", None, 10, {}),
        ("sdxl.odd", "sdxl", 10, {}),
        ("sdxl-turbo.odd", "sdxl-turbo", 4, {}),
        ("sd15.both", None, 4, BOTH),
        ("sdxl.both", None, 4, BOTH),
        ("sd15.control", None, 4, BOTH),
    ],
)
def test_whole_unets_are_the_authors(unets, key, table, steps, settings, request):
    """Both halves of RAU-Net, both at once, windows, odd sizes, a ControlNet's residuals; the gradient too."""
    model = unets[key.split(".")[0].split("-")[0]]
    x, text = inputs("even" in key)
    extra = {}
    if "control" in key:
        g = torch.Generator().manual_seed(7)
        down = [torch.randn(1, 4, s, s, generator=g) for s in [16] * 3 + [8] * 3 + [4] * 3 + [2] * 3]
        middle = torch.randn(1, 4, 2, 2, generator=g).half().double()
        extra = dict(
            down_block_additional_residuals=[r.half().double() for r in down], mid_block_additional_residual=middle
        )
    handle = model.time_proj.register_forward_hook(recorded_sines)
    request.addfinalizer(handle.remove)
    plain = model(x, 500, encoder_hidden_states=text, **({} if extra else extra)).sample
    it = Given(table, steps=steps, **settings)
    some = sorted(int(name.rpartition("step")[2]) for name in RECORDED if name.startswith(f"{key}.step"))
    with attnlib.attach(model, it) as session:
        for step in some:
            it.shifts = RECORDED[f"{key}.shifts{step}"].tolist()
            leaf = x.clone().requires_grad_()
            with session.at(step=step):
                out = model(leaf, 500, encoder_hidden_states=text, **extra).sample
            torch.testing.assert_close(out, RECORDED[f"{key}.step{step}"], atol=1e-9, rtol=1e-9)
            assert not it.shifts and (out - plain).abs().max() > 0.1
            if f"{key}.slope" in RECORDED and step == 0:
                (slope,) = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaf)
                torch.testing.assert_close(slope, RECORDED[f"{key}.slope"], atol=1e-9, rtol=1e-7)
    assert some and torch.equal(model(x, 500, encoder_hidden_states=text).sample, plain)


# ---- the tables


def spans(table, steps, sides, **settings):
    """``{place: (first, last + 1)}`` of the steps that it acts in."""
    found = {}
    for step in range(steps):
        for place in TABLES[table].shrunk(step, steps, sides, **settings):
            found.setdefault(place.how, []).append(step)
    assert all(s == list(range(s[0], s[-1] + 1)) for s in found.values())
    return {how: (s[0], s[-1] + 1) for how, s in found.items()}


def test_schedules_are_the_tables():
    assert spans("sd15", 50, (128, 128)) == {"conv": (0, 20)}
    assert spans("sd15", 50, (256, 255)) == {"conv": (0, 20)}  # one side is enough to be small
    assert spans("sd15", 50, (256, 256)) == {"conv": (0, 35), "pool": (0, 15)}
    assert spans("sdxl", 50, (256, 256)) == {"conv": (0, 8), "pool": (8, 20)}
    assert spans("sdxl", 30, (256, 256)) == {"conv": (0, 4), "pool": (4, 12)}
    assert spans("sdxl", 50, (256, 256), aggressive=False) == {"pool": (0, 20)}
    assert spans("sdxl", 50, (256, 256), controlled=True) == {"conv": (0, 8), "pool": (8, 25)}
    assert spans("sdxl", 50, (512, 600)) == {"pool": (0, 35), "conv": (0, 15)}
    assert spans("sdxl-turbo", 4, (128, 128)) == {"pool": (0, 2)}
    assert spans("sd15", 50, (128, 128), ratios=(1.0, 0.1)) == {"conv": (0, 50), "pool": (0, 5)}


def test_the_table_of_a_unet_is_known(unets):
    it = HiDiffusion()
    for kind, name, wanted in (
        ("sd15", "", "sd15"),
        ("sdxl", "", "sdxl"),
        ("sdxl", "stabilityai/sdxl-turbo", "sdxl-turbo"),
    ):
        unets[kind].register_to_config(_name_or_path=name)
        it.meet(unets[kind])
        assert it.chosen is TABLES[wanted]
    unets["sdxl"].register_to_config(_name_or_path="")
    it.meet(unets["sd15"])
    assert it.acts_on[-1] == "up_blocks.2.attentions.1"
    with attnlib.attach(unets["sd15"], HiDiffusion(raunet=False)) as session:
        attached = {".".join(s.name.split(".")[:4]) for s in session.attached}
    levels = {("down_blocks.0", 2), ("up_blocks.3", 3)}
    assert attached == {f"{stage}.attentions.{n}" for stage, count in levels for n in range(count)}


# ---- windows


def by_hand(attn, x, grid, shift):
    """Window attention of one image, window by window."""
    (h, w), c = grid, x.shape[-1]
    wh, ww = h // 2, w // 2
    rows = [(i + wh // 4 * shift) % h for i in range(h)]
    cols = [(j + ww // 4 * shift) % w for j in range(w)]
    out = torch.zeros(h, w, c, dtype=x.dtype)
    for a in range(2):
        for b in range(2):
            r, s = rows[a * wh : (a + 1) * wh], cols[b * ww : (b + 1) * ww]
            part = x.view(h, w, c)[r][:, s].reshape(1, -1, c)
            out[torch.tensor(r)[:, None], torch.tensor(s)] = attn(part).view(wh, ww, c)
    return out.view(1, h * w, c)


@pytest.mark.parametrize("shift", range(4))
def test_windows_are_attention_in_quadrants(pipe, shift):
    attn = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x, grid = torch.randn(2, 8 * 12, 16, generator=torch.Generator().manual_seed(0)), (8, 12)
    parts = shifted_windows(x, grid, shift)
    assert parts.shape == (8, 24, 16) and torch.equal(merge_windows(parts, grid, shift), x)
    with torch.no_grad():
        truth = torch.cat([by_hand(attn, image[None], grid, shift) for image in x])
        got = merge_windows(attn(parts), grid, shift)
        same = merge_windows(attn(shifted_windows(torch.ones(1, 96, 16), grid, shift)), grid, shift)
    torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-5)
    assert (same - same[:, :1]).abs().max() < 1e-6  # constant stays constant
    odd = torch.randn(1, 5 * 7, 4)
    assert shifted_windows(odd, (5, 7), shift).shape == (4, 12, 4)
    assert merge_windows(shifted_windows(odd, (5, 7), shift), (5, 7), shift).shape == odd.shape


class Products(TorchFunctionMode):
    """Multiplications of attention's two products, call by call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3] if len(args) > 2 else (kwargs[n] for n in ("query", "key", "value"))
            self.calls.append(q.numel() * k.shape[-2] + q.numel() // q.shape[-1] * k.shape[-2] * v.shape[-1])
        return func(*args, **(kwargs or {}))


def test_a_quarter_of_the_products(unets):
    x, text = inputs(True)
    counts = []
    for it in (HiDiffusion(raunet=False), None):
        with torch.no_grad(), Products() as count:
            if it is None:
                unets["sd15"](x, 5, encoder_hidden_states=text)
            else:
                with attnlib.attach(unets["sd15"], it):
                    unets["sd15"](x, 5, encoder_hidden_states=text)
        counts.append(count.calls)
    windows, plain = counts
    treated = [i for i, (a, b) in enumerate(zip(windows, plain, strict=True)) if a != b]
    assert len(treated) == 5 and all(4 * windows[i] == plain[i] for i in treated)
    assert all(plain[i] == max(plain) for i in treated)


def test_shifts_have_a_generator_of_their_own(pipe):
    class Drawn(HiDiffusion):
        def draw(self, site):
            shift = super().draw(site)
            self.seen.append(shift)
            return shift

    def draws(it):
        it.seen, state = [], torch.get_rng_state()
        with attnlib.attach(pipe, it):
            out = [draw(pipe, (24, 20), steps=3) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), state) and torch.equal(*out)
        half = len(it.seen) // 2
        assert it.seen[:half] == it.seen[half:]
        return it.seen[:half], out[0]

    first, image = draws(Drawn(TINY))
    again, same = draws(Drawn(TINY, raunet=True))
    other, changed = draws(Drawn(TINY, seed=1))
    assert first == again and torch.equal(image, same) and first != other and not torch.equal(image, changed)
    assert set(first + other) == {0, 1, 2, 3} and len(first) == 3 * 3


def test_windows_know_their_rows(pipe):
    """What acts inside a window still knows which row of the batch is which prompt's."""
    watch = Watch([0])
    with attnlib.attach(pipe, HiDiffusion(TINY, raunet=False), watch):
        pipes.sample(pipe, ["a red cat", "a dog"], steps=1)
    site, q, *_ = watch.calls[0]
    assert q.shape[:3] == (16, 2, 64) and site.q_layout.grid("image") == (8, 8)
    assert site.rows == ("uncond",) * 8 + ("cond",) * 8 and site.prompts == (0,) * 4 + (1,) * 4 + (0,) * 4 + (1,) * 4


# ---- smaller maps


class Sizes(Intervention):
    """The sizes of what stages give."""

    def __init__(self):
        self.acts_on, self.seen = ["stage"], []

    def around_module(self, site, inputs, call):
        out = call(inputs)
        self.seen.append((site.step, site.name, tuple((out[0] if isinstance(out, tuple) else out).shape[-2:])))
        return out


@pytest.mark.parametrize("size", [(32, 32), (49, 65), (18, 22)])
def test_deep_stages_see_a_quarter_and_the_size_comes_back(pipe, size):
    """Until T1 the deep stage sees ceil(H / 4); the output has the size of the input, odd ones too."""
    sizes = Sizes()
    with attnlib.attach(pipe, HiDiffusion(TINY), sizes):
        out = draw(pipe, size)
    small, half = tuple(-(-s // 4) for s in size), tuple(-(-s // 2) for s in size)
    assert out.shape == (1, 4, *size) and out.isfinite().all()
    seen = {(step, name): found for step, name, found in sizes.seen}
    for step, deep in ((0, small), (1, half)):
        assert seen[step, "down_blocks.1"] == seen[step, "mid_block"] == deep and seen[step, "up_blocks.0"] == size


@pytest.mark.parametrize("places", [(Place("pool", 1), None), (Place("pool", 0), Place("conv", 0))])
def test_other_places(pipe, places):
    sizes = Sizes()
    table = Table(2, *places, ratios=(0.5, 0.5))
    with attnlib.attach(pipe, HiDiffusion(table, windows=False), sizes):
        out = draw(pipe, (19, 33))
    assert out.shape == (1, 4, 19, 33)
    middle = [found for step, name, found in sizes.seen if name == "mid_block"]
    assert middle == [(5, 9) if places[1] is None else (3, 5), (10, 17)]


def test_after_its_steps_and_without_parts_it_is_the_pipeline(pipe):
    plain = pipes.sample(pipe, steps=4)
    for it in (HiDiffusion(TINY, raunet=False, windows=False), HiDiffusion(TINY, windows=False, ratios=(0.0, 0.0))):
        with attnlib.attach(pipe, it):
            assert torch.equal(pipes.sample(pipe, steps=4), plain)
    kept = []
    keep = lambda pipe, step, t, given: kept.append(given["latents"].clone()) or given  # noqa: E731
    with attnlib.attach(pipe, HiDiffusion(TINY, windows=False)):
        pipes.sample(pipe, steps=4, callback_on_step_end=keep)
    assert not torch.equal(kept[-1], plain)
    # From T1 = 2 on the model is itself: a step of the plain U-Net from the same latents.
    plan, text = pipe.scheduler, pipe.encode_prompt("a red circle and a blue square", "cpu", 1, True)
    plan.set_timesteps(4)
    with torch.no_grad():
        both = torch.cat([text[1], text[0]])
        a, b = pipe.unet(torch.cat([kept[1]] * 2), plan.timesteps[2], encoder_hidden_states=both).sample.chunk(2)
    assert torch.equal(plan.step(a + 7.5 * (b - a), plan.timesteps[2], kept[1]).prev_sample, kept[2])
    with attnlib.attach(pipe, HiDiffusion(TINY)), pytest.raises(RuntimeError, match="in the middle"):
        handle = pipe.unet.mid_block.register_forward_hook(broken)
        try:
            pipes.sample(pipe, steps=4)
        finally:
            handle.remove()
    assert torch.equal(pipes.sample(pipe, steps=4), plain)


def broken(*args):
    raise RuntimeError("in the middle")


def test_steps_are_the_pipelines(folder):
    """Heun calls the denoiser twice for each step of its own: T1 counts steps of the scheduler."""
    heun = pipes.stable_diffusion(folder, plan=pipes.scheduler("HeunDiscreteScheduler"))
    sizes = Sizes()
    with attnlib.attach(heun, HiDiffusion(TINY), sizes):
        pipes.sample(heun, steps=3)
    middle = [(step, found) for step, name, found in sizes.seen if name == "mid_block"]
    assert middle == [(step, (4, 4) if step < 2 else (8, 8)) for step in range(5)]  # 5 calls, int(5 / 2)


def test_sdxl_half_precision_and_two_images(tmp_path):
    xl = pipes.sdxl(str(tmp_path)).to(torch.bfloat16)
    with attnlib.attach(xl, HiDiffusion(TINY)):
        out = pipes.sample(xl, ["a cat", "a dog"], steps=2, height=32, width=24, num_images_per_prompt=2)
    assert out.shape == (4, 4, 32, 24) and out.dtype == torch.bfloat16 and out.isfinite().all()
    half = pipes.stable_diffusion(str(tmp_path)).to(torch.float16)
    with attnlib.attach(half, HiDiffusion(TINY)):
        assert draw(half, (21, 24)).isfinite().all()


def test_adapters_of_a_convolution_take_four_pixels_too(folder):
    peft = pytest.importorskip("peft")
    pipe = pipes.stable_diffusion(folder)
    x, text = torch.randn(1, 4, 32, 32), torch.randn(1, 5, 16)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["downsamplers.0.conv"], init_lora_weights=False))
    conv = pipe.unet.down_blocks[0].downsamplers[0].conv
    with torch.no_grad(), attnlib.attach(pipe.unet, HiDiffusion(TINY, windows=False, steps=2)) as session:
        with session.at(step=0):
            got = pipe.unet(x, 3, encoder_hidden_states=text).sample
        low, up = conv.lora_A["default"].weight, conv.lora_B["default"].weight
        merged = conv.base_layer.weight + torch.einsum("orij,rchw->ochw", up, low) * conv.scaling["default"]
        pipe.unet.delete_adapters("default")
        plain = pipe.unet.down_blocks[0].downsamplers[0].conv
        plain.weight.copy_(merged)
        with session.at(step=0):
            torch.testing.assert_close(pipe.unet(x, 3, encoder_hidden_states=text).sample, got, atol=1e-5, rtol=1e-5)


# ---- beside a ControlNet


@pytest.fixture(scope="module")
def controlled(folder):
    torch.manual_seed(0)
    net = ControlNetModel(
        in_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=(2, 4),
        down_block_types=("CrossAttnDownBlock2D",) * 2, cross_attention_dim=16, conditioning_channels=3,
        conditioning_embedding_out_channels=(8,),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for one in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            one.weight.normal_(0, 0.5)
    return pipes.stable_diffusion(folder, "StableDiffusionControlNetPipeline", controlnet=net)


def test_beside_a_controlnet(controlled):
    picture, seen, added = torch.rand(1, 3, 32, 48), [], []
    handle = controlled.controlnet.register_forward_hook(
        lambda net, args, kwargs, out: seen.append(tuple(out[1].shape)), with_kwargs=True
    )
    conds = controlled.controlnet.controlnet_cond_embedding.register_forward_pre_hook(
        lambda module, args: seen.append(tuple(args[0].shape[-2:]))
    )

    class Added(Intervention):
        def around_denoiser(self, site, inputs, call):
            some = inputs["down_block_additional_residuals"]
            middle = inputs["mid_block_additional_residual"]
            added.append(None if some is None else [tuple(r.shape[-2:]) for r in (*some, middle)])
            return call(inputs)

    try:
        with attnlib.attach(controlled, HiDiffusion(TINY), Added()):
            out = pipes.sample(controlled, steps=4, image=picture, height=32, width=48)
    finally:
        handle.remove()
        conds.remove()
    assert out.shape == (1, 4, 32, 48) and out.isfinite().all()
    # 16 x 16 at training: by 3 and down to multiples of 8; the net's own middle is half of it.
    assert seen[:2] == [(8, 16), (2, 32, 4, 8)] and len(seen) == 8
    top, deep = (32, 48), [(8, 12)] * 3  # the convolution, one layer, and the middle
    assert added[0] == [top, top, *deep] and added[2] == [top, top, *[(16, 24)] * 3] and added[3] is None
    plain = pipes.sample(controlled, steps=4, image=picture, height=32, width=48)
    with attnlib.attach(controlled, HiDiffusion(TINY, raunet=False, windows=False)):
        assert torch.equal(pipes.sample(controlled, steps=4, image=picture, height=32, width=48), plain)


def test_text_beside_a_controlnet_has_ratios_of_its_own(controlled):
    table = Table(2, Place("pool", 1), ratios=(0.25, 0.0), controlled=(0.75, 0.0))
    sizes = Sizes()
    with attnlib.attach(controlled, HiDiffusion(table), sizes):
        pipes.sample(controlled, steps=4, image=torch.rand(1, 3, 16, 16), height=16, width=16)
    assert [f for _, name, f in sizes.seen if name == "mid_block"] == [(4, 4)] * 3 + [(8, 8)]


# ---- what is refused


def test_bad_input(pipe, unets):
    with pytest.raises(ValueError, match="transformers have one resolution"):
        attnlib.attach(pipes.dit(), HiDiffusion())
    with pytest.raises(ValueError, match="transformers have one resolution"):
        attnlib.attach(pipes.sd3()[0], HiDiffusion("sdxl"))
    with pytest.raises(ValueError, match="built like none of"):
        attnlib.attach(pipe, HiDiffusion())
    with pytest.raises(ValueError, match="table is of a U-Net of 4 stages"):
        attnlib.attach(pipe, HiDiffusion("sd15"))
    with pytest.raises(ValueError, match="names stage 2"):
        attnlib.attach(pipe, HiDiffusion(Table(2, Place("conv", 2))))
    with pytest.raises(ValueError, match=r"down_blocks.1 does not end in a convolution"):
        attnlib.attach(pipe, HiDiffusion(Table(2, Place("conv", 1))))
    with pytest.raises(ValueError, match="how"):
        Place("shrink", 0)
    with pytest.raises(ValueError, match="table"):
        HiDiffusion("sd3")
    with pytest.raises(TypeError, match="first must be Place, got 'conv'"):
        Table(2, "conv")
    with pytest.raises(ValueError, match=r"control_size\[0\] must be an integer of at least 1"):
        HiDiffusion(control_size=0)
    with pytest.raises(ValueError, match="x must have the 20 tokens"):
        shifted_windows(torch.ones(1, 16, 2), (4, 5))
    with pytest.raises(ValueError, match="shift must be .* at most 3, got 4"):
        shifted_windows(torch.ones(1, 16, 2), (4, 4), 4)
    with pytest.raises(ValueError, match=r"x must be \(4 B, 4, C\)"):
        merge_windows(torch.ones(3, 4, 2), (4, 4))
    with pytest.raises(ValueError, match="ratios"):
        HiDiffusion(ratios=(0.5, 1.5))
    with attnlib.attach(pipe, HiDiffusion(TINY)), pytest.raises(ValueError, match="too few for the table's ratios"):
        pipes.sample(pipe, steps=1)
    x, text = inputs(True)
    with attnlib.attach(unets["sd15"], HiDiffusion()), pytest.raises(ValueError, match=r"HiDiffusion\(steps=...\)"):
        unets["sd15"](x, 3, encoder_hidden_states=text)
    with (
        attnlib.attach(unets["sd15"], HiDiffusion(steps=4)) as session, session.at(step=0),
        pytest.raises(ValueError, match="T2I adapter"),
    ):  # fmt: skip
        unets["sd15"](x, 3, encoder_hidden_states=text, down_intrablock_additional_residuals=[])
    with pytest.raises(ValueError, match="both shrink the same maps"):
        attnlib.attach(pipe, HiDiffusion(TINY), HiDiffusion(TINY))


def test_features_of_other_steps_do_not_fit(pipe):
    class Reuse(Intervention):
        acts_on, reuses_features = ("resnet",), True

        def around_module(self, site, inputs, call):
            return call(inputs)

    with pytest.raises(ValueError, match="maps change their sizes between steps"):
        attnlib.attach(pipe, HiDiffusion(TINY), Reuse())
    with attnlib.attach(pipe, HiDiffusion(TINY, raunet=False), Reuse()):
        pass
    assert hidiffusion.SHIFTS == 4

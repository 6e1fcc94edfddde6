"""DiMR: the authors' whole model from a recording, sizes, time, loss, sampling in a pipeline, errors."""

import dataclasses
import json
import re

import pytest
import torch
from parity import Fixture, synthetic

from attnlib.models.diffusion.dimr import (
    SIZES,
    Branch,
    DiMR,
    TimeNorm,
    TimeParameter,
    dimr,
    linear_time,
    log_snr,
    noise_at,
    settings_of,
)


class Their(Fixture):
    def model(self, case):
        config = {name: value for name, value in self.config[case].items() if name != "first"}
        settings = settings_of({**config, "stage_configs": config.pop("stages")})
        model = DiMR(**settings, sample_size=8).double()
        model.load_released({n: p.double() for n, p in self.under(f"{case}/sd").items()})
        return model

    def inputs(self, case):
        classes = self.tensors[f"{case}/y"] if self.config[case].get("num_classes") else None
        return self.tensors[f"{case}/x"], self.tensors[f"{case}/log_snr"], classes


@pytest.fixture(scope="module")
def their():
    return Their("dimr")


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    assert (a - b).detach().abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("case", ["rms", "ln", "three", "uncond"])
def test_output_and_gradients_are_the_authors(their, case):
    """Both norms and the one without time, two and three resolutions, maps smaller than their tables."""
    model, (x, s, classes) = their.model(case), their.inputs(case)
    x = x.clone().requires_grad_()
    found = model.at(x, s, classes)
    wanted, g = their.under(f"{case}/out"), their.under(f"{case}/g")
    assert len(found.levels) == len(wanted) and found.levels[-1] is found.sample
    for i, level in enumerate(found.levels):
        close(level, wanted[str(i)])
    names = dict(model.named_parameters())
    loss = sum((level * g[str(i)]).sum() for i, level in enumerate(found.levels))
    grads = dict(zip(["x", *names], torch.autograd.grad(loss, [x, *names.values()]), strict=True))
    close(grads["x"], their.tensors[f"{case}/dx"])
    recorded = their.under(f"{case}/dw")
    some = {**{n: torch.zeros_like(p).double() for n, p in their.under(f"{case}/sd").items()}, **recorded}
    for name, wanted in model.convert_state_dict(some).items():
        if bool(wanted.any()):
            close(grads[name], wanted.reshape(grads[name].shape))
    close(model.at(x, s[:1], classes).sample, their.tensors[f"{case}/same"])  # one time for all


@pytest.mark.parametrize("case", ["ada", "axial", "both", "text"])
def test_settings_that_no_released_model_uses_are_the_authors(case):
    """Gains of the first token, rotary positions along both axes, both, and tokens of a text beside the map's."""
    their = Their("dimr-blocks")
    config = their.config[case]
    shapes, first = config.pop("shapes"), config.pop("first")
    model = DiMR(**settings_of({**config, "stage_configs": config.pop("stages")}), sample_size=8).double()
    ours = {
        "norm.linear.weight": "norm.map.weight",
        "pos_emb.freqs_h": "mixer.rows",
        "qk_norm.scale": "mixer.log_scale",
    }
    for name, (mean, std) in first.items():  # as they start
        match = re.fullmatch(r"stages\.0\.blocks\.(\d)\.block1\.(.*)", name)
        if match and match[2] in ours:
            own = model.get_parameter(f"branches.0.blocks.{match[1]}.{ours[match[2]]}").detach()
            assert (float(own.mean()), float(own.std(unbiased=False))) == pytest.approx((mean, std), abs=1e-6), name
    raised = {"axial": 2.3, "both": 5.0}.get(case, 0.0)
    weights = {n: v.double() + (raised if "qk_norm" in n else 0.0) for n, v in synthetic(shapes).items()}
    model.load_released(weights)
    x, s, classes = their.inputs(case)
    text = {}
    if f"{case}/text" in their.tensors:
        text = {"context": their.tensors[f"{case}/text"], "context_valid": their.tensors[f"{case}/mask"]}
    x = x.clone().requires_grad_()
    found = model.at(x, s, classes, **text)
    g = their.under(f"{case}/g")
    for i, level in enumerate(found.levels):
        close(level, their.tensors[f"{case}/out/{i}"])
    sum((level * g[str(i)]).sum() for i, level in enumerate(found.levels)).backward()
    close(x.grad, their.tensors[f"{case}/dx"])
    recorded = their.under(f"{case}/dw")
    assert recorded
    zeros = {n: torch.zeros(shape).double() for n, shape in shapes.items()}
    own = dict(model.named_parameters())
    for name, wanted in model.convert_state_dict(zeros | recorded).items():
        if bool(wanted.any()):
            close(own[name].grad, wanted.reshape(own[name].shape))
    for name, wanted in model.convert_state_dict(zeros | their.under(f"{case}/after")).items():
        if "log_scale" in name:
            close(own[name], wanted)
    model.at(x, s[:1], classes).sample.sum().backward()  # one time for all, no text


def test_the_loss_is_the_authors(their):
    for case in ("rms", "three"):
        model = their.model(case)
        terms = model.loss(model.at(*their.inputs(case)), their.tensors[f"{case}/noise"].double())
        assert list(terms) == (["4x4", "8x8"] if case == "rms" else ["2x2", "4x4", "8x8"])
        close(sum(terms.values()), their.tensors[f"{case}/loss"].mean())
    assert dimr_tiny(loss_weights=(0.0, 2.0)).loss_weights == [0.0, 2.0]


def test_half_size_noise_keeps_its_variance():
    torch.manual_seed(0)
    noise = torch.randn(64, 4, 32, 32, dtype=torch.float64)
    for side in (16, 8):
        small = noise_at(noise, (side, side))
        assert small.std().item() == pytest.approx(1, abs=0.02)
    by_hand = (noise[:, :, ::2] + noise[:, :, 1::2])[..., ::2] + (noise[:, :, ::2] + noise[:, :, 1::2])[..., 1::2]
    close(noise_at(noise, (16, 16)), by_hand / 2)


def test_sizes():
    """Parameters by name, as counted on the authors' configurations."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in dimr(name).parameters()) for name in SIZES}
        model = dimr("dimr_xl_2r")
    assert counts == {"dimr_xl_2r": 505_046_408, "dimr_g_2r": 1_056_352_904}
    assert [len(b.blocks) for b in model.branches] == [39, 21] and len(model.branches[0].skips) == 19
    assert sum(p.numel() for p in model.branches[1].up.map.parameters()) == pytest.approx(74.04e6, rel=0.01)
    assert round(sum(p.numel() for p in model.branches[0].parameters()) / 1e6, 2) == 396.25
    x = torch.empty(2, 4, 32, 32, device="meta")
    levels = model.at(x, torch.empty(2, device="meta"), torch.empty(2, dtype=torch.long, device="meta")).levels
    assert [tuple(level.shape) for level in levels] == [(2, 4, 16, 16), (2, 4, 32, 32)]


def dimr_tiny(**changes):
    torch.manual_seed(0)
    branches = [Branch(16, 24, 3, 4, num_heads=2, patch_size=2), Branch(8, 16, 2, 8, kernel_size=3)]
    return DiMR(branches, **{"num_classes": 1001, "sample_size": 8, **changes})


def test_time_blends_two_vectors():
    p = TimeParameter(3, 1.0).double()
    with torch.no_grad():
        for value in p.parameters():
            value.copy_(torch.randn(3).double().abs())
    close(p(torch.tensor([1e6]).double())[0], p.first)
    close(p(torch.tensor([-1e6]).double())[0], p.second)
    t = torch.tensor([0.3, -2.0]).double()
    share = 1 / (1 + torch.exp(-(t[:, None] * (1 + p.slope) + p.offset)))
    close(p(t), share * p.first + (1 - share) * p.second)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    norm = TimeNorm(3, "td-rms").double()
    norm.weight = p
    close(norm(x, t), x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8) * p(t)[:, None, None])
    norm = TimeNorm(3).double()
    norm.weight = norm.bias = p
    plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    close(norm(x, t), plain * p(t)[:, None, None] + p(t)[:, None, None])


@pytest.mark.parametrize("norm", ["td-rms", "td-layer"])
def test_time_does_nothing_at_the_start(norm):
    model, x = dimr_tiny(norm=norm), torch.randn(2, 4, 8, 8)
    y = torch.tensor([3, 1000])
    early, late = model(x, torch.tensor([0, 0]), y).sample, model(x, torch.tensor([999, 500]), y).sample
    assert torch.allclose(early, late, atol=1e-6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".second"):
                p.add_(0.5)
    assert not torch.allclose(model(x, 0, y).sample, model(x, 999, y).sample, atol=1e-3)


def test_first_weights_are_the_authors(their):
    """Means and deviations of the recorded first weights; those of two or more kinds stand in one of ours."""
    first = their.config["rms"]["first"]
    torch.manual_seed(0)
    big = DiMR([Branch(256, 256, 1, 16, num_heads=2, patch_size=2), Branch(128, 128, 1, 32)], num_classes=300)
    for name, p in big.named_parameters():
        if name.endswith((".slope", ".offset")) or (
            name.endswith("bias") and "embed" not in name and ".out." not in name
        ):
            if "mixer" not in name:
                assert not bool(p.any()), name
        elif name.endswith((".first", ".second")):
            assert bool((p == (0.0 if ".bias." in name else 1.0)).all()), name
        elif p.dim() > 1 and ("mlp" in name or "mixer.q" in name or "skips" in name or "pos_embed" in name):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
    assert all(std == 0 for name, (_, std) in first.items() if "nodecay" in name or "param" in name)
    linear = [std for name, (_, std) in first.items() if name.endswith(("w0.weight", "query_key_value.weight"))]
    assert linear and all(std == pytest.approx(0.02, rel=0.2) for std in linear)


def test_two_times():
    assert linear_time(torch.tensor([-1, 499, 999])).tolist() == [-4.0, 0.0, 4.0]
    alphas = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
    close(log_snr(alphas)(torch.tensor([10, 700])), (alphas / (1 - alphas)).log()[[10, 700]])
    model, x, y = dimr_tiny(time=log_snr(alphas)), torch.randn(1, 4, 8, 8), torch.tensor([7])
    same = model.at(x, log_snr(alphas)(torch.tensor([300])), y).sample
    assert torch.equal(model(x, 300, y).sample, same)


def test_gradient_may_stop_between_branches():
    for stop in (False, True):
        model = dimr_tiny(stop_gradient=stop)
        model(torch.randn(1, 4, 8, 8), 5, torch.tensor([1])).sample.sum().backward()
        assert (model.branches[0].embed.weight.grad is None) == stop
        assert (model.branches[0].out.weight.grad is None) and model.branches[1].out.weight.grad is not None


def test_groups_for_an_optimizer():
    decayed, free = dimr_tiny().decayed(0.03)
    assert free["weight_decay"] == 0 and decayed["weight_decay"] == 0.03
    assert sum(p.numel() for g in (decayed, free) for p in g["params"]) == sum(
        p.numel() for p in dimr_tiny().parameters()
    )
    assert all(not bool(p.any()) for p in free["params"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_samples_from_it(dtype):
    pytest.importorskip("diffusers")
    from diffusers import DiTPipeline
    from hooks import pipes

    model = dimr_tiny().eval().to(dtype)
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
        pipe = pipes.quiet(DiTPipeline(transformer=model, vae=pipes.vae().to(dtype), scheduler=pipes.scheduler(name)))

        def draw(pipe=pipe, labels=(3, 3, 5), scale=1.4):
            out = pipe(
                list(labels), guidance_scale=scale, num_inference_steps=3, output_type="np",
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            return torch.as_tensor(out.images)

        assert draw().shape == (3, 8, 8, 3) and draw().isfinite().all()
        assert not torch.equal(draw(), draw(scale=1.0)) and torch.equal(draw(), draw())


def test_interventions_reach_its_attention():
    pytest.importorskip("diffusers")
    from diffusers import DiTPipeline
    from hooks import pipes

    import attnlib
    from attnlib.hooks import Record

    pipe = pipes.quiet(DiTPipeline(transformer=dimr_tiny().eval(), vae=pipes.vae(), scheduler=pipes.scheduler()))
    with attnlib.attach(pipe, Record(what=("entropy",), rows="all")) as session:
        pipe([3], num_inference_steps=1, output_type="np")
    assert list(session.results["record"]) == [0, 1, 2]
    with pytest.raises(ValueError, match="StepCache needs the stage around_module, which is missing"):
        attnlib.attach(pipe, attnlib.cache.StepCache(torch.tensor([True, False])))


def test_errors():
    model, x, y = dimr_tiny(), torch.randn(1, 4, 8, 8), torch.tensor([1])
    for call, message in (
        (lambda: model(x[:, :3], 1, y), r"hidden_states must be \(B, 4, H, W\), got \(1, 3, 8, 8\)"),
        (lambda: model(torch.randn(1, 4, 16, 16), 1, y), "a map of 8 x 8 tokens is larger than the 4 x 4"),
        (lambda: model(torch.randn(1, 4, 7, 8), 1, y), r"\(7, 8\) do not divide into tokens of 2 pixels"),
        (lambda: model(x, torch.tensor([1, 2]), y), "timestep must be one number or one for each of 1 samples"),
        (lambda: model(x, 1), "class_labels are needed, integers below 1001"),
        (lambda: model(x, 1, torch.tensor([1001])), r"class_labels must be 1 integers below 1001, got \[1001\]"),
        (lambda: DiMR([]), "branches must hold at least one Branch"),
        (lambda: DiMR([Branch(8, 8, 1, 8)]), "no branch has num_heads"),
        (lambda: DiMR([Branch(8, 8, 1, 8, kernel_size=4)], num_classes=0), "kernel_size=4 must be odd"),
        (lambda: dimr_tiny(loss_weights=(1.0,)), "loss_weights must be 2 numbers"),
        (lambda: dimr_tiny(norm="batch"), "norm"),
        (lambda: dimr_tiny(time=3), "time must be a function of timesteps"),
        (lambda: dimr_tiny(sample_size=0), "sample_size"),
        (lambda: dimr_tiny(loss_weights=1.0), "loss_weights must be a sequence"),
        (lambda: DiMR(3), "branches must be a sequence"),
        (lambda: Branch(8, 8, 1, 0), "size must be an integer of at least 1, got 0"),
        (lambda: model(x, 1, torch.tensor([1.0])), "class_labels must be an integer tensor"),
        (lambda: model(x.long(), 1, y), "hidden_states must be a floating-point tensor"),
        (lambda: model.loss(x, x), "prediction must be Prediction"),
        (
            lambda: model.loss(model(x, 1, y), x[:, :1]),
            r"noise must be \(1, 4, 8, 8\), as the prediction is, got \(1, 1",
        ),
        (lambda: model.decayed(-1.0), "weight_decay"),
        (lambda: TimeParameter(0, 1.0), "dim"),
        (lambda: TimeNorm(3)(torch.randn(2, 4, 5), torch.zeros(1)), r"x must be \(B, \*grid, 3\), got \(2, 4, 5\)"),
        (lambda: TimeNorm(3)(torch.randn(2, 4, 3), torch.zeros(3)), "time must be one number or one for each of 2"),
        (lambda: noise_at(torch.ones(1, 1, 4, 4), (0, 0)), "size must be an integer of at least 1, got 0"),
        (lambda: log_snr(torch.tensor([0.5]))(torch.tensor([5])), "timestep points at step 5; possible: 0 to 0"),
        (lambda: settings_of({"pe_type": "RoPE"}), "pe_type='RoPE' is not possible"),
        (lambda: dimr_tiny(positions="axial-rotary"), "num_classes=1001 puts a token of the class"),
        (lambda: dimr_tiny(positions="sines"), "positions='sines' is not possible"),
        (lambda: DiMR([Branch(8, 8, 1, 8)], num_classes=0, context_dim=3), "context_dim=3 needs a transformer branch"),
        (lambda: model(x, 1, y, encoder_hidden_states=torch.randn(1, 2, 3)), "need context_dim, which is 0"),
        (
            lambda: dimr_tiny(context_dim=3)(x, 1, y, encoder_hidden_states=torch.randn(1, 2, 4)),
            "encoder_hidden_states.*context_dim=3",
        ),
        (
            lambda: model(x, 1, y, encoder_attention_mask=torch.ones(1, 2)),
            "encoder_attention_mask is given without encoder_hidden_states",
        ),
        (lambda: settings_of({}), r"config must have stage_configs, got \[\]"),
        (lambda: dimr("dimr_s"), "name"),
        (lambda: noise_at(torch.ones(1, 1, 9, 9), (4, 4)), r"size \(4, 4\) must divide \(9, 9\)"),
        (lambda: settings_of({"norm_type": "BN"}), "norm_type"),
        (
            lambda: DiMR([Branch(8, 8, 1, 4, num_heads=1, patch_size=3), Branch(8, 8, 1, 8, patch_size=2)]),
            "by a whole factor, got 3 and 2 pixels",
        ),
        (lambda: DiMR.convert_state_dict({"stages.0.other": torch.ones(1)}), "stages.0.other"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert dataclasses.replace(SIZES["dimr_xl_2r"][1], drop=0.1).blocks == 21
    assert json.loads(json.dumps(dataclasses.asdict(SIZES["dimr_xl_2r"][0])))["size"] == [16, 16]

"""U-Nets in lock-step: against the authors' code, in pipelines, trained, saved; bad input."""

import json

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, synthetic
from safetensors import safe_open

from attnlib.models.diffusion.ensemble import Aggregator, TextEncoders, UNetEnsemble
from attnlib.ops._count import counted
from tests.hooks.pipes import clip_tokenizer, sample, scheduler, sdxl, stable_diffusion, text_encoder, unet

pytest.importorskip("diffusers")
SMALL = dict(dim=64, num_heads=4)


def ensemble(count=2, seed=0, **options):
    return UNetEnsemble([unet(seed=seed + i) for i in range(count)], **{**SMALL, **options})


def moved(made, seed=5):
    """Aggregators that do not average."""
    torch.manual_seed(seed)
    for aggregator in made.aggregators:
        torch.nn.init.normal_(aggregator.conv_out.weight, std=0.5)
    return made


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(1)
    return torch.randn(2, 4, 16, 16), torch.tensor(7), torch.randn(2, 5, 16)


@pytest.mark.parametrize("case", ["two", "three, odd"])
def test_a_call_equals_the_authors(case):
    with safe_open(HERE / "adaptive-feature-aggregation.safetensors", "pt") as f:
        said = json.loads(f.metadata()["config"])[case]
        held = {k.removeprefix(case + "/"): f.get_tensor(k) for k in f.keys() if k.startswith(case + "/")}  # noqa: SIM118

    def recorded_sines(module, args, out):
        """Of the times, in float32, as they were: their last bit depends on the machine."""
        torch.testing.assert_close(out, held["sines"].expand_as(out), atol=1e-4, rtol=0)
        return held["sines"].expand_as(out)

    nets = [unet(**said["blocks"]) for _ in range(said["k"])]
    for i, net in enumerate(nets):
        weights = synthetic({f"net{i}.{k}": v for k, v in said["shapes"].items()})
        net.load_state_dict({k.split(".", 1)[1]: v for k, v in weights.items()})
        net.time_proj.register_forward_hook(recorded_sines)
    made = UNetEnsemble(nets, dim=64, num_heads=4, num_layers=said["layers"]).double()
    made.aggregators.load_state_dict(synthetic(said["aggregators"]))
    x = held["x"].clone().requires_grad_()
    found = made.predict(x, held["t"], held["c"])
    close = dict(atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.sample, held["y"], **close)
    assert len(found.weights) == len(made.aggregators) == sum(k.startswith("map/") for k in held)
    for i, weights in enumerate(found.weights):
        torch.testing.assert_close(weights.mean((2, 3)), held[f"map/{i}"], **close)
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]), **close)
    found.sample.backward(held["g"])
    torch.testing.assert_close(x.grad, held["dx"], **close)
    first, middle, last = (made.aggregators[i] for i in (0, 4, -1))
    torch.testing.assert_close(first.conv_in.weight.grad, held["dw/first"], **close)
    torch.testing.assert_close(middle.res_block.time_emb_proj.bias.grad, held["dw/mid"], **close)
    torch.testing.assert_close(last.conv_out.weight.grad, held["dw/last"], **close)
    assert all(p.grad is None for p in made.unets.parameters())
    side_by_side = torch.cat(list(held["c"]), -1)
    torch.testing.assert_close(made(x, held["t"], side_by_side).sample, held["y"], **close)


@torch.no_grad()
def test_equal_nets_are_the_net(given):
    net = unet()
    made = UNetEnsemble([net, unet(), unet()], **SMALL)
    for side in ((16, 16), (13, 18)):  # a side that the levels do not divide
        x = torch.randn(2, 4, *side)
        torch.testing.assert_close(made(x, *given[1:]).sample, net(x, *given[1:]).sample, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved(made)(*given).sample, net(*given).sample, atol=1e-5, rtol=1e-5)
    residuals = tuple(torch.randn_like(s) for s in _skips(net, *given))
    more = dict(down_block_additional_residuals=residuals, mid_block_additional_residual=torch.ones(2, 32, 8, 8))
    torch.testing.assert_close(made(*given, **more).sample, net(*given, **more).sample, atol=1e-5, rtol=1e-5)
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 0]])
    masked = made(*given, encoder_attention_mask=mask, return_dict=False)
    torch.testing.assert_close(masked[0], net(*given, encoder_attention_mask=mask).sample, atol=1e-5, rtol=1e-5)


def _skips(net, x, t, c):
    """The maps that a U-Net hands over from its way down."""
    seen = []
    handles = [net.conv_in.register_forward_hook(lambda m, a, y: seen.append(y))]
    handles += [b.register_forward_hook(lambda m, a, y: seen.extend(y[1])) for b in net.down_blocks]
    net(x, t, c)
    for handle in handles:
        handle.remove()
    return seen


def test_sizes_are_the_papers_code():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        nets = [
            UNet2DConditionModel(
                sample_size=64, in_channels=4, out_channels=4, layers_per_block=2,
                block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
                down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            )
            for _ in range(3)
        ]  # fmt: skip
        for count, size in ((2, 30_082_944), (3, 32_790_016)):
            made = UNetEnsemble(nets[:count])
            trained = [p for p in made.parameters() if p.requires_grad]
            assert len(made.aggregators) == 25 and sum(p.numel() for p in trained) == size
        given = torch.empty(1, 4, 48, 48), torch.tensor(5), torch.empty(1, 77, 768)
        work = []
        for net in (nets[0], UNetEnsemble(nets[:2])):
            with counted() as counter, torch.no_grad():
                net(*given)
            work.append(counter.get_total_flops() // 2)
    assert work[0] == 211_506_022_400 and round(work[1] / work[0], 2) == 2.12


def test_in_pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    first = unet()
    count = len(clip_tokenizer(folder))
    for plan in (None, scheduler("EulerDiscreteScheduler")):
        plain = stable_diffusion(folder, model=first, plan=plan)
        twins = stable_diffusion(folder, model=UNetEnsemble([first, unet()], **SMALL), plan=plan)
        call = dict(steps=2, num_images_per_prompt=2, negative_prompt="a dog")
        torch.testing.assert_close(sample(twins, **call), sample(plain, **call), atol=1e-5, rtol=1e-5)
        twins.text_encoder = TextEncoders([plain.text_encoder, text_encoder(count, seed=2)])
        torch.testing.assert_close(sample(twins, **call), sample(plain, **call), atol=1e-5, rtol=1e-5)
    others = stable_diffusion(folder, model=moved(ensemble()))
    others.text_encoder = TextEncoders([text_encoder(count, seed=2), text_encoder(count, seed=9)])
    apart = sample(others, steps=2)
    assert bool(apart.isfinite().all()) and not torch.allclose(apart, sample(plain, steps=2))
    with pytest.raises(ValueError, match="clip_skip"):
        sample(others, steps=1, clip_skip=1)
    halves = stable_diffusion(folder, model=moved(ensemble())).to(torch.bfloat16)
    found = sample(halves, steps=2)
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())


def test_in_sdxl(tmp_path):
    pipe = sdxl(tmp_path)
    before = sample(pipe, steps=2)
    pipe.unet = UNetEnsemble([pipe.unet, pipe.unet], **SMALL)
    torch.testing.assert_close(sample(pipe, steps=2), before, atol=1e-5, rtol=1e-5)


def test_training_turns_from_the_half_that_a_net_has_wrong():
    """The second net's first features are noise on the left; the others must be trusted there."""
    torch.manual_seed(0)
    good = unet()
    bad = unet()

    def spoil(module, args, y):
        left = torch.arange(y.shape[-1]) < y.shape[-1] // 2
        return torch.where(left, y + 4 * torch.randn_like(y), y)

    bad.conv_in.register_forward_hook(spoil)
    made = UNetEnsemble([good, bad], **SMALL)
    assert made.train().training and not made.unets.training
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], 2e-3)
    x, t, c = torch.randn(2, 4, 16, 16), torch.tensor(7), torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted = good(x, t, c).sample
    losses = []
    for _ in range(25):
        found = made.predict(x, t, c)
        loss = F.mse_loss(found.sample, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    of_bad = made.predict(x, t, c).weights[0][:, 1].detach()
    assert losses[-1] < 0.5 * losses[0]
    assert float(of_bad[..., :8].mean()) < 0.3 and float(of_bad[..., :8].mean()) < float(of_bad[..., 8:].mean())


def test_saved_and_loaded_as_released(tmp_path, given):
    made = moved(ensemble())
    made.save_aggregators(tmp_path)
    assert (tmp_path / "aggregator_8" / "aggregator.safetensors").exists()
    again = ensemble()
    again.load_aggregators(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(*given).sample, made(*given).sample)
    with pytest.raises(ValueError, match="was made with"):
        ensemble(num_layers=2).load_aggregators(tmp_path)
    with pytest.raises(FileNotFoundError, match="aggregator_0"):
        again.load_aggregators(tmp_path / "none")
    (tmp_path / "aggregator_8" / "config.json").unlink()
    with pytest.raises(ValueError, match="8 aggregators"):
        again.load_aggregators(tmp_path)


def test_time_and_text_reach_the_weights():
    torch.manual_seed(0)
    made = Aggregator(6, 2, text_dim=5, time_dim=7, **SMALL)
    torch.nn.init.normal_(made.conv_out.weight)
    maps, time, text = torch.randn(1, 2, 6, 4, 4), torch.randn(1, 7), torch.randn(1, 3, 5)
    _, before = made(maps, time, text)
    assert not torch.allclose(made(maps, time + 1, text)[1], before)
    assert not torch.allclose(made(maps, time, text + 1)[1], before)


def test_bad_input(given):
    x, t, c = given
    made = ensemble()
    for call, message in (
        (lambda: ensemble(dim=32), "time embedding"), (lambda: ensemble(dim=80), "groups"),
        (lambda: ensemble(num_heads=5), "num_heads"), (lambda: ensemble(num_layers=0), "num_layers"),
        (lambda: UNetEnsemble([unet()], **SMALL), "two"), (lambda: UNetEnsemble([unet(), None], **SMALL), "unets"),
        (lambda: UNetEnsemble([unet(), unet(layers_per_block=2)], **SMALL), "other parts"),
        (lambda: UNetEnsemble([unet(), unet(cross=8)], **SMALL), "other parts"),
        (lambda: made(x, t, torch.randn(2, 5, 7)), "encoder_hidden_states"),
        (lambda: made(x, t, c, down_block_additional_residuals=(x,)), "together"),
        (lambda: made(x, t, c, down_intrablock_additional_residuals=[x]), "T2I"),
        (lambda: TextEncoders([text_encoder(20)]), "two"), (lambda: Aggregator(4, 1, 5, 7, **SMALL), "count"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    made.unets[1].enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(ValueError, match="FreeU"):
        made(x, t, c)

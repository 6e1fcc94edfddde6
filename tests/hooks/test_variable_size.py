"""The scale of self-attention at other sizes than that of training."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.steer import Clear, VariableSizeScale  # noqa: E402
from attnlib.steer.diffusion.variable_size import halvings, scale_factor  # noqa: E402
from hooks import pipes  # noqa: E402
from hooks.models import Watch  # noqa: E402

# ---- the number


def test_the_factor_is_the_equation():
    for n, t in ((2, 4), (784, 4096), (9216, 4096), (7, 64)):
        assert scale_factor(n, t) == pytest.approx((math.log(n) / math.log(t)) ** 0.5, abs=1e-12)
    some = [scale_factor(n, 4096) for n in (64, 784, 4096, 9216, 65536)]
    assert some == sorted(some) and some[2] == 1.0 and scale_factor(1, 4096) == 0.0
    with pytest.raises(ValueError, match="trained must be an integer of at least 2, got 1"):
        scale_factor(4, 1)


def entropy(n, scale, generator):
    """Mean entropy of 64 rows of attention over n Gaussian keys of width 40."""
    q, k = (2 * torch.randn(m, 40, generator=generator, dtype=torch.float64) for m in (64, n))
    weights = (q @ k.T * scale).softmax(-1)
    return -(weights * weights.clamp(min=1e-300).log()).sum(-1).mean().item()


def test_rows_stay_nearer_to_the_entropy_of_training():
    """On wide logits, above and below T."""
    t, plain = 1024, 40**-0.5
    kept = entropy(t, plain, torch.Generator().manual_seed(0))
    for n in (100, 6400):
        before = entropy(n, plain, torch.Generator().manual_seed(1))
        after = entropy(n, plain * scale_factor(n, t), torch.Generator().manual_seed(1))
        assert abs(after - kept) < abs(before - kept)


def test_queries_carry_the_scale_under_any_kernel():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 96, 8)
    truth = ((q.double() @ k.double().mT) * 8**-0.5 * scale_factor(96, 25)).softmax(-1) @ v.double()
    scaled = q * scale_factor(96, 25)
    sliced = torch.cat([(part @ k.mT * 8**-0.5).softmax(-1) @ v for part in scaled.split(32, 2)], 2)
    outs = [sliced]
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel([backend]):
            outs.append(F.scaled_dot_product_attention(scaled, k, v))
    for out in outs:
        torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)


# ---- in models


def test_layers_count_at_their_own_resolution(pipe):
    """An upright image: scores of each self-attention are scaled by its own counts, cross-attention is left."""
    watch = Watch(range(10))
    with attnlib.attach(pipe, VariableSizeScale(), watch):
        pipes.sample(pipe, steps=1, height=24, width=16)
    trained = {"down_blocks.0": 256, "down_blocks.1": 64, "mid_block": 64, "up_blocks.0": 64, "up_blocks.1": 256}
    plain = Watch(range(10))
    with attnlib.attach(pipe, plain):
        pipes.sample(pipe, steps=1, height=24, width=16)
    first = [next(c for c in w.calls if c[0].name.endswith("attn1")) for w in (watch, plain)]
    torch.testing.assert_close(first[0][1], first[1][1] * scale_factor(384, 256), atol=1e-6, rtol=1e-6)
    it = VariableSizeScale()
    with attnlib.attach(pipe, it):
        for site, *_ in watch.calls:
            place = ".".join(site.name.split(".")[:2]) if "mid" not in site.name else "mid_block"
            if site.kind == "self":
                n = 384 if trained[place] == 256 else 96
                assert it.factor(site) == scale_factor(n, trained[place])
    cross = [next(c for c in w.calls if c[0].kind == "cross") for w in (watch, plain)]
    assert cross[0][0].name == cross[1][0].name and len(watch.calls) == 10


def test_resolution_is_counted_by_what_halves():
    unet = pipes.unet(block_out_channels=(8, 8, 8), down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",),
                      up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 2, attention_head_dim=2)  # fmt: skip
    names = ("down_blocks.0.x", "down_blocks.2.x", "mid_block.x", "up_blocks.0.x", "up_blocks.1", "up_blocks.2")
    assert [halvings(unet, name) for name in names] == [0, 2, 2, 2, 1, 0]
    with pytest.raises(ValueError, match="conv_in is in no stage"):
        halvings(unet, "conv_in")


def test_the_size_of_training_is_the_pipeline_itself(pipe):
    state = torch.get_rng_state()
    plain = pipes.sample(pipe, steps=2)
    with attnlib.attach(pipe, VariableSizeScale()):
        assert torch.equal(pipes.sample(pipe, steps=2), plain)
        big = pipes.sample(pipe, ["a red cat", "a dog"], steps=2, height=24, width=24, num_images_per_prompt=2)
    assert big.shape == (4, 4, 24, 24) and big.isfinite().all()
    other = pipes.sample(pipe, ["a red cat", "a dog"], steps=2, height=24, width=24, num_images_per_prompt=2)
    assert not torch.equal(big, other) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pipes.sample(pipe, steps=2), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_another_scheduler(tmp_path, dtype):
    half = pipes.stable_diffusion(str(tmp_path), plan=pipes.scheduler("EulerDiscreteScheduler")).to(dtype)
    with attnlib.attach(half, VariableSizeScale(trained_size=8)):
        got = pipes.sample(half, steps=1)
    assert got.dtype == dtype and got.isfinite().all() and not torch.equal(got, pipes.sample(half, steps=1))


def test_transformers_count_patches():
    for make, sizes in ((pipes.sd3, {}), (pipes.flux, {"trained_size": 2})):
        pipe, given = make()
        draw = lambda **more: pipes.sample(pipe, None, 1, **{**given, **more})  # noqa: B023, E731
        plain = draw()
        with attnlib.attach(pipe, VariableSizeScale(**sizes)) as session:
            (trained,) = {session.interventions[0]._trained[s.layer] for s in session.attached}
            assert trained == (4 if sizes else 16)  # latents of 8 in patches of 2
            same = draw()
        assert torch.equal(same, plain) == (not sizes)
        with attnlib.attach(pipe, VariableSizeScale(trained_size=4)), pytest.raises(RuntimeError, match="stop"):
            pipe.scheduler.step, step = stop, pipe.scheduler.step
            try:
                draw()
            finally:
                pipe.scheduler.step = step
        assert torch.equal(draw(), plain)


def stop(*args, **kwargs):
    raise RuntimeError("stop")


def test_bad_input(pipe):
    flux, _ = pipes.flux()
    with pytest.raises(ValueError, match="does not say the size of its latents at training; give trained_size"):
        attnlib.attach(flux, VariableSizeScale())
    with pytest.raises(ValueError, match="has one token at trained_size"):
        attnlib.attach(pipe, VariableSizeScale(trained_size=2))
    with pytest.raises(ValueError, match="twice"):
        attnlib.attach(pipe, VariableSizeScale(), VariableSizeScale())
    with pytest.raises(ValueError, match="proportional=True"):
        attnlib.attach(flux, VariableSizeScale(trained_size=2), Clear(proportional=True))
    with pytest.raises((TypeError, ValueError), match="trained_size"):
        VariableSizeScale(trained_size=(1, 2, 3))
    with pytest.raises(ValueError, match="at least 1, got -8"):
        VariableSizeScale(trained_size=-8)

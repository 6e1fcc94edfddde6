"""YONOS: shared noise and pictures, what the stages train, and one step from pure noise."""

import copy
import pickle

import pytest
import torch
from torch import nn

from attnlib.models.diffusion.scale_distillation import WEIGHTS, OneStepUpscaler, levels, smaller, zero_terminal_snr
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.restore.adversarial import PatchDiscriminator, PerceptualLoss

PLAN = zero_terminal_snr(torch.linspace(0.999, 0.01, 20))


class Net(nn.Module):
    """A small denoiser of one or two axes that sees the time."""

    def __init__(self, chans=3, dim=8, rank=2):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[rank]
        self.first, self.last = conv(2 * chans, dim, 3, padding=1), conv(dim, chans, 3, padding=1)
        self.time = nn.Linear(1, dim)
        self.seen = []

    def forward(self, z, t, encoder_hidden_states=None):
        self.seen.append((z.detach(), t, encoder_hidden_states))
        shift = self.time(t[:, None].to(z.dtype) / 20).view(len(t), self.time.out_features, *[1] * (z.dim() - 2))
        y = self.last(torch.nn.functional.silu(self.first(z) + shift))
        return (y,) if encoder_hidden_states is not None else y


class Coder(nn.Module):
    """An autoencoder of half the size, as diffusers' answer: distributions and samples, with a factor of scale."""

    class Answer:
        def __init__(self, **held):
            self.__dict__.update(held)

    class Peak:
        def __init__(self, z):
            self.z = z

        def mode(self):
            return self.z

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)
        self.config = Coder.Answer(scaling_factor=0.5)

    def encode(self, x):
        return Coder.Answer(latent_dist=Coder.Peak(self.encoder(x)))

    def decode(self, z):
        return Coder.Answer(sample=self.decoder(z))


def make(factor=2, **settings):
    torch.manual_seed(0)
    return OneStepUpscaler(settings.pop("net", None) or Net(), PLAN, factor, **settings)


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_levels_without_signal_at_the_end():
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    plain = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    with pytest.raises(ValueError, match="keeps signal at its last step, alphas_cumprod"):
        levels(plain)
    ours = zero_terminal_snr(plain.alphas_cumprod)
    theirs = (1 - rescale_zero_terminal_snr(plain.betas)).cumprod(0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert ours[-1] == 0 and float(ours[0]) == pytest.approx(float(plain.alphas_cumprod[0]))
    mended = DDIMScheduler(rescale_betas_zero_snr=True)
    assert len(levels(mended)) == 1000
    rising, wide = torch.tensor([0.5, 0.6, 0.0]), torch.tensor([1.5, 0.0])
    for wrong, message in ((rising, "fall from step to step"), (wide, "from 0 to 1")):
        with pytest.raises(ValueError, match=message):
            levels(wrong)
    with pytest.raises(TypeError, match="schedule must be alphas_cumprod"):
        levels([0.5, 0.0])


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("weight", [*WEIGHTS, lambda snr: snr.sqrt()])
def test_the_first_stage_is_the_equation(prediction, weight):
    model = make(prediction=prediction, weight=weight)
    y, noise, t = data(3, 3, 8, 8), data(3, 3, 8, 8, seed=1), torch.tensor([0, 7, 19])
    (loss,) = model.denoiser_loss(y, noise=noise, timesteps=t).values()
    a = PLAN[t].view(3, 1, 1, 1)
    noisy = a.sqrt() * y + (1 - a).sqrt() * noise
    up = torch.nn.functional.interpolate(smaller(y, 2), (8, 8), mode="bicubic")
    out = model.denoiser(torch.cat([noisy, up], 1), t)
    clean = out if prediction == "x0" else a.sqrt() * noisy - (1 - a).sqrt() * out
    snr = (a / (1 - a)).flatten()
    w = {"one": torch.ones(3), "snr": snr, "velocity": snr + 1, "truncated": snr.clamp(min=1)}.get(weight, snr.sqrt())
    torch.testing.assert_close(loss, (w * (clean - y).square().mean((1, 2, 3))).mean())
    if prediction == "v" and weight == "velocity":  # the same as the error of v
        v = a.sqrt() * noise - (1 - a).sqrt() * y
        torch.testing.assert_close(loss, (out - v).square().mean(), rtol=1e-3, atol=1e-5)


def test_teacher_and_student_see_the_same_noise_and_their_own_factor():
    first = make()
    second = first.student()
    assert (second.factor, second.teacher, first.teacher) == (4, first, None)
    for a, b in zip(first.denoiser.parameters(), second.denoiser.parameters(), strict=True):
        assert a.equal(b) and a is not b
    y = data(2, 3, 8, 8)
    first.denoiser.seen.clear()
    second.denoiser.seen.clear()
    (loss,) = second.denoiser_loss(y).values()
    ((theirs, t1, _),), ((ours, t2, _),) = first.denoiser.seen, second.denoiser.seen
    assert t1.equal(t2) and theirs[:, :3].equal(ours[:, :3])
    torch.testing.assert_close(theirs[:, 3:], first.hint(smaller(y, 2), (8, 8)))
    torch.testing.assert_close(ours[:, 3:], first.hint(smaller(y, 4), (8, 8)))
    loss.backward()
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in second.denoiser.parameters())
    right = first.taught(y, ours[:, :3], t2)
    torch.testing.assert_close(loss, (second.clean(ours[:, :3], ours[:, 3:], t2) - right).square().mean())
    third = second.student()
    assert third.factor == 8 and second.teacher is None and third.teacher is second


def test_a_teacher_that_knows_the_truth_is_plain_training():
    y, noise, t = data(2, 3, 8, 8), data(2, 3, 8, 8, seed=1), torch.tensor([3, 19])
    plain, taught = make(4), make(4, teacher=make(2))
    taught.teacher.taught = lambda target, noisy, timesteps, condition: target
    (a,), (b,) = (m.denoiser_loss(y, noise=noise, timesteps=t).values() for m in (plain, taught))
    assert a.equal(b)


def test_one_step():
    model = make()
    low, noise = data(2, 3, 5, 4), data(2, 3, 10, 8, seed=1)
    up = torch.nn.functional.interpolate(low, (10, 8), mode="bicubic")
    last = torch.tensor([19, 19])
    torch.testing.assert_close(model(low, noise), -model.denoiser(torch.cat([noise, up], 1), last))
    state = torch.random.get_rng_state()
    assert model(low).equal(model(low)) and torch.random.get_rng_state().equal(state)
    assert model(low[:0]).shape == (0, 3, 10, 8)
    lines = make(net=Net(1, rank=1), factor=4)
    assert lines(data(2, 1, 6)).shape == (2, 1, 24)
    text = model(low, noise, torch.zeros(2, 1, 1))
    assert model.denoiser.seen[-1][2] is not None and text.equal(model(low, noise))


def test_only_the_decoder_learns_in_its_stage():
    torch.manual_seed(0)
    coder = Coder()
    first = make(net=Net(4), autoencoder=coder)
    torch.testing.assert_close(first.encode(data(1, 3, 8, 8)), 0.5 * coder.encoder(data(1, 3, 8, 8)))
    last = first.decoder_stage(
        discriminator=PatchDiscriminator(3, (4,)), perceptual=PerceptualLoss(nn.Conv2d(3, 2, 3)), gan_weight=0.1
    )
    assert last.denoiser is first.denoiser
    before = {k: v.clone() for k, v in last.state_dict().items()}
    y = data(2, 3, 8, 8)
    seen = train_batch(last, {"target": y}, Optimizers(lambda name, params: torch.optim.SGD(params, 0.1)))
    assert list(seen) == ["discriminator", "generator"]
    assert list(seen["generator"]) == ["l1", "perceptual", "adversarial"]
    changed = {k.split(".")[0] + "." + k.split(".")[1] for k, v in last.state_dict().items() if not v.equal(before[k])}
    assert changed == {"autoencoder.decoder", "discriminator.layers"}
    before = {k: v.clone() for k, v in first.state_dict().items()}
    train_batch(first, {"target": y}, Optimizers(lambda name, params: torch.optim.SGD(params, 0.1)))
    assert {k.split(".")[0] for k, v in first.state_dict().items() if not v.equal(before[k])} == {"denoiser"}


def signals(count, g):
    """Sums of two sines (count, 1, 32)."""
    at = torch.linspace(0, 6.28, 32)
    f, p = 1 + 2 * torch.rand(2, count, 1, generator=g), 6.28 * torch.rand(2, count, 1, generator=g)
    return (torch.sin(f[0] * at + p[0]) + 0.5 * torch.sin(3 * f[1] * at + p[1]))[:, None]


def test_noise_stops_mattering_as_it_learns():
    torch.manual_seed(0)
    model = make(net=Net(1, 16, 1), factor=4)
    adam = Optimizers(lambda name, params: torch.optim.Adam(params, 1e-2))
    g = torch.Generator().manual_seed(0)
    low = smaller(signals(16, g), 4)

    def spread():
        with torch.no_grad():
            return float(torch.stack([model(low, data(16, 1, 32, seed=s)) for s in range(6)]).var(0).mean())

    with torch.no_grad():
        model.denoiser.first.weight *= 4  # so that noise matters at the start
    before = spread()
    for _ in range(150):
        y, last = signals(32, g), torch.full((32,), 19)
        train_batch(model, {"target": y, "timesteps": last, "noise": torch.randn(y.shape, generator=g)}, adam)
    assert before > 0.1 and spread() < 0.1 * before


def test_users_things():
    model = make().student()
    low = data(1, 3, 4, 3)
    model.denoiser.seen.clear()
    want = model(low)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(low).equal(want)
    assert copy.deepcopy(model).bfloat16()(low.bfloat16()).dtype == torch.bfloat16
    assert model.double()(low.double()).dtype == torch.float64


def test_a_unet_and_an_autoencoder_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=6, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    coder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model = OneStepUpscaler(unet, PLAN, 2, autoencoder=coder)
    y, text = data(1, 3, 16, 16), data(1, 2, 6)
    sgd = Optimizers(lambda name, params: torch.optim.SGD(params, 1e-3))
    student = model.student()
    assert train_batch(student, {"target": y, "condition": text}, sgd)["denoiser"]["clean"] >= 0
    assert student(data(1, 3, 4, 4), condition=text).shape == (1, 3, 16, 16)
    last = student.decoder_stage()
    sgd = Optimizers(lambda name, params: torch.optim.SGD(params, 1e-3))
    assert list(train_batch(last, {"target": y, "condition": text}, sgd)["generator"]) == ["l1"]


def test_bad_input():
    model = make(4)
    with pytest.raises(ValueError, match=r"multiples of 4"):
        model.denoiser_loss(torch.zeros(1, 3, 8, 6))
    y = torch.zeros(2, 3, 8, 8)
    for given, message in (
        (dict(timesteps=torch.tensor([0, 20])), "timesteps points at step 20; possible: 0 to 19"),
        (dict(timesteps=torch.tensor([0, -1])), "timesteps points at step -1"),
        (dict(timesteps=torch.tensor([0])), r"timesteps must have shape \(2,\)"),
        (dict(noise=y[:1]), "noise must be of the shape of latents"),
        (dict(low=y), r"low must be the target 4 times smaller, \(2, 3, 2, 2\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.denoiser_loss(y, **given)
    for flat in (torch.ones(4), torch.ones(1)):
        with pytest.raises(ValueError, match="alphas_cumprod must fall"):
            zero_terminal_snr(flat)
    student = make().student()
    with pytest.raises(ValueError, match="smaller than factor=2"):
        student.student(2)
    assert student.teacher is not None  # a refusal changes nothing
    with pytest.raises(ValueError, match="low must be pictures"):
        model(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="noise must be of the shape"):
        model(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="prediction='epsilon' is not possible"):
        make(prediction="epsilon")
    with pytest.raises(ValueError, match="teacher is of factor 4"):
        make(4, teacher=make(4))
    with pytest.raises(ValueError, match="stage='decoder' needs an autoencoder"):
        make(stage="decoder")
    with pytest.raises(ValueError, match="no 'target'"):
        list(model.steps({"low": torch.zeros(1, 3, 2, 2)}))
    with pytest.raises(ValueError, match="keeps signal"):
        OneStepUpscaler(Net(), torch.linspace(0.99, 0.01, 10), 2)
    with pytest.raises(ValueError, match="denoiser must give"):
        OneStepUpscaler(Wide(), PLAN, 2)(torch.zeros(1, 3, 2, 2))


class Wide(nn.Module):
    def forward(self, z, t):
        return z


class Lines(nn.Module):
    """A denoiser of signals that reads all of them at once."""

    def __init__(self, dim=96):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(65, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 32))

    def forward(self, z, t):
        return self.net(torch.cat([z.flatten(1), t[:, None] / 20], 1))[:, None]


def test_a_student_is_better_than_a_model_of_its_factor_trained_for_the_steps_of_its_stage():
    """Signals; 8 after 2 and 4 starts from what they know, and has cost four times as many steps in all."""
    g, at = torch.Generator().manual_seed(0), torch.linspace(0, 6.28, 32)

    def waves(count):
        (p, q), (a, b) = (torch.rand(2, count, 1, generator=g) for _ in range(2))
        return (a * torch.sin(at + 6.28 * p) + b * torch.sin(3 * at + 6.28 * q))[:, None]

    def fitted(model, steps):
        adam = Optimizers(lambda name, params: torch.optim.Adam(params, 2e-3))
        for _ in range(steps):
            y = waves(64)
            drawn = {"timesteps": torch.randint(20, (64,), generator=g), "noise": torch.randn(y.shape, generator=g)}
            train_batch(model, {"target": y, **drawn}, adam)
        return model

    def error(model):
        y = waves(512)
        with torch.no_grad():
            return float((model(smaller(y, 8), torch.randn(y.shape, generator=g)) - y).square().mean())

    alone = fitted(make(8, net=Lines()), 150)
    student = fitted(fitted(fitted(make(2, net=Lines()), 300).student(), 150).student(), 150)
    assert student.factor == 8 and error(student) < error(alone)

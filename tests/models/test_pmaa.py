"""PMAA against the authors' classes, and what its card asks."""

import copy
import pickle

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.build import counted_params, model_entry
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.restore.adversarial import PatchDiscriminator
from attnlib.models.restore.pmaa import NORMS, PMAA, CloudExtractor, CloudPrediction, Injection, cloud_masks, convert
from tests.whole import Whole, renamer


def small(**settings):
    torch.manual_seed(0)
    return PMAA(**{"dim": 8, "drop_path": 0.0, **settings})


def still(model):
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def dates(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).tanh()


def everything(model, inputs):
    return model(inputs["x"])._asdict()


@pytest.mark.parametrize("case", ["batch", "batch_noact", "instance_noact"])
def test_as_released(case):
    whole = Whole("pmaa")
    model = still(small(norm=case))

    def rule(state):
        return convert(state, model)

    whole.holds(case, model, rule, everything, renamer(rule, whole.state(case)))


@pytest.mark.parametrize("case", ["old", "first"])
def test_colours_alone(case):
    """Sen2_MTC_Old: four bands in, three out; and the head as it was before the release's first fix."""
    whole = Whole("pmaa-old")
    model = still(small(**whole.cases[case]["note"]))

    def rule(state):
        return convert(state, model)

    whole.holds(case, model, rule, everything, renamer(rule, whole.state(case)))
    x, y = dates(2, 3, 4, 16, 16), dates(2, 3, 16, 16, seed=1)
    made = model(x)
    model.aux = 50.0
    wanted = 50 * sum((made.dates[:, t, :3] - y).abs().mean() for t in range(3))
    torch.testing.assert_close(model.loss(made, y)["aux"], wanted)
    judge = PatchDiscriminator(15, (4, 8))
    assert judge(model.shown(made.image.float(), {"x": x})).isfinite().all()
    with pytest.raises(ValueError, match="target must be an image"):
        model.loss(made, x[:, 0])
    for wrong in (dict(out_chans=5), dict(head_kernel=2)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            small(**wrong)


def test_the_extractor_that_teaches_masks():
    whole = Whole("pmaa")
    rule = CloudExtractor.convert_state_dict

    def call(model, inputs):
        return dict(zip(("mask", "maps", "image"), model(inputs["x"]), strict=True))

    model = CloudExtractor(pooled_norm=True)
    whole.holds("teacher", model, rule, call, renamer(rule, whole.state("teacher")))
    x = dates(2, 3, 4, 9, 8)
    masks = cloud_masks(model.train(), x)
    assert masks.shape == (2, 3, 1, 9, 8) and model.training and not masks.requires_grad
    torch.testing.assert_close(masks[:, 1], model.eval()(x[:, 1])[0].detach())


def test_the_discriminator():
    whole = Whole("pmaa")
    model = PatchDiscriminator(16, (64, 64, 128, 256, 512))

    def rule(state):
        return {k.replace("discriminator.", "layers."): v for k, v in state.items()}

    whole.holds(
        "discriminator", model, rule, lambda m, i: {"y": m(i["x"])}, lambda n: n.replace("discriminator", "layers")
    )


def test_parameters():
    counts = {}
    for norm in ("batch", "instance_noact"):
        for coarsest in (False, True):
            with torch.device("meta"):
                model = PMAA(norm=norm, coarsest=coarsest)
            counts[norm, coarsest] = sum(p.numel() for p in model.parameters())
    assert counts["batch", True] == 3_471_881 and counts["instance_noact", True] == 3_439_689
    assert counts["batch", False] == 3_471_881 - 3456 and counts["instance_noact", False] == 3_439_689 - 1152
    assert counts["instance_noact", False] == counted_params(model_entry("pmaa"))
    assert counted_params(model_entry("pmaa_old")) == model_entry("pmaa_old").params == 3_439_656 - 1152
    assert sum(p.numel() for p in model.extractor.parameters()) == 219_717


def test_how_it_starts():
    torch.manual_seed(0)
    block = PMAA(norm="batch").stages[1]
    assert abs(float(block.scales[1].places.weight.detach().std()) - (2 / (9 * 128)) ** 0.5) < 1e-3
    assert abs(float(block.attention.fc1.weight.detach().std()) - (2 / 512) ** 0.5) < 1e-3
    assert (
        not block.attention.fc1.bias.any() and abs(float(block.merge[0].local[0].weight.detach().std()) - 0.283) < 0.02
    )
    x = dates(1, 128, 5, 6, dtype=torch.float32)
    torch.testing.assert_close(block.attention.eval()(x), x, rtol=0, atol=1e-3)  # layer scale 1e-6


def test_injection_without_what_is_global_is_half_of_what_is_local():
    m = Injection(6).double().eval()
    x, g = dates(2, 6, 8, 8), dates(2, 6, 2, 2)
    with torch.no_grad():
        m.gate[0].weight.zero_()
        m.added[0].weight.zero_()
    torch.testing.assert_close(m(x, g), 0.5 * m.local(x))


def test_gates_are_constant_on_blocks():
    m = Injection(6).double().eval()
    with torch.no_grad():
        m.added[0].weight.zero_()
    ratio = m(dates(2, 6, 8, 8), dates(2, 6, 2, 2, seed=1)) / m.local(dates(2, 6, 8, 8))
    blocks = ratio.unflatten(3, (2, 4)).unflatten(2, (2, 4))
    torch.testing.assert_close(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("count", "size"), [(1, (16, 16)), (2, (7, 33)), (5, (1, 1))])
def test_any_number_of_dates_and_any_size(norm, count, size):
    model = small(norm=norm, num_dates=count).eval()
    made = model(dates(2, count, 4, *size, dtype=torch.float32))
    assert made.image.shape == (2, 4, *size) and made.masks.shape == (2, count, 1, *size)
    assert made.dates.shape == (2, count, 4, *size)
    assert all(t.isfinite().all() for t in made) and float(made.image.detach().abs().max()) <= 1
    assert model(torch.zeros(0, count, 4, 17, 16)).image.shape == (0, 4, 17, 16)


def test_a_sample_alone_is_as_in_its_batch_and_parts_start_the_sum():
    model = still(small()).double()
    x = dates(3, 3, 4, 19, 16)
    torch.testing.assert_close(model(x).image[1:2], model(x[1:2]).image)
    block = model.stages[0]
    with torch.no_grad():
        block.out.weight.zero_()
    y = dates(2, 24, 16, 16)
    torch.testing.assert_close(block(y), y.unflatten(1, (3, 8)).sum(1))


def test_the_coarsest_scale_may_begin():
    first, second = small(coarsest=True).eval(), small().eval()
    kept = {k: v for k, v in first.state_dict().items() if ".inject.4." not in k}
    second.load_state_dict(kept, strict=True)
    x = dates(1, 3, 4, 32, 32, dtype=torch.float32)
    assert not torch.allclose(first(x).image, second(x).image)
    first.stages(torch.randn(1, 24, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in first.stages.parameters())


def test_terms_of_the_loss():
    model = small(aux=50.0).double()
    x, y, masks = dates(2, 3, 4, 16, 16), dates(2, 4, 16, 16, seed=1), dates(2, 3, 1, 16, 16, seed=2).abs()
    made = model(x)
    terms = model.loss(made, (y, masks))
    torch.testing.assert_close(terms["l1"], 100 * (made.image - y).abs().mean())
    torch.testing.assert_close(terms["masks"], sum((made.masks[:, t] - masks[:, t]).square().mean() for t in range(3)))
    torch.testing.assert_close(terms["aux"], 50 * sum((made.dates[:, t] - y).abs().mean() for t in range(3)))
    assert list(small().loss(made, y)) == ["l1"]
    with pytest.raises(ValueError, match="target must be an image"):
        model.loss(made, y[:1])
    with pytest.raises(ValueError, match="target's masks"):
        model.loss(made, (y, masks[:, :1]))


def test_turns_are_those_of_the_release():
    """One batch against the equations, step by step."""
    torch.manual_seed(0)
    judge = PatchDiscriminator(16, (4, 8), norm=True)
    model = still(small(discriminator=judge)).double()
    twin = copy.deepcopy(model)
    x, y = dates(2, 3, 4, 16, 16), dates(2, 4, 16, 16, seed=1)
    sgd = Optimizers(lambda name, params: torch.optim.SGD(params, 0.01))
    seen = train_batch(model, {"x": x, "target": y}, sgd)
    fake, seen_by = twin(x).image, lambda image: torch.cat([*x.unbind(1), image], 1)
    d_loss = 0.5 * (twin.discriminator(seen_by(fake.detach())).square().mean()
                    + (twin.discriminator(seen_by(y)) - 1).square().mean())  # fmt: skip
    grads = torch.autograd.grad(d_loss, list(twin.discriminator.parameters()))
    with torch.no_grad():
        for p, g in zip(twin.discriminator.parameters(), grads, strict=True):
            p -= 0.01 * g
    g_loss = (twin.discriminator(seen_by(fake)) - 1).square().mean()
    rest = [p for n, p in twin.named_parameters() if not n.startswith("discriminator.")]
    grads = torch.autograd.grad(g_loss + 100 * (fake - y).abs().mean(), rest, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(rest, grads, strict=True):
            p -= 0.01 * (0 if g is None else g)
    assert seen["discriminator"]["discriminator"] == pytest.approx(float(d_loss.detach()))
    assert seen["generator"]["adversarial"] == pytest.approx(float(g_loss.detach()))
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_it_learns_to_take_from_the_date_without_clouds():
    model = small(num_dates=2, depth=3)
    g = torch.Generator().manual_seed(0)
    sgd = Optimizers(lambda name, params: torch.optim.AdamW(params, 1e-2))
    losses = []
    for _ in range(20):
        y = torch.nn.functional.interpolate(torch.rand(2, 4, 4, 4, generator=g) - 0.5, scale_factor=4)
        x = y[:, None].repeat(1, 2, 1, 1, 1)
        x[:, 0, :, :, :8] = 0.9
        x[:, 1, :, :, 8:] = 0.9
        losses.append(train_batch(model, {"x": x, "target": y}, sgd, clip=1.0)["generator"]["l1"])
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_users_things():
    model = attnlib.create_model("pmaa", dim=4, depth=3).eval()
    x = dates(1, 3, 4, 21, 17, dtype=torch.float32)
    before, want = x.clone(), model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x).image, want.image)
    assert x.equal(before) and isinstance(want, CloudPrediction)
    rough = copy.deepcopy(model).bfloat16()(x.bfloat16()).image
    assert rough.dtype == torch.bfloat16 and float((rough.float() - want.image).detach().abs().mean()) < 0.1
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x).image, want.image)
    model.train()
    state = torch.random.get_rng_state()
    answer = model.predict(x)
    assert model.training and torch.random.get_rng_state().equal(state) and not answer.requires_grad
    assert model(torch.zeros(2, 3, 4, 16, 16)).image.isfinite().all()  # no variance anywhere


def test_bad_input():
    model = small()
    for x in (torch.zeros(1, 2, 4, 8, 8), torch.zeros(1, 3, 3, 8, 8), torch.zeros(3, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"x must be dates \(B, 3, 4, H, W\)"):
            model(x)
    with pytest.raises(ValueError, match="at least one pixel"):
        model(torch.zeros(1, 3, 4, 0, 8))
    for settings in (dict(norm="group"), dict(num_dates=0), dict(depth=2), dict(l1=-1.0), dict(gan_kind="wgan")):
        with pytest.raises(ValueError, match=next(iter(settings))):
            small(**settings)
    with pytest.raises(TypeError, match="discriminator"):
        small(discriminator=3)
    state = Whole("pmaa").state("instance_noact")
    with pytest.raises(ValueError, match="mine"):
        convert({**state, "mine": torch.zeros(1)}, model)

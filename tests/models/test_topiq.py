"""TOPIQ against the authors' whole class, and what its parts promise."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import attnlib
from attnlib.models.build import load_pretrained
from attnlib.models.restore import topiq
from attnlib.models.restore.topiq import (
    TOPIQ,
    GatedDifference,
    ScaleLayer,
    earth_movers_loss,
    norm_in_norm_loss,
    score_of,
)
from tests.parity import synthetic

FOLDER = Path(__file__).parents[1] / "fixtures" / "models"
CASES, WANT = {}, {}
for name in ("topiq-cfanet", "topiq-cfanet-more"):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as held:
        CASES |= json.loads(held.metadata()["cases"])
        WANT |= {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118
#: Buffers, frozen norms, and what never runs.
UNTRAINED = re.compile(
    r"running_|num_batches|\.bn\d|downsample\.1\.|^attn_blks.*\.self_attn\.|^semantic_model\.(norm|head)\.|attn_mask"
    r"|relative_position_index"
)


class Trunk(nn.Module):
    """Three maps of few channels."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 4), (4, 6), (6, 8)))
        self.norm = nn.BatchNorm2d(4)
        info = [{"num_chs": c, "reduction": 2**i} for i, c in enumerate((4, 6, 8), 1)]
        self.feature_info = attnlib.models.backbones.stages.FeatureInfo(info)

    def forward(self, x):
        maps = []
        for i, conv in enumerate(self.convs):
            x = conv(x) if i else self.norm(conv(x))
            x = x.relu()
            maps.append(x)
        return maps


def small(**settings):
    torch.manual_seed(0)
    return TOPIQ(dim=8, num_heads=2, encoder=Trunk(), **settings)


@pytest.mark.parametrize("case", CASES)
def test_as_released(case):
    config = CASES[case]
    model = attnlib.create_model(config["model"], **config["settings"]).double()
    state = synthetic(config["shapes"])
    load_pretrained(model, state)
    model.mean, model.std = (tuple(torch.tensor(v).tolist()) for v in (model.mean, model.std))  # theirs are float32
    g = torch.Generator().manual_seed(3)
    x = torch.rand(config["size"], generator=g)
    given = (x + 0.2 * torch.rand(x.shape, generator=g)).double() if model.reference else None
    x = x.double().requires_grad_()
    y = model.eval()(x, given)
    torch.testing.assert_close(y, WANT[f"{case}/y"], rtol=0, atol=1e-9)
    (y * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))).sum().backward()
    torch.testing.assert_close(x.grad[..., ::4, ::4], WANT[f"{case}/dx"], rtol=0, atol=1e-9)
    # Every gradient: theirs go through the converter by number of the parameter.
    shapes = config["shapes"]
    names = [n for n in shapes if not UNTRAINED.search(n)]
    numbered = {n: torch.full(shapes[n], float(i)) for i, n in enumerate(names)}
    rest = {n: torch.full(s, -1.0) for n, s in shapes.items() if n not in numbered}
    ours = topiq.convert({**numbered, **rest}, model)
    grads, seen = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, {}
    for name, of in ours.items():
        if name in grads and int(of.flatten()[0]) >= 0:
            seen.setdefault(int(of.flatten()[0]), []).append(grads[name].flatten())
    assert len(seen) == len(names) and sum(len(v) for v in seen.values()) == len(grads)
    for i, parts in seen.items():
        whole = torch.cat(parts)
        torch.testing.assert_close(whole.norm(), WANT[f"{case}/norms"][i], rtol=1e-8, atol=1e-9)
        if "relative_position_bias_table" in names[i]:
            continue  # ours is laid out otherwise
        wave = torch.cos(torch.arange(whole.numel(), dtype=torch.float64))
        rounding = 1e-10 * float(whole.norm()) * len(whole) ** 0.5
        torch.testing.assert_close((whole * wave).sum(), WANT[f"{case}/sums"][i], rtol=0, atol=rounding + 1e-12)


def test_every_entry_is_accounted_for():
    model = attnlib.create_model("topiq_nr_resnet50", **CASES["nr"]["settings"])
    state = synthetic(CASES["nr"]["shapes"])
    with pytest.raises(ValueError, match="one_of_mine"):
        topiq.convert({**state, "one_of_mine": torch.zeros(1)}, model)
    dead = [k for k in state if k.startswith("attn_blks") and ".self_attn." in k]
    assert len(dead) == 16
    short = {k: v for k, v in state.items() if k != "dim_reduce.2.0.bias"}
    with pytest.raises(ValueError, match="reduce.2.bias"):
        load_pretrained(model, short)


def test_what_is_resized_in_evaluation():
    x = torch.rand(1, 3, 50, 40)
    assert topiq.resized_to(x, 34).shape == (1, 3, 42, 34) and topiq.resized_to(x, 40) is x
    assert topiq.resized_to(x, (64, 20)).shape == (1, 3, 64, 20)
    model = small(eval_size=20, reference=True).eval()
    other, sized = torch.rand(1, 3, 50, 40), topiq.resized_to(x, 20)
    want = model(sized, topiq.resized_to(other, 20))  # as it is, with the right shorter side
    torch.testing.assert_close(model(x, other), want)
    assert model.tokens(x, other)[0].shape[1] < model.train().tokens(x, other)[0].shape[1]
    for wrong in ((1, 2, 3), 0):
        with pytest.raises(ValueError, match="eval_size"):
            small(eval_size=wrong)
    with pytest.raises(ValueError, match="activation"):
        small(activation="tanh")


def test_a_swin_takes_any_size_and_one_conversion():
    settings = CASES["swin"]["settings"]
    model = attnlib.create_model("topiq_face_swin_base", **{**settings, "eval_size": None}).eval()
    assert model(torch.rand(2, 3, 70, 41)).isfinite().all()
    plain = attnlib.create_model("topiq_nr_resnet50", **CASES["nr"]["settings"])
    with pytest.raises(ValueError, match="does not have"):
        topiq.convert(synthetic(CASES["swin"]["shapes"]), plain)
    with torch.device("meta"):
        base = attnlib.create_model("topiq_iaa_swin_base")
    assert base.encoder.feature_info.channels() == [256, 512, 1024, 1024]
    assert base.encoder.stages[3].blocks[1].mixer.inner.window_size == (12, 12)


def test_parameters():
    for name in attnlib.list_models(family="topiq-cfanet"):
        with torch.device("meta"):
            count = sum(p.numel() for p in attnlib.create_model(name).parameters())
        assert count == attnlib.models.build.model_entry(name).params, name
    for name, released in (("topiq_nr_resnet50", 45_196_934), ("topiq_fr_resnet50", 36_038_662)):
        with torch.device("meta"):
            model = attnlib.create_model(name)
        count = sum(p.numel() for p in model.parameters())
        dead = 4 * (4 * 256 * 256 + 4 * 256)
        assert count == released - dead
        trunk = sum(p.numel() for p in model.encoder.parameters())
        assert count + dead - trunk == {"nr": 21_688_902, "fr": 12_530_630}[name[6:8]]


def test_it_starts_as_released():
    torch.manual_seed(0)
    model = TOPIQ(encoder=Trunk())
    assert model.within[0][0].attention.q.weight.equal(model.within[2][0].attention.q.weight)  # copies of one layer
    layer = ScaleLayer(256, 4, True, 1024, 0.1)
    bound = (6 / 1024) ** 0.5
    assert float(layer.attention.v.weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)
    for part, fan in ((layer.attention.proj, 256), (layer.mlp.fc1, 256), (layer.mlp.fc2, 1024)):
        assert float(part.weight.detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.05)
        assert not part.bias.any()
    calls = []
    for part in layer.modules():
        if isinstance(part, nn.Dropout) and part.p:
            part.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(1, 3, 256), torch.randn(1, 2, 256))
    assert len(calls) == 3 and layer.attention.attn_drop == 0.1  # both branches and the hidden layer, and weights
    assert float(model.rows.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_equal_images_have_no_distance_and_equal_gates_inside():
    gate = GatedDifference(4).double()
    x = torch.randn(1, 4, 9, 8, dtype=torch.float64)
    seen = []
    gate.weigh.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    gate(x, x.clone())
    distance, weight = seen[0]
    torch.testing.assert_close(distance, torch.full_like(distance, 1e-6), rtol=1e-12, atol=0)
    inside = weight[..., 2:-2, 2:-2]  # the 3 x 3 convolutions see zeros beyond the border
    torch.testing.assert_close(inside, inside[..., :1, :1].expand_as(inside))
    model = small(reference=True)
    x = torch.rand(2, 3, 20, 24, requires_grad=True)
    model(x, x.detach().clone()).sum().backward()
    assert x.grad.isfinite().all()


def test_order_of_tokens_does_not_matter():
    model = small().eval()
    with torch.no_grad():
        tokens = model.tokens(torch.rand(1, 3, 40, 48))
        mixed = [t[:, torch.randperm(t.shape[1])] for t in tokens]
        torch.testing.assert_close(model.judge(mixed), model.judge(tokens))
        x = torch.rand(1, 3, 40, 48)
        model.rows.zero_(), model.columns.zero_()
        whole = [t + 0 for t in model.tokens(x)]
        model.rows.normal_()
        assert not torch.allclose(model.judge(whole), model(x))


@pytest.mark.parametrize("size", [(33, 47), (8, 64), (1, 1), (50, 9)])
@pytest.mark.parametrize("reference", [False, True])
def test_any_size(size, reference):
    model = small(reference=reference).eval()
    x = torch.rand(3, 3, *size)
    beside = (x.flip(0),) if reference else ()
    y = model(x, *beside)
    assert y.shape == (3, 1) and y.isfinite().all()
    torch.testing.assert_close(model(x[:1], *(b[:1] for b in beside)), y[:1], rtol=1e-4, atol=1e-5)
    assert model(x[:0], *(b[:0] for b in beside)).shape == (0, 1)
    assert model.train().predict(x, *beside).shape == (3,) and model.training and not model.encoder.training
    half = copy.deepcopy(model).eval().bfloat16()
    torch.testing.assert_close(half(*(t.bfloat16() for t in (x, *beside))).float(), y, rtol=0.1, atol=0.1)


def test_pooled_to_the_grid_of_meaning():
    model = small().eval()
    assert [t.shape[1] for t in model.tokens(torch.rand(1, 3, 40, 48))] == [30, 30, 30]
    assert [t.shape[1] for t in model.tokens(torch.rand(1, 3, 4, 64))] == [8, 16, 8]  # as high: left as it is


def test_grades_and_crops():
    model = small(num_classes=5).eval()
    x = torch.rand(2, 3, 40, 48)
    y = model(x)
    torch.testing.assert_close(y.sum(-1), torch.ones(2))
    torch.testing.assert_close(model.predict(x), (y * torch.arange(1, 6)).sum(-1))
    score = model.predict(x, crops=5, crop_size=16)
    parts = [model(x[..., i : i + 16, j : j + 16]) for i, j in ((0, 0), (0, 16), (0, 32), (12, 0), (12, 16))]
    torch.testing.assert_close(score, score_of(torch.stack(parts).mean(0)))
    assert model.predict(x, crops=2, crop_size=(64, 20)).shape == (2,)
    assert (small(positive=True).eval()(x) > 0).all()
    target = torch.tensor([[0.0, 0.5, 0.5, 0, 0]] * 2)
    (term,) = model.loss(y, target).values()
    apart = (y.cumsum(-1) - target.cumsum(-1)).square().mean(-1).sqrt().mean()
    torch.testing.assert_close(term, apart)
    same = target.clone().requires_grad_()
    model.loss(same, target)["earth_movers"].backward()
    assert same.grad.isfinite().all()


def test_norm_in_norm():
    a, b = torch.randn(2, 6, dtype=torch.float64)
    u, v = ((t - t.mean()) / (t - t.mean()).norm() for t in (a, b))
    torch.testing.assert_close(norm_in_norm_loss(a, b), (u - v).abs().sum() / (2 * 6**0.5))
    assert float(norm_in_norm_loss(3 * a + 1, a)) < 1e-12
    assert float(norm_in_norm_loss(a[:1], b[:1])) == pytest.approx(float((a[0] - b[0]).abs()))
    flat = torch.ones(4, requires_grad=True)
    norm_in_norm_loss(flat, torch.randn(4)).backward()
    assert not flat.grad.any()  # no direction, and no number that is not one
    assert norm_in_norm_loss(flat, flat).isfinite() and not norm_in_norm_loss(flat[:0], flat[:0])


def test_what_is_not_a_number_stays_none():
    assert norm_in_norm_loss(torch.tensor([1.0, torch.nan, 2.0]), torch.arange(3.0)).isnan()
    assert earth_movers_loss(torch.full((1, 3), torch.nan), torch.full((1, 3), 1 / 3)).isnan()
    with pytest.raises(ValueError, match=r"target must be \(3,\)"):
        norm_in_norm_loss(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"must be \(B, K\)"):
        earth_movers_loss(torch.zeros(1, 3), torch.zeros(1, 2))


def test_constant_images_and_features():
    for reference in (False, True):
        model = small(reference=reference)
        x = torch.full((2, 3, 16, 16), 0.5)
        terms = model.loss(model(x, x) if reference else model(x), torch.tensor([0.1, 0.1]))
        sum(terms.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_frozen_norms():
    model = small().train()
    before = model.encoder.norm.running_mean.clone()
    model(torch.rand(2, 3, 16, 16))
    assert model.encoder.norm.running_mean.equal(before) and not model.encoder.norm.weight.requires_grad
    loose = small(freeze_norms=False).train()
    loose(torch.rand(2, 3, 16, 16))
    assert not loose.encoder.norm.running_mean.equal(before)


def test_it_learns_how_blurred_an_image_is():
    """Rank correlation on images that were not seen."""
    from scipy.stats import spearmanr

    g = torch.Generator().manual_seed(0)

    def batch(count):
        x = torch.rand(count, 3, 32, 32, generator=g)
        level = torch.randint(0, 4, (count,), generator=g)
        for i, n in enumerate(level):
            for _ in range(int(n)):
                x[i] = nn.functional.avg_pool2d(x[i], 3, 1, 1, count_include_pad=False)
        return x, level.float()

    torch.manual_seed(0)
    model = small(drop=0.0, freeze_norms=False)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(40):
        x, level = batch(16)
        loss = sum(model.loss(model(x), level).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, level = batch(64)
    assert spearmanr(model.predict(x).numpy(), level.numpy())[0] > 0.9


def test_compiled_and_exported():
    model = small(reference=True).eval()
    x, r = torch.rand(2, 2, 3, 24, 20)
    y = model(x, r)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x, r), y)
    made = torch.export.export(model, (x, r), strict=False).module()
    torch.testing.assert_close(made(x, r), y)
    with torch.no_grad():
        again = small(reference=True).eval()
        again.load_state_dict(model.state_dict())
        assert again(x, r).equal(model(x, r))


def test_bad_input():
    model, full = small().eval(), small(reference=True).eval()
    x = torch.rand(1, 3, 16, 16)
    for wrong in (x[:, :2], x[0], x.long(), x[..., :0]):
        with pytest.raises(ValueError, match="x must"):
            model(wrong)
    with pytest.raises(ValueError, match="needs a reference"):
        full(x)
    with pytest.raises(ValueError, match="takes none"):
        model(x, x)
    with pytest.raises(ValueError, match="reference must be images"):
        full(x, x[..., :8])
    with pytest.raises(ValueError, match="target must be"):
        model.loss(torch.zeros(2, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        model.loss(torch.zeros(2, 1), torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match="sum of 1"):
        small(num_classes=3).loss(torch.full((1, 3), 1 / 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="prediction must be"):
        model.loss(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="positive is for a score"):
        small(positive=True, num_classes=3)
    with pytest.raises(ValueError, match="feature_info"):
        TOPIQ(encoder=nn.Identity())
    with pytest.raises(ValueError, match="encoder_settings"):
        TOPIQ(encoder=Trunk(), encoder_settings={})
    with pytest.raises(ValueError, match=r"2 \* num_heads"):
        TOPIQ(dim=10, num_heads=4, encoder=Trunk())
    with pytest.raises(ValueError, match="std must"):
        small(std=(1, 0, 1))
    with pytest.raises(ValueError, match="crops"):
        model.predict(x, crops=0)
    with pytest.raises(ValueError, match="ResNet of this library"):
        topiq.convert({"a": torch.zeros(1)}, model)

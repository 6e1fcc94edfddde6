"""Maps by gradients: each cell against autograd through an identity layer, and against both releases."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hooks.models import language_model, prompt
from safetensors import safe_open
from torch import nn

from attnlib import Layout
from attnlib.look.attribution import (
    class_sensitivity,
    combine,
    extract_aggregate,
    grad_cam,
    integrated_gradients,
    map_correlation,
    meta_saliency,
    own_norm_grad,
    saliency,
    transformer_relevance,
)

EXTRACT = ("bias", "scaling", "conv1x1", "conv3x3", "conv3x3_depthwise")
AGGREGATE = ("sum", "max", "norm", "filter_norm")


def net(seed=0, inplace=False):
    torch.manual_seed(seed)
    relu = nn.ReLU(inplace=inplace)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), relu, nn.Conv2d(4, 5, 3, stride=2, padding=1), relu,
        nn.Conv2d(5, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).eval()  # fmt: skip


def images(rows=2, h=6, w=5):
    return torch.randn(rows, 3, h, w, generator=torch.Generator().manual_seed(5)).double()


def identity_gradients(tail, x, extract, target):
    """m (entries, h, w): the gradient of an identity layer whose weights are another copy at each place."""
    c, h, w = x.shape[1:]
    if extract == "bias":
        weight = torch.zeros(c, h, w).double().requires_grad_()
        y = x + weight
    elif extract == "scaling":
        weight = torch.ones(c, h, w).double().requires_grad_()
        y = x * weight
    else:
        k = 1 if extract == "conv1x1" else 3
        patches = F.unfold(x, k, padding=k // 2).view(c, k * k, h, w)
        eye = torch.zeros(c, c, k * k).double()
        eye[range(c), range(c), k * k // 2] = 1
        if extract.endswith("depthwise"):
            weight = eye[range(c), range(c)][..., None, None].repeat(1, 1, h, w).requires_grad_()
            y = (weight * patches).sum(1)[None]
        else:
            weight = eye[..., None, None].repeat(1, 1, 1, h, w).requires_grad_()
            y = torch.einsum("ockhw,ckhw->ohw", weight, patches)[None]
    return torch.autograd.grad(tail(y)[0, target], weight)[0].reshape(-1, h, w)


def aggregate_by_hand(m, how):
    if how in ("sum", "max"):
        return m.sum(0) if how == "sum" else m.amax(0)
    if how == "max_abs":
        return m.abs().amax(0)
    return (m if how == "norm" else m.clamp_min(0)).square().sum(0).sqrt()


@pytest.mark.parametrize("aggregate", [*AGGREGATE, "max_abs"])
@pytest.mark.parametrize("extract", EXTRACT)
def test_each_cell_is_autograd_through_an_identity_layer(extract, aggregate):
    model, x = net().double(), images()
    found = saliency(model, x, modules=["0", "2"], target=[0, 2], extract=extract, aggregate=aggregate)
    for name, cut in (("0", 1), ("2", 3)):
        for row, target in enumerate((0, 2)):
            a = model[:cut](x[row : row + 1]).detach()
            expected = aggregate_by_hand(identity_gradients(model[cut:], a, extract, target), aggregate)
            torch.testing.assert_close(found[name][row], expected, rtol=1e-9, atol=1e-12)


def test_places_add_up_to_the_gradient_of_an_inserted_convolution():
    model, x = net().double(), images(1)
    a = model[:1](x).detach()
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False).double()
    nn.init.dirac_(conv.weight)
    model[1:](conv(a))[0, 1].backward()
    total = identity_gradients(model[1:], a, "conv3x3", 1).sum((1, 2)).view(4, 4, 3, 3)
    torch.testing.assert_close(conv.weight.grad, total)


def fixture():
    path = Path(__file__).parents[1] / "fixtures" / "normgrad.safetensors"
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


@pytest.mark.parametrize("layers", [["1"], ["3"], ["1", "3"]], ids="+".join)
def test_the_grid_equals_the_released_one(layers):
    t = fixture()
    model = net()
    model.load_state_dict({k[3:]: v for k, v in t.items() if k.startswith("sd/")})
    for i, extract in enumerate(EXTRACT):
        for j, aggregate in enumerate(AGGREGATE):
            # ReLU is one module called twice here: its calls have names, as the release's two modules have.
            maps = saliency(_apart(model), t["x"], modules=layers, target=2, extract=extract, aggregate=aggregate)
            ours = combine(maps, (224, 224))[0, 16::32, 16::32]
            torch.testing.assert_close(ours, t[f"grid/{'+'.join(layers)}"][i, j], rtol=1e-5, atol=1e-5)


def _apart(model):
    """The same with ReLUs of their own."""
    new = copy.deepcopy(model)
    new[3] = nn.ReLU()
    return new


def test_torchray_branch():
    t = fixture()
    model = net()
    model.load_state_dict({k[3:]: v for k, v in t.items() if k.startswith("sd/")})
    model, x = _apart(model), t["x"]
    near = dict(rtol=1e-5, atol=1e-5)
    maps = saliency(model, x, modules=["1", "3"], target=2)
    selective = saliency(model, x, modules=["1", "3"], target=2, extract="scaling", aggregate="filter_norm")
    for name in ("1", "3"):
        torch.testing.assert_close(maps[name], t[f"torchray/norm_grad/{name}"][:, 0], **near)
        torch.testing.assert_close(selective[name], t[f"torchray/selective/{name}"][:, 0], **near)
    torch.testing.assert_close(
        own_norm_grad(model, x, modules=["2"], target=2)["2"], t["torchray/proper/2"][:, 0], **near
    )
    for how in ("sum", "product"):
        for strategy in ("accuracy", "uniform", "linear"):
            weights = [0.3, 0.9] if strategy == "accuracy" else strategy
            ours = combine(maps, (14, 14), how, weights)
            torch.testing.assert_close(ours, t[f"torchray/{how}/{strategy}"][:, 0], **near)
    for negate in (False, True):
        ours = meta_saliency(saliency, model, x, target=2, lr=0.05, negate=negate, modules=["1"])["1"]
        torch.testing.assert_close(ours, t[f"torchray/meta/{int(negate)}"][:, 0], **near)


def test_normgrad_builds_no_outer_product():
    """3000 channels: one C^2 of one place would have nine million numbers."""
    x, g = torch.randn(2, 1, 3000, 2, 2)

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Count.largest = max(Count.largest, out.numel())
            return out

    with Count():
        for aggregate in AGGREGATE:
            extract_aggregate(x, g, "conv1x1", aggregate)
            extract_aggregate(x, g, "conv3x3", aggregate)
    assert Count.largest <= x.numel() * 4, Count.largest  # padding makes 2 x 2 into 4 x 4


def test_grad_cam_and_linear_approximation():
    model, x = net().double(), images()
    x4 = model[:5](x)
    weight = model[7].weight[1]
    expected = ((weight / 9)[None, :, None, None] * x4).sum(1)  # 3 x 3 places before the mean
    torch.testing.assert_close(grad_cam(model, x, modules=["4"], target=1)["4"], expected.relu())
    linear = saliency(model, x, modules=["4"], target=1, extract="scaling", aggregate="sum")["4"]
    torch.testing.assert_close(linear, expected)
    away = saliency(model, x, modules=["4"], target=1, extract="scaling", aggregate="sum", against=True)["4"]
    torch.testing.assert_close(away, -expected)


def test_in_place_and_chunks_change_nothing():
    x = images(5)
    plain = saliency(net().double(), x, modules=["0", "2"], target=[0, 1, 2, 0, 1])
    chunked = saliency(net(inplace=True).double(), x, modules=["0", "2"], target=[0, 1, 2, 0, 1], chunk=2)
    assert list(plain) == list(chunked) == ["0", "2"]
    for name in plain:
        torch.testing.assert_close(plain[name], chunked[name])
    twice = saliency(net().double(), x, modules=["1"], target=0, chunk=2)
    assert list(twice) == ["1", "1:1"]
    assert twice["1:1"].shape == (5, 3, 3)


@pytest.mark.parametrize("fails", [False, True])
def test_meta_saliency_leaves_the_model_as_it_was(fails):
    model, x = net().double(), images()
    model.insert(1, nn.BatchNorm2d(4).double())
    model.train()
    model[0].weight.requires_grad_(False)
    before = {k: (v.clone(), v.data_ptr()) for k, v in model.state_dict().items()}
    seen = {}

    def method(model, x, target):
        seen.update({k: v.clone() for k, v in model.state_dict().items()}, training=model.training)
        if fails:
            raise RuntimeError("no map")
        return saliency(model, x, modules=["3"], target=target)["3"]

    if fails:
        with pytest.raises(RuntimeError, match="no map"):
            meta_saliency(method, model, x, target=[0, 1], lr=0.1)
    else:
        meta_saliency(method, model, x, target=[0, 1], lr=0.1)
        stepped = copy.deepcopy(model).eval().requires_grad_()
        F.cross_entropy(stepped(x), torch.tensor([0, 1])).backward()
        for name, p in stepped.named_parameters():
            torch.testing.assert_close(seen[name], p.data - 0.1 * p.grad)
    assert not seen["training"] and not torch.equal(seen["0.weight"], before["0.weight"][0])
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].data_ptr() == p for k, (v, p) in before.items())
    assert model.training and not model[0].weight.requires_grad and model[3].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_meta_saliency_of_no_step_is_the_plain_map():
    model, x = net().double(), images()
    plain = saliency(model, x, modules=["2"], target=1)["2"]
    assert torch.equal(meta_saliency(saliency, model, x, target=1, lr=0.0, modules=["2"])["2"], plain)


@pytest.mark.parametrize("measure", ["pearson", "spearman"])
def test_class_sensitivity(measure):
    model, x = net().double(), images()

    def blind(model, x, target):
        return x.abs().sum(1)

    def seeing(model, x, target):
        return saliency(model, x, modules=["4"], target=target, extract="scaling", aggregate="sum")["4"]

    assert class_sensitivity(blind, model, x, measure=measure).tolist() == [1.0, 1.0]
    found = class_sensitivity(seeing, model, x, measure=measure)
    ends = [seeing(model, x, e).flatten(1) for e in (model(x).argmax(1), model(x).argmin(1))]
    if measure == "spearman":
        ends = [e.argsort(1).argsort(1).double() for e in ends]
    expected = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ends, strict=True)])
    torch.testing.assert_close(found, expected)
    assert (found < 1).all()
    with pytest.raises(ValueError, match="the same everywhere"):
        map_correlation(torch.ones(1, 2, 2), torch.rand(1, 2, 2), measure)


def test_ranks_share_ties_and_take_no_table_of_pairs():
    """A map as large as a picture: a table of all pairs of its places would not fit."""
    a, b = (torch.randint(9, (1, 300, 300), generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    b = a + b

    def ranks(m):
        _, number, count = m.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - count / 2)[number].flatten().double()

    expected = torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]
    torch.testing.assert_close(map_correlation(a, b, "spearman")[0], expected)


def test_combined_maps():
    a, b = torch.rand(2, 4, 4).double(), torch.rand(2, 2, 2).double()

    def unit(m):
        low, high = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
        return (m - low) / (high - low)

    big = F.interpolate(b[:, None], size=(4, 4), mode="bilinear")[:, 0]
    torch.testing.assert_close(combine({"a": a, "b": b}), unit(a) * unit(big))
    torch.testing.assert_close(combine([a, b], how="sum", weights=[1, 3]), 0.25 * unit(a) + 0.75 * unit(big))
    torch.testing.assert_close(combine([a, b], weights="linear"), unit(a) ** (1 / 3) * unit(big) ** (2 / 3))
    flat = torch.ones(2, 2, 2).double()
    with pytest.raises(ValueError, match="the same everywhere in sample"):
        combine({"a": a, "end": flat})
    torch.testing.assert_close(combine([a, flat], constant="skip"), unit(a))
    assert not combine([a, flat], constant="zeros").any()
    assert combine([a[:0], b[:0]]).shape == (0, 4, 4)
    with pytest.raises(ValueError, match="weights must have one number per map"):
        combine([a, b], weights=[1.0])


def test_tokens_of_a_grid_and_of_a_text():
    model = language_model()
    inputs = prompt()
    found = saliency(model, modules=["model.layers.1"], target=4, **inputs)
    assert found["model.layers.1"].shape == inputs["input_ids"].shape

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.embed(x).tanh().mean(1))

    vit, x = Tokens(), torch.randn(2, 13, 3)
    layout = Layout.image(3, 4, cls=1)
    flat = saliency(vit, x, modules=["embed"], target=1)["embed"]
    grid = saliency(vit, x, modules=["embed"], target=1, layout=layout)["embed"]
    assert torch.equal(grid.flatten(1), flat[:, 1:])
    wide = saliency(vit, x, modules=["embed"], target=1, extract="conv3x3", layout=layout)["embed"]
    assert wide.shape == (2, 3, 4)
    with pytest.raises(ValueError, match="a grid of two axes"):
        saliency(vit, x, modules=["embed"], target=1, extract="conv3x3")


def test_images_run_channels_last_unless_the_model_views_them():
    torch.manual_seed(0)
    seen = []

    class Views(nn.Module):
        def __init__(self, view):
            super().__init__()
            self.first, self.view = nn.Conv2d(3, 4, 3), view
            self.last = nn.Linear(4 * 16, 5)

        def forward(self, x):
            seen.append(x.is_contiguous())
            y = self.first(x).relu()
            return self.last(y.view(len(y), -1) if self.view else y.flatten(1))

    free, fixed = Views(False).double().eval(), Views(True).double().eval()
    fixed.load_state_dict(free.state_dict())
    x = torch.randn(4, 3, 6, 6).double()
    for way in (
        lambda m: integrated_gradients(m, x, target=1, steps=4),
        lambda m: transformer_relevance(m, x, target=1, attention="gradient", norm="gradient", activation="gradient"),
        lambda m: transformer_relevance(m, x, target=1, default="gamma"),
    ):
        seen.clear()
        found = way(free)
        assert not any(seen) and found.is_contiguous()
        torch.testing.assert_close(way(fixed), found, rtol=1e-9, atol=1e-11)
        assert seen[-1]

    class Broken(Views):
        def forward(self, x):
            return super().forward(x)[:, :, :, None] @ x

    with pytest.raises((RuntimeError, IndexError), match=r"too many indices|dimension"):
        integrated_gradients(Broken(False).double().eval(), x, target=1, steps=4)


def test_integrated_gradients():
    model, x = net().double(), images(3)
    baseline = torch.full((), 0.1).double()
    target = [0, 2, 1]
    found = integrated_gradients(model, x, target=target, baseline=baseline, steps=400, rule="middle", chunk=100)
    rise = model(x) - model(torch.full_like(x, 0.1))
    torch.testing.assert_close(found.sum((1, 2, 3)), rise[range(3), target], rtol=1e-3, atol=1e-3)
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    y = torch.randn(3, 6).double()
    by_chunks = [integrated_gradients(smooth, y, target=1, chunk=c) for c in (None, 1, 7, 1000)]
    for other in by_chunks[1:]:
        torch.testing.assert_close(other, by_chunks[0])
    rise = (smooth(y) - smooth(torch.zeros_like(y)))[:, 1]
    torch.testing.assert_close(by_chunks[0].sum(1), rise, rtol=1e-7, atol=1e-7)
    points = (torch.arange(2000).double() + 0.5) / 2000
    path = (points[:, None] * y[:1]).requires_grad_()
    slope = torch.autograd.grad(smooth(path)[:, 1].sum(), path)[0].mean(0)
    torch.testing.assert_close(by_chunks[0][0], slope * y[0], rtol=1e-5, atol=1e-6)


def test_integrated_gradients_of_embeddings():
    model = language_model()
    inputs = prompt()
    found = integrated_gradients(model, module="model.embed_tokens", steps=64, **inputs)
    with torch.no_grad():
        top = model(**inputs).logits[:, -1].max(-1)
        handle = model.model.embed_tokens.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
        start = model(**inputs).logits[:, -1].gather(1, top.indices[:, None])[:, 0]
        handle.remove()
    assert found.shape[:2] == inputs["input_ids"].shape
    assert torch.isfinite(found).all() and found.dtype == start.dtype
    with pytest.raises(TypeError, match="module that embeds it"):
        integrated_gradients(model, inputs["input_ids"], target=0)


def test_bad_input():
    model, x = net(), images(1).float()
    with pytest.raises(ValueError, match="extract must be"):
        saliency(model, x, modules=["0"], extract="conv2x2")
    with pytest.raises(ValueError, match="aggregate="):
        saliency(model, x, modules=["0"], aggregate="mean")
    with pytest.raises(ValueError, match="has no 'nine'"):
        saliency(model, x, modules=["nine"])
    with pytest.raises(ValueError, match="to have a map"):
        saliency(model, x, modules=["7"])
    with pytest.raises(TypeError, match="Conv2d of one group"):
        own_norm_grad(model, x, modules=["1"])
    with pytest.raises(ValueError, match="target must be a class"):
        integrated_gradients(model, x, target=1.5)
    for wrong in (lambda: extract_aggregate([1.0], [2.0]), lambda: map_correlation([1.0], [2.0])):
        with pytest.raises(TypeError, match="must be a torch.Tensor"):
            wrong()
    with pytest.raises(ValueError, match="quantized"):
        low = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear})
        meta_saliency(saliency, low, torch.ones(1, 2), target=0, modules=["0"])


def test_inference_mode_halves_and_empty_batches():
    model, x = net().float(), images().float()
    with torch.inference_mode():
        given = x.clone()
        step = meta_saliency(saliency, model, given, target=1, lr=0.1, modules=["2"])["2"]
        path = integrated_gradients(model, given, target=1, steps=3)
    torch.testing.assert_close(step, meta_saliency(saliency, model, x, target=1, lr=0.1, modules=["2"])["2"])
    torch.testing.assert_close(path, integrated_gradients(model, x, target=1, steps=3))
    assert not any(p.is_inference() for p in model.parameters())
    half = copy.deepcopy(model).bfloat16()
    assert integrated_gradients(half, x.bfloat16(), steps=3).dtype == torch.bfloat16
    assert combine(saliency(half, x.bfloat16(), modules=["0", "2"])).isfinite().all()
    assert saliency(model, x[:0], modules=["0"], target=1)["0"].shape == (0, 6, 5)
    assert integrated_gradients(model, x[:0]).shape == (0, 3, 6, 5)
    with pytest.raises(ValueError, match="names 3 samples"):
        integrated_gradients(model, x, target=[0, 1, 2])
    with pytest.raises(ValueError, match="names 3 samples"):
        meta_saliency(saliency, model, x, target=[0, 1, 2], modules=["0"])
    with pytest.raises(ValueError, match="baseline must fit"):
        integrated_gradients(model, x, target=0, baseline=torch.zeros(7))

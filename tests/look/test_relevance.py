"""Relevance by rules: closed forms, conservation, the authors' layers; context-aware saliency against a loop."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from attnlib.look.attribution import Rule, context_aware_saliency, relevance, sr_map, transformer_relevance

RULES = ["0", "epsilon", "z+", "alphabeta", "gamma", Rule("zB", low=-4.0, high=4.0), "flat"]


def images(rows=2, side=12):
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(5)).double()


def net(bias=False, pool=None):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.ReLU(inplace=True), pool or nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(45, 7, bias=bias),
        nn.ReLU(), nn.Linear(7, 4, bias=bias),
    ).double().eval()  # fmt: skip


def by_hand(x, w, b, r, rule):
    """One linear layer, product by product."""
    z = x[:, None, :] * w[None]  # (B, out, in)
    if rule.name in ("0", "epsilon"):
        total = z.sum(2) + (0 if b is None else b)
        return (z * (r / (total + rule.epsilon * torch.where(total < 0, -1, 1)))[..., None]).sum(1)
    if rule.name == "zB":
        z = z - rule.low * w.clamp(min=0) - rule.high * w.clamp(max=0)
        return (z * (r / z.sum(2))[..., None]).sum(1)
    if rule.name == "flat":
        return (r.sum(1, keepdim=True) / w.shape[1]).expand_as(x)
    plus, minus = z.clamp(min=0), z.clamp(max=0)
    if rule.name == "gamma":
        b = torch.zeros(w.shape[0], dtype=w.dtype) if b is None else b
        up = ((z.sum(2) + b) > 0)[..., None]
        z = z + rule.gamma * torch.where(up, plus, minus)
        total = z.sum(2) + b + rule.gamma * torch.where(up[..., 0], b.clamp(min=0), b.clamp(max=0))
        return (z * (r / total)[..., None]).sum(1)

    def share(part):
        total = part.sum(2)
        return (part * (r / (total + rule.epsilon * torch.where(total < 0, -1, 1)))[..., None]).sum(1)

    alpha = 1 if rule.name == "z+" else rule.alpha
    return alpha * share(plus) + (1 - alpha) * share(minus)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: getattr(r, "name", r))
def test_rules_of_one_layer_by_hand(rule, bias):
    torch.manual_seed(1)
    layer, x = nn.Linear(6, 3, bias=bias).double(), torch.randn(4, 6).double()
    found = relevance(layer, x, [0, 2, 1, 1], default=rule)
    y = layer(x)
    r = torch.zeros_like(y)
    r[range(4), [0, 2, 1, 1]] = y[range(4), [0, 2, 1, 1]].detach()
    rule = rule if isinstance(rule, Rule) else Rule(rule)
    expected = by_hand(x, layer.weight, layer.bias, r, rule).detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_gamma_equals_zennit_and_lies_between_its_ends():
    path = Path(__file__).parents[1] / "fixtures" / "salient-relevance-map-gamma.safetensors"
    with safe_open(path, "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(12, 5),
    ).double().eval()  # fmt: skip
    model.load_state_dict({k.removeprefix("weights."): v for k, v in held.items() if k.startswith("weights.")})
    x, target = held["x"], torch.tensor([0, 3, 4])
    for gamma in (0.25, 2.0):
        rule = Rule("gamma", gamma=gamma, epsilon=1e-12)
        theirs = held[f"relevance.{gamma}"]
        torch.testing.assert_close(relevance(model, x, target, default=rule), theirs, rtol=1e-9, atol=1e-12)
        by_derivative = transformer_relevance(model, x, target=target, default=rule)
        torch.testing.assert_close(by_derivative, theirs, rtol=1e-9, atol=1e-12)
    plain, positive = net(), images()
    none = relevance(plain, positive, 1, default=Rule("gamma", gamma=0.0))
    torch.testing.assert_close(none, relevance(plain, positive, 1, default="0"), rtol=1e-6, atol=1e-9)
    layer, y = nn.Linear(6, 3, bias=False).double(), torch.randn(5, 6).double()
    top = layer(y).argmax(1)  # where an output is positive, much of gamma is z+
    much = relevance(layer, y, top, default=Rule("gamma", gamma=1e9))
    above = layer(y).amax(1) > 0
    torch.testing.assert_close(much[above], relevance(layer, y, top, default="z+")[above], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="gamma"):
        Rule("gamma", gamma=-1)


@pytest.mark.parametrize("rule", ["0", "epsilon", "gamma"])
def test_relevance_of_a_network_without_biases_is_its_logit(rule):
    x = images()
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)):
        model = net(pool=pool)
        logits = model(x)
        for target in (None, [1, 3]):
            found = relevance(model, x, target, default=rule)
            wanted = logits.amax(1) if target is None else logits[range(2), target]
            torch.testing.assert_close(found.sum((1, 2, 3)), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", ["z+", "alphabeta"])
def test_signed_rules_hand_on_what_they_got(rule):
    """Where every output has products of both signs, nothing is lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Identity(), nn.Linear(30, 4, bias=False)).double()
    x = torch.randn(3, 40).double()
    found = relevance(model, x, [0, 1, 2], default=rule)
    torch.testing.assert_close(found.sum(1), model(x)[range(3), range(3)], rtol=1e-6, atol=1e-9)


def test_rule_0_is_gradient_times_input_without_biases():
    model, x = net(), images().requires_grad_()
    grad = torch.autograd.grad(model(x)[range(2), [1, 2]].sum(), x)[0]
    found = relevance(model, x.detach(), [1, 2], default=Rule("0", epsilon=0.0))
    torch.testing.assert_close(found, (x * grad).detach(), rtol=1e-6, atol=1e-9)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x))
        y += x
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(y), 1), 1))


def test_folded_norms_and_residual_sums():
    model, x = Residual().double().eval(), images(2, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = relevance(model, x, [0, 2], default=Rule("0", epsilon=0.0))

    def scaled(norm):
        return norm.weight / (norm.running_var + norm.eps).sqrt()

    # Rule 0 through biases: x times the gradient with every pre-activation's share, seed times products / whole.
    s1, s2 = scaled(model.norm1), scaled(model.norm2)
    w1, w2 = model.conv1.weight * s1.view(-1, 1, 1, 1), model.conv2.weight * s2.view(-1, 1, 1, 1)
    b1 = model.norm1.bias - model.norm1.running_mean * s1
    b2 = model.norm2.bias + (model.conv2.bias - model.norm2.running_mean) * s2
    a = F.conv2d(x, w1, b1, padding=1)
    h = a.relu()
    y = F.conv2d(h, w2, b2, padding=1)
    z = (y + h).relu()
    logits = model.head(z.mean((2, 3)))
    torch.testing.assert_close(logits, model(x))
    # Rule 0 lets gradient times input pass each layer as it is, biases or not, where the ratio is carried along.
    xs = x.clone().requires_grad_()
    again = F.conv2d(F.conv2d(xs, w1, b1, padding=1).relu(), w2, b2, padding=1)
    again = (again + F.conv2d(xs, w1, b1, padding=1).relu()).relu()
    grad = torch.autograd.grad(model.head(again.mean((2, 3)))[range(2), [0, 2]].sum(), xs)[0]
    torch.testing.assert_close(found, (x * grad).detach(), rtol=1e-5, atol=1e-8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_relevance_of_a_sum_is_shared_by_its_terms():
    class Sum(nn.Module):
        def forward(self, x):
            return x + F.relu(x)

    x = torch.tensor([[2.0, -1.0]]).double()
    found = relevance(Sum(), x, 0, default="0")
    torch.testing.assert_close(found, torch.tensor([[4.0, 0.0]]).double())


def test_a_maximum_takes_all():
    pool = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
    x = torch.rand(1, 1, 4, 4).double()
    found = relevance(pool, x, 0)
    assert (found != 0).sum() == 1 and found.sum() == x[..., :2, :2].max()


def test_rules_by_path_pattern_and_class():
    model, x = net(), images()
    one = relevance(model, x, 0, {nn.Linear: "z+", nn.Conv2d: "0"})
    two = relevance(model, x, 0, {"6": "z+", "8": "z+", "[03]": Rule("0")})
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, relevance(model, x, 0))


@pytest.mark.parametrize("case", ["plain", "biased", "overlap"])
def test_compat_equals_the_released_layers(case):
    with safe_open(Path(__file__).parents[1] / "fixtures" / "salient-relevance-map.safetensors", "pt") as f:
        t = {k[len(case) + 1 :]: f.get_tensor(k).double() for k in f.keys() if k.startswith(case)}  # noqa: SIM118
    model = net(bias=case == "biased", pool=nn.MaxPool2d(3, 2) if case == "overlap" else None)
    model.load_state_dict({k[3:]: v for k, v in t.items() if k.startswith("sd/")})
    found = relevance(model, t["x"], compat=True)
    torch.testing.assert_close(found, t["r"], rtol=1e-5, atol=1e-5)
    if case != "plain":  # what the release loses, ours keeps
        top = model(t["x"]).amax(1)
        assert ((found.sum((1, 2, 3)) - top).abs() > 1e-3 * top.abs()).any()
    if case == "overlap":
        ours = relevance(model, t["x"], rules={nn.Linear: Rule("z+", inputs="weights"), nn.Conv2d: "0"})
        torch.testing.assert_close(ours.sum((1, 2, 3)), top, rtol=1e-3, atol=0)


def test_modules_without_a_rule_are_named():
    x = images(1, 4)
    with pytest.raises(ValueError, match=r"'1' \(LayerNorm\) has no rule"):
        relevance(nn.Sequential(nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 2)).double(), x)

    class Odd(nn.Module):
        def forward(self, x):
            return torch.sin(x.flatten(1))

    with pytest.raises(ValueError, match="'sin'.*has no rule"):
        relevance(Odd(), x)
    with pytest.raises(ValueError, match="training mode"):
        relevance(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).double(), x)
    with pytest.raises(TypeError, match="rules must be a dictionary"):
        relevance(net(), images(), rules=["0"])
    with pytest.raises(TypeError, match="default must be a Rule"):
        relevance(net(), images(), default=3)
    with pytest.raises(ValueError, match="no module is called 'nine'"):
        relevance(net(), images(), rules={"nine": "0"})
    with pytest.raises(ValueError, match="choose one of"):
        Rule("lrp")
    with pytest.raises(ValueError, match="needs low="):
        relevance(net(), images(), default="zB")
    with pytest.raises(ValueError, match="target must lie in"):
        relevance(net(), images(), 4)


def context_by_hand(m, patch, nearest, c):
    h, w = m.shape
    e = patch // 2
    padded = F.pad(m[None, None], [e] * 4, mode="replicate")[0, 0]
    out = torch.zeros(h, w).double()
    for y in range(h):
        for x in range(w):
            ds = []
            for v in range(h):
                for u in range(w):
                    if (v, u) != (y, x):
                        a, b = padded[y : y + patch, x : x + patch], padded[v : v + patch, u : u + patch]
                        far = math.hypot(y - v, x - u) / max(h, w)
                        ds.append(float((a - b).norm()) / patch / (1 + c * far))
            out[y, x] = 1 - math.exp(-sum(sorted(ds)[:nearest]) / min(nearest, len(ds)))
    out = (out - out.min()) / (out.max() - out.min())
    foci = [(y, x) for y in range(h) for x in range(w) if out[y, x] > 0.8]
    new = out.clone()
    for y in range(h):
        for x in range(w):
            new[y, x] *= 1 - min(math.hypot(y - v, x - u) for v, u in foci) / max(h, w)
    return new


def test_context_by_hand():
    m = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    unit = (m - m.min()) / (m.max() - m.min())
    found = context_aware_saliency(m, scales=(1.0,), patch=3, nearest=7, rows=4)
    torch.testing.assert_close(found[0], context_by_hand(unit[0], 3, 7, 3.0))
    torch.testing.assert_close(found, context_aware_saliency(3 * m + 1, scales=(1.0,), patch=3, nearest=7))
    # 0.78 of a patch of 5 is a side of 3.9, to which 3 is the nearest odd one.
    smaller = context_aware_saliency(m, scales=(0.78,), patch=5, nearest=7, scaled="patch")
    torch.testing.assert_close(smaller, found)


@pytest.mark.parametrize("scaled", ["image", "patch"])
def test_scattered_pixels_become_an_area(scaled):
    """Pixels scattered in one blob, noise elsewhere: the area over the threshold fits the blob better than |R|."""
    better = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        ys, xs = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        blob = (ys - 12) ** 2 + (xs - 19) ** 2 <= 36
        raw = (torch.rand(32, 32, generator=g) < 0.4) * blob * torch.rand(32, 32, generator=g)
        raw = raw + 0.05 * torch.rand(32, 32, generator=g)
        found = context_aware_saliency(raw[None], patch=7, scaled=scaled)[0]

        def iou(m, blob=blob):
            area = m > m.flatten().sort(descending=True).values[int(blob.sum())]
            return float((area & blob).sum() / (area | blob).sum())

        better.append(iou(found) - iou(raw))
    assert min(better) > 0.1, better


def test_salient_relevance_maps():
    model, x = net(bias=True), images()
    found = sr_map(model, x, 1, most=12)
    assert found.shape == (2, 12, 12) and found.amin() >= 0 and found.amax() <= 1
    r = relevance(model, x, 1)
    torch.testing.assert_close(found, context_aware_saliency(r.abs(), most=12))
    torch.testing.assert_close(sr_map(model, x, 1, by="sum"), context_aware_saliency(r.sum(1)))
    assert not context_aware_saliency(torch.full((2, 9, 9), 3.0)).any()
    assert context_aware_saliency(torch.zeros(0, 9, 9)).shape == (0, 9, 9)
    assert context_aware_saliency(torch.rand(1, 40, 70), most=20).shape == (1, 40, 70)
    for bad, message in (({"patch": 4}, "odd"), ({"scales": ()}, "empty"), ({"scaled": "both"}, "scaled=")):
        with pytest.raises(ValueError, match=message):
            context_aware_saliency(torch.rand(1, 8, 8), **bad)


def test_inference_mode_halves_and_empty_batches():
    model, x = net().float(), images().float()
    with torch.inference_mode():
        found = relevance(model, x.clone(), 1)
    torch.testing.assert_close(found, relevance(model, x, 1))
    half = copy.deepcopy(model).bfloat16()
    assert sr_map(half, x.bfloat16(), 1, most=12).dtype == torch.bfloat16
    assert relevance(model, x[:0]).shape == (0, 3, 12, 12)
    for target in ([0, 1, 2], 1.5):
        with pytest.raises(ValueError, match="target"):
            relevance(model, x, target)

"""BioFusionNet: the release over the batch, ours within a patient; the weighted Cox loss, by risk and by time."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import attnlib
from attnlib.models.bags.biofusionnet import (
    BioFusionNet,
    FeatureVAE,
    Survival,
    convert_vae,
    weighted_cox_loss,
)
from attnlib.models.build import load_pretrained
from attnlib.models.losses import concordance, cox_loss
from attnlib.models.protocol import Optimizers, train_batch
from tests.parity import HERE, synthetic

with safe_open(HERE / "biofusionnet.safetensors", "pt") as f:
    RECORDED = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    SHAPES = json.loads(f.metadata()["config"])

SMALL = dict(in_chans=8, num_genes=5, num_clinical=2, num_heads=2, depth=1, ff_dim=12, hidden=(12, 8, 6, 4))
NEAR = dict(rtol=1e-9, atol=1e-12)


def built(**settings):
    torch.manual_seed(0)
    return BioFusionNet(**{**SMALL, **settings}).double().eval()


def patients(count, patches=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    return draw(count, patches, 8), draw(count, 5), draw(count, 2)


def under(name):
    return {k.removeprefix(f"{name}/"): v for k, v in RECORDED.items() if k.startswith(f"{name}/")}


# ---- the authors'


def test_the_authors_model_over_the_batch():
    held = under("model")
    with pytest.warns(UserWarning, match="over the patients of a batch"):
        model = attnlib.create_model("biofusionnet", compat="authors").double().eval()
    weights = synthetic(SHAPES["model"])
    load_pretrained(model, weights)
    xs = [held[k].double().requires_grad_() for k in ("patches", "genes", "clinical")]
    y = model(*xs)
    torch.testing.assert_close(y, held["y"], **NEAR)
    (y * torch.tensor([1.0, -2.0, 0.5, 3.0]).double()).sum().backward()
    torch.testing.assert_close(xs[0].grad.flatten()[::11], held["dpatches"], **NEAR)
    torch.testing.assert_close(xs[1].grad, held["dgenes"], **NEAR)
    torch.testing.assert_close(xs[2].grad, held["dclinical"], **NEAR)
    # where an entry of theirs lies in ours: the names, carried over by whole tensors
    shapes = SHAPES["model"]
    marks = {k: torch.full(s, float(i)) for i, (k, s) in enumerate(shapes.items())}
    where = {n: list(shapes)[int(t.flatten()[0])] for n, t in model.entry.convert(marks, model).items()}
    for name, p in model.named_parameters():
        theirs = held[f"dw/{where[name]}"]
        found = p.grad.flatten()[:: max(1, p.numel() // 40)]
        torch.testing.assert_close(found, theirs, rtol=1e-8, atol=1e-10, msg=lambda said, name=name: f"{name}: {said}")
    dead = sum(math.prod(s) for k, s in shapes.items() if k.startswith("comodel.transformer_encoder."))
    assert sum(p.numel() for p in model.parameters()) + dead == 8_070_016
    with pytest.raises(ValueError, match="mine"):
        load_pretrained(model, {**weights, "mine": torch.ones(1)})
    weights.pop("fc2.0.bias")
    with pytest.raises(ValueError, match="missing"):
        load_pretrained(model, weights)


def test_the_authors_loss_sorts_by_risk():
    held = under("cox")
    risk = held["risk"].clone().requires_grad_()
    time = torch.rand(9).double()
    loss = weighted_cox_loss(risk, time, held["event"], held["weights"], compat="authors")
    torch.testing.assert_close(loss, held["loss"], **NEAR)
    loss.backward()
    torch.testing.assert_close(risk.grad, held["drisk"], **NEAR)
    assert not torch.isclose(weighted_cox_loss(risk, time, held["event"], held["weights"]), loss)


def test_the_authors_vae():
    held = under("vae")
    vae = FeatureVAE().double()
    vae.load_state_dict(convert_vae(synthetic(SHAPES["vae"])))
    x = held["x"].double().requires_grad_()
    found = vae(x, held["noise"].double())
    torch.testing.assert_close(found[0][:, ::9], held["rec"], **NEAR)
    terms = vae.loss(found, x)
    torch.testing.assert_close(terms["reconstruction"], held["mse"], **NEAR)
    torch.testing.assert_close(terms["divergence"], held["kl"], **NEAR)
    sum(terms.values()).backward()
    torch.testing.assert_close(x.grad[:, ::9], held["dx"], **NEAR)
    torch.testing.assert_close(vae.mean.weight.grad.flatten()[::997], held["dmean"], **NEAR)
    zero = torch.zeros(3, 256)
    assert vae.loss((x.detach(), zero, zero), x.detach())["divergence"] == 0
    assert vae.predict(torch.randn(2, 7, 1152).double()).shape == (2, 7, 256)
    vae.eval()
    assert vae(x)[0].equal(vae(x)[0])


# ---- within a patient


def oracle(m, patches, genes, clinical):
    """One patient: softmax over its own tokens, written out."""

    def attend(q, k, v, scale):
        return torch.softmax(q @ k.T * scale, -1) @ v

    s, c = m.self_attention, m.co_attention
    image = attend(s.query(patches), s.key(patches), s.value(patches), 1.0)
    diag = torch.diag(genes)  # gene j alone
    gq, gk, gv = (diag @ layer.weight.T for layer in (c.gene_query, c.gene_key, c.gene_value))
    co_image = attend(c.img_query(image), gk, gv, 1.0)
    co_genes = attend(gq, c.img_key(image), c.img_value(image), 1.0)

    def cross(layer, x, context):
        return attend(layer.query(x), layer.key(context), layer.value(context), 8**-0.5)

    a, b = cross(m.image_cross, co_image, co_genes), cross(m.gene_cross, co_genes, co_image)
    a, b = cross(m.image_back, a, image), cross(m.gene_back, b, m.gene_adjust(diag))
    x = torch.cat([a.mean(0), b.mean(0)])
    for layer in m.encoder.layers:  # of one token, attention is its value
        at = layer.self_attn
        v = x @ at.in_proj_weight[32:].T + at.in_proj_bias[32:]
        x = layer.norm1(x + at.out_proj(v))
        x = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
    return m.head(m.join(torch.cat([m.mlp(x), clinical])))[0]


def test_a_patient_alone_is_the_oracle():
    m, xs = built(), patients(3)
    want = torch.stack([oracle(m, *(x[i] for x in xs)) for i in range(3)])
    got = m(*xs)
    torch.testing.assert_close(got, want, **NEAR)
    weights = list(m.parameters())
    ours = torch.autograd.grad(got.sin().sum(), weights)
    for a, b in zip(ours, torch.autograd.grad(want.sin().sum(), weights, allow_unused=True), strict=True):
        if b is not None:  # of one token, queries and keys have no say
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_risks_do_not_depend_on_other_patients_or_on_absent_patches():
    m, xs = built(), patients(4)
    full = m(*xs)
    torch.testing.assert_close(m(*(x[:2] for x in xs)), full[:2], **NEAR)
    with pytest.warns(UserWarning):
        theirs = built(compat="authors")
    assert not torch.allclose(theirs(*(x[:2] for x in xs)), theirs(*xs)[:2])
    valid = torch.arange(6) < torch.tensor([6, 4, 1, 5])[:, None]
    dirty = xs[0].masked_fill(~valid[..., None], math.nan).requires_grad_()
    found = m(dirty, *xs[1:], valid)
    for i, n in enumerate((6, 4, 1, 5)):
        torch.testing.assert_close(found[i : i + 1], m(xs[0][i : i + 1, :n], xs[1][i : i + 1], xs[2][i : i + 1]))
    found.sum().backward()
    assert dirty.grad.isfinite().all() and not dirty.grad[~valid].any()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(m(xs[0][:, order], *xs[1:]), full)


# ---- survival


def brute(risk, time, event, weights):
    total = 0.0
    for i in range(len(risk)):
        if event[i]:
            at_risk = [j for j in range(len(risk)) if time[j] >= time[i]]
            total = total + weights[i] * (risk[i] - sum(weights[j] * risk[j].exp() for j in at_risk).log())
    return -total / (weights * event).sum()


def test_weighted_cox_is_the_sum_over_sets_at_risk():
    g = torch.Generator().manual_seed(0)
    risk = torch.randn(12, generator=g).double().requires_grad_()
    time = torch.randint(0, 6, (12,), generator=g).double()  # ties
    event = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1]).double()
    for weights in (torch.ones(12).double(), torch.where(event > 0, 5.0, 1.0).double(), torch.rand(12).double() + 0.1):
        ours, want = weighted_cox_loss(risk, time, event, weights), brute(risk, time, event, weights)
        torch.testing.assert_close(ours, want, **NEAR)
        torch.testing.assert_close(torch.autograd.grad(ours, risk), torch.autograd.grad(want, risk))
        torch.testing.assert_close(weighted_cox_loss(risk + 7, time, event, weights), ours)
        far = weighted_cox_loss(risk.detach() * 1000, time, event, weights)
        assert far.isfinite()
    plain = weighted_cox_loss(risk, time, event, torch.ones(12), ties="efron")
    torch.testing.assert_close(plain, cox_loss(risk, time, event, ties="efron"))
    m = built()
    torch.testing.assert_close(
        m.loss(risk, Survival(time, event))["cox"], weighted_cox_loss(risk, time, event, 1 + 4 * event)
    )


def test_concordance():
    time, event = torch.arange(6.0), torch.tensor([1, 0, 1, 1, 0, 1])
    assert concordance(-time, time, event) == 1 and concordance(time, time, event) == 0
    assert concordance(torch.zeros(6), time, event) == 0.5
    g = torch.Generator().manual_seed(0)
    risk, time, event = (torch.randint(0, most, (40,), generator=g) for most in (9, 12, 2))  # ties of both
    pairs = [
        (i, j) for i in range(40) for j in range(40)
        if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j]))
    ]  # fmt: skip
    right = sum(1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0 for i, j in pairs) / len(pairs)
    assert float(concordance(risk, time, event)) == pytest.approx(right, rel=1e-12)
    for wrong, said in (
        ((risk / 0, time, event), "risk must be finite"), ((risk, time, event * 2), "event must hold 0 and 1"),
        ((risk, time[:3], event), r"time must be a tensor of shape \(N=40\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            concordance(*wrong)
    with pytest.raises(ValueError, match="no pair"):
        concordance(time, time, torch.zeros(40))


def test_it_learns_risks_from_both_sides():
    def world(count, g):
        patches, genes = torch.randn(count, 6, 8, generator=g), torch.randn(count, 5, generator=g)
        lifted = torch.randn(count, generator=g)
        patches[:, :, 0] += lifted[:, None]
        risk = 1.5 * (lifted + genes[:, 1])
        time = torch.empty(count).exponential_(generator=g) * (-risk).exp()
        return {
            "patches": patches, "genes": genes, "clinical": torch.zeros(count, 2),
            "target": Survival(time.clamp(max=3.0), (time < 3.0).float()),
        }  # fmt: skip

    torch.manual_seed(0)
    m = BioFusionNet(**{**SMALL, "drop": 0.0})
    o, g = Optimizers(lambda _, p: torch.optim.AdamW(p, 5e-3)), torch.Generator().manual_seed(1)
    for _ in range(100):
        train_batch(m.train(), world(32, g), o, clip=1.0)
    test = world(200, g)
    found = m.eval().predict(test["patches"], test["genes"], test["clinical"])
    assert concordance(found, *test["target"]) > 0.7


def test_the_world_outside():
    m, xs = built(), patients(3)
    want = m(*xs)
    torch.testing.assert_close(copy.deepcopy(m)(*xs), want)
    made = torch.export.export(m, xs, strict=False).module()
    torch.testing.assert_close(made(*xs), want)
    torch.testing.assert_close(torch.compile(m, backend="eager")(*xs), want)
    assert m(*(x[:0] for x in xs)).shape == (0,)
    half = copy.deepcopy(m).bfloat16().train()
    risk = half(*(x.bfloat16() for x in xs))
    loss = half.loss(risk, Survival(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0, 1])))["cox"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in half.parameters())
    with torch.no_grad():
        torch.testing.assert_close(m(*xs), want)


def test_what_is_refused():
    m, xs = built(), patients(3)
    risk, time, event = m(*xs), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0, 1])
    with pytest.raises(ValueError, match="event holds none"):
        m.loss(risk, Survival(time, torch.zeros(3)))
    with pytest.raises(ValueError, match="time must be at least 0, got -1"):
        m.loss(risk, Survival(time - 2, event))
    with pytest.raises(ValueError, match="time must be finite"):
        m.loss(risk, Survival(time * math.nan, event))
    with pytest.raises(TypeError, match="target must be Survival"):
        m.loss(risk, time)
    with pytest.raises(ValueError, match="event must be"):
        m.loss(risk, Survival(time, event[:2]))
    with pytest.raises(ValueError, match="weights must be finite and above 0"):
        weighted_cox_loss(risk, time, event, torch.zeros(3))
    with pytest.raises(ValueError, match="risk must be finite"):
        m.loss(risk * math.nan, Survival(time, event))
    with pytest.raises(ValueError, match=r"patches must be finite; those of the patients \[0, 1, 2\]"):
        m(xs[0] * math.nan, *xs[1:])
    with pytest.raises(TypeError, match="patches must be a floating-point tensor"):
        m(xs[0].long(), *xs[1:])
    with pytest.raises(ValueError, match=r"features must be \(\.\.\., 8\)"):
        FeatureVAE(8, 4, 2)(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="at least one patch"):
        m(xs[0][:, :0], *xs[1:])
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[1] = False
    with pytest.raises(ValueError, match=r"valid leaves the patients \[1\] without a patch"):
        m(*xs, valid)
    genes = xs[1].clone()
    genes[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"genes must be finite; those of the patients \[2\]"):
        m(xs[0], genes, xs[2])
    with pytest.raises(ValueError, match=r"genes must be a tensor of shape \(B=3, J=5\)"):
        m(xs[0], xs[1][:2], xs[2])
    for settings, said in (
        (dict(compat="theirs"), "compat"), (dict(num_heads=3), "num_heads"), (dict(hidden=(4, 4)), "hidden"),
        (dict(event_weight=0.0), "event_weight"), (dict(ties="none"), "ties"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            built(**settings)

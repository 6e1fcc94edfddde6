"""ACMIL: pools and whole models held to the authors' classes, with losses and gradients; what training hides."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture
from whole import Whole, renamer

import attnlib
from attnlib.models.bags.acmil import ACMIL, convert
from attnlib.models.build import counted_params, load_pretrained, model_entry
from attnlib.models.protocol import Optimizers, train_batch
from attnlib.nn.pools.acmil import ACMILHeads, ACMILPool, diversity, hide_top

RECORDED = Fixture("acmil")
SMALL = dict(in_chans=6, dim=8, num_classes=3, num_branches=3, hidden_dim=4)


def built(**settings):
    torch.manual_seed(0)
    return ACMIL(**{**SMALL, **settings}).double().eval()


def bags(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_query_that_reads_the_bag_is_the_authors_mha():
    whole = Whole("acmil-mha-mil")
    model = attnlib.create_model("mha_mil", in_chans=12, dim=16, num_classes=3)

    def rule(state):
        return convert(state, model)

    def call(model, inputs):
        return {"logits": model(inputs["bags"]).logits}

    whole.holds("mha", model, rule, call, renamer(rule, whole.state("mha")))
    load_pretrained(model.float(), {f"module.{k}": v.float() for k, v in whole.state("mha").items()})
    assert counted_params(model_entry("mha_mil")) == model_entry("mha_mil").params
    with pytest.raises(ValueError, match="bag_values=False is for a single branch"):
        ACMILHeads(8, 2, bag_values=False)
    with pytest.raises(ValueError, match="bag_values=False is for attention='multihead'"):
        built(bag_values=False)
    pool = ACMILHeads(8, 1, 2, bag_values=False).eval()
    x = torch.randn(2, 5, 8)
    found = pool.branches(x)
    assert found.bag.equal(found.branches[:, 0]) and pool(x).equal(found.bag)


@pytest.mark.parametrize("case", RECORDED.config)
def test_the_authors_models_losses_and_gradients(case):
    config, held = RECORDED.config[case], RECORDED.under(case)
    model = attnlib.create_model("acmil", **config["settings"]).double()
    load_pretrained(model, RECORDED.under(f"{case}/sd"))
    model.train(config["train"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    x = held["x"].double().requires_grad_()
    noise = held["noise"] if "noise" in held else None
    if noise is not None:  # theirs is one draw of all branches, or one per branch of all heads
        noise = noise.reshape(1, config["settings"]["num_branches"], -1, noise.shape[-1])
    found = model(x, noise=noise)
    near = dict(rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.logits, held["slide"], **near)
    terms = model.loss(found, torch.tensor([config["label"]]))
    if "sub" in held and case != "gated_one":
        torch.testing.assert_close(found.branches[0], held["sub"], **near)
        theirs = held["weights"]  # (1, M, N), or (H, M, N)
        theirs = theirs[:, :, None] if "heads" not in case else theirs.transpose(0, 1)[None]
        torch.testing.assert_close(found.weights, theirs, **near)
        torch.testing.assert_close(torch.stack(list(terms.values())), held["terms"], **near)
    sum(terms.values()).backward()
    torch.testing.assert_close(x.grad, held["dx"], **near)
    grads = {n: p.grad for n, p in model.named_parameters()}
    shapes = {k: torch.full_like(v, math.nan) for k, v in RECORDED.under(f"{case}/sd").items()}
    wanted = model.entry.convert({**shapes, **RECORDED.under(f"{case}/dw")}, model)
    assert set(wanted) == set(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], **near, msg=lambda said, name=name: f"{name}: {said}")


def test_counts_of_the_card():
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(attnlib.create_model("acmil")) == 84_369 and count(attnlib.create_model("abmil")) == 82_563
    assert count(ACMIL(bias=True)) == 84_369 + 128
    assert count(ACMIL(num_branches=1, top_k=0)) == 82_563


def test_every_entry_is_accounted_for():
    weights = RECORDED.under("gated/sd")
    model = attnlib.create_model("acmil", **RECORDED.config["gated"]["settings"])
    with pytest.raises(ValueError, match="mine"):
        load_pretrained(model, {**weights, "mine": torch.ones(1)})
    weights.pop("Slide_classifier.fc.bias")
    with pytest.raises(ValueError, match="missing"):
        load_pretrained(model, weights)


def test_one_branch_that_hides_nothing_is_gated_abmil():
    m, x = built(num_branches=1, top_k=0).train(), bags(2, 9, 6)
    h = F.relu(x @ m.embed.weight.T)
    a = m.pool.score(torch.tanh(m.pool.v(h)) * torch.sigmoid(m.pool.u(h))).softmax(1)
    found = m(x)
    torch.testing.assert_close(found.weights.flatten(1), a.flatten(1))
    torch.testing.assert_close(found.logits, m.head((a * h).sum(1)))
    assert set(m.loss(found, torch.tensor([0, 1]))) == {"bag"} and not found.branches.numel()


@pytest.mark.parametrize("attention", ["gated", "multihead"])
@pytest.mark.parametrize(("k", "p", "n"), [(5, 0.6, 20), (10, 0.6, 7), (4, 0.25, 20), (3, 0.3, 9), (6, 1.0, 7)])
def test_exactly_so_many_of_the_highest_are_hidden(attention, k, p, n):
    m, x = built(attention=attention, num_heads=2, top_k=k, mask_ratio=p), bags(4, n, 6)
    plain = m(x)
    assert m(x).logits.equal(plain.logits) and bool((plain.weights > 0).all())
    found = m.train()(x)
    gone = found.weights == 0
    assert bool((gone.sum(-1) == int(min(k, n) * p)).all())
    best = torch.zeros_like(gone).scatter(-1, plain.weights.topk(min(k, n), -1).indices, True)
    assert not bool((gone & ~best).any())
    torch.testing.assert_close(found.weights.sum(-1), torch.ones_like(found.weights[..., 0]))
    # what is left keeps its proportions
    kept = plain.weights.masked_fill(gone, 0)
    torch.testing.assert_close(found.weights, kept / kept.sum(-1, keepdim=True))


def test_which_are_hidden_is_uniform():
    torch.manual_seed(0)
    hidden = hide_top(torch.arange(6.0).expand(4000, 6), 4, 0.5)
    assert bool((hidden.sum(-1) == 2).all()) and not hidden[:, :2].any()
    assert (hidden[:, 2:].float().mean(0) - 0.5).abs().max() < 0.04  # five standard deviations


@pytest.mark.parametrize("attention", ["gated", "multihead"])
def test_bags_of_several_sizes_in_one_batch(attention):
    m = built(attention=attention, num_heads=2, top_k=4, mask_ratio=0.5)
    sizes, x = (9, 3, 1), bags(3, 9, 6)
    valid = torch.arange(9) < torch.tensor(sizes)[:, None]
    dirty = x.masked_fill(~valid[..., None], math.nan).requires_grad_()
    found = m(dirty, valid)
    for i, n in enumerate(sizes):
        alone = m(x[i : i + 1, :n])
        torch.testing.assert_close(found.logits[i], alone.logits[0])
        torch.testing.assert_close(found.branches[i], alone.branches[0])
        torch.testing.assert_close(found.weights[i, ..., :n], alone.weights[0])
        assert not found.weights[i, ..., n:].any()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(m(dirty[:, order], valid[:, order]).logits, found.logits)
    trained = m.train()(dirty, valid)
    gone = (trained.weights == 0).sum(-1)
    for i, n in enumerate(sizes):
        assert bool((gone[i] == 9 - n + int(min(4, n) * 0.5)).all())
    sum(m.loss(trained, torch.tensor([0, 1, 2])).values()).backward()
    assert dirty.grad.isfinite().all() and not dirty.grad[~valid].any()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_diversity_is_one_for_equal_branches_and_zero_where_none_meet():
    same = torch.rand(2, 1, 7).softmax(-1).expand(2, 3, 7)
    assert float(diversity(same)) == pytest.approx(1.0)
    assert float(diversity(torch.eye(3)[None])) == 0.0
    torch.testing.assert_close(diversity(same[:, :, None].repeat(1, 1, 4, 1)), diversity(same))


def test_it_spreads_what_abmil_gathers():
    """Bags whose positive instances are many: hiding and diversity take weight from the first ten."""

    def world(count, generator):
        x = torch.randn(count, 40, 8, generator=generator)
        y = torch.arange(count) % 2
        x[:, :15, 0] += 2.5 * y[:, None]
        return {"bags": x, "target": y}

    mass = {}
    for name, settings in {"acmil": {}, "abmil": dict(num_branches=1, top_k=0)}.items():
        torch.manual_seed(0)
        m = ACMIL(8, 2, 16, hidden_dim=8, **settings)
        o = Optimizers(lambda _, p: torch.optim.AdamW(p, 5e-3))
        g = torch.Generator().manual_seed(3)
        for _ in range(60):
            train_batch(m.train(), world(16, g), o)
        test = world(64, g)
        m.eval()
        assert (m.predict(test["bags"]).argmax(-1) == test["target"]).float().mean() > 0.9
        held = m(test["bags"]).weights.detach().mean((1, 2))[test["target"] == 1]
        mass[name] = float(held.topk(10, -1).values.sum(-1).mean())
    assert mass["acmil"] < mass["abmil"]


def test_the_world_outside():
    m, x = built(), bags(2, 9, 6)
    assert attnlib.create("acmil", dim=8, top_k=0)(torch.randn(2, 5, 8)).shape == (2, 8)
    assert m(x[:0]).logits.shape == (0, 3) and m(x[:0]).weights.shape == (0, 3, 1, 9)
    copied = copy.deepcopy(m)
    torch.testing.assert_close(copied(x).logits, m(x).logits)
    n = torch.export.Dim("n", min=2, max=4096)
    made = torch.export.export(m, (x,), dynamic_shapes=({1: n},), strict=False).module()
    longer = bags(2, 17, 6)
    torch.testing.assert_close(made(longer).logits, m(longer).logits)
    half = copy.deepcopy(m).bfloat16().train()
    assert half(x.bfloat16()).logits.isfinite().all()
    half = copy.deepcopy(m).half().train()
    assert half(x.half()).logits.isfinite().all()
    compiled = torch.compile(m, backend="eager")
    torch.testing.assert_close(compiled(x).logits, m(x).logits)
    torch.testing.assert_close(m.predict(x).sum(-1), torch.ones(2).double())


def test_what_is_refused():
    m, x = built(mask_ratio=1.0).train(), bags(2, 9, 6)
    with pytest.raises(ValueError, match=r"mask_ratio=1.0 with top_k=10 hides every instance of the bags \[0, 1\]"):
        m(x)
    assert m.eval()(x).logits.isfinite().all()
    with pytest.raises(ValueError, match="bags must hold at least one instance"):
        m(x[:, :0])
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1] = False
    with pytest.raises(ValueError, match=r"valid leaves the bags \[1\] empty"):
        m(x, valid)
    with pytest.raises(ValueError, match=r"bags must be a tensor of shape \(B, N, C=6\)"):
        m(x[0])
    for settings, said in (
        (dict(mask_ratio=1.5), "mask_ratio"), (dict(top_k=-1), "top_k"), (dict(num_branches=0), "num_branches"),
        (dict(attention="soft"), "attention"), (dict(attention="multihead", num_heads=3), "num_heads"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            built(**settings)
    with pytest.raises(ValueError, match="target points at class 3"):
        m.loss(m(x), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"target must be \(2,\)"):
        m.loss(m(x), torch.tensor([0]))
    with pytest.raises(ValueError, match="at least one bag"):
        m.loss(m(x[:0]), torch.zeros(0, dtype=torch.long))
    with pytest.raises(TypeError, match="bags must be a floating-point tensor"):
        m(x.long())
    with pytest.raises(ValueError, match=r"x must be a tensor of shape \(B, N, C=8\)"):
        ACMILPool(8).branches(torch.zeros(1, 4, 6))
    with pytest.raises(ValueError, match=r"noise must be \(2, 3, 1, 9\)"):
        built(mask_ratio=0.5).train()(x, noise=torch.rand(2, 3, 1, 4))
    for settings, said in ((dict(top_k=-1), "top_k"), (dict(mask_ratio=1.5), "mask_ratio")):
        with pytest.raises(ValueError, match=said):
            hide_top(x, **{"top_k": 2, "mask_ratio": 0.5, **settings})
    with pytest.raises(TypeError, match="weights must be"):
        diversity([1.0])
    with pytest.raises(ValueError, match="two branches"):
        diversity(torch.ones(1, 1, 4))
    assert issubclass(ACMILPool, attnlib.nn.pools.Pool) and issubclass(ACMILHeads, attnlib.nn.pools.Pool)

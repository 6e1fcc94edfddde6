"""dynamicvis: sparse scans, one test per acceptance criterion of its card that concerns the module."""

import pytest
import torch

import attnlib
from attnlib.types import Plan

DOUBLE = torch.double


def make(**config):
    m = attnlib.create("dynamicvis", **{"dim": 8, "state_dim": 2, "global_tokens": 0, **config}).double()
    torch.manual_seed(0)
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return m.eval()


def images(*grid, seed=1):
    return torch.randn(2, *grid, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_the_equation():
    m, x = make(reduction=3, global_tokens=2), images(12)
    p = (x @ m.router.weight[0]).softmax(1)
    for b in range(2):
        chosen = p[b].argsort(descending=True)[:4]
        means = torch.stack([x[b, :6].mean(0), x[b, 6:].mean(0)])
        u = torch.cat([means, x[b, chosen]])[None]
        normed = m.inner.norm(u)
        mixed = (m.inner.mamba(normed) + m.inner.mamba(normed.flip(1)).flip(1)) / 2
        want = p[b, :, None] * x[b]
        want[chosen] = p[b, chosen, None] * (u + mixed)[0, 2:]
        torch.testing.assert_close(m(x)[b], want)


def test_all_tokens_are_chosen_by_one_in_one_and_few_by_many():
    x = images(4, 4)
    assert make(reduction=1).plan(x)["index"].sort(-1).values.tolist() == [list(range(16))] * 2
    m = make(reduction=100)
    plan, p = m.plan(x), (x.flatten(1, 2) @ m.router.weight[0]).softmax(1)
    assert plan["index"].shape == (2, 1)
    rest = torch.ones(2, 16, dtype=torch.bool).scatter(1, plan["index"], False)
    y = (x + m(x)).flatten(1, 2)
    torch.testing.assert_close(y[rest], (x.flatten(1, 2) * (1 + p)[..., None])[rest])
    none = make(reduction=100, keep_rest=False)
    assert not none(x).flatten(1, 2)[rest].any()


def test_the_router_learns_through_p_alone():
    """Its gradient is that of p with the choice frozen, and noise in training carries none."""
    m, x = make(reduction=4), images(4, 4)
    plan = m.plan(x)
    g = images(4, 4, seed=2)
    (own,) = torch.autograd.grad((m(x) * g).sum(), m.router.weight)
    p = (x.flatten(1, 2) @ m.router.weight[0]).softmax(1)
    scale = m(x, plan=plan).flatten(1, 2).detach() / p.detach()[..., None]
    (through_p,) = torch.autograd.grad(((p[..., None] * scale).view_as(g) * g).sum(), m.router.weight)
    torch.testing.assert_close(own, through_p)
    torch.testing.assert_close(m(x), m(x))  # without noise
    m.train()
    torch.manual_seed(3)
    noisy = m.plan(x)["index"]
    torch.manual_seed(3)
    (frozen,) = torch.autograd.grad((m(x) * g).sum(), m.router.weight)
    held = Plan("tokens", {"index": noisy, "keep": torch.ones_like(noisy)}, (("N", 16),))
    (again,) = torch.autograd.grad((m(x, plan=held) * g).sum(), m.router.weight)
    torch.testing.assert_close(frozen, again)


def test_noise_changes_the_choice_and_falls_with_progress():
    m, x = make(reduction=4, noise=5.0, noise_decay=True).train(), images(8, 8)
    calm = make(reduction=4).plan(x)["index"].sort(-1).values
    assert not torch.equal(m.plan(x)["index"].sort(-1).values, calm)
    m.set_progress(1.0)
    assert torch.equal(m.plan(x)["index"].sort(-1).values, calm)


def test_both_orders():
    """By score the scan meets the largest first; by place it meets tokens as they stand. The chosen are the same."""
    by_score, by_place, x = make(reduction=3), make(reduction=3, order="place"), images(3, 5)
    a, b = by_score.plan(x)["index"], by_place.plan(x)["index"]
    p = by_score.router(x.flatten(1, 2))[..., 0]
    assert (p.gather(1, a).diff(dim=1) <= 0).all() and (b.diff(dim=1) > 0).all()
    assert torch.equal(a.sort(-1).values, b)
    assert not torch.allclose(by_score(x), by_place(x))


@pytest.mark.parametrize(("place", "count"), [("head", 3), ("middle", 3), ("ends", 6), ("none", 0)])
def test_the_mamba_reads_the_chosen_and_the_means(place, count):
    m, seen = make(reduction=4, global_tokens=3, global_place=place), []
    m.inner.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    m(images(4, 5))
    assert seen == [20 // 4 + count] and m.chosen(20) == 5


def test_as_many_means_as_rows():
    m, seen = make(reduction=2, global_tokens=-1), []
    m.inner.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    m(images(3, 4))
    assert seen == [6 + 3]


def test_means_in_the_middle_are_taken_out_where_they_were_put():
    x = images(2, 4)
    ours, theirs = (make(global_tokens=3, global_place="middle", compat=c, reduction=2) for c in (None, "authors"))
    assert not torch.allclose(ours(x), theirs(x))
    one = [make(global_tokens=1, global_place="middle", compat=c, reduction=2)(x) for c in (None, "authors")]
    torch.testing.assert_close(*one)


def test_balance():
    m, x = make(reduction=4), images(4, 4)
    p = (x.flatten(1, 2) @ m.router.weight[0]).softmax(1)
    counted = torch.zeros(2, 16, dtype=DOUBLE).scatter(1, m.plan(x)["index"], 1.0)
    out = m(x, returns=("losses",))
    torch.testing.assert_close(out.losses["balance"], (counted.mean(0) * p.mean(0)).sum())


@pytest.mark.parametrize("config", [dict(reduction=3), dict(reduction=2, order="place", normalize=True)])
def test_tokens_that_do_not_exist_are_not_chosen_or_counted(config):
    m, x = make(**config), images(16)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, 12:] = False
    y = m(x.masked_fill(~valid[..., None], float("nan")), valid=valid)
    torch.testing.assert_close(y[:1, :12], m(x[:1, :12]))
    torch.testing.assert_close(y[1:], m(x[1:]))
    assert not y[0, 12:].any()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(reduction=-1), "reduction"),
        (dict(order="random"), "order='random'"),
        (dict(path="shuffle"), "path='shuffle'"),
        (dict(global_place="tail"), "global_place='tail'"),
        (dict(global_tokens=-2), "global_tokens"),
        (dict(noise=-1.0), "noise"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)


def test_a_plan_of_another_problem_is_refused():
    m = make(reduction=2)
    with pytest.raises(ValueError, match="N=8.*N=6"):
        m(images(6), plan=m.plan(images(8)))

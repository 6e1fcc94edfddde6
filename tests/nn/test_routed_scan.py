"""Scans along routes: the plain loop per route, fusions, tokens that do not exist, routes of one's own."""

import pytest
import torch
import torch.nn.functional as F

from attnlib.grids import inverse_permutation, route
from attnlib.nn.scan.routed import RoutedScan, ScanParameters, Walk, variation_gate

DOUBLE = torch.double
CROSS = ("rows", "columns", "rows-reversed", "columns-reversed")


def make(routes=CROSS, dim=5, **config):
    m = RoutedScan(dim, routes, **{"state_dim": 3, **config}).double()
    torch.manual_seed(0)
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return m


def loop(p: ScanParameters, k, x):
    """One token of (B, N, D) after the other, by parameter set k."""
    r, b, c = (x @ p.x_proj[k].T).split([p.rank, p.state_dim, p.state_dim], -1)
    step = F.softplus(r @ p.step_weight[k].T + p.step_bias[k])
    decay, h, out = -p.A_log[k].exp(), torch.zeros(len(x), p.dim, p.state_dim, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = (step[:, t, :, None] * decay).exp() * h + (step[:, t] * x[:, t])[..., None] * b[:, t, None]
        out.append((h * c[:, t, None]).sum(-1) + p.D[k] * x[:, t])
    return torch.stack(out, 1)


def along(m, x):
    flat, outs = x.flatten(1, 2), []
    for k, way in enumerate(m.routes):
        order = route(way, x.shape[1:3])
        y = loop(m.scan, k if m.scan.sets > 1 else 0, flat[:, order])
        outs.append(y[:, inverse_permutation(order)])
    return torch.stack(outs, 2)


@pytest.mark.parametrize(
    "routes",
    [CROSS, ("snake", "snake-transposed-reversed"), ("spiral-flipped", "zigzag", "diagonal-mirrored"), ("columns",)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_every_route_is_the_plain_loop(routes, shared):
    m, x = make(routes, shared=shared), torch.randn(2, 3, 4, 5, dtype=DOUBLE)
    torch.testing.assert_close(m.along(x), along(m, x))
    torch.testing.assert_close(m(x), along(m, x).sum(2).view_as(x))


def test_scans_that_pass_tokens_on_give_them_back_once_per_route():
    m, x = make(("snake", "spiral", "zigzag-reversed"), fusion="sum"), torch.randn(1, 5, 3, 5, dtype=DOUBLE)
    with torch.no_grad():
        m.scan.x_proj.zero_()
        m.scan.D.fill_(1.0)
    torch.testing.assert_close(m(x), 3 * x)


@pytest.mark.parametrize("way", ["rows", "columns", "snake-mirrored-reversed", "spiral", "columns-reversed"])
def test_a_walk_leads_there_as_the_route_says_and_back(way):
    x = torch.randn(2, 12, 3)
    walk = Walk(way, (3, 4))
    assert torch.equal(walk.go(x), x[:, route(way, (3, 4))]) and torch.equal(walk.back(walk.go(x)), x)


def test_fusions():
    x = torch.randn(2, 3, 2, 5, dtype=DOUBLE)
    y = along(make(), x)
    torch.testing.assert_close(make(fusion="mean")(x), y.mean(2).view_as(x))
    gated = make(fusion="gate")
    weight = (y.mean(1).flatten(1) @ gated.gate.weight.T).softmax(-1)
    torch.testing.assert_close(gated(x), torch.einsum("bnkd,bk->bnd", y, weight).view_as(x))
    shifted = y - y.amin(2, keepdim=True)
    ratio = (y.var(2).sqrt() / (shifted.mean(2) + 1e-5) - 0.5).clamp(min=0)
    torch.testing.assert_close(make(fusion="variation", threshold=0.5)(x), (y.sum(2) * ratio).view_as(x))


def test_routes_that_agree_leave_nothing_to_the_variation_gate():
    y = torch.randn(1, 4, 1, 3, dtype=DOUBLE).expand(1, 4, 4, 3).clone().requires_grad_()
    out = variation_gate(y)
    assert not out.any()
    assert torch.autograd.grad(out.sum(), y)[0].isfinite().all()
    other = torch.randn(1, 50, 4, 3, dtype=DOUBLE)
    left = [int((variation_gate(other, t) != 0).sum()) for t in (0.0, 0.5, 1.0, 1.5, 2.0)]
    assert left == sorted(left, reverse=True) and left[0] == 150 and left[-1] < left[0]


@pytest.mark.parametrize("fusion", ["sum", "gate", "variation"])
@pytest.mark.parametrize("shared", [False, True])
def test_tokens_that_do_not_exist_are_as_if_they_were_cut_off(fusion, shared):
    m = make((*CROSS, "snake", "zigzag"), fusion=fusion, shared=shared)
    small, big = torch.randn(2, 3, 4, 5, dtype=DOUBLE), torch.randn(2, 5, 6, 5, dtype=DOUBLE)
    big[:, :3, :4] = small
    valid = torch.zeros(2, 5, 6, dtype=torch.bool)
    valid[:, :3, :4] = True
    y = m(big, valid)
    torch.testing.assert_close(y[:, :3, :4], m(small))
    assert not y[~valid].any()


def test_gradients_are_exact():
    m = make(("columns", "spiral-reversed"), dim=2, state_dim=2, fusion="variation")
    x = torch.randn(1, 2, 3, 2, dtype=DOUBLE, requires_grad=True)
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    valid[0, 1, 1] = False
    assert torch.autograd.gradcheck(lambda t: m(t, valid), (x,))


def test_a_route_of_ones_own():
    def centre_first(grid):
        return torch.arange(grid[0] * grid[1]).roll(3)

    m, x = make((centre_first, "rows")), torch.randn(1, 2, 4, 5, dtype=DOUBLE)
    expected = loop(m.scan, 0, x.flatten(1, 2)[:, centre_first((2, 4))]).roll(-3, 1)
    torch.testing.assert_close(m.along(x)[:, :, 0], expected)


def test_sequences_and_volumes_have_rows():
    for grid in ((7,), (2, 3, 2)):
        m, x = make(("rows", "rows-reversed")), torch.randn(1, *grid, 5, dtype=DOUBLE)
        expected = loop(m.scan, 0, x.flatten(1, -2)) + loop(m.scan, 1, x.flatten(1, -2).flip(1)).flip(1)
        torch.testing.assert_close(m(x), expected.view_as(x))


def test_starts():
    p = ScanParameters(32, 3, 4, step_init="constant", step_scale=2.0)
    assert torch.equal(p.A_log[1, 5].exp().round(), torch.arange(1.0, 5)) and bool((p.D == 1).all())
    assert p.step_weight.unique().tolist() == pytest.approx([2 * 2**-0.5])
    steps = F.softplus(p.step_bias)
    assert bool((steps > 0.99e-3).all()) and bool((steps < 0.101).all())
    log = steps.log10()
    assert abs(log.mean().item() + 2) < 0.25  # even in the logarithm: mean -2, deviation 0.58 over 96 channels
    assert ScanParameters(32, start="small-uniform").A_log.abs().max() == 0


@pytest.mark.parametrize(
    ("make_it", "match"),
    [
        (lambda: make(()), "routes must be one route or more"),
        (lambda: make("rows"), "routes must be one route or more.*'rows'"),
        (lambda: make(("rows", "circle")), "routes='circle' is no route"),
        (lambda: make(("rows",), fusion="variation"), "at least two routes"),
        (lambda: make(fusion="product"), "fusion='product'"),
        (lambda: make(start="zeros"), "start='zeros'"),
        (lambda: make((lambda grid: torch.zeros(4, dtype=torch.long),))(torch.randn(1, 2, 2, 5).double()), "once"),
        (lambda: make((lambda grid: torch.arange(3),))(torch.randn(1, 2, 2, 5).double()), r"\(4,\).*\(2, 2\)"),
        (lambda: make(("snake",))(torch.randn(1, 4, 5).double()), "'snake' needs a grid of two axes"),
        (lambda: make(state_dim=0), "state_dim"),
    ],
)
def test_bad_arguments_are_refused(make_it, match):
    with pytest.raises(ValueError, match=match):
        make_it()

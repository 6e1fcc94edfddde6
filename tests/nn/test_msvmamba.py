"""msvmamba: scans at two scales, one test per acceptance criterion of its card that concerns the module."""

import pytest
import torch
import torch.nn.functional as F
from parity import Options
from test_routed_scan import loop

import attnlib
from attnlib.grids import inverse_permutation, route
from attnlib.nn.scan.msvmamba import scanned_tokens

DOUBLE = torch.double


def make(**config):
    m = attnlib.create("msvmamba", **{"dim": 6, "state_dim": 2, **config}).double()
    torch.manual_seed(0)
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return m


def oracle(m, x, leak):
    """The equation; three routes as one sequence, or each from zero."""
    b, h, w, _ = x.shape
    u, z = m.in_proj(x).chunk(2, -1)
    first = u.permute(0, 3, 1, 2)
    fine = F.silu(F.conv2d(first, m.conv.weight, m.conv.bias, padding=1, groups=12)).permute(0, 2, 3, 1)
    small = F.silu(F.conv2d(first, m.coarse.weight, m.coarse.bias, 2, 3, groups=12)).permute(0, 2, 3, 1)

    def norm(y):
        return F.layer_norm(y, (12,), m.norm.layer.weight, m.norm.layer.bias)

    y0 = norm(loop(m.fine_scan, 0, fine.flatten(1, 2))).view_as(fine)
    orders = [route(r, small.shape[1:3]) for r in ("rows-reversed", "columns", "columns-reversed")]
    walked = [small.flatten(1, 2)[:, o] for o in orders]
    if leak:
        seen = norm(loop(m.coarse_scan, 0, torch.cat(walked, 1))).chunk(3, 1)
    else:
        seen = [norm(loop(m.coarse_scan, 0, one)) for one in walked]
    y1 = sum(y[:, inverse_permutation(o)] for y, o in zip(seen, orders, strict=True)).view_as(small)
    y1 = F.interpolate(y1.permute(0, 3, 1, 2), (h, w), mode="bilinear").permute(0, 2, 3, 1)
    y = y0 + y1
    gate = (F.relu(y.mean((1, 2)) @ m.squeeze.fc1.weight.T) @ m.squeeze.fc2.weight.T).sigmoid()
    return m.proj(y * gate[:, None, None] * F.silu(z))


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_states_leak_between_routes_as_released_or_every_route_starts_from_zero(grid):
    x = torch.randn(2, *grid, 6, dtype=DOUBLE)
    torch.testing.assert_close(make()(x), oracle(make(), x, leak=False))
    torch.testing.assert_close(make(compat="authors")(x), oracle(make(), x, leak=True))
    assert not torch.allclose(make()(x), make(compat="authors")(x))


def test_tokens_of_a_layer():
    assert scanned_tokens(56, 56) == 56 * 56 + 3 * 28 * 28 == 0.4375 * 4 * 56 * 56
    assert scanned_tokens(5, 3) == 15 + 3 * 6 and scanned_tokens(0, 4) == 0
    with pytest.raises(ValueError, match="height.*-1"):
        scanned_tokens(-1, 4)


def test_the_scans_read_that_many_tokens():
    m, seen = make(), []
    for scan in (m.fine_scan, m.coarse_scan):
        scan.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    m(torch.randn(1, 7, 5, 6, dtype=DOUBLE))
    assert sum(seen) == scanned_tokens(7, 5)


def test_scans_that_pass_tokens_on():
    """One times the fine map, three times the coarse one: without convolutions and norms nothing is lost."""
    m, x = make(norm="none", squeeze=False, coarse=False, gate="none"), torch.randn(1, 4, 4, 6, dtype=DOUBLE)
    with torch.no_grad():
        for scan in (m.fine_scan, m.coarse_scan):
            scan.x_proj.zero_()
            scan.D.fill_(1.0)
        m.conv.weight.zero_()
        m.conv.weight[:, :, 1, 1] = 1.0
        m.conv.bias.zero_()
    raw = m.in_proj(x)
    torch.testing.assert_close(m(x), m.proj(F.silu(raw) + 3 * raw))


def test_what_far_tokens_add_falls_less_over_the_shorter_sequence():
    """|C_i prod A B_j| from the first token to the last, steps and maps alike, along h w and along a quarter of it."""

    def reach(count):
        p = make().coarse_scan
        x = torch.full((1, count, 12), 0.1, dtype=DOUBLE).requires_grad_()
        y = p(x.unsqueeze(2))[0, -1, 0]
        return torch.autograd.grad(y.sum(), x)[0][0, 0].abs().sum()

    assert reach(16) > 10 * reach(64) > 0


def test_whole_state_dicts_with_two_names_of_one_norm_load():
    recorded = Options("msvmamba")
    theirs = recorded.under("separate-norms/sd")
    theirs |= {k.replace("out_norm.", "out_norm0."): v for k, v in theirs.items() if k.startswith("out_norm.")}
    recorded.create("separate-norms").load_state_dict(attnlib.convert_state_dict("msvmamba", theirs))


@pytest.mark.parametrize("compat", [None, "authors"])
def test_tokens_that_do_not_exist_change_nothing(compat):
    m, x = make(compat=compat, bias=True), torch.randn(2, 5, 6, 6, dtype=DOUBLE)
    valid = torch.ones(2, 5, 6, dtype=torch.bool)
    valid[0, :, 3:] = valid[1, 4] = False
    other = x.masked_fill(~valid.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(m(other, valid=valid), m(x, valid=valid))
    assert not m(x, valid=valid)[~valid].any()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(coarse_kernel=4), "coarse_kernel must be odd"),
        (dict(kernel_size=0), "kernel_size"),
        (dict(norm="conv"), "norm='conv'"),
        (dict(compat="theirs"), "compat='theirs'"),
        (dict(dim=3), "squeeze=True needs at least 8 channels inside"),
        (dict(routes=()), "routes must be one route or more"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)

"""mhs-vm: heads along families of routes, one test per acceptance criterion of its card that concerns the module."""

import pytest
import torch
import torch.nn.functional as F
from parity import Options
from test_routed_scan import along

import attnlib
from attnlib.grids import inverse_permutation, route
from attnlib.nn.scan.mhs_vm import FAMILIES

DOUBLE = torch.double


def make(**config):
    m = attnlib.create("mhs-vm", **{"dim": 9, "state_dim": 2, **config}).double()
    torch.manual_seed(0)
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return m


@pytest.mark.parametrize("grid", [(2, 5), (4, 3), (1, 4), (3, 1)])
def test_every_route_of_every_family_leads_back(grid):
    x = torch.randn(2, grid[0] * grid[1], 3)
    for routes in FAMILIES.values():
        assert len(routes) == 4
        for name in routes:
            order = route(name, grid)
            assert sorted(order.tolist()) == list(range(len(order)))
            assert torch.equal(x[:, order][:, inverse_permutation(order)], x)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_equation(threshold):
    m, x = make(threshold=threshold), torch.randn(2, 3, 4, 9, dtype=DOUBLE)
    u, z = m.in_proj(x).chunk(2, -1)
    u = F.conv2d(u.permute(0, 3, 1, 2), m.conv.weight, m.conv.bias, padding=1, groups=9).permute(0, 2, 3, 1)
    parts = (F.silu(u) @ m.split.weight.T).chunk(4, -1)  # of two channels: one of nine is left out
    outs = []
    for head, part in zip(m.heads, parts, strict=True):
        y = along(head, part)
        ratio = y.var(2).sqrt() / ((y - y.amin(2, keepdim=True)).mean(2) + 1e-5)
        outs.append(y.sum(2) * (ratio - threshold).clamp(min=0))
    y = F.layer_norm(torch.cat(outs, -1), (8,), m.cat_norm.weight, m.cat_norm.bias) @ m.proj.weight.T
    y = F.layer_norm(y, (9,), m.norm.weight, m.norm.bias).view_as(x)
    torch.testing.assert_close(m(x), y * F.silu(z))


def test_scans_that_pass_tokens_on_and_no_gate_give_four_times_the_input():
    m, x = make(), torch.randn(1, 3, 4, 2, dtype=DOUBLE)
    head = m.heads[2]
    head.fusion = "sum"
    with torch.no_grad():
        head.scan.x_proj.zero_()
        head.scan.D.fill_(1.0)
        torch.testing.assert_close(head(x), 4 * x)
        head.fusion = "variation"
        assert not head(x).any()  # all routes agree


def test_fewer_parameters_than_ss2d():
    for dim in (32, 96):
        ours, theirs = attnlib.create("mhs-vm", dim=dim), attnlib.create("vmamba", dim=dim)
        assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in theirs.parameters())


def test_whole_state_dicts_with_two_names_of_one_part_load():
    recorded = Options("mhs-vm")
    theirs = recorded.under("gate-four/sd")
    theirs["mhs.x_ssproj_W"] = theirs["mhs.x_ssproj.weight"]
    theirs |= {k.replace("mambaeng", "scanning.seq2seq_engine"): v for k, v in theirs.items() if "mambaeng" in k}
    recorded.create("gate-four").load_state_dict(attnlib.convert_state_dict("mhs-vm", theirs))


def test_tokens_that_do_not_exist_change_nothing():
    m, x = make(bias=True), torch.randn(2, 4, 5, 9, dtype=DOUBLE)
    valid = torch.ones(2, 4, 5, dtype=torch.bool)
    valid[0, :, 3:] = valid[1, 2] = False
    other = x.masked_fill(~valid.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(m(other, valid=valid), m(x, valid=valid))
    flat = make(families=["C", "Z"])  # snakes and rows meet the others in the same order as without the padding
    cut = torch.ones(2, 4, 5, dtype=torch.bool)
    cut[:, :, 4:] = False
    torch.testing.assert_close(flat(x, valid=cut)[:, :, :4], flat(x[:, :, :4]))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(families=[]), "families.*must name one or more of C, X, S, Z"),
        (dict(families=["C", "Q"]), "families.*'Q'"),
        (dict(dim=3), "dim=3 has no 4 heads"),
        (dict(with_proj=False), "dim=9 has no 4 heads of equal width"),
        (dict(kernel_size=2), "kernel_size must be odd"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)

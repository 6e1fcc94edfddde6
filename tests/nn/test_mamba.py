import math

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib
from attnlib.nn.layers import CausalConv
from attnlib.nn.scan.mamba import S6

FIXTURES = {"mamba": Fixture("mamba"), "bimamba": Fixture("bimamba")}
CASES = [(slug, case) for slug, fixture in FIXTURES.items() for case in fixture.config]


@pytest.mark.parametrize(("slug", "case"), CASES)
def test_equals_the_authors(slug, case):
    fixture = FIXTURES[slug]
    fixture.holds(case, fixture.build(case), lambda m, xs: m(xs["x"]))


@pytest.mark.parametrize(("slug", "case"), CASES)
def test_starts_as_the_authors(slug, case):
    fixture = FIXTURES[slug]
    torch.manual_seed(3)
    ours = attnlib.create(slug, **fixture.config[case]).state_dict()
    theirs = attnlib.convert_state_dict(slug, fixture.under(f"{case}/init"))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda m, n=name: f"{n}: {m}")


def oracle(x, m):
    """Mamba's layer in float64, token by token."""
    sd = {k: v.double() for k, v in m.state_dict().items()}
    u, z = (x.double() @ sd["in_proj.weight"].T).chunk(2, -1)
    width = sd["scan.conv1d.weight"].shape[-1]
    rank, size = sd["scan.dt_proj.weight"].shape[1], sd["scan.A_log"].shape[1]
    h, outs = 0, []
    for t in range(x.shape[1]):
        seen = sd["scan.conv1d.bias"]
        for k in range(width):
            if t - k >= 0:
                seen = seen + sd["scan.conv1d.weight"][:, 0, width - 1 - k] * u[:, t - k]
        v = F.silu(seen)
        dt, b, c = (v @ sd["scan.x_proj.weight"].T).split([rank, size, size], -1)
        step = F.softplus(dt @ sd["scan.dt_proj.weight"].T + sd["scan.dt_proj.bias"]).unsqueeze(-1)
        h = (-step * sd["scan.A_log"].exp()).exp() * h + step * b.unsqueeze(1) * v.unsqueeze(-1)
        y = (h * c.unsqueeze(1)).sum(-1) + sd["scan.D"] * v
        outs.append((y * F.silu(z[:, t])) @ sd["out_proj.weight"].T)
    return torch.stack(outs, 1)


def test_is_its_equation():
    m, x = attnlib.create("mamba", dim=8, d_state=3), torch.randn(2, 9, 8)
    torch.testing.assert_close(m(x).double(), oracle(x, m), atol=1e-6, rtol=1e-5)


def test_state_is_constant_and_pieces_equal_the_whole():
    m = attnlib.create("mamba", dim=8, d_state=3)
    x, state, pieces = torch.randn(2, 14, 8), None, []
    for part in x.split([1, 5, 1, 7], 1):
        y, state = m.step(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), m(x), atol=1e-6, rtol=1e-4)
    assert state["h"].shape == (2, 16, 3) and state["conv"].shape == (2, 16, 3)
    assert len({m.step(torch.randn(1, n, 8))[1].numel() for n in (1, 10, 100)}) == 1


def test_left_padding_changes_nothing():
    m = attnlib.create("mamba", dim=8, bias=True)
    x = torch.randn(1, 9, 8)
    padded = torch.cat([torch.full((1, 5, 8), 7.0), x], 1)
    valid = torch.arange(14)[None] >= 5
    y, state = m.step(padded[:, :12], None, valid=valid[:, :12])
    rest, _ = m.step(padded[:, 12:], state)
    torch.testing.assert_close(torch.cat([y, rest], 1)[:, 5:], m(x), atol=1e-6, rtol=1e-4)


def test_starting_values():
    scan = S6(64, d_state=5)
    assert torch.equal(scan.A, -torch.arange(1.0, 6.0).expand(64, -1)) and (scan.D == 1).all()
    steps = F.softplus(scan.dt_proj.bias.detach())
    assert 0.00099 < float(steps.min()) and float(steps.max()) < 0.1001 and float(steps.log().std()) > 0.8
    assert float(scan.dt_proj.weight.detach().abs().max()) <= math.ceil(64 / 32) ** -0.5


def test_convolution_is_causal():
    conv, x = CausalConv(3, 4), torch.randn(1, 6, 3)
    want = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), conv.weight, conv.bias, groups=3).transpose(1, 2)
    torch.testing.assert_close(conv(x), want)
    torch.testing.assert_close(conv(x[:, 3:], x[:, :3]), want[:, 3:])


def test_two_ways_are_two_mambas():
    m, x = attnlib.create("bimamba", dim=8, d_state=3), torch.randn(2, 7, 8)
    ways = []
    for scan, order in ((m.scan, x), (m.back, x.flip(1))):
        one = attnlib.create("mamba", dim=8, d_state=3)
        one.in_proj, one.scan, one.out_proj = m.in_proj, scan, m.out_proj
        ways.append(one(order))
    torch.testing.assert_close(m(x), ways[0] + ways[1].flip(1), atol=1e-6, rtol=1e-5)
    half = attnlib.create("bimamba", dim=8, d_state=3, divide=True)
    half.load_state_dict(m.state_dict())
    torch.testing.assert_close(2 * half(x), m(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_what_was_removed_goes_on_decaying(kind):
    """Without a convolution's neighbours a scan of what is left, aligned, is the dense scan with zeroed inputs."""
    m, x = attnlib.create("bimamba", dim=8, d_state=3, kind=kind, d_conv=1), torch.randn(2, 10, 8)
    every = torch.arange(10).expand(2, -1)
    torch.testing.assert_close(m.both_ways(x, positions=every, length=10).y, m(x), atol=1e-6, rtol=1e-5)
    at = torch.tensor([[0, 3, 4, 9], [1, 2, 6, 7]])
    left = x.gather(1, at.unsqueeze(-1).expand(-1, -1, 8))
    aligned = m.both_ways(left, positions=at, length=10).y
    assert not torch.allclose(aligned, m(left), atol=1e-4)
    # By the steps of the dense call: each way is the dense scan with zeroed inputs.
    dense = m.both_ways(x)
    own = m.both_ways(left, positions=at, length=10, steps=dense.steps)
    stays = torch.zeros(2, 10, 1).scatter(1, at.unsqueeze(-1), 1.0)
    inner, z = m.in_proj(x).chunk(2, -1)
    for scan, A, flip, found in (
        (m.scan, m.scan.A, False, own.ahead),
        (m.back or m.scan, m.back.A if m.back else -m.A_back_log.exp(), True, own.back),
    ):
        u, gate, keep = ((t.flip(1) if flip else t) for t in (inner, z, stays))
        u = F.silu(scan.conv1d(u))
        dt, b, c = scan.x_proj(u).split([scan.dt_rank, 3, 3], -1)
        whole = attnlib.ops.selective_scan(u * keep, scan.dt_proj(dt), A, b, c, scan.D, gate, delta_softplus=True)
        whole = whole.flip(1) if flip else whole
        torch.testing.assert_close(found, whole.gather(1, at.unsqueeze(-1).expand_as(found)), atol=1e-6, rtol=1e-5)
    for scan in (m.scan, m.back) if kind == "v2" else (m.scan,):
        with torch.no_grad():
            scan.A_log.fill_(-60.0)  # a state that does not fade feels no gap
    if kind == "v1":
        with torch.no_grad():
            m.A_back_log.fill_(-60.0)
    torch.testing.assert_close(m.both_ways(left, positions=at, length=10).y, m(left), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("slug", "config", "message"),
    [
        ("mamba", dict(causal=False), "bimamba scans both ways"),
        ("mamba", dict(d_state=0), "d_state must be"),
        ("mamba", dict(d_conv=0), "d_conv must be"),
        ("mamba", dict(expand=0), "expand must be"),
        ("mamba", dict(expand=0.01), "leaves no channel"),
        ("mamba", dict(dt_init="zeros"), "dt_init='zeros'"),
        ("mamba", dict(chunk=0), "chunk must be"),
        ("bimamba", dict(kind="v3"), "kind='v3'"),
        ("bimamba", dict(kind="v1", divide=True), "divide=True is not possible"),
    ],
)
def test_bad_settings(slug, config, message):
    with pytest.raises(ValueError, match=message):
        attnlib.create(slug, **{"dim": 16, **config})


def test_bad_calls():
    m = attnlib.create("mamba", dim=8, d_state=3)
    other = attnlib.create("mamba", dim=8, d_state=4)
    with pytest.raises(ValueError, match="state"):
        m.step(torch.randn(1, 1, 8), other.step(torch.randn(1, 3, 8))[1])
    with pytest.raises(ValueError, match="need length"):
        attnlib.create("bimamba", dim=8).both_ways(torch.randn(1, 2, 8), positions=torch.tensor([[0, 3]]))
    m = attnlib.create("bimamba", dim=8)
    with pytest.raises(ValueError, match="steps need positions"):
        m.both_ways(torch.randn(1, 2, 8), steps=m.both_ways(torch.randn(1, 2, 8)).steps)

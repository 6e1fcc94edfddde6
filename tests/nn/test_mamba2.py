import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib

FIXTURE = Fixture("mamba2")


@pytest.mark.parametrize("case", FIXTURE.config)
def test_equals_the_authors(case):
    FIXTURE.holds(case, FIXTURE.build(case), lambda m, xs: m(xs["x"]))


@pytest.mark.parametrize("case", FIXTURE.config)
def test_starts_as_the_authors(case):
    torch.manual_seed(3)
    ours = attnlib.create("mamba2", **FIXTURE.config[case]).state_dict()
    theirs = attnlib.convert_state_dict("mamba2", FIXTURE.under(f"{case}/init"))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_is_a_selective_scan_with_one_decay_per_head():
    m, x = attnlib.create("mamba2", dim=8, d_state=3, head_dim=4, norm=False).double(), torch.randn(2, 9, 8).double()
    z, mixed, dt = m.in_proj(x).split([16, 22, 4], -1)
    u, b, c = F.silu(m.conv1d(mixed)).split([16, 3, 3], -1)
    decays = -m.A_log.exp().repeat_interleave(4).unsqueeze(1).expand(-1, 3)
    step, skip = (dt + m.dt_bias).repeat_interleave(4, 2), m.D.repeat_interleave(4)
    y = attnlib.ops.selective_scan(u, step, decays, b, c, skip, z, delta_softplus=True)
    torch.testing.assert_close(m(x), m.out_proj(y))


def test_state_is_constant_and_pieces_equal_the_whole():
    m = attnlib.create("mamba2", dim=8, d_state=3, head_dim=4, chunk=4)
    x, state, pieces = torch.randn(2, 14, 8), None, []
    for part in x.split([1, 5, 1, 7], 1):
        y, state = m.step(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), m(x), atol=1e-6, rtol=1e-4)
    assert state["S"].shape == (2, 4, 3, 4) and state["conv"].shape == (2, 22, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(causal=False), "mamba2 is causal"),
        (dict(head_dim=5), "head_dim"),
        (dict(groups=3), "groups"),
        (dict(decay_range=(3.0, 2.0)), "decay_range"),
        (dict(dt_min=1.0), "dt_min=1.0"),
        (dict(chunk=0), "chunk must be"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        attnlib.create("mamba2", **{"dim": 16, "head_dim": 8, **config})

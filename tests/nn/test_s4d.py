"""S4D: the loop over tokens, initial values of the released class, states that go on, absent tokens."""

import pytest
import torch
from parity import Options

from attnlib.nn.scan.s4d import S4D

FIXTURE = Options("s4d")


def loop(m, x):
    """One token after the other, in float64; with a second system that runs backwards where there is one."""
    dt = m.log_dt.exp()
    w = torch.complex(-m.log_w_real.exp(), m.w_imag)
    a = torch.exp(w * dt[:, None])  # (H, N / 2)
    c = torch.view_as_complex(m.C.detach()) * (a - 1) / w
    ys = x[:, :, None] * m.D
    for system, order, delay in [(c[: m.num_heads], range(x.shape[1]), 0)] + (
        [(c[m.num_heads :], range(x.shape[1] - 1, -1, -1), 1)] if m.bidirectional else []
    ):
        h = x.new_zeros(x.shape[0], *a.shape, dtype=a.dtype)
        for t in order:
            before, h = h, a * h + x[:, t, :, None]
            ys[:, t] += 2 * torch.einsum("chn,bhn->bch", system, before if delay else h).real
    y = m.activation(ys.flatten(2))
    return m.postact(m.proj(y))


@pytest.mark.parametrize("settings", [
    dict(), dict(num_heads=3), dict(bidirectional=True, num_heads=2), dict(activation="tanh", postact="glu"),
    dict(scaling="linear"), dict(scaling="random", d_state=6),
])  # fmt: skip
def test_equals_the_loop(settings):
    m = S4D(**{"dim": 4, "d_state": 4, **settings}).double()
    x = torch.randn(2, 7, 4, dtype=torch.double)
    torch.testing.assert_close(m(x), loop(m, x).detach() * 1.0, check_dtype=True)


@pytest.mark.parametrize("case", ["plain", "heads", "both", "post-glu"])
def test_initial_values_are_those_of_the_class(case):
    """From the same seed, every parameter."""
    torch.manual_seed(list(FIXTURE.config).index(case))
    ours = FIXTURE.create(case).state_dict()
    for name, value in FIXTURE.convert(case, FIXTURE.under(f"{case}/sd")).items():
        torch.testing.assert_close(ours[name], value)


def test_states_go_on_from_the_last_token_that_exists():
    m = S4D(4, d_state=4, num_heads=2).double()
    x, more = torch.randn(2, 6, 4, dtype=torch.double), torch.randn(2, 3, 4, dtype=torch.double)
    there = torch.tensor([[True, False, True, True, False, False], [False, True, True, True, True, True]])
    state = m(x, valid=there, returns=("state",)).state
    y, _ = m.step(more, state)
    for b in range(2):
        alone = torch.cat([x[b, there[b]], more[b]])[None]
        torch.testing.assert_close(y[b], m(alone)[0, -3:])
    assert state["tokens"].tolist() == [3, 5]


def test_what_it_cannot_do_is_refused():
    for settings, message in [
        (dict(d_state=3), "d_state must be even"),
        (dict(activation="glu"), "activation='glu' is not possible"),
        (dict(dt_min=0.2), "ascending"),
        (dict(dropout=1.0), "dropout"),
    ]:
        with pytest.raises(ValueError, match=message):
            S4D(4, **settings)
    with pytest.raises(ValueError, match="takes no context"):
        S4D(4)(torch.randn(1, 3, 4), torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match="cannot decode step by step"):
        S4D(4, bidirectional=True).step(torch.randn(1, 1, 4))

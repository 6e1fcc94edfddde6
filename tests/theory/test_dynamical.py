"""One linear system: both forms, and what every converter says against the operator it converts."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnlib import masks
from attnlib.ops import attention, linear_attention, selective_scan
from attnlib.theory.dynamical import (
    LinearSystem,
    OneFramework,
    from_cell,
    from_gates,
    from_linear_attention,
    from_s6,
    normalised_attention,
    quasi_lstm,
    taylor_features,
)

DOUBLE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shared", [False, True])
def test_recurrence_matrix_and_written_out_matrices_agree(shared):
    n, s, d = 9, 3, 4
    decay = -draw(n, 1 if shared else s, 1 if shared else d).abs()
    system = LinearSystem(decay, draw(n, s, 1 if shared else d, seed=1), draw(n, s, d, seed=2), draw(d, seed=3))
    u = draw(n, d, seed=4)
    y = system.recurrent(u)
    assert torch.allclose(y, system.parallel(u), atol=1e-12)
    h = torch.zeros(s * d, dtype=DOUBLE)
    for i in range(n):
        step, enters, reads = system.matrices(i, d)
        assert step.shape == (s * d, s * d) and enters.shape == (s * d, d) and reads.shape == (d, s * d)
        h = step @ h + enters @ u[i]
        assert torch.allclose(reads @ h + system.skip * u[i], y[i], atol=1e-12)


def test_long_products_of_small_decays_do_not_underflow():
    n = 400
    system = LinearSystem(torch.full((n, 1, 1), -3.0, dtype=DOUBLE), draw(n, 1, 2), draw(n, 1, 2, seed=1))
    u = draw(n, 2, seed=2)
    assert torch.isfinite(system.phi(2)).all() and torch.allclose(system.recurrent(u), system.parallel(u), atol=1e-12)


def test_linear_attention_is_that_of_the_operator():
    q, k, v = (draw(12, 5, seed=i) for i in range(3))
    told = linear_attention(q[None, None], k[None, None], v[None, None])[0, 0]
    assert torch.allclose(from_linear_attention(q, k).recurrent(v), told, atol=1e-10)
    q, k = q.exp(), k.exp()
    told = linear_attention(q[None, None], k[None, None], v[None, None], normalizer="sum")[0, 0]
    for place in ("output", "decay"):
        assert torch.allclose(from_linear_attention(q, k, "sum", place).recurrent(v), told, atol=1e-10)
    eta = draw(12, seed=5).exp()
    both = [from_linear_attention(q, k, eta, place).parallel(v) for place in ("output", "decay")]
    assert torch.allclose(*both, atol=1e-10)


def test_s6_is_the_selective_scan():
    u, delta = draw(11, 4), F.softplus(draw(11, 4, seed=1))
    a, b, c, skip = -draw(4, 3, seed=2).abs(), draw(11, 3, seed=3), draw(11, 3, seed=4), draw(4, seed=5)
    told = selective_scan(u[None], delta[None], a, b[None], c[None], skip)[0]
    system = from_s6(delta, a, b, c, skip)
    assert torch.allclose(system.recurrent(u), told, atol=1e-10) and torch.allclose(
        system.parallel(u), told, atol=1e-10
    )
    still = from_s6(torch.ones_like(delta), torch.zeros_like(a), b, c)  # no decay, steps of one
    assert torch.allclose(still.recurrent(u), from_linear_attention(c, b).recurrent(u), atol=1e-10)


@pytest.mark.parametrize("side", ["key", "query"])
@pytest.mark.parametrize(
    ("function", "plain"), [("exp", torch.exp), ("softplus", F.softplus), ("sigmoid", torch.sigmoid)]
)
def test_normalised_attention_divides_by_a_function_of_one_token(side, function, plain):
    q, k, v, scores = draw(6, 3), draw(6, 3, seed=1), draw(6, 2, seed=2), draw(6, seed=3)
    eta, found = plain(scores), normalised_attention(q, k, scores, function, side).recurrent(v)
    for i in range(6):
        told = sum((q[i] @ k[j]) * v[j] / eta[j if side == "key" else i] for j in range(i + 1))
        assert torch.allclose(found[i], told)


def test_gates_are_those_of_the_quasi_lstm():
    f, i, o, u = (draw(7, 3, seed=s) for s in range(4))
    for gate in ("own", "coupled", "s6"):
        h, told = torch.zeros(3, dtype=DOUBLE), []
        for t in range(7):
            keep = torch.sigmoid(-f[t] if gate == "s6" else f[t])
            enter = {"own": torch.sigmoid(i[t]), "coupled": 1 - torch.sigmoid(f[t]), "s6": torch.log1p(f[t].exp())}[
                gate
            ]
            h = keep * h + enter * u[t]
            told.append(torch.sigmoid(o[t]) * h)
        system = quasi_lstm(f, i, o, gate)
        assert torch.allclose(system.recurrent(u), torch.stack(told)) and torch.allclose(
            system.parallel(u), torch.stack(told)
        )
    assert torch.allclose((-F.softplus(f)).exp(), torch.sigmoid(-f))


def test_taylor_features_are_the_polynomial_and_approach_softmax():
    q, k, v = 0.5 * draw(10, 3), 0.5 * draw(10, 3, seed=1), draw(10, 2, seed=2)
    exact = attention(q[None, None], k[None, None], v[None, None], scale=1.0, mask=masks.causal())[0, 0]
    errors = []
    for order in range(5):
        features = taylor_features(q, order), taylor_features(k, order)
        assert features[0].shape[-1] == math.comb(3 + order, order)
        told = sum((q @ k.mT) ** r / math.factorial(r) for r in range(order + 1))
        assert torch.allclose(features[0] @ features[1].mT, told)
        system = from_linear_attention(*features)
        errors.append(float((system.recurrent(v) / system.recurrent(torch.ones_like(v)) - exact).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]


def test_a_cell_is_taken_when_it_is_linear_and_diagonal_and_refused_otherwise():
    w = draw(3, 2)
    u = draw(5, 2, seed=1)
    decay, entered = from_cell(lambda t, h: (w @ t).sigmoid() * h + (w @ t).tanh(), u, 3)
    assert torch.allclose(decay, (u @ w.mT).sigmoid()) and torch.allclose(entered, (u @ w.mT).tanh())
    lstm = torch.nn.LSTMCell(2, 3).double()
    with pytest.raises(ValueError, match="not linear in its state"):
        from_cell(lambda t, h: lstm(t[None], (h[None], h[None]))[1][0], u, 3)
    mixing = draw(3, 3, seed=2)
    with pytest.raises(ValueError, match="not diagonal"):
        from_cell(lambda t, h: mixing @ h, u, 3)


def test_what_makes_no_sense_is_refused():
    q = draw(4, 2)
    with pytest.raises(ValueError, match="eta must be above 0"):
        from_linear_attention(q, -q, "sum")
    with pytest.raises(ValueError, match="log_decay must be finite"):
        from_gates(torch.zeros(4, 2), torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="agree in N, S"):
        LinearSystem(torch.zeros(3, 1, 1), torch.zeros(4, 1, 1), torch.zeros(4, 1, 1))
    with pytest.raises(ValueError, match="place"):
        from_linear_attention(q, q, place="input")
    with pytest.raises(ValueError, match="gate"):
        quasi_lstm(q, q, q, "gru")
    with pytest.raises(ValueError, match="u"):
        from_linear_attention(q, q).recurrent(draw(5, 2))


def test_the_experiment_runs():
    inside = OneFramework(tokens=6, dim=2)
    assert set(inside.predict()) <= set(inside.run(0))
    assert inside.outside().setting() == inside.setting() | {"size": 10.0}

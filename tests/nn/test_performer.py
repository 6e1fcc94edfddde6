"""Performer: oracle, what random features estimate, causal sums, new directions, bad input."""

import pytest
import torch

import attnlib
from attnlib.nn.linear.performer import PerformerAttention


def made(**settings):
    torch.manual_seed(0)
    return PerformerAttention(**{**dict(dim=16, num_heads=2, num_features=12), **settings}).double()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(m, x, context=None):
    read = x if context is None else context
    return [part(t).unflatten(-1, (2, 8)).transpose(1, 2) for part, t in ((m.q, x), (m.k, read), (m.v, read))]


@pytest.mark.parametrize("kind", ["self", "cross", "causal"])
def test_it_is_the_equation(kind):
    m, x = made(causal=kind == "causal"), noise(2, 7, 16)
    context = noise(2, 9, 16, seed=2) if kind == "cross" else None
    q, k, v = heads(m, x, context)
    z_q, z_k = ((t / 8**0.25) @ m.directions.mT for t in (q, k))
    half_q, half_k = ((t / 8**0.25).square().sum(-1, keepdim=True) / 2 for t in (q, k))
    top = 0.0 if kind == "causal" else z_k.flatten(2).max(2).values[..., None, None]
    f_q = (z_q - half_q - z_q.max(-1, keepdim=True).values).exp() + 1e-4
    f_k = (z_k - half_k - top).exp() + 1e-4
    scores = f_q @ f_k.mT
    scores = scores.tril() if kind == "causal" else scores
    out = (scores / scores.sum(-1, keepdim=True)) @ v
    found = m(x, returns=("weights",)) if context is None else m(x, context, returns=("weights",))
    torch.testing.assert_close(found.y, m.proj(out.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(found.weights, scores / scores.sum(-1, keepdim=True))


def test_many_features_estimate_softmax_attention():
    x = noise(1, 12, 16)
    few, many = (made(num_features=count, eps=0.0) for count in (8, 4096))
    q, k, v = heads(many, x)
    exact = torch.softmax(q @ k.mT / 8**0.5, -1)
    errors = [(m(x, returns=("weights",)).weights - exact).abs().mean().item() for m in (few, many)]
    assert errors[1] < errors[0] / 3 and errors[1] < 0.01


def test_new_directions():
    m, x = made(), noise(1, 6, 16)
    first = m(x)
    w = m.directions[0, :8]
    torch.testing.assert_close(
        (w @ w.T) / w.norm(dim=1)[:, None] / w.norm(dim=1), torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=0
    )
    m.redraw(torch.Generator().manual_seed(3))
    assert not torch.allclose(m(x), first)
    m = made(resample=True)
    torch.testing.assert_close(m.eval()(x), m(x))
    m.train()
    assert not torch.allclose(m(x), m(x))
    assert "directions" in m.state_dict()
    made().load_state_dict({k: v for k, v in m.state_dict().items() if k != "directions"})


def test_the_authors_cut_denominators():
    m, x = made(compat="authors"), 6 * noise(1, 5, 16)
    plain = made()
    with torch.no_grad():
        plain.load_state_dict(m.state_dict())
    weights = m(x, returns=("weights",)).weights
    assert weights.sum(-1).min() < 0.99 and torch.allclose(
        plain(x, returns=("weights",)).weights.sum(-1), torch.ones(1, 2, 5, dtype=torch.float64)
    )


def test_decoding_has_a_state_of_one_size():
    m, x = made(causal=True), noise(2, 9, 16)
    state, rows = None, []
    for t in range(9):
        y, state = m.step(x[:, t : t + 1], state)
        rows.append(y[:, 0])
        assert state["S"].shape == (2, 2, 12, 8) and state["z"].shape == (2, 2, 12)
    torch.testing.assert_close(torch.stack(rows, 1), m(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: made(num_features=0), "num_features"),
        (lambda: made(eps=-1.0), "eps"),
        (lambda: made(causal=True, compat="authors"), "compat='authors' is not possible with causal=True"),
        (lambda: made(chunk=0), "chunk"),
        (lambda: attnlib.convert_state_dict("performer", {"wrong": torch.zeros(1)}), "wrong"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()

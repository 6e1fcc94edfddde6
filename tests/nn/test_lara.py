"""LARA: oracle, segments of tokens that exist, what it estimates, noise, bad input."""

import json

import pytest
import torch
from parity import HERE
from safetensors import safe_open

import attnlib
from attnlib.nn.linear.lara import LinearRandomizedAttention


def made(**settings):
    torch.manual_seed(0)
    return LinearRandomizedAttention(**{**dict(dim=16, num_heads=2, num_landmarks=4), **settings}).double().eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(m, x):
    return [part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (m.q, m.k, m.v)]


@pytest.mark.parametrize("settings", [{}, dict(proposal="adaptive", value_norms=True)])
def test_it_is_the_equation(settings):
    m, x = made(**settings), noise(1, 8, 16)
    q, k, v = heads(m, x)
    q_mean, k_mean = (t.unflatten(2, (4, 2)).mean(3) for t in (q, k))
    if settings:
        q_mean, k_mean = m.q_bar(q_mean), m.k_bar(k_mean)
    mu, root = q_mean + k_mean, 8**0.5
    out = torch.zeros_like(v)
    for h in range(2):
        for i in range(8):
            logs, values = [], []
            for c in range(4):
                w = mu[0, h, c]

                def log(t, w=w):
                    return (w @ t - t @ t / 2) / root

                of_keys = torch.stack([log(k[0, h, j]) for j in range(8)])
                values.append(of_keys.softmax(0) @ v[0, h])
                weight = w @ q[0, h, i] / root + log(q[0, h, i]) + of_keys.logsumexp(0) - log(w)
                logs.append(weight + (v[0, h, i].norm() + 1e-10).log() if settings else weight)
            out[0, h, i] = torch.stack(logs).softmax(0) @ torch.stack(values)
    torch.testing.assert_close(m(x), m.proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("landmarks", [4, 12])
def test_padding_changes_nothing(landmarks):
    m, x = made(num_landmarks=landmarks), noise(2, 11, 16)
    padded = torch.cat([noise(2, 3, 16, seed=2), x, noise(2, 2, 16, seed=3)], 1)
    valid = torch.zeros(2, 16, dtype=torch.bool)
    valid[:, 3:14] = True
    torch.testing.assert_close(m(padded, valid=valid)[:, 3:14], m(x))


def test_weights_are_shares_and_give_the_output():
    m, x = made(), noise(2, 9, 16)
    found = m(x, returns=("weights",))
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))
    out = (found.weights @ heads(m, x)[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found.y, m.proj(out))


def test_one_proposal_per_token_is_near_softmax_attention():
    x = noise(2, 16, 16)
    errors = []
    for landmarks in (2, 16):
        m = made(num_landmarks=landmarks)
        q, k, _ = heads(m, x)
        exact = torch.softmax(q @ k.mT / 8**0.5, -1)
        errors.append((m(x, returns=("weights",)).weights - exact).abs().mean().item())
    assert errors[1] < errors[0]


def test_noise_in_training():
    m, x = made(), noise(1, 9, 16)
    quiet = m(x)
    m.train()
    assert not torch.allclose(m(x), m(x))
    torch.testing.assert_close(made(noise=False).train()(x), quiet)
    twice = made(antithetic=True)
    torch.testing.assert_close(twice(x), quiet)
    assert not torch.allclose(twice.train()(x), quiet)


@pytest.mark.parametrize("case", ["plain", "antithetic", "adaptive"])
def test_samples_in_training_are_the_authors_given_their_noise(case, monkeypatch):
    with safe_open(HERE / "lara-training.safetensors", "pt") as f:
        settings = json.loads(f.metadata()["config"])[case]
        held = {k[len(case) + 1 :]: f.get_tensor(k).double() for k in f.keys() if k.startswith(case + "/")}  # noqa: SIM118
    m = LinearRandomizedAttention(8, 2, **settings).double().train()
    own = {f"{kind}_bar.{part}": held.get(f"w/{kind}_bar_proj.{part}") for kind in "qk" for part in ("weight", "bias")}
    m.load_state_dict({k: t for k, t in own.items() if t is not None}, strict=False)
    monkeypatch.setattr(torch, "randn_like", lambda x: held["noise"].view(x.shape))
    q, k, v = (held[name].requires_grad_() for name in "qkv")
    y, _, _ = m.mix_heads(q, k, v, None, False, None, False)
    (y * held["g"]).sum().backward()
    found = {"y": y, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if m.q_bar is not None and m.k_bar is not None:
        found |= {f"dw/{n}_bar_proj.weight": getattr(m, f"{n}_bar").weight.grad for n in "qk"}
    for name, ours in found.items():
        assert float((ours - held[name]).detach().abs().max()) <= 1e-5 * float(held[name].detach().abs().max()), name


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: made(num_landmarks=0), "num_landmarks"),
        (lambda: made(proposal="means"), "proposal"),
        (lambda: made()(noise(1, 4, 16), noise(1, 4, 16)), "context"),
        (lambda: attnlib.convert_state_dict("lara", {"wrong": torch.zeros(1)}), "wrong"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()

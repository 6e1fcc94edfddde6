"""In-context regression: tasks, layer, estimators and dynamics against the authors' code, and what they imply."""

import pytest
import torch
from parity import HERE
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

from attnlib.theory import icl
from attnlib.theory.icl import InContextReader, InContextRegression, linear_task, two_tasks

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def theirs():
    return load_file(HERE / "icl-linear-multihead-softmax.safetensors")


def test_tasks_are_drawn_as_the_authors_draw_them(theirs):
    for seed, name, drawn in ((0, "task", linear_task), (1, "multi", two_tasks)):
        kind = dict(dim=3) if name == "task" else dict(dim=4, first=2, second=3)
        found = drawn(4, length=7, generator=torch.Generator().manual_seed(seed), **kind)
        for mine, key in zip(found, ("z_q", "z", "y"), strict=True):
            assert torch.allclose(mine, theirs[f"{name}.{key}"], atol=1e-6)


@pytest.mark.parametrize("case", ["one", "all"])
def test_the_layer_is_the_authors(theirs, case):
    reader = InContextReader(4, 2, out_dim=1 if case == "one" else None)
    reader.load_state_dict({k[len(case) + 4 :]: v for k, v in theirs.items() if k.startswith(f"{case}/sd/")})
    z_q, z = (theirs[f"task.{k}"].clone().requires_grad_() for k in ("z_q", "z"))
    y = reader(z_q, z)
    y.backward(theirs[f"{case}/g"])
    assert torch.allclose(y, theirs[f"{case}/y"], atol=1e-5)
    for mine, key in ((z_q.grad, "z_q"), (z.grad, "z")):
        assert torch.allclose(mine, theirs[f"{case}/dx/{key}"], atol=1e-5)
    for name, p in reader.named_parameters():
        assert torch.allclose(p.grad, theirs[f"{case}/dw/{name}"], atol=1e-5)


@pytest.mark.parametrize("init", ["small_id", "small_id_qk", "oppo_small_id"])
def test_layers_start_as_the_authors(theirs, init):
    weights = InContextReader(4, 2, init=init).state_dict()
    held = [k for k in theirs if k.startswith(init + "/")]
    assert held and all(torch.equal(weights[k[len(init) + 1 :]], theirs[k]) for k in held)


def test_causal_rows_are_those_of_the_plain_softmax():
    reader, z = InContextReader(3, 2).double(), torch.randn(2, 5, 3, dtype=DOUBLE)
    out = reader(z)
    for i in range(5):
        assert torch.allclose(out[:, i : i + 1], reader(z[:, i : i + 1], z[:, : i + 1]), atol=1e-12)


def test_estimators_are_the_authors(theirs):
    x, y, q = (theirs[f"est.{k}"] for k in ("x", "y", "q"))
    given = (x[None], y[None], q[None])
    omega, mu = theirs["est.omega"], theirs["est.mu"]
    assert torch.allclose(icl.best_mu(omega, 0.01, 7, 3), mu)
    for mine, key in (
        (icl.softmax_heads(*given, omega, mu), "softmax"), (icl.gradient_step(*given, 2 * 0.4 * 1.3), "gd"),
        (icl.gradient_step(*given, 2 * 0.4 * 1.3, debiased=True), "debiased"), (icl.ridge(*given, 0.01), "ridge"),
        (icl.loss(omega, 1.2 * mu, 0.01, 7, 3)[None], "loss"),
    ):  # fmt: skip
        assert torch.allclose(mine, theirs[f"est.{key}"], atol=1e-10), key
    assert [icl.ridge_risk(0.1, r) for r in (0.5, 2.0, 8.0)] == pytest.approx(theirs["est.risk"].tolist())
    exact = torch.randn(2, 9, 3, dtype=DOUBLE)
    beta, ask = torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE)
    told = torch.einsum("bld,bd->bl", exact, beta)
    assert torch.allclose(icl.ridge(exact, told, ask, 0.0), (beta * ask).sum(-1))  # least squares without noise


def test_slopes_and_the_flow_are_the_authors(theirs):
    omega, mu = theirs["est.omega"].clone().requires_grad_(), (1.2 * theirs["est.mu"]).requires_grad_()
    slopes = torch.autograd.grad(icl.loss(omega, mu, 0.01, 7, 3) / 2, (omega, mu))
    assert torch.allclose(slopes[0], theirs["est.domega"]) and torch.allclose(slopes[1], theirs["est.dmu"])
    found = icl.flow(0.5 * theirs["est.omega"], 0.2 * theirs["est.mu"], 0.01, 7, 3, steps=50)
    for name in ("omega", "mu"):
        assert torch.allclose(getattr(found, name), theirs[f"flow.{name}"])
    assert torch.allclose(found.loss, theirs["flow.loss"].flatten())


def test_best_mu_is_least():
    omega = torch.tensor([0.3, -0.2, 0.1], dtype=DOUBLE)
    mu = icl.best_mu(omega, 0.1, 20, 4)
    least = icl.loss(omega, mu, 0.1, 20, 4)
    for i in range(3):
        for step in (1e-3, -1e-3):
            moved = mu.clone()
            moved[i] += step
            assert icl.loss(omega, moved, 0.1, 20, 4) > least


def test_a_small_pair_of_heads_is_the_debiased_step():
    task = linear_task(16, generator=torch.Generator().manual_seed(0))
    x, y, q = (t.double() for t in task.regression())
    omega, mu = torch.tensor([1e-3, -1e-3], dtype=DOUBLE), torch.tensor([1.0, -1.0], dtype=DOUBLE)
    pair = icl.softmax_heads(x, y, q, omega, mu) / (2 * 1e-3)
    assert torch.allclose(pair, icl.gradient_step(x, y, q, debiased=True), atol=1e-5)
    shifted = x + 3.0  # a mean that is not zero
    told = torch.einsum("bld,d->bl", shifted, torch.ones(5, dtype=DOUBLE))
    asked = (q + 3.0).sum(-1)
    errors = [mse_loss(icl.gradient_step(shifted, told, q + 3.0, 0.1, debiased=d), asked) for d in (True, False)]
    assert errors[0] < errors[1]


def test_heads_pair_up_in_the_flow_and_reach_the_least_loss():
    start = torch.tensor([0.05, -0.02], dtype=DOUBLE), torch.tensor([0.02, -0.06], dtype=DOUBLE)
    found = icl.flow(*start, 0.01, 40, 5, steps=2000, lr=0.05)
    mu, omega = found.mu[-1], found.omega[-1]
    assert float(mu.sum().abs() / mu.abs().sum()) < 0.1 and float((omega[0] + omega[1]).abs()) < 0.1 * float(
        omega.abs().sum()
    )
    pair = 2 * float(found.loss[-1])
    assert icl.least_loss(0.01, 40, 5) <= pair < 0.55 * icl.least_loss(0.01, 40, 5, heads=1)
    grid = torch.linspace(-0.5, 0.5, 21, dtype=DOUBLE)
    best = min(
        float(icl.loss(o, icl.best_mu(o, 0.01, 40, 5), 0.01, 40, 5))
        for o in (torch.stack([a, b]) for a in grid for b in grid if a - b > 1e-6 and a.abs() > 1e-6)
    )
    assert best >= icl.least_loss(0.01, 40, 5) - 1e-12


def test_two_trained_heads_pair_up():
    """A small task and a short training; that of the paper's size is in the results."""
    experiment = InContextRegression(dim=2, length=20, steps=300, batch=64, lr=0.03)
    pattern = experiment.trained(2, 2).pattern()
    assert pattern.imbalance() < 0.1 and pattern.off_diagonal() < 0.1
    assert float(pattern.omega.sum().abs() / pattern.omega.abs().sum()) < 0.2


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        InContextReader(4, 3, init="oppo_small_id")
    with pytest.raises(ValueError, match="init"):
        InContextReader(4, 2, init="zeros")
    with pytest.raises(ValueError, match="overflows"):
        icl.best_mu(torch.tensor([4.0]), 0.01, 40, 5)
    with pytest.raises(ValueError, match="z"):
        InContextReader(4, 2)(torch.zeros(2, 1, 4), torch.zeros(3, 5, 4))
    with pytest.raises(ValueError, match="first"):
        two_tasks(2, dim=3, first=4)
    with pytest.raises(ValueError, match="y"):
        icl.ridge(torch.zeros(2, 5, 3), torch.zeros(2, 4), torch.zeros(2, 3), 0.1)


def test_the_experiment_runs():
    inside = InContextRegression(steps=2, batch=4, tested=10)
    assert set(inside.predict()) <= set(inside.run(0))
    assert inside.outside().setting() == inside.setting() | {"correlation": 0.8}

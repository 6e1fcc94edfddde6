"""Order of features: fixed points and times against numbers integrated elsewhere, and against real networks."""

import pytest
import torch

from attnlib.theory import jepa
from attnlib.theory.jepa import DeepLinear, FeatureOrder, descend, plateau, slope, time_to, trajectory

DOUBLE = torch.float64


def test_plateaus_are_the_known_ones():
    known = {(1, "jepa"): 0.625, (1, "mae"): 0.790569, (2, "jepa"): 0.390625, (2, "mae"): 0.731004}
    for (depth, objective), value in known.items():
        assert plateau(0.5, 0.8, depth, objective) == pytest.approx(value, abs=1e-6)
        assert slope(plateau(0.5, 0.8, depth, objective), 0.5, 0.8, depth, objective) == pytest.approx(0, abs=1e-12)
        end = float(trajectory([4000.0], 0.5, 0.8, depth, objective)[0])
        assert end == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("depth", "objective", "times"),
    [
        (1, "jepa", (20.95, 20.89)), (2, "jepa", (40.68, 46.32)), (3, "jepa", (48.12, 63.11)),
        (1, "mae", (2.54, 2.33)), (2, "mae", (3.40, 3.24)), (3, "mae", (3.24, 3.13)),
    ],
)  # fmt: skip
def test_half_times_are_the_known_ones(depth, objective, times):
    """Integrated elsewhere by Euler's method with steps of 0.001."""
    for rho, known in zip((1.2, 0.8), times, strict=True):
        half = time_to(1.0, 1 / rho, depth, objective)
        assert half == pytest.approx(known, abs=0.011)
        reached = float(trajectory([half], 1.0, 1 / rho, depth, objective)[0])
        assert reached == pytest.approx(plateau(1.0, 1 / rho, depth, objective) / 2, rel=1e-5)


def test_deep_jepa_alone_puts_off_the_feature_of_small_rho():
    gaps = {
        objective: [time_to(1.0, 1 / 0.8, d, objective) - time_to(1.0, 1 / 1.2, d, objective) for d in (1, 2, 3, 4)]
        for objective in jepa.OBJECTIVES
    }  # fmt: skip
    assert gaps["jepa"] == sorted(gaps["jepa"]) and gaps["jepa"][1] > 5
    assert all(gap < 0 for gap in gaps["mae"])


def test_depth_reverses_the_order_of_a_noisy_strong_feature():
    quiet, noisy = (1.0, 1.0 / 1.5), (1.2, 1.2 / 0.7)  # covariance and variance
    for depth in (1, 2, 3, 4):
        assert time_to(*noisy, depth, "mae") < time_to(*quiet, depth, "mae")
    assert time_to(*noisy, 1) < time_to(*quiet, 1)
    assert all(time_to(*noisy, depth) > time_to(*quiet, depth) for depth in (2, 3, 4))


def moments(rho, noise=0.5):
    rho = torch.tensor(rho, dtype=DOUBLE)
    return torch.diag(1 / rho), torch.eye(len(rho), dtype=DOUBLE), torch.diag(rho + noise)


@pytest.mark.parametrize("objective", jepa.OBJECTIVES)
def test_real_networks_follow_the_formula(objective):
    time, rho = {"jepa": (80.0, (1.2, 0.8)), "mae": (8.0, (1.2, 0.8))}[objective]
    lr = time / 800
    path = descend(DeepLinear(2, 3), *moments(rho), time, lr, objective)
    at = [0.5 * time, 0.75 * time, time]
    for i, r in enumerate(rho):
        told = trajectory(at, 1.0, 1 / r, 3, objective)
        seen = torch.stack([path[round(t / lr), i] for t in at])
        assert torch.allclose(seen, told, rtol=0.03)


def test_the_loss_is_the_mean_over_samples():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 50, 3, dtype=DOUBLE, generator=g)
    model = DeepLinear(3, 2, 0.3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, dtype=DOUBLE, generator=g)
    xx, yx, yy = (a.mT @ b / 50 for a, b in ((x, x), (y, x), (y, y)))
    w, v = model.encoder(), model.predictor
    for objective, stop, target in (("mae", True, y), ("jepa", True, (y @ w.mT).detach()), ("jepa", False, y @ w.mT)):
        plain = ((x @ (v @ w).mT - target) ** 2).sum(-1).mean() / 2
        loss = model.loss(xx, yx, yy, objective, stop)
        assert torch.allclose(loss, plain)
        for mine, direct in zip(
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True),
            torch.autograd.grad(plain, list(model.parameters()), retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(mine, direct)


def test_without_the_stop_gradient_all_collapses():
    model = DeepLinear(2, 2)
    path = descend(model, *moments((1.2, 0.8)), 60.0, 0.1, stop_gradient=False)
    assert float(path[-1].abs().max()) < 0.3 * 0.05
    assert float(model.loss(*moments((1.2, 0.8)), stop_gradient=False).detach()) < 1e-3


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="objective"):
        plateau(1.0, 1.0, 2, "vicreg")
    with pytest.raises(ValueError, match="beyond 0.5 of the plateau"):
        time_to(1.0, 1.0, 2, start=0.9)
    with pytest.raises(ValueError, match="start"):
        time_to(1.0, 1.0, 2, start=-0.1)
    with pytest.raises(ValueError, match="depth"):
        DeepLinear(2, 0)
    with pytest.raises(ValueError, match="times"):
        trajectory([], 1.0, 1.0, 2)
    with pytest.raises(ValueError, match="lam"):
        plateau(0.0, 1.0, 2)


def test_the_experiment_runs():
    inside = FeatureOrder(copies=1, count=100, time=1.0)
    assert set(inside.predict()) == set(inside.run(0))
    assert inside.outside().setting() == inside.setting() | {"stop_gradient": False}

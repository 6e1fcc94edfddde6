"""Which features a deep linear network learns first: predicting latents (JEPA) against predicting inputs (MAE).

Data ``x, y`` have zero mean and diagonal covariances ``E[x x^T] = diag(var)``, ``E[y x^T] = diag(lam)``; feature i has
the regression coefficient ``rho_i = lam_i / var_i``. An encoder ``W = W_L ... W_1`` and a linear predictor ``V`` learn

* ``"mae"``: ``1/2 E |V W x - y|^2``,
* ``"jepa"``: ``1/2 E |V W x - stop(W y)|^2``, the target by the current encoder, without its gradient.

Started balanced, every mode of every layer at ``start^(1/L)``, the features evolve apart under gradient flow:

* mae: ``dw/dt = L (lam w^(2 - 1/L) - var w^3)``, which ends at ``rho^(L / (L + 1))``,
* jepa: ``dw/dt = L (lam w^(3 - 1/L) - var w^3)``, which ends at ``rho^L``.

Of two features of one covariance the deep JEPA learns that of the larger ``rho`` first, and so puts off noisy ones.

The paper's authors released no code; these equations were derived again from its setting and are held to simulations.

Reference: Littwin et al., 2024, arXiv 2407.03475.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_real, checked
from ..extras import need
from .experiment import Claim, Experiment

OBJECTIVES = ("jepa", "mae")
DOUBLE = torch.float64


def _check(lam: float, var: float, depth: int, objective: str) -> None:
    check_real("lam", lam, above=0)
    check_real("var", var, above=0)
    check_int("depth", depth, least=1)
    check_choice("objective", objective, OBJECTIVES)


def plateau(lam: float, var: float, depth: int, objective: str = "jepa") -> float:
    """Where a feature ends: ``rho^L`` or ``rho^(L / (L + 1))``.

    >>> plateau(0.5, 0.8, 2), round(plateau(0.5, 0.8, 2, "mae"), 6)
    (0.390625, 0.731004)
    """
    _check(lam, var, depth, objective)
    return (lam / var) ** (depth if objective == "jepa" else depth / (depth + 1))


def slope(w: float, lam: float, var: float, depth: int, objective: str = "jepa") -> float:
    """``dw/dt`` of one feature."""
    power = (3 if objective == "jepa" else 2) - 1 / depth
    return depth * (lam * w**power - var * w**3)


def trajectory(
    times: Sequence[float], lam: float, var: float, depth: int, objective: str = "jepa", start: float = 0.05
) -> Tensor:
    """The feature at these times, from ``start`` at 0, by an implicit integrator of high order (scipy)."""
    _check(lam, var, depth, objective)
    check_real("start", start, above=0)
    at = sorted(float(t) for t in times)
    if not at or at[0] < 0:
        raise ValueError(f"times must hold at least one, none of them negative, got {list(times)}")
    solve = need("scipy.integrate", "a trajectory").solve_ivp
    found = solve(
        lambda t, w: [slope(max(float(w[0]), 0.0), lam, var, depth, objective)], (0.0, max(at[-1], 1e-12)), [start],
        t_eval=at, method="Radau", rtol=1e-10, atol=1e-13,
    )  # fmt: skip
    by_time = dict(zip(at, found.y[0].tolist(), strict=True))
    return torch.tensor([by_time[float(t)] for t in times], dtype=DOUBLE)


def time_to(
    lam: float, var: float, depth: int, objective: str = "jepa", start: float = 0.05, fraction: float = 0.5
) -> float:
    """When a feature reaches this fraction of its plateau: the integral of ``dw / slope(w)``.

    >>> [round(time_to(1.0, 1 / rho, depth=3), 2) for rho in (1.2, 0.8)]
    [48.12, 63.11]
    """
    _check(lam, var, depth, objective)
    check_real("fraction", fraction, above=0, below=1)
    goal = fraction * plateau(lam, var, depth, objective)
    check_real("start", start, above=0)
    if start >= goal:
        raise ValueError(
            f"start={start} is beyond {fraction} of the plateau, {goal:.4g}; it takes no time to get there"
        )
    integral = need("scipy.integrate", "the time to a plateau").quad
    return float(integral(lambda w: 1 / slope(w, lam, var, depth, objective), start, goal, epsabs=0, epsrel=1e-10)[0])


class DeepLinear(nn.Module):
    """Encoder of ``depth`` square matrices and a predictor, started balanced: each ``start^(1/depth)`` times identity.

    >>> [round(w, 6) for w in DeepLinear(3, depth=3, start=0.05).encoder().diagonal().tolist()]
    [0.05, 0.05, 0.05]
    """

    @checked
    def __init__(self, dim: int, depth: int, start: float = 0.05):
        super().__init__()
        check_int("dim", dim, least=1)
        check_int("depth", depth, least=1)
        check_real("start", start, above=0)
        one = start ** (1 / depth) * torch.eye(dim, dtype=DOUBLE)
        self.layers = nn.ParameterList([nn.Parameter(one.clone()) for _ in range(depth)])
        self.predictor = nn.Parameter(one.clone())

    def encoder(self) -> Tensor:
        """``W_L ... W_1``."""
        w = self.layers[0]
        for layer in list(self.layers)[1:]:
            w = layer @ w
        return w

    def loss(self, xx: Tensor, yx: Tensor, yy: Tensor, objective: str = "jepa", stop_gradient: bool = True) -> Tensor:
        """The mean loss over data with these second moments (d, d): ``E[x x^T]``, ``E[y x^T]``, ``E[y y^T]``."""
        check_choice("objective", objective, OBJECTIVES)
        w = self.encoder()
        read = self.predictor @ w
        target = torch.eye(len(w), dtype=w.dtype) if objective == "mae" else w.detach() if stop_gradient else w
        return ((read @ xx * read).sum() - 2 * (target @ yx * read).sum() + (target @ yy * target).sum()) / 2


@checked
def descend(
    model: DeepLinear, xx: Tensor, yx: Tensor, yy: Tensor, time: float, lr: float = 0.05, objective: str = "jepa",
    stop_gradient: bool = True,
) -> Tensor:  # fmt: skip
    """Plain gradient descent for ``time / lr`` steps; the encoder's diagonal after each, (steps + 1, d)."""
    check_real("time", time, above=0)
    check_real("lr", lr, above=0)
    optimizer, path = torch.optim.SGD(model.parameters(), lr=lr), [model.encoder().detach().diagonal().clone()]
    for _ in range(round(time / lr)):
        optimizer.zero_grad()
        model.loss(xx, yx, yy, objective, stop_gradient).backward()
        optimizer.step()
        path.append(model.encoder().detach().diagonal().clone())
    return torch.stack(path)


class FeatureOrder(Experiment):
    """Do real deep linear networks learn features when the formula says? On sampled data, features of two kinds.

    Args:
        depth: matrices of the encoder.
        objective: ``"jepa"`` or ``"mae"``.
        rho: regression coefficients of the two kinds; their covariance is 1, so that only ``rho`` tells them apart.
        copies: features of each kind.
        count: samples, from which the second moments are taken.
        time, lr: of gradient descent.
        start: see :class:`DeepLinear`.
        stop_gradient: off is outside of the theory.
    """

    name = "order of features in deep linear networks"

    @checked
    def __init__(
        self, depth: int = 3, objective: str = "jepa", rho: tuple[float, float] = (1.2, 0.8), copies: int = 4,
        count: int = 20000, time: float = 150.0, lr: float = 0.05, start: float = 0.05, stop_gradient: bool = True,
    ):  # fmt: skip
        check_choice("objective", objective, OBJECTIVES)
        self.depth, self.objective, self.rho, self.copies, self.count = depth, objective, rho, copies, count
        self.time, self.lr, self.start, self.stop_gradient = time, lr, start, stop_gradient

    def predict(self) -> dict[str, Claim]:
        claims = {}
        for rho in self.rho:
            args = (1.0, 1 / rho, self.depth, self.objective)
            claims[f"half-time at rho {rho}"] = Claim.near(time_to(*args, start=self.start), 0.05)
            claims[f"plateau at rho {rho}"] = Claim.near(plateau(*args), 0.05)
        return claims

    def outside(self) -> FeatureOrder:
        """The gradient goes through the target too."""
        return FeatureOrder(**{**self.setting(), "stop_gradient": False})

    def run(self, seed: int) -> dict[str, float]:
        g = torch.Generator().manual_seed(seed)
        rho = torch.tensor(self.rho, dtype=DOUBLE).repeat_interleave(self.copies)
        x = torch.randn(self.count, len(rho), dtype=DOUBLE, generator=g) / rho.sqrt()  # variances 1 / rho
        y = rho * x + 0.7 * torch.randn(x.shape, dtype=DOUBLE, generator=g)
        xx, yx, yy = (a.mT @ b / self.count for a, b in ((x, x), (y, x), (y, y)))
        model = DeepLinear(len(rho), self.depth, self.start)
        path = descend(model, xx, yx, yy, self.time, self.lr, self.objective, self.stop_gradient)
        found = {}
        for rho_of, part in zip(self.rho, path.split(self.copies, 1), strict=True):
            goal = plateau(1.0, 1 / rho_of, self.depth, self.objective)
            reached = part >= goal / 2
            steps = torch.where(reached.any(0), reached.double().argmax(0), len(path) - 1)  # never: when it was ended
            found[f"half-time at rho {rho_of}"] = float(steps.double().mean()) * self.lr
            found[f"plateau at rho {rho_of}"] = float(part[-1].mean())
        return found

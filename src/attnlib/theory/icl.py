"""Linear regression in context: what heads of softmax attention learn, and which estimator they then are.

A prompt holds ``L`` examples ``z_l = [x_l; y_l]`` with ``x ~ N(0, I_d)``, ``y = beta . x + noise``, and a query
``z_q = [x_q; 0]``; one layer of ``H`` heads, each as wide as a token, reads the prompt. Trained, it becomes

``y_hat = sum_h mu_h  y^T softmax(omega_h X x_q)``:

the product of queries and keys is ``omega_h I``, values and output read the label alone with ``mu_h``. Its loss is
close to ``1 + s - 2 mu.omega + mu^T (omega omega^T + (1 + s) / L exp(d omega omega^T)) mu`` with ``s`` the variance of
the noise. Two heads end as a pair ``+-omega`` with ``sum mu = 0``, which for small ``omega`` is one step of gradient
descent with the mean of ``x`` taken out; one head cannot do that.

Reference: He et al., 2025, arXiv 2503.12734; code XintianPan/ICL_linear. Its causal layer takes the softmax twice; ours
does not, and so has no parity there. Its two losses differ by a factor of two: :func:`loss` is the whole,
:func:`flow` descends the half.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_axes, check_choice, check_int, check_real, checked
from ..masks import causal
from ..ops import attention
from .experiment import Claim, Experiment

INITS = ("random", "small_id", "small_id_qk", "oppo_small_id")
#: Beyond this ``exp(d omega^2)`` says nothing any more.
LARGEST_EXPONENT = 60.0


class Prompts(NamedTuple):
    """Queries (B, 1, d + m), examples (B, L, d + m) and what is asked for (B, 1, m)."""

    z_q: Tensor
    z: Tensor
    y: Tensor

    def regression(self) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` (B, L, d), the first ``y`` (B, L) and ``x_q`` (B, d), as estimators take them."""
        d = self.z.shape[-1] - self.y.shape[-1]
        return self.z[..., :d], self.z[..., d], self.z_q[:, 0, :d]


@checked
def linear_task(
    count: int, dim: int = 5, length: int = 40, noise: float = 0.1, generator: torch.Generator | None = None,
    mix: Tensor | None = None,
) -> Prompts:  # fmt: skip
    """Prompts of one regression each, ``beta ~ N(0, I / d)``, drawn in the order of the authors' generator.

    Args:
        count: prompts.
        dim: coordinates of ``x``.
        length: examples.
        noise: standard deviation, on examples and on the answer.
        generator: of what is drawn.
        mix: (d, d) that multiplies every ``x``: covariates that are correlated, outside of the theory.

    >>> linear_task(2).z.shape
    torch.Size([2, 40, 6])
    """
    for name, value in (("dim", dim), ("length", length)):
        check_int(name, value, least=1)
    check_int("count", count, least=0)
    check_real("noise", noise, least=0)
    x = torch.randn(count, length, dim, generator=generator)
    x_q = torch.randn(count, 1, dim, generator=generator)
    if mix is not None:
        check_axes("mix", mix, d=dim, e=dim)
        x, x_q = x @ mix.mT, x_q @ mix.mT
    beta = torch.randn(count, dim, 1, generator=generator) * dim**-0.5
    y = x @ beta + noise * torch.randn(count, length, 1, generator=generator)
    y_q = x_q @ beta + noise * torch.randn(count, 1, 1, generator=generator)
    return Prompts(torch.cat([x_q, torch.zeros_like(y_q)], -1), torch.cat([x, y], -1), y_q)


@checked
def two_tasks(
    count: int, dim: int = 6, first: int = 3, second: int = 3, length: int = 40, noise: float = 0.1,
    generator: torch.Generator | None = None,
) -> Prompts:  # fmt: skip
    """Prompts of two regressions, on the first and on the last coordinates, as the authors' generator draws them.

    Their coefficients are not scaled, the noise is multiplied by the root of a task's width, and answers have none.
    """
    check_int("first", first, least=1, most=dim)
    check_int("second", second, least=1, most=dim)
    x = torch.randn(count, length, dim, generator=generator)
    x_q = torch.randn(count, 1, dim, generator=generator)
    betas = [torch.randn(count, width, 1, generator=generator) for width in (first, second)]
    told, asked = [], []
    for width, beta, part in ((first, betas[0], slice(None, first)), (second, betas[1], slice(dim - second, None))):
        drawn = torch.randn(count, length, 1, generator=generator)
        told.append(x[..., part] @ beta + math.sqrt(width) * noise * drawn)
        asked.append(x_q[..., part] @ beta)
    y_q = torch.cat(asked, -1)
    return Prompts(torch.cat([x_q, torch.zeros_like(y_q)], -1), torch.cat([x, *told], -1), y_q)


class Pattern(NamedTuple):
    """Per head: ``qk`` (H, E, E) the product of queries and keys with its scale, ``ov`` (H, m, E) of output and values.

    ``omega`` (H,) is the mean of the diagonal of ``qk`` over the coordinates of ``x``, ``mu`` (H,) the label's entry.
    """

    qk: Tensor
    ov: Tensor

    @property
    def omega(self) -> Tensor:
        return self.qk[:, :-1, :-1].diagonal(dim1=-2, dim2=-1).mean(-1)

    @property
    def mu(self) -> Tensor:
        return self.ov[:, -1, -1]

    def off_diagonal(self) -> float:
        """Frobenius norm of what lies off the diagonal of ``qk``'s block of ``x``, over that of the diagonal."""
        block = self.qk[:, :-1, :-1]
        diagonal = torch.diag_embed(block.diagonal(dim1=-2, dim2=-1))
        return float((block - diagonal).norm() / diagonal.norm())

    def imbalance(self) -> float:
        """``|sum mu| / sum |mu|``: 0 where heads cancel, 1 where they agree."""
        return float(self.mu.sum().abs() / self.mu.abs().sum())


class InContextReader(nn.Module):
    """One layer of ``num_heads`` heads as wide as a token; the query stands apart from the examples.

    Args:
        dim: width E of a token.
        num_heads: heads.
        out_dim: width of the output, ``dim`` by default.
        init: ``"random"`` (torch's own), ``"small_id"`` (1e-6 I), ``"small_id_qk"`` (1e-4 I for queries and keys), or
            ``"oppo_small_id"`` (the same at 1e-6, with -I for the queries of the second half of the heads).

    Shape: ``z_q`` (B, Q, E), ``z`` (B, L, E) to (B, Q, out_dim). Without ``z``, tokens of ``z_q`` read themselves and
    those before them.

    >>> InContextReader(6, 2, out_dim=1)(*linear_task(3)[:2]).shape
    torch.Size([3, 1, 1])
    """

    @checked
    def __init__(self, dim: int, num_heads: int, out_dim: int | None = None, init: str = "random"):
        super().__init__()
        check_int("dim", dim, least=2)
        check_int("num_heads", num_heads, least=1)
        check_choice("init", init, INITS)
        self.dim, self.num_heads = dim, num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim * num_heads, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(dim * num_heads, dim if out_dim is None else out_dim, bias=False)
        if init == "random":
            return
        if init == "oppo_small_id" and num_heads % 2:
            raise ValueError(f"num_heads={num_heads} must be even for init='oppo_small_id', which pairs heads")
        one = (1e-4 if init == "small_id_qk" else 1e-6) * torch.eye(dim)
        signs = [-1.0 if init == "oppo_small_id" and h >= num_heads // 2 else 1.0 for h in range(num_heads)]
        with torch.no_grad():
            self.q_proj.weight.copy_(torch.cat([s * one for s in signs]))
            self.k_proj.weight.copy_(one.repeat(num_heads, 1))
            if init == "small_id":
                self.v_proj.weight.copy_(one.repeat(num_heads, 1))
                if out_dim is None:
                    self.o_proj.weight.copy_(one.repeat(1, num_heads))

    def forward(self, z_q: Tensor, z: Tensor | None = None) -> Tensor:
        check_axes("z_q", z_q, B=None, Q=None, E=self.dim)
        source = z_q if z is None else z
        check_axes("z", source, B=z_q.shape[0], L=None, E=self.dim)
        q, k, v = (
            p(t).unflatten(-1, (self.num_heads, self.dim)).transpose(1, 2)
            for p, t in ((self.q_proj, z_q), (self.k_proj, source), (self.v_proj, source))
        )
        out: Tensor = attention(q, k, v, scale=self.dim**-0.5, mask=causal() if z is None else None)  # type: ignore[assignment]
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def pattern(self) -> Pattern:
        """What the heads compute."""
        shape = (self.num_heads, self.dim, self.dim)
        q, k, v = (p.weight.detach().view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        o = self.o_proj.weight.detach().unflatten(1, (self.num_heads, self.dim)).transpose(0, 1)
        return Pattern(q.mT @ k * self.dim**-0.5, o @ v)


# --------------------------------------------------------------------------------------------------------------------
# Five estimators. x (B, L, d), y (B, L), x_q (B, d) to (B,)


def _check(x: Tensor, y: Tensor, x_q: Tensor) -> None:
    check_axes("x", x, B=None, L=None, d=None)
    check_axes("y", y, B=x.shape[0], L=x.shape[1])
    check_axes("x_q", x_q, B=x.shape[0], d=x.shape[2])


def softmax_heads(x: Tensor, y: Tensor, x_q: Tensor, omega: Tensor, mu: Tensor) -> Tensor:
    """``sum_h mu_h y^T softmax(omega_h X x_q)``."""
    _check(x, y, x_q)
    scores = torch.einsum("bld,bd->bl", x, x_q)
    return sum(m * (y * (o * scores).softmax(-1)).sum(-1) for o, m in zip(omega, mu, strict=True))  # type: ignore[return-value]


def gradient_step(x: Tensor, y: Tensor, x_q: Tensor, rate: float = 1.0, debiased: bool = False) -> Tensor:
    """One step of gradient descent from zero, ``rate / L sum_l y_l x_l . x_q``; ``debiased`` takes the mean of x out.

    A pair of heads ``+-omega`` with ``+-mu`` of small ``omega`` is the debiased one at ``rate = 2 omega mu``.
    """
    _check(x, y, x_q)
    around = x - x.mean(1, keepdim=True) if debiased else x
    return rate / x.shape[1] * torch.einsum("bl,bld,bd->b", y, around, x_q)


def ridge(x: Tensor, y: Tensor, x_q: Tensor, variance: float) -> Tensor:
    """The best estimator there is, Bayes': ridge regression at ``variance * d``; ``variance=0`` is least squares."""
    _check(x, y, x_q)
    check_real("variance", variance, least=0)
    if variance == 0:
        return (torch.linalg.pinv(x) @ y[..., None])[..., 0].mul(x_q).sum(-1)
    penalty = variance * x.shape[2] * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(x.mT @ x + penalty, x.mT @ y[..., None])[..., 0].mul(x_q).sum(-1)


def ridge_risk(variance: float, ratio: float) -> float:
    """Its risk, noise of the answer left out, for large ``d`` and ``L = ratio * d``."""
    check_real("variance", variance, least=0)
    check_real("ratio", ratio, above=0)
    inner = 4 * variance + (variance + (1 - ratio) / ratio) ** 2
    return (variance + (ratio - 1) / ratio + math.sqrt(inner)) / 2


# --------------------------------------------------------------------------------------------------------------------
# The reduced dynamics


def _matrix(omega: Tensor, variance: float, length: int, dim: int) -> Tensor:
    outer = omega[:, None] * omega
    largest = float((dim * outer).detach().max())
    if largest > LARGEST_EXPONENT:
        raise ValueError(
            f"omega is too large: d omega^2 = {largest:.3g}, whose exponential overflows the approximation"
        )
    return outer + (1 + variance) / length * (dim * outer).exp()


def loss(omega: Tensor, mu: Tensor, variance: float, length: int, dim: int) -> Tensor:
    """The approximate mean squared error of heads ``omega, mu`` (H,)."""
    check_axes("omega", omega, H=None)
    check_axes("mu", mu, H=omega.shape[0])
    return 1 + variance - 2 * mu @ omega + mu @ _matrix(omega, variance, length, dim) @ mu


def best_mu(omega: Tensor, variance: float, length: int, dim: int) -> Tensor:
    """The ``mu`` that minimises :func:`loss` at ``omega`` (H,).

    >>> best_mu(torch.tensor([0.2, -0.2]), 0.01, 40, 5).sum().abs() < 1e-5
    tensor(True)
    """
    check_axes("omega", omega, H=None)
    return torch.linalg.solve(_matrix(omega, variance, length, dim), omega)


def least_loss(variance: float, length: int, dim: int, heads: int = 2) -> float:
    """The least :func:`loss` of one head (found on a grid) or of two: a pair of vanishing ``omega``, in closed form.

    >>> round(least_loss(0.01, 40, 5, heads=2), 4), round(least_loss(0.01, 40, 5, heads=1), 4)
    (0.1221, 0.2655)
    """
    check_int("heads", heads, least=1, most=2)
    if heads == 2:
        return 1 + variance - 1 / (1 + (1 + variance) * dim / length)
    omega = torch.linspace(1e-3, 3 / math.sqrt(dim), 20000, dtype=torch.float64)
    square = omega**2
    return float((1 + variance - square / (square + (1 + variance) / length * (dim * square).exp())).min())


class Flow(NamedTuple):
    """``omega`` and ``mu`` (steps + 1, H), and the half loss that was descended (steps + 1)."""

    omega: Tensor
    mu: Tensor
    loss: Tensor


@checked
def flow(
    omega: Tensor, mu: Tensor, variance: float, length: int, dim: int, steps: int = 1000, lr: float = 0.01
) -> Flow:
    """Gradient descent on half of :func:`loss`, as the authors run it."""
    check_int("steps", steps, least=0)
    check_real("lr", lr, above=0)
    o, m = omega.detach().clone().requires_grad_(), mu.detach().clone().requires_grad_()
    kept: list[tuple[Tensor, ...]] = []
    for step in range(steps + 1):
        half = loss(o, m, variance, length, dim) / 2
        kept.append((o.detach().clone(), m.detach().clone(), half.detach()))
        if step < steps:
            slopes = torch.autograd.grad(half, (o, m))
            with torch.no_grad():
                o -= lr * slopes[0]
                m -= lr * slopes[1]
    return Flow(*(torch.stack(part) for part in zip(*kept, strict=True)))


class InContextRegression(Experiment):
    """Do two trained heads pair up, and are they the estimator of the theory?

    Args:
        dim, length, noise: of the task.
        steps, batch, lr: of training (Adam, a cosine).
        correlation: between neighbouring coordinates of ``x``; any but 0 is outside of the theory.
        tested: prompts.
    """

    name = "linear regression in context"

    @checked
    def __init__(
        self, dim: int = 5, length: int = 40, noise: float = 0.1, steps: int = 2000, batch: int = 64, lr: float = 0.01,
        correlation: float = 0.0, tested: int = 20000,
    ):  # fmt: skip
        check_real("correlation", correlation, least=0, below=1)
        self.dim, self.length, self.noise, self.steps, self.batch, self.lr = dim, length, noise, steps, batch, lr
        self.correlation, self.tested = correlation, tested

    def predict(self) -> dict[str, Claim]:
        return {
            "off-diagonal of queries and keys over diagonal": Claim.below(0.1),
            "|sum mu| over sum |mu|": Claim.below(0.1),
            "loss of two heads over that of one": Claim.below(1.0),
            "loss of two heads over that of the debiased step": Claim.near(1.0, 0.05),
            "loss of two heads": Claim.near(least_loss(self.noise**2, self.length, self.dim), 0.1),
        }

    def outside(self) -> InContextRegression:
        """Coordinates that are correlated."""
        return InContextRegression(**{**self.setting(), "correlation": 0.8})

    def _mix(self) -> Tensor | None:
        if not self.correlation:
            return None
        at = torch.arange(self.dim)
        return torch.linalg.cholesky(self.correlation ** (at[:, None] - at).abs().double()).float()

    def trained(self, heads: int, seed: int) -> InContextReader:
        """A reader after training."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reader = InContextReader(self.dim + 1, heads, out_dim=1)
        g, mix = torch.Generator().manual_seed(seed), self._mix()
        optimizer = torch.optim.Adam(reader.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            z_q, z, y = linear_task(self.batch, self.dim, self.length, self.noise, g, mix)
            error = F.mse_loss(reader(z_q, z), y)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
        return reader

    @torch.no_grad()
    def run(self, seed: int) -> dict[str, float]:
        g = torch.Generator().manual_seed(10_000 + seed)
        z_q, z, y = test = linear_task(self.tested, self.dim, self.length, self.noise, g, self._mix())
        with torch.enable_grad():
            readers = {heads: self.trained(heads, seed) for heads in (1, 2)}
        losses = {heads: float(F.mse_loss(reader(z_q, z), y)) for heads, reader in readers.items()}
        pattern, asked = readers[2].pattern(), y[:, 0, 0]
        found = test.regression()
        rate = 1 / (1 + (1 + self.noise**2) * self.dim / self.length)
        step = float(F.mse_loss(gradient_step(*found, rate, debiased=True), asked))
        return {
            "off-diagonal of queries and keys over diagonal": pattern.off_diagonal(),
            "|sum mu| over sum |mu|": pattern.imbalance(),
            "loss of two heads over that of one": losses[2] / losses[1],
            "loss of two heads over that of the debiased step": losses[2] / step,
            "loss of two heads": losses[2],
            "loss of one head": losses[1],
            "loss of the debiased step": step,
            "loss of ridge": float(F.mse_loss(ridge(*found, self.noise**2), asked)),
        }

"""Attention as a support vector machine: where gradient descent on one softmax attention layer points in the end.

Samples hold tokens ``x_i: (T, d)``, a query ``z_i: (d,)`` and a label ``y_i`` of 1 or -1. One layer reads

``f_i = head(x_i^T softmax(x_i W z_i))``, and the loss is the mean of ``log(1 + exp(-y_i f_i))``.

Trained with normalised gradient descent the norm of ``W`` diverges, while its direction becomes that of

``min ||W||  such that  (x_{i,a_i} - x_{it})^T W z_i >= 1  for every i and t != a_i``,

with the Frobenius norm where ``W`` is trained and the nuclear norm where ``W = K^T Q`` is trained by its factors. ``a``
are the tokens that are best for the loss (the global direction), or those the training chose (a local one). With a
head that is not linear several tokens of a sample may keep a share: then differences between them vanish in the
direction, and a finite part sets their ratio (:func:`several_svm`). Everything is float64.

Reference: Ataee Tarzanagh et al., 2023, arXiv 2308.16898; code umich-sota/TF-as-SVM, whose logits these are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_axes, check_choice, check_int, check_real, check_values, check_whole, check_within, checked
from ..extras import need
from .experiment import Claim, Experiment

DOUBLE = torch.float64
NORMS = ("fro", "nuc")


class Infeasible(ValueError):
    """No matrix keeps the margins that were asked for: they contradict each other."""


class Samples(NamedTuple):
    """Tokens (n, T, d), queries (n, d), labels (n,) and a linear head (d,)."""

    x: Tensor
    z: Tensor
    y: Tensor
    head: Tensor

    def best(self) -> Tensor:
        """(n,) the token of each sample whose score ``y_i head . x_it`` is largest."""
        return (self.y[:, None] * (self.x @ self.head)).argmax(-1)


def samples(seed: int, n: int = 6, tokens: int = 8, dim: int = 10) -> Samples:
    """Random samples on the unit sphere with random labels, drawn as the authors' notebook draws them.

    >>> samples(0).x.shape
    torch.Size([6, 8, 10])
    """
    g = torch.Generator().manual_seed(seed)
    unit = [F.normalize(torch.randn(dim, generator=g), dim=-1)]
    y = 2.0 * (torch.randn(n, generator=g) > 0) - 1
    unit += [F.normalize(torch.randn(shape, generator=g), dim=-1) for shape in ((n, tokens, dim), (n, dim))]
    return Samples(unit[1].to(DOUBLE), unit[2].to(DOUBLE), y.to(DOUBLE), unit[0].to(DOUBLE))


def _check(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    check_axes("x", x, n=None, T=None, d=None)
    check_axes("z", z, n=x.shape[0], d=x.shape[2])
    if not x.shape[0] or x.shape[1] < 2:
        raise ValueError(f"x must hold at least one sample of two tokens, got shape {tuple(x.shape)}")
    x, z = x.detach().to(DOUBLE), z.detach().to(DOUBLE)
    check_values("x", x)
    check_values("z", z)
    return x, z


def _rows(x: Tensor, z: Tensor, better: Tensor, worse: Tensor, sample: Tensor) -> Tensor:
    """(m, d d): rows whose product with vec(W) is the margin of one token over another."""
    return torch.einsum("ma,mb->mab", x[sample, better] - x[sample, worse], z[sample]).flatten(1)


def _pairs(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept token, token that is not, and sample of every pair."""
    sample, better, worse = (kept[:, :, None] & ~kept[:, None, :]).nonzero(as_tuple=True)
    return better, worse, sample


def margins(w: Tensor, x: Tensor, z: Tensor, chosen: Tensor) -> Tensor:
    """(n, T - 1) margins ``(x_{i,a_i} - x_{it})^T W z_i``."""
    logits = torch.einsum("ntd,de,ne->nt", x, w, z)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, chosen[:, None], False)
    return (logits.gather(1, chosen[:, None]) - logits)[others].view(x.shape[0], -1)


@checked
def attention_svm(x: Tensor, z: Tensor, chosen: Tensor, norm: str = "fro") -> Tensor:
    """The matrix of least norm that puts the chosen token of every sample one above all others.

    The Frobenius problem is a least-distance problem (Lawson and Hanson), solved by non-negative least squares on its
    dual and then exactly on the constraints that bind. The nuclear one is a semidefinite program (cvxpy, Clarabel),
    scaled so that its least margin is one.

    Args:
        x: tokens (n, T, d).
        z: queries (n, d).
        chosen: (n,) integers, the token of each sample that is to win.
        norm: ``"fro"`` or ``"nuc"``.

    Returns:
        ``W`` (d, d), float64; the logits of sample i are ``x_i W z_i``.

    Raises:
        Infeasible: no matrix keeps these margins.

    >>> x, z = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]), torch.tensor([[1.0, 0.0]])
    >>> attention_svm(x, z, torch.tensor([0]))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.0000]], dtype=torch.float64)
    """
    check_choice("norm", norm, NORMS)
    x, z = _check(x, z)
    check_whole("chosen", chosen)
    check_axes("chosen", chosen, n=x.shape[0])
    check_within("chosen", chosen, x.shape[1], "token")
    kept = F.one_hot(chosen.long(), x.shape[1]).bool()
    return _least(_rows(x, z, *_pairs(kept)), None, norm)


def _least(above: Tensor, zero: Tensor | None, norm: str) -> Tensor:
    """Least norm with ``above @ vec(W) >= 1`` and ``zero @ vec(W) = 0``."""
    if norm == "nuc":
        return _nuclear(above, 1.0, zero, None)
    basis = torch.eye(above.shape[1], dtype=DOUBLE)
    if zero is not None and len(zero):
        _, s, vh = torch.linalg.svd(zero)
        basis = vh[int((s > 1e-10 * s.max()).sum()) :].mT
    dim = round(above.shape[1] ** 0.5)
    return (basis @ _least_distance(above @ basis)).view(dim, dim)


def _least_distance(above: Tensor) -> Tensor:
    """The shortest w with ``above @ w >= 1``: its dual is a problem of non-negative least squares."""
    length = above.norm(dim=1, keepdim=True).clamp(min=1e-300)  # columns of one length keep the problem well scaled
    scaled, bound = above / length, 1 / length[:, 0]
    system = torch.cat([scaled.mT, bound[None]])
    target = torch.zeros(len(system), dtype=DOUBLE)
    target[-1] = 1.0
    duals, _ = need("scipy.optimize", "the Frobenius problem").nnls(
        system.numpy(), target.numpy(), maxiter=50 * len(above)
    )
    binding = torch.from_numpy(duals) > 0
    if binding.any():
        solve = torch.linalg.lstsq(scaled[binding], bound[binding, None], driver="gelsd").solution[:, 0]
        if float((above @ solve).min()) >= 1 - 1e-6:
            return solve
    raise Infeasible(f"no matrix keeps all {len(above)} margins: they contradict each other")


def _nuclear(rows: Tensor, bound: float, equal: Tensor | None, values: Tensor | None) -> Tensor:
    cp = need("cvxpy", "the nuclear-norm problem")
    need("clarabel", "the nuclear-norm problem")
    dim = round(rows.shape[1] ** 0.5)
    w = cp.Variable((dim, dim))
    vector = cp.reshape(w, (dim * dim,), order="C")
    constraints = [rows.numpy() @ vector >= bound] if len(rows) else []
    if equal is not None and len(equal):
        target = torch.zeros(len(equal), dtype=DOUBLE) if values is None else values
        constraints.append(equal.numpy() @ vector == target.numpy())
    problem = cp.Problem(cp.Minimize(cp.normNuc(w)), constraints)
    problem.solve(solver="CLARABEL")
    if w.value is None or problem.status not in ("optimal", "optimal_inaccurate"):
        raise Infeasible(f"no matrix keeps all {len(rows)} margins: the solver says {problem.status}")
    found = torch.from_numpy(w.value)
    if len(rows):
        least = float((rows @ found.flatten()).min())
        if least < 0.5 * bound:
            raise Infeasible(f"no matrix keeps all {len(rows)} margins: the least one is {least:.2g}")
        found = found * (bound / least)
    return found


class Several(NamedTuple):
    """``W ~ finite + C direction`` for large C: what sets the ratio of tokens that stay, and what drives others out."""

    finite: Tensor
    direction: Tensor

    def nearest(self, w: Tensor) -> Tensor:
        """``finite + R direction`` nearest to ``w``."""
        r = ((w - self.finite) * self.direction).sum() / (self.direction**2).sum()
        return self.finite + r * self.direction


@checked
def several_svm(x: Tensor, z: Tensor, probabilities: Tensor, norm: str = "fro", threshold: float = 1e-3) -> Several:
    """The generalised problem: tokens whose softmax weight is at least ``threshold`` stay, all others are driven out.

    Args:
        x, z, norm: as in :func:`attention_svm`.
        probabilities: (n, T) softmax weights after training.
        threshold: from which weight a token stays.

    Raises:
        Infeasible: no matrix does that.

    Returns:
        ``finite`` has logit differences ``log(p_s / p_t)`` between tokens that stay, ``direction`` has none between
        them and one towards every other token.
    """
    check_choice("norm", norm, NORMS)
    check_real("threshold", threshold, above=0, below=1)
    x, z = _check(x, z)
    check_axes("probabilities", probabilities, n=x.shape[0], T=x.shape[1])
    p = probabilities.detach().to(DOUBLE)
    kept = p >= threshold
    if not kept.any(1).all():
        raise ValueError("probabilities has a sample none of whose tokens reaches threshold; each must keep one")
    above = _rows(x, z, *_pairs(kept))
    both = (kept[:, :, None] & kept[:, None, :]).triu(1)
    sample, one, other = both.nonzero(as_tuple=True)
    equal = _rows(x, z, one, other, sample)
    ratio = (p[sample, one] / p[sample, other]).log()
    dim = x.shape[2]
    if not len(above):
        raise Infeasible("every token keeps a share: nothing is driven out, so that there is no direction")
    direction = _least(above, equal, norm)
    finite = torch.zeros(dim, dim, dtype=DOUBLE)
    if len(equal):
        solve = torch.linalg.lstsq(equal, ratio[:, None], driver="gelsd").solution[:, 0]
        if float((equal @ solve - ratio).abs().max()) > 1e-6 * max(1.0, float(ratio.abs().max())):
            raise Infeasible("no matrix gives the tokens that stay their ratios")
        finite = solve.view(dim, dim) if norm == "fro" else _nuclear(above[:0], 1.0, equal, ratio)
    return Several(finite, direction)


def correlation(a: Tensor, b: Tensor) -> float:
    """``<A, B> / (||A|| ||B||)``; 0 where one of them is zero."""
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0, eps=1e-300))


class Trained(NamedTuple):
    """``w`` (d, d) and softmax weights (n, T) after the last step; ``path`` (steps // every, d, d)."""

    w: Tensor
    probabilities: Tensor
    path: Tensor


def read(x: Tensor, z: Tensor, w: Tensor, head: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs (n,) and softmax weights (n, T) of the layer; ``value`` (d, h) makes the head ``relu(. value) head``."""
    p = (x @ (z @ w.mT)[..., None])[..., 0].softmax(-1)
    pooled = (p[:, None] @ x)[:, 0]
    return (pooled @ head if value is None else (pooled @ value).relu() @ head), p


@checked
def train(
    data: Samples,
    steps: int = 2000,
    lr: float = 0.1,
    start: Tensor | tuple[Tensor, Tensor] | None = None,
    value: Tensor | None = None,
    optimizer: str = "normalised",
    every: int = 100,
) -> Trained:
    """Gradient descent on the layer, each gradient divided by its own norm.

    Args:
        data: what is learnt.
        steps, lr: number and length of the steps.
        start: ``W`` (d, d) to start from, zeros by default, or the pair ``K, Q`` (m, d) of ``W = K^T Q``, which are
            then trained with a ridge of the machine's rounding, as the authors do.
        value: (d, h) for the head with a ReLU.
        optimizer: ``"normalised"``; ``"plain"`` gradient descent and ``"adam"`` are outside the theory.
        every: how often ``path`` keeps ``W``.
    """
    check_int("steps", steps, least=1)
    check_int("every", every, least=1)
    check_real("lr", lr, above=0)
    check_choice("optimizer", optimizer, ("normalised", "plain", "adam"))
    x, z = _check(data.x, data.z)
    y, head = data.y.to(DOUBLE), data.head.to(DOUBLE)
    value = None if value is None else value.to(DOUBLE)
    dim, eps = x.shape[2], torch.finfo(DOUBLE).eps
    begin = torch.zeros(dim, dim) if start is None else start
    parts = [p.detach().to(DOUBLE).clone().requires_grad_() for p in (begin if isinstance(begin, tuple) else (begin,))]

    def whole() -> Tensor:
        return parts[0] if len(parts) == 1 else parts[0].mT @ parts[1]

    make: Any = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    descent, path = make(parts, lr=lr), []
    for step in range(steps):
        descent.zero_grad()
        loss = F.softplus(-y * read(x, z, whole(), head, value)[0]).mean()
        if len(parts) == 2:
            loss = loss + eps * sum((p**2).sum() for p in parts)
        loss.backward()
        if optimizer == "normalised":
            for slope in (p.grad for p in parts):
                assert slope is not None
                slope /= slope.norm() + eps
        descent.step()
        if (step + 1) % every == 0:
            path.append(whole().detach().clone())
    w = whole().detach()
    kept = torch.stack(path) if path else torch.zeros(0, dim, dim, dtype=DOUBLE)
    return Trained(w, read(x, z, w, head, value)[1], kept)


class AttentionSVM(Experiment):
    """Does training point at the solution of the SVM? Local directions, from random starts, as the authors' notebook.

    Args:
        factors: train ``K`` and ``Q``, whose direction is that of the nuclear norm, instead of ``W``.
        dim, tokens, n: sizes.
        steps: of training.
        optimizer: see :func:`train`.
    """

    name = "attention is a support vector machine"

    @checked
    def __init__(
        self, factors: bool = False, dim: int = 10, tokens: int = 8, n: int = 6, steps: int = 2000,
        optimizer: str = "normalised",
    ):  # fmt: skip
        self.factors, self.dim, self.tokens, self.n = factors, dim, tokens, n
        self.steps, self.optimizer = steps, optimizer

    def predict(self) -> dict[str, Claim]:
        return {"correlation with the SVM": Claim.above(0.99), "weight of the chosen token": Claim.above(0.99)}

    def outside(self) -> AttentionSVM:
        """Adam, whose steps are not along the gradient."""
        return AttentionSVM(self.factors, self.dim, self.tokens, self.n, self.steps, "adam")

    def run(self, seed: int) -> dict[str, float]:
        data = samples(seed, self.n, self.tokens, self.dim)
        g = torch.Generator().manual_seed(1000 + seed)
        draws = [(2 * torch.rand(self.dim, self.dim, generator=g) - 1) / self.dim**0.5 for _ in range(1 + self.factors)]
        trained = train(data, self.steps, start=tuple(draws) if self.factors else draws[0], optimizer=self.optimizer)  # type: ignore[arg-type]
        best = trained.probabilities.max(-1)
        found = {n: correlation(trained.w, attention_svm(data.x, data.z, best.indices, n)) for n in NORMS}
        mine = NORMS[self.factors]
        return {
            "correlation with the SVM": found.pop(mine),
            "correlation with the other norm's": found.popitem()[1],
            "weight of the chosen token": float(best.values.mean()),
            "share of best tokens chosen": float((best.indices == data.best()).double().mean()),
        }

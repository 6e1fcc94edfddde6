"""One attention layer whose queries and keys are random and frozen: regression that cannot tell the keys' order.

A query ``x_0`` and keys ``x_1 ... x_N`` in d dimensions, each with a 1 appended (``~x``). The features of head m are

``phi_m(x) = 1/N sum_i relu(~x_0^T W_m ~x_i) ~x_i``  (d + 1 numbers),

``W_m`` Gaussian and frozen, and the output ``sum_m <v_m, phi_m(x)>`` is linear in what is trained. ``W_m`` of mean zero
are RFA, of mean ``bias * diag(I_d, 0)`` BRFA, which sees how query and keys correlate. The baseline RFMLP puts random
units on all tokens side by side, with as many trained numbers. Targets are means over keys of functions of query and
key; attention needs samples for d numbers where the MLP needs them for all N d. For ``<x_0, x_i>^p <beta, x_i>^q`` RFA
needs ``d^max(p, q)``, BRFA ``d^q``: a bias helps where ``p > q``.

Our reading: no code was released, and the constants of the distributions (``std``, ``bias``, the sphere that inputs
come from) are unsure, so they are options.

Reference: Fu et al., 2023, arXiv 2307.11353.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_axes, check_choice, check_flag, check_int, check_real, checked
from .experiment import Claim, Experiment

DOUBLE = torch.float64
FORMS = ("primal", "dual")
PENALTIES = (1e-3, 1e-1, 1.0, 10.0, 100.0, 1000.0)


class RandomFeatureAttention(nn.Module):
    """Features of RFA (``bias=0``) and BRFA.

    Args:
        dim: width of a token.
        heads: M.
        bias: the mean of ``W_m`` is this multiple of ``diag(I_d, 0)`` (unsure).
        std: standard deviation of its entries (unsure: 1/2).
        activation: ``"relu"``, or ``"exp"``.
        normalise: weights of a head are divided by their sum over keys, which with ``"exp"`` is softmax attention;
            otherwise by the number of keys.
        seed: of the frozen weights.

    >>> layer = RandomFeatureAttention(16, 1000)
    >>> layer(torch.randn(2, 16), torch.randn(2, 5, 16)).shape
    torch.Size([2, 17000])
    """

    weight: Tensor

    @checked
    def __init__(
        self, dim: int, heads: int, bias: float = 0.0, std: float = 0.5, activation: str = "relu",
        normalise: bool = False, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        check_int("dim", dim, least=1)
        check_int("heads", heads, least=1)
        check_real("std", std, least=0)
        check_choice("activation", activation, ("relu", "exp"))
        check_flag("normalise", normalise)
        self.dim, self.heads, self.activation, self.normalise = dim, heads, activation, normalise
        drawn = torch.randn(heads, dim + 1, dim + 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
        mean = torch.diag(torch.tensor([1.0] * dim + [0.0], dtype=DOUBLE))
        self.register_buffer("weight", std * drawn + bias * mean)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """``query`` (B, d), ``keys`` (B, N, d) to features (B, heads (d + 1))."""
        check_axes("query", query, B=None, d=self.dim)
        check_axes("keys", keys, B=query.shape[0], N=None, d=self.dim)
        if not keys.shape[1]:
            raise ValueError("keys has none; features are a mean over keys")
        q, k = (F.pad(t, (0, 1), value=1.0) for t in (query, keys))
        asked = torch.einsum("bd,mde->bme", q, self.weight.to(q.dtype))
        scores = asked @ k.mT
        if self.activation == "exp" and self.normalise:
            return (scores.softmax(-1) @ k).flatten(1)
        weights = scores.relu() if self.activation == "relu" else scores.exp()
        if self.normalise:
            total = weights.sum(-1, keepdim=True)
            return (weights / torch.where(total == 0, 1, total) @ k).flatten(1)
        return (weights @ k / keys.shape[1]).flatten(1)


class RandomFeatureMLP(nn.Module):
    """Random ReLU units on all tokens side by side, and a 1.

    Args:
        dim: width of a token.
        keys: their number N.
        units: hidden units.
        std: standard deviation of their weights (unsure).
        seed: of the frozen weights.
    """

    weight: Tensor

    @checked
    def __init__(self, dim: int, keys: int, units: int, std: float = 0.5, seed: int = 0):
        super().__init__()
        for name, value in (("dim", dim), ("keys", keys), ("units", units)):
            check_int(name, value, least=1)
        check_real("std", std, least=0)
        self.dim, self.keys, self.units = dim, keys, units
        width = dim * (keys + 1) + 1
        drawn = torch.randn(units, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("weight", std * drawn)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """``query`` (B, d), ``keys`` (B, N, d) to features (B, units)."""
        check_axes("query", query, B=None, d=self.dim)
        check_axes("keys", keys, B=query.shape[0], N=self.keys, d=self.dim)
        x = F.pad(torch.cat([query[:, None], keys], 1).flatten(1), (0, 1), value=1.0)
        return F.linear(x, self.weight.to(x.dtype)).relu()


@checked
def ridge(features: Tensor, targets: Tensor, penalty: float, form: str | None = None) -> Tensor:
    """The v that minimises ``|features v - targets|^2 + penalty |v|^2``, in closed form.

    Args:
        features: (n, p).
        targets: (n,).
        penalty: above 0.
        form: ``"primal"`` solves p equations, ``"dual"`` n; the smaller by default.

    >>> x, y = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    >>> torch.allclose(ridge(x, y, 0.1, "primal"), ridge(x, y, 0.1, "dual"))
    True
    """
    check_axes("features", features, n=None, p=None)
    check_axes("targets", targets, n=features.shape[0])
    check_real("penalty", penalty, above=0)
    if form is None:
        form = FORMS[features.shape[0] < features.shape[1]]
    check_choice("form", form, FORMS)
    gram = features.mT @ features if form == "primal" else features @ features.mT
    gram = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if form == "primal":
        return torch.linalg.solve(gram, features.mT @ targets)
    return features.mT @ torch.linalg.solve(gram, targets)


def target(
    query: Tensor, keys: Tensor, beta: Tensor, power: int = 1, with_query: int = 0, gamma: float | None = None
) -> Tensor:
    """``1/N sum_i <x_0, x_i>^with_query <beta, x_i>^power``; with ``gamma``, keys weigh ``softmax(gamma <x_0, x_i>)``.

    Args:
        query, keys, beta: (B, d), (B, N, d), (d,).
        power: at least 0.
        with_query: 0 is a function of keys alone.
        gamma: strength of the softmax in place of ``1/N``.
    """
    check_axes("query", query, B=None, d=None)
    check_axes("keys", keys, B=query.shape[0], N=None, d=query.shape[1])
    check_axes("beta", beta, d=query.shape[1])
    check_int("power", power, least=0)
    check_int("with_query", with_query, least=0)
    meets = torch.einsum("bd,bnd->bn", query, keys)
    values = meets**with_query * (keys @ beta) ** power
    return values.mean(1) if gamma is None else ((gamma * meets).softmax(-1) * values).sum(1)


class RandomFeatures(Experiment):
    """Which layer learns which target from few samples?

    Args:
        dim, keys, heads: sizes; every model trains ``heads (dim + 1)`` numbers.
        count, tested: samples to learn from (a fifth of them choose the penalty) and to judge by.
        bias: of BRFA.
        ordered: the target reads the first key alone, which is outside of the theory: it is not a mean over keys.
    """

    name = "one attention layer of random features"

    @checked
    def __init__(
        self, dim: int = 8, keys: int = 8, heads: int = 128, count: int = 1024, tested: int = 2000, bias: float = 4.0,
        ordered: bool = False,
    ):  # fmt: skip
        self.dim, self.keys, self.heads, self.count, self.tested = dim, keys, heads, count, tested
        self.bias, self.ordered = bias, ordered

    def predict(self) -> dict[str, Claim]:
        return {
            "error of plain attention, square of keys": Claim.below(0.5),
            "attention over MLP, square of keys": Claim.below(1.0),
            "attention over MLP, query times key": Claim.below(1.0),
            "biased over plain attention, fourth power of query times key": Claim.below(1.0),
        }

    def outside(self) -> RandomFeatures:
        """The target is a function of the first key alone."""
        return RandomFeatures(**{**self.setting(), "ordered": True})

    def run(self, seed: int) -> dict[str, float]:
        g = torch.Generator().manual_seed(seed)
        total = self.count + self.tested
        x = F.normalize(torch.randn(total, self.keys + 1, self.dim, dtype=DOUBLE, generator=g), dim=-1)
        beta = F.normalize(torch.randn(self.dim, dtype=DOUBLE, generator=g), dim=0)
        query, keys = x[:, 0], x[:, 1:]
        seen = keys[:, :1] if self.ordered else keys
        targets = {
            "square of keys": target(query, seen, beta, power=2),
            "query times key": target(query, seen, beta, with_query=1),
            "fourth power of query times key": target(query, seen, beta, with_query=4),
        }
        models: Mapping[str, nn.Module] = {
            "plain attention": RandomFeatureAttention(self.dim, self.heads, seed=seed),
            "biased attention": RandomFeatureAttention(self.dim, self.heads, bias=self.bias, seed=seed),
            "MLP": RandomFeatureMLP(self.dim, self.keys, self.heads * (self.dim + 1), seed=seed),
        }
        found: dict[str, float] = {}
        for name, model in models.items():
            features = model(query, keys)
            for kind, y in targets.items():
                found[f"error of {name}, {kind}"] = self._error(features, (y - y.mean()) / y.std())
        for kind in targets:
            plain = found[f"error of plain attention, {kind}"]
            found[f"attention over MLP, {kind}"] = plain / found[f"error of MLP, {kind}"]
            found[f"biased over plain attention, {kind}"] = found[f"error of biased attention, {kind}"] / plain
        return found

    def _error(self, features: Tensor, y: Tensor, penalties: Sequence[float] = PENALTIES) -> float:
        """Mean squared error on the test samples, as a share of the target's variance."""
        features = F.pad(features, (0, 1), value=float(features.std()))  # an intercept
        learnt, chosen = slice(0, self.count * 4 // 5), slice(self.count * 4 // 5, self.count)
        fits = [ridge(features[learnt], y[learnt], p) for p in penalties]
        best = min(range(len(fits)), key=lambda i: float((features[chosen] @ fits[i] - y[chosen]).square().mean()))
        return float((features[self.count :] @ fits[best] - y[self.count :]).square().mean())

"""How many visual tokens each layer of a decoder needs: greedy search, and a sigmoid fitted to a budget.

Tokens are ranked, in every layer, by the attention they got in the layer before, and those dropped stay dropped. Since
the ranks hardly change from layer to layer, a policy is a vector of counts that never grow, ``k_1 >= ... >= k_L``.

G-Search finds the smallest counts that keep a score ``f(k)``, from shallow to deep: with the counts before it fixed,

    ``k_l = min { m <= k_{l-1} : f(k_1, ..., k_{l-1}, m, ..., m) >= f(n, ..., n) - tolerance }``,

by bisection. It is exact where f falls with fewer tokens and deeper layers need no more than shallower ones.

P-Sigmoid gives the best counts for a budget: the share of tokens in layer l of L is

    ``r(l) = low + (high - low) sigmoid(-steepness (l - centre))``,

with ``centre`` solved from the budget and the rest searched by Bayesian optimisation.

The paper's code is not released, and what is known of it comes from reviews. They do not say which queries rank the
tokens, the steps of the search, or the sigmoid's parameters: here those are settings, text after the image ranks, the
search bisects, and the three parameters above are used. Nothing is dropped by the ranks of the first layer, which
differ from all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_int, check_real, checked, shaped
from ..hooks.site import Site
from .base import ByAttention, Rate, ReduceByAttention, Selector, TopK

# --------------------------------------------------------------------------------------------------------------------
# Acting


class ScheduledPruning(ReduceByAttention):
    """Keep, in every layer, the visual tokens that got the most attention in the layer before.

    Args:
        rates: share of visual tokens that each layer reads, one per layer; never growing. Shares serve any image size.
        counts: numbers instead of shares; the first is that of all visual tokens of a sample.
        rows: whose attention ranks: ``"text"`` after the image, or ``"last"`` token.
        first_layer: earlier layers read all tokens; at least 2, since the ranks of layer 0 are not those of others.

    Raises:
        ValueError: both or neither of ``rates`` and ``counts``, values that grow, or that drop tokens before
            ``first_layer``; when attached, not one value per layer.

    Reference: Zhao et al., 2024, arXiv 2412.00556 (searching optimal vision token reduction).

    >>> sorted(ScheduledPruning([1.0, 1.0, 0.5, 0.25]).layers)
    [1, 2, 3]
    """

    name: ClassVar[str] = "scheduled-pruning"

    def __init__(
        self,
        rates: Sequence[float] | None = None,
        counts: Sequence[int] | None = None,
        rows: str = "text",
        first_layer: int = 2,
    ):
        if (rates is None) == (counts is None):
            raise ValueError("give either rates or counts, one per layer")
        values: list[float] | list[int] = list(rates) if rates is not None else list(counts or ())
        if not values or any(b > a for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"tokens that were dropped stay dropped, so values must never grow; got {values}")
        if first_layer < 2:
            raise ValueError(
                f"first_layer must be at least 2: nothing is dropped by the ranks of layer 0; got {first_layer}"
            )
        self.values, self.of = values, None if counts is None else int(values[0])
        before: float = values[0] if rates is None else 1.0
        chosen: dict[int, Selector] = {}
        for layer, value in enumerate(values):
            if value < before:
                chosen[layer] = TopK(int(value)) if rates is None else Rate(float(value))
            before = value
        early = sorted(n for n in chosen if n < first_layer)
        if early:
            raise ValueError(
                f"layers {early} would drop tokens by the ranks of a layer before {first_layer - 1}; give them the "
                "value of all tokens"
            )
        super().__init__(chosen or {first_layer: 1.0}, ByAttention(rows), first_layer=first_layer)

    def reduce(self, site: Site, hidden: Tensor, image: Tensor, selector: Selector) -> tuple[Tensor, Tensor] | None:
        found = self.images_before(site)
        if self.of is not None and bool(((found != self.of) & (found > 0)).any()):
            raise ValueError(
                f"counts are for {self.of} visual tokens, the samples have {found.tolist()}; give rates, which serve "
                "any number"
            )
        return super().reduce(site, hidden, image, selector)

    def prepare(self, model: Any, sites: Sequence[Any]) -> None:
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        if len(self.values) != config.num_hidden_layers:
            raise ValueError(f"{len(self.values)} values were given, the model has {config.num_hidden_layers} layers")

    @property
    def identity(self) -> bool:
        return not self.schedule


# --------------------------------------------------------------------------------------------------------------------
# Greedy search


@dataclass
class Evaluations:
    """A score of policies that remembers what it was asked.

    >>> f = Evaluations(lambda k: sum(k)); f((3, 1)), f((3, 1)), f.count
    (4.0, 4.0, 1)
    """

    score: Callable[[tuple[int, ...]], float]
    seen: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __call__(self, counts: Sequence[int]) -> float:
        key = tuple(counts)
        if key not in self.seen:
            self.seen[key] = float(self.score(key))
        return self.seen[key]

    @property
    def count(self) -> int:
        """How often the score was really computed."""
        return len(self.seen)


@dataclass(frozen=True)
class SearchResult:
    """What a search found: ``counts`` per layer (or ``parameters``), their ``score``, and the ``history`` of all
    policies that were evaluated, in order."""

    counts: tuple[int, ...]
    score: float
    history: tuple[tuple[tuple[float, ...], float], ...]
    parameters: tuple[float, ...] = ()

    @property
    def evaluations(self) -> int:
        """How many policies were evaluated."""
        return len(self.history)

    def rates(self, n: int) -> tuple[float, ...]:
        """Counts as shares of n, to serve other image sizes."""
        return tuple(k / n for k in self.counts)


@shaped(tolerance="infinite")
def greedy_search(
    score: Callable[[tuple[int, ...]], float],
    layers: int,
    n: int,
    tolerance: float = 0.0,
    minimum: int = 0,
    first_layer: int = 0,
    grid: Sequence[int] | None = None,
) -> SearchResult:
    """G-Search: the smallest counts that keep the score, layer by layer from shallow to deep.

    Args:
        score: f, of one count per layer; larger is better. Each policy is asked once.
        layers: L.
        n: visual tokens.
        tolerance: how far the score may fall below that of all tokens.
        minimum: fewest tokens of a layer.
        first_layer: layers before it keep all.
        grid: counts to choose from; by default all from ``minimum`` to n.

    Returns:
        The counts, never growing; about ``L log2(n)`` evaluations.

    Raises:
        ValueError: no layers, a minimum above n, a grid without n.

    Reference: Zhao et al., 2024, arXiv 2412.00556 (G-Search).

    >>> greedy_search(lambda k: float(k[0] >= 5 and k[1] >= 2), layers=2, n=8).counts
    (5, 2)
    """
    if layers < 1 or not 0 <= minimum <= n or not 0 <= first_layer <= layers:
        raise ValueError(
            f"layers must be at least 1, minimum within 0 to n and first_layer within 0 to layers; got {layers}, "
            f"{minimum} of {n}, {first_layer}"
        )
    steps = sorted(set(range(minimum, n + 1) if grid is None else grid))
    if not steps or steps[-1] != n or steps[0] < minimum:
        raise ValueError(f"grid must lie between {minimum} and {n} and hold {n}; got {steps}")
    f = Evaluations(score)
    goal = f((n,) * layers) - tolerance
    counts: list[int] = [n] * first_layer
    top = len(steps) - 1
    for layer in range(first_layer, layers):
        low, high = 0, top  # with steps[high] everywhere the score is kept
        while low < high:
            middle = (low + high) // 2
            if f((*counts, *[steps[middle]] * (layers - layer))) >= goal:
                high = middle
            else:
                low = middle + 1
        counts.append(steps[high])
        top = high
    found = tuple(counts)
    return SearchResult(found, f(found), tuple(f.seen.items()))


# --------------------------------------------------------------------------------------------------------------------
# Sigmoid schedules


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


@checked
@dataclass(frozen=True)
class SigmoidSchedule:
    """``r(l) = low + (high - low) sigmoid(-steepness (l - centre))``, never growing with depth.

    Args:
        low: share that the deepest layers tend to.
        high: share that the first layers tend to.
        steepness: how fast it falls; 0 is constant.
        centre: layer where it is half-way.

    >>> [round(r, 2) for r in SigmoidSchedule(0.0, 1.0, 2.0, 1.0).rates(3)]
    [0.88, 0.5, 0.12]
    """

    low: float
    high: float
    steepness: float
    centre: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(f"shares must lie in [0, 1], low not above high; got low={self.low}, high={self.high}")
        if not self.steepness >= 0:
            raise ValueError(f"steepness must not be negative: counts would grow with depth; got {self.steepness}")

    def rates(self, layers: int) -> tuple[float, ...]:
        """The share of each layer."""
        span = self.high - self.low
        return tuple(self.low + span * _sigmoid(-self.steepness * (l - self.centre)) for l in range(layers))

    def counts(self, layers: int, n: int) -> tuple[int, ...]:
        """The count of each layer: rounded so that the mean is within one token of the unrounded, never growing."""
        counts, owed = [], 0.0
        last = n
        for rate in self.rates(layers):
            exact = rate * n
            count = min(last, max(0, math.floor(exact + owed + 0.5)))
            owed += exact - count
            counts.append(count)
            last = count
        return tuple(counts)

    @classmethod
    def fitted(
        cls,
        budget: float,
        layers: int,
        low: float = 0.0,
        high: float = 1.0,
        steepness: float = 0.5,
        cost: Callable[[Sequence[float]], float] | None = None,
    ) -> SigmoidSchedule:
        """The schedule of these parameters whose ``centre`` meets a budget.

        Args:
            budget: mean share of tokens per layer; with ``cost``, the share of the cost of reading all tokens.
            layers: L.
            low: see the class; lowered to the budget where it exceeds it.
            high: see the class; raised to the budget where it is below.
            steepness: see the class; 0 gives the budget in every layer.
            cost: of the shares of all layers, growing with each; their mean by default.

        Raises:
            ValueError: a budget outside (0, 1], or one that these parameters cannot meet.

        >>> s = SigmoidSchedule.fitted(0.25, layers=32, steepness=0.4)
        >>> round(sum(s.rates(32)) / 32, 6)
        0.25
        """
        if not 0.0 < budget <= 1.0:
            raise ValueError(f"budget must lie in (0, 1]: a share of all tokens, or of their cost; got {budget}")
        price = cost or (lambda rates: sum(rates) / len(rates))
        whole = price([1.0] * layers)

        def spent(schedule: SigmoidSchedule) -> float:
            return price(schedule.rates(layers)) / whole

        if steepness == 0.0 or cost is None:
            low, high = min(low, budget), max(high, budget)
        if steepness == 0.0:
            # Constant: the share itself is what is solved for.
            below, above = 0.0, 1.0
            for _ in range(100):
                middle = (below + above) / 2
                if spent(cls(middle, middle, 0.0, 0.0)) < budget:
                    below = middle
                else:
                    above = middle
            return cls(above, above, 0.0, 0.0)
        reach = 40.0 / steepness
        left, right = -reach, layers + reach
        least, most = spent(cls(low, high, steepness, left)), spent(cls(low, high, steepness, right))
        slack = 1e-6
        if not least - slack <= budget <= most + slack:
            raise ValueError(
                f"with low={low} and high={high} the budget lies between {least:.4f} and {most:.4f}; {budget} was asked"
            )
        for _ in range(200):
            middle = (left + right) / 2
            if spent(cls(low, high, steepness, middle)) < budget:
                left = middle
            else:
                right = middle
        return cls(low, high, steepness, (left + right) / 2)


# --------------------------------------------------------------------------------------------------------------------
# Bayesian optimisation


def _gram(a: Tensor, b: Tensor, length: float) -> Tensor:
    """Matern 5/2 covariance of points in the unit cube."""
    d = torch.cdist(a, b) * math.sqrt(5.0) / length
    return (1 + d + d * d / 3) * torch.exp(-d)


def _posterior(x: Tensor, y: Tensor, at: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation at points, with the length scale of the largest evidence."""
    best: tuple[float, Tensor, Tensor] | None = None
    eye = torch.eye(len(x), dtype=x.dtype)
    for length in (0.1, 0.2, 0.35, 0.6, 1.0, 2.0):
        chol = torch.linalg.cholesky(_gram(x, x, length) + noise * eye)
        weights = torch.cholesky_solve(y[:, None], chol)
        evidence = float(-0.5 * (y[None] @ weights).sum() - chol.diagonal().log().sum())
        if best is None or evidence > best[0]:
            cross = _gram(at, x, length)
            solved = torch.linalg.solve_triangular(chol, cross.T, upper=False)
            best = (evidence, (cross @ weights)[:, 0], (1 - solved.pow(2).sum(0)).clamp(min=1e-12).sqrt())
    assert best is not None
    return best[1], best[2]


@shaped()
def bayesian_search(
    score: Callable[[tuple[float, ...]], float],
    bounds: Sequence[tuple[float, float]],
    evaluations: int,
    start: Sequence[Sequence[float]] = (),
    explore: int = 5,
    noise: float = 1e-4,
    seed: int = 0,
) -> tuple[tuple[float, ...], float, tuple[tuple[tuple[float, ...], float], ...]]:
    """Maximise a function of a few bounded parameters with a Gaussian process and expected improvement.

    Args:
        score: f; larger is better.
        bounds: (least, most) of each parameter.
        evaluations: how often f is computed.
        start: points to begin with.
        explore: scattered points to begin with, after ``start``.
        noise: variance of f's noise, as a part of its own.
        seed: of the scattered points and the candidates.

    Returns:
        The best point, its score, and all points with their scores in order.

    Raises:
        ValueError: no bounds, bounds in the wrong order, no evaluations.

    >>> best, value, history = bayesian_search(lambda p: -(p[0] - 0.3) ** 2, [(0.0, 1.0)], 12)
    >>> abs(best[0] - 0.3) < 0.02, len(history)
    (True, 12)
    """
    if not bounds or any(not a < b for a, b in bounds):
        raise ValueError(f"bounds must be pairs (least, most), got {list(bounds)}")
    check_int("evaluations", evaluations, least=1)
    check_int("explore", explore, least=0)
    check_real("noise", noise, above=0)
    generator = torch.Generator().manual_seed(seed)
    low = torch.tensor([b[0] for b in bounds], dtype=torch.float64)
    span = torch.tensor([b[1] - b[0] for b in bounds], dtype=torch.float64)
    sobol = torch.quasirandom.SobolEngine(len(bounds), scramble=True, seed=seed)
    waiting = [((torch.tensor(p, dtype=torch.float64) - low) / span).clamp(0, 1) for p in start]
    waiting += list(sobol.draw(explore).to(torch.float64)) if explore else []
    points: list[Tensor] = []
    values: list[float] = []
    history: list[tuple[tuple[float, ...], float]] = []
    for number in range(evaluations):
        if number < len(waiting):
            x = waiting[number]
        elif not points:
            x = torch.full_like(low, 0.5)
        else:
            done, y = torch.stack(points), torch.tensor(values, dtype=torch.float64)
            spread = float(y.std()) if len(y) > 1 else 0.0
            y = (y - y.mean()) / (spread or 1.0)
            best = done[int(y.argmax())]
            near = best + torch.randn(256, len(low), dtype=torch.float64, generator=generator) * 0.05
            far = torch.rand(512, len(low), dtype=torch.float64, generator=generator)
            candidates = torch.cat([near.clamp(0, 1), far])
            mean, deviation = _posterior(done, y, candidates, noise)
            better = mean - y.max()
            z = better / deviation
            normal = torch.distributions.Normal(0.0, 1.0)
            gain = better * normal.cdf(z) + deviation * normal.log_prob(z).exp()
            x = candidates[int(gain.argmax())]
        parameters = tuple((low + x * span).tolist())
        value = float(score(parameters))
        points.append(x)
        values.append(value)
        history.append((parameters, value))
    top = max(range(len(values)), key=values.__getitem__)
    return history[top][0], history[top][1], tuple(history)


@shaped()
def sigmoid_search(
    score: Callable[[tuple[int, ...]], float],
    layers: int,
    n: int,
    budget: float,
    evaluations: int = 30,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    cost: Callable[[Sequence[float]], float] | None = None,
    first_layer: int = 0,
    like: Sequence[int] | None = None,
    seed: int = 0,
) -> SearchResult:
    """P-Sigmoid: the sigmoid schedule of the best score within a budget.

    Args:
        score: f, of one count per layer; larger is better.
        layers: L.
        n: visual tokens.
        budget: mean share of tokens per layer, or share of ``cost``.
        evaluations: of f.
        bounds: of ``low``, ``high`` and ``steepness``.
        cost: see :meth:`SigmoidSchedule.fitted`.
        first_layer: layers before it keep all; the budget is that of the others.
        like: counts whose curve to begin with, as greedy search found them.
        seed: of the search.

    Returns:
        The counts, with ``parameters`` (low, high, steepness, centre).

    Reference: Zhao et al., 2024, arXiv 2412.00556 (P-Sigmoid).

    >>> sigmoid_search(lambda k: k[1], layers=4, n=16, budget=0.5, evaluations=8).evaluations
    8
    """
    check_int("layers", layers, least=1)
    check_int("first_layer", first_layer, least=0, most=layers - 1)
    check_int("n", n, least=1)
    limits = {"low": (0.0, budget), "high": (budget, 1.0), "steepness": (0.05, 3.0), **(bounds or {})}
    unknown = sorted(set(limits) - {"low", "high", "steepness"})
    if unknown:
        raise ValueError(f"bounds are of low, high and steepness; got {unknown}")
    if not 0.0 < budget < 1.0:
        raise ValueError(f"budget must lie in (0, 1), got {budget}")
    inner = layers - first_layer

    def schedule(point: Sequence[float]) -> SigmoidSchedule:
        low, high, steepness = point
        return SigmoidSchedule.fitted(budget, inner, low, high, steepness, cost)

    def counts(point: Sequence[float]) -> tuple[int, ...]:
        return (n,) * first_layer + schedule(point).counts(inner, n)

    f = Evaluations(score)
    start = []
    if like is not None:
        curve = [k / n for k in like[first_layer:]]
        start.append([curve[-1], curve[0], _steepness(curve)])
    best, value, history = bayesian_search(
        lambda p: f(counts(p)), [limits[name] for name in ("low", "high", "steepness")], evaluations, start, seed=seed
    )
    found = schedule(best)
    parameters = (found.low, found.high, found.steepness, found.centre)
    return SearchResult(counts(best), value, history, parameters)


def _steepness(curve: Sequence[float]) -> float:
    """Of a sigmoid between the ends of a falling curve: four times its steepest fall, as a part of all."""
    span = curve[0] - curve[-1]
    if span <= 0:
        return 0.05
    return 4 * max(a - b for a, b in zip(curve, curve[1:], strict=False)) / span


# --------------------------------------------------------------------------------------------------------------------
# Ranks


@shaped(scores="number (L, B, n) | (L, n)")
def rank_consistency(scores: Tensor) -> Tensor:
    """How alike layers rank the same tokens: Spearman's correlation of every pair of layers, averaged over samples.

    Args:
        scores: (L, B, n) or (L, n) of the same tokens in every layer; equal scores share their mean rank.

    Returns:
        (L, L), 1 for the same order, 0 on average for unrelated ones.

    Raises:
        ValueError: fewer than two tokens.

    >>> rank_consistency(torch.tensor([[0.1, 0.5, 0.9], [2.0, 3.0, 7.0], [3.0, 2.0, 1.0]]))[0].round().tolist()
    [1.0, 1.0, -1.0]
    """
    if scores.dim() == 2:
        scores = scores[:, None]
    if scores.shape[-1] < 2 or not scores.numel():
        raise ValueError(f"scores must be (L, B, n) with a sample and at least two tokens, got {tuple(scores.shape)}")
    wide = scores.to(torch.float64)
    less = (wide.unsqueeze(-1) > wide.unsqueeze(-2)).sum(-1)
    same = (wide.unsqueeze(-1) == wide.unsqueeze(-2)).sum(-1)
    rank = less.to(torch.float64) + (same - 1).to(torch.float64) / 2
    centred = rank - rank.mean(-1, keepdim=True)
    norm = centred.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, centred / norm.clamp(min=1e-12), torch.zeros_like(centred))
    return torch.einsum("abn,cbn->bac", unit, unit).mean(0)

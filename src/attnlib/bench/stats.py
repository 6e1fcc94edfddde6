"""The statistics of a comparison: intervals over seeds, growth exponents and where two cost curves cross."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..checks import check_int, check_real


class Interval(NamedTuple):
    """A mean over seeds with the half-width of its confidence interval.

    ``half`` is ``None`` when one seed leaves no interval to speak of.
    """

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t-interval of the mean of independent ``values``.

    Args:
        values: one measurement per seed.
        confidence: coverage, strictly between 0 and 1.

    Returns:
        The mean, the half-width (``None`` for a single value) and the number of values.

    Raises:
        ValueError: when there is no value or ``confidence`` is out of range.

    >>> mean_interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence} is not possible; it must lie strictly between 0 and 1")
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("values is empty; an interval needs at least one measurement")
    if data.size == 1:
        return Interval(float(data[0]), None, 1)
    from scipy import stats

    half = float(stats.t.ppf(0.5 + confidence / 2, data.size - 1)) * float(data.std(ddof=1)) / math.sqrt(data.size)
    return Interval(float(data.mean()), half, int(data.size))


def share_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share: it stays within 0 and 1, and has a width where all or none succeeded.

    >>> low, high = share_interval(100, 100)
    >>> round(low, 3), high
    (0.963, 1.0)
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes={successes} must lie in 0..n and n={n} be at least 1")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence} is not possible; it must lie strictly between 0 and 1")
    from scipy import stats

    z, share = float(stats.norm.ppf(0.5 + confidence / 2)), successes / n
    centre, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max((centre - width) / scale, 0.0), min((centre + width) / scale, 1.0)


#: The name of its author.
wilson = share_interval


def paired_interval(
    values: Mapping[int, float], reference: Mapping[int, float], confidence: float = 0.95
) -> Interval | None:
    """The interval of ``values - reference`` over the seeds both have, or ``None`` when they share none.

    Runs of one seed see the same batches in the same order, so that the difference is tighter than either mean.

    >>> paired_interval({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    Interval(mean=1.0, half=0.0, n=2)
    """
    shared = sorted(set(values) & set(reference))
    if not shared:
        return None
    return mean_interval([values[s] - reference[s] for s in shared], confidence)


def paired_test(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[float, float] | None:
    """Mean of ``a - b`` over the seeds both have, and the two-sided p of Student's paired test; ``None`` below three.

    >>> paired_test({0: 1.0, 1: 2.0, 2: 0.0}, {0: 0.0, 1: 1.0, 2: -1.0})
    (1.0, 0.0)
    """
    shared = sorted(set(a) & set(b))
    if len(shared) < 3:  # two that agree by chance would have no spread at all
        return None
    gaps = np.asarray([a[s] - b[s] for s in shared])
    mean, spread = float(gaps.mean()), float(gaps.std(ddof=1))
    if spread == 0.0:
        return mean, 1.0 if mean == 0.0 else 0.0
    from scipy import stats

    t = abs(mean) / (spread / math.sqrt(len(shared)))
    return mean, float(2 * stats.t.sf(t, len(shared) - 1))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which of several tests hold together at level ``alpha`` (Holm 1979, Scand. J. Statist. 6, 65-70).

    >>> holm([0.001, 0.04, 0.03], 0.05)
    [True, False, False]
    """
    holds = [False] * len(p_values)
    for done, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > alpha / (len(p_values) - done):
            break
        holds[index] = True
    return holds


def permutation_p(a: Sequence[float], b: Sequence[float], draws: int = 9999, seed: int = 0) -> float:
    """Two-sided p of the mean of ``a - b``, item by item, when the two of any item could be exchanged.

    Exact where all ``2 ** n`` exchanges are no more than ``draws``; else from random ones, the one at hand among them.

    Args:
        a, b: a score per item, in one order.
        draws: exchanges at most.
        seed: of the random ones.

    >>> permutation_p([1, 2, 3, 4], [0, 0, 0, 0])
    0.125
    """
    check_int("draws", draws, least=1)
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ValueError(f"a and b must hold a score per item each, of the same items, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a and b must be finite; leave items without a score out of both")
    from scipy import stats

    def gap(gaps: Any, axis: int) -> Any:
        return np.abs(gaps.mean(axis=axis))

    found = stats.permutation_test(
        (x - y,), gap, permutation_type="samples", alternative="greater", n_resamples=draws,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, draws: int = 2000, seed: int = 0,
    items: Sequence[Any] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Percentiles of the mean when items are drawn again.

    Args:
        values: scores.
        confidence: coverage.
        draws: resamples.
        seed: of them.
        items: whose score each is; all scores of an item are drawn together. Every score is an item of its own by
            default.

    >>> bootstrap_interval([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    check_int("draws", draws, least=1)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence} is not possible; it must lie strictly between 0 and 1")
    data = np.asarray(values, dtype=float)
    names = list(range(data.size)) if items is None else list(items)
    if data.ndim != 1 or not data.size or len(names) != data.size:
        raise ValueError(f"values must hold a score, and items a name, each; got {data.size} and {len(names)}")
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    which = np.asarray([number[name] for name in names])
    total, count = np.bincount(which, data), np.bincount(which)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for start in range(0, draws, 256):  # bounds the memory
        drawn = rng.integers(len(total), size=(min(256, draws - start), len(total)))
        means[start : start + len(drawn)] = total[drawn].sum(1) / count[drawn].sum(1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """A mean difference and percentiles of it when items are drawn again; ``n`` is how many scores were paired."""

    mean: float
    low: float
    high: float
    n: int


def paired_bootstrap(
    a: Mapping[str, float], b: Mapping[str, float], confidence: float = 0.95, draws: int = 2000, seed: int = 0,
    items: Mapping[str, Any] | None = None,
) -> Difference:  # fmt: skip
    """Mean of ``a - b`` over the questions both have, with its bootstrap interval.

    Args:
        a, b: scores by question.
        confidence, draws, seed: of :func:`bootstrap_interval`.
        items: what each question is about, such as its image; all questions on one are drawn together.

    Raises:
        ValueError: no question is in both, or an item is not told.

    >>> paired_bootstrap({"x": 1.0, "y": 1.0}, {"x": 0.0, "y": 0.0, "z": 1.0})
    Difference(mean=1.0, low=1.0, high=1.0, n=2)
    """
    shared = sorted(set(a) & set(b))
    if not shared:
        raise ValueError("a and b share no question, so that nothing can be paired")
    if items is not None and (lacking := [q for q in shared if q not in items]):
        raise ValueError(f"items must tell what every question is about; it lacks {lacking[:5]}")
    for name, scores in (("a", a), ("b", b)):
        for q in shared:
            check_real(f"{name}[{q!r}]", scores[q])
    gaps = [a[q] - b[q] for q in shared]
    about = None if items is None else [items[q] for q in shared]
    low, high = bootstrap_interval(gaps, confidence, draws, seed, about)
    return Difference(sum(gaps) / len(gaps), low, high, len(gaps))


def above_chance(share: float, chance: float) -> float:
    """``(share - chance) / (1 - chance)``: 0 for who guesses, 1 for who is always right, below 0 for worse.

    >>> above_chance(0.25, 0.25), above_chance(1.0, 0.25)
    (0.0, 1.0)
    """
    check_real("share", share, least=0, most=1)
    check_real("chance", chance, least=0, below=1)
    return (share - chance) / (1 - chance)


def benjamini_hochberg(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which of several independent tests hold when a share ``alpha`` of those that hold may be false.

    >>> benjamini_hochberg([0.001, 0.04, 0.03, 0.9], 0.05)
    [True, False, False, False]
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha={alpha} is not possible; it must lie strictly between 0 and 1")
    if not len(p_values):
        return []
    from scipy import stats

    return [bool(p <= alpha) for p in stats.false_discovery_control(p_values)]


def binomial_p(successes: int, n: int, share: float) -> float:
    """Two-sided p of so many successes where each comes with probability ``share``, such as chance.

    >>> round(binomial_p(8, 8, 0.5), 4)
    0.0078
    """
    from scipy import stats

    return float(stats.binomtest(successes, n, share).pvalue)


def fisher_p(successes: tuple[int, int], n: tuple[int, int]) -> float:
    """Two-sided p of Fisher's exact test that two shares are the same.

    >>> round(fisher_p((3, 0), (3, 3)), 4)
    0.1
    """
    if any(not 0 <= s <= m or m < 1 for s, m in zip(successes, n, strict=True)):
        raise ValueError(f"successes={successes} must lie in 0..n and n={n} be at least 1")
    from scipy import stats

    return float(stats.fisher_exact([[s, m - s] for s, m in zip(successes, n, strict=True)]).pvalue)


def kappa(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Cohen's kappa of two raters: agreement beyond that of independent ones, 1 at most.

    Where both give one and the same label throughout, nothing is left beyond chance and it is NaN.

    >>> kappa(["x", "y", "x"], ["x", "y", "x"])
    1.0
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a and b must hold a label per item each, of the same items, got {len(a)} and {len(b)}")
    agree = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    chance = sum(list(a).count(label) * list(b).count(label) for label in set(a)) / len(a) ** 2
    return math.nan if chance == 1 else (agree - chance) / (1 - chance)


def growth_exponent(sizes: Sequence[float], costs: Sequence[float], last: int = 3) -> float | None:
    """Slope of log cost against log size over the ``last`` largest sizes, or ``None`` with fewer than two sizes.

    Small sizes measure call overhead, not growth, and are left out.

    >>> round(growth_exponent([10, 20, 40], [1, 4, 16]), 6)
    2.0
    """
    pairs = sorted((n, c) for n, c in zip(sizes, costs, strict=True) if n > 0 and c > 0)[-last:]
    if len(pairs) < 2:
        return None
    x = np.log([n for n, _ in pairs])
    y = np.log([c for _, c in pairs])
    return float(np.polyfit(x, y, 1)[0])


class PowerLaw(NamedTuple):
    """``value(n) = floor + scale * n ** -exponent``.

    ``half`` is the half-width of the exponent's confidence interval from what the fit leaves over, ``None`` where as
    many points as parameters leave nothing; ``rms`` is the root of the mean square of what is left.
    """

    floor: float
    scale: float
    exponent: float
    half: float | None
    rms: float

    def __call__(self, n: float) -> float:
        return self.floor + self.scale * n**-self.exponent


def fit_power_law(
    sizes: Sequence[float], values: Sequence[float], floor: float | None = None, confidence: float = 0.95
) -> PowerLaw:
    """Least squares of a power law that falls towards a floor, with the error of its exponent.

    For every exponent the best floor and scale are linear least squares, neither of them negative; the exponent is
    searched between 0.001 and 8. Its error follows from the curvature of the sum of squares (Student's t).

    Args:
        sizes: what the law is in, such as numbers of tokens; positive.
        values: what falls.
        floor: a known floor; fitted by default.
        confidence: coverage of the interval.

    Raises:
        ValueError: fewer points than parameters, sizes that are not positive.

    >>> law = fit_power_law([4, 16, 64, 256, 1024], [1 + 2 * n**-0.5 for n in (4, 16, 64, 256, 1024)])
    >>> [round(float(v), 3) for v in law[:3]]
    [1.0, 2.0, 0.5]
    """
    n, y = np.asarray(sizes, dtype=float), np.asarray(values, dtype=float)
    free = 2 if floor is not None else 3
    if n.shape != y.shape or n.size < free:
        raise ValueError(f"a power law of {free} parameters needs as many points, got {n.size} sizes, {y.size} values")
    if not (n > 0).all() or not np.isfinite(y).all():
        raise ValueError("sizes must be positive and values finite")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence} is not possible; it must lie strictly between 0 and 1")
    from scipy import optimize, stats

    middle = float(np.exp(np.log(n).mean()))  # sizes near 1 keep the columns comparable

    def best(exponent: float) -> tuple[float, float, float]:
        basis = (n / middle) ** -exponent
        if floor is not None:
            scale = max(0.0, float(basis @ (y - floor) / (basis @ basis)))
            return float(((y - floor - scale * basis) ** 2).sum()), floor, scale
        (low, scale), left = optimize.nnls(np.stack([np.ones_like(n), basis], 1), y)
        return float(left**2), float(low), float(scale)

    grid = np.geomspace(1e-3, 8.0, 200)
    at = int(np.argmin([best(e)[0] for e in grid]))
    bounds = (grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)])
    exponent = float(optimize.minimize_scalar(lambda e: best(e)[0], bounds=bounds, method="bounded").x)
    square, low, scale = best(exponent)
    half = None
    inside = 1.02 * grid[0] < exponent < 0.98 * grid[-1] and scale > 0
    if n.size > free and inside:
        basis = (n / middle) ** -exponent
        slopes = [basis, -scale * np.log(n / middle) * basis] + ([] if floor is not None else [np.ones_like(n)])
        spread = np.linalg.pinv(np.stack(slopes, 1).T @ np.stack(slopes, 1)) * square / (n.size - free)
        half = float(stats.t.ppf(0.5 + confidence / 2, n.size - free) * math.sqrt(max(0.0, spread[1, 1])))
    return PowerLaw(low, scale * middle**exponent, exponent, half, math.sqrt(square / n.size))


class CostCurve(NamedTuple):
    """``cost(N) = constant + linear * N + quadratic * N**2`` with no negative coefficient."""

    constant: float
    linear: float
    quadratic: float

    def __call__(self, n: float) -> float:
        return self.constant + self.linear * n + self.quadratic * n * n


def fit_curve(sizes: Sequence[float], costs: Sequence[float]) -> CostCurve:
    """Non-negative least squares of a quadratic in relative error.

    Relative error, because the costs span orders of magnitude; non-negative, because no cost falls with N and a
    negative coefficient would invent a crossing outside the measured range.

    Raises:
        ValueError: when fewer than two sizes were measured.

    >>> fit = fit_curve([100, 200, 400], [1e4, 4e4, 16e4]); round(fit.quadratic, 6)
    1.0
    """
    n = np.asarray(sizes, dtype=float)
    c = np.asarray(costs, dtype=float)
    if n.size < 2:
        raise ValueError(f"a cost curve needs at least two sizes, got {n.size}")
    from scipy.optimize import nnls

    top = n.max()
    basis = np.stack([np.ones_like(n), n / top, (n / top) ** 2], axis=1) / c[:, None]
    weights, _ = nnls(basis, np.ones_like(c))
    return CostCurve(float(weights[0]), float(weights[1] / top), float(weights[2] / top**2))


def efficiency_length(method: CostCurve, plain: CostCurve) -> float:
    """The N from which ``method`` stays cheaper than ``plain``.

    Returns:
        0 when it is cheaper everywhere, ``inf`` when it never stays cheaper, otherwise the last crossing.

    Reference: Zhang et al. 2022, arXiv:2210.07661, efficiency length.

    >>> efficiency_length(CostCurve(0, 10, 0), CostCurve(0, 0, 1))
    10.0
    """
    a = plain.quadratic - method.quadratic
    b = plain.linear - method.linear
    c = plain.constant - method.constant
    lead = next((x for x in (a, b, c) if x != 0), 0.0)
    if lead <= 0:
        return math.inf
    if a == 0:
        roots = [] if b == 0 else [-c / b]
    else:
        disc = b * b - 4 * a * c
        roots = [] if disc < 0 else [(-b - math.sqrt(disc)) / (2 * a), (-b + math.sqrt(disc)) / (2 * a)]
    return float(max([0.0, *roots]))


def z_scores(values: Mapping[str, float], higher_is_better: bool) -> dict[str, float]:
    """Each value as standard deviations above the mean of this run, signed so that more is better.

    The compositional index of the Comprehensive Attention Benchmark uses fixed tables of means and deviations; these
    are those of the run at hand, and so compare only mechanisms that were in it.

    >>> z_scores({"a": 1.0, "b": 3.0}, higher_is_better=True)
    {'a': -1.0, 'b': 1.0}
    """
    if not values:
        return {}
    data = np.asarray(list(values.values()), dtype=float)
    spread = float(data.std())
    sign = 1.0 if higher_is_better else -1.0
    if spread == 0.0:
        return dict.fromkeys(values, 0.0)
    return {name: float(sign * (v - data.mean()) / spread) for name, v in values.items()}

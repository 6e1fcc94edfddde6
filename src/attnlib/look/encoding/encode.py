"""Encoding models: how well the features of a model predict responses to the same events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_rank, check_real, shaped, to_list
from ...extras import need
from ...hooks.tape import Entry, Tape
from .folds import Fold, folds, resamples
from .ridge import INTERCEPTS, SIDES, Intercept, Scaler, Side, _check_finite, _floats, check_alphas, ridge_path
from .scores import noise_ceiling, pearson

#: Penalties that are tried.
ALPHAS = (1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
#: Where the penalty of a response is chosen: on each fold's own events, or by the mean over folds.
CHOICES = ("fold", "shared")


@dataclass(frozen=True)
class Encoding:
    """How well responses are predicted.

    Args:
        val, test: (T,) Pearson's r, mean over folds: of the events that chose the penalty, and of those that were
            held out. A fold in which a response does not vary is left out; NaN where that is every fold.
        alpha: (F, T) penalties that were chosen.
        val_folds, test_folds: (F, T), fold by fold.
        predicted: (N, T) predictions of the events that were tested; NaN for the others.
        ceiling: (T,) the r that a perfect model would have; ``None`` without repeats.
    """

    val: Tensor
    test: Tensor
    alpha: Tensor
    val_folds: Tensor
    test_folds: Tensor
    predicted: Tensor
    ceiling: Tensor | None = None

    @property
    def normalized(self) -> Tensor:
        """(T,) test r as a share of the ceiling; NaN where the ceiling is 0."""
        if self.ceiling is None:
            raise ValueError("there is no ceiling: responses must be given as (R, N, T), with at least two repeats")
        return self.test / torch.where(self.ceiling == 0, torch.nan, self.ceiling)


def encode(
    features: Tensor,
    responses: Tensor,
    *,
    alphas: Sequence[float] = ALPHAS,
    split: int | Sequence[Fold] = 5,
    gap: int = 0,
    choose: Literal["fold", "shared"] = "fold",
    intercept: Intercept = "free",
    side: Side | None = None,
    standardize: bool = True,
    constant: Literal["refuse", "nan"] = "refuse",
) -> Encoding:
    """Predict responses from features by ridge regression, with a penalty for each response.

    In each fold, features are brought to mean 0 and variance 1 by the events that train, a penalty is chosen for every
    response by Pearson's r on the first half of what is held out, and its r on the second half is what is told.

    Args:
        features: (N, P), one row per event; :func:`features_of` has those of any module of any model.
        responses: (N, T), or (R, N, T) with R repeats of every event: then their mean is predicted, and the ceiling
            follows from how they differ.
        alphas: penalties to choose from.
        split: how many contiguous folds, or the folds themselves.
        gap: events left out between train, val and test.
        choose: ``"fold"``: the penalty of a fold is chosen on its own events, and what a fold tests decides nothing
            in it. ``"shared"``: one penalty for all folds, by the mean of their r; the events that one fold tests then
            train the others and have a part in the choice.
        intercept: ``"free"``, or ``"penalised"``: a column of ones whose weight is penalised too. Where features are
            standardised this moves all predictions of a fold by one number, and r not at all.
        side: ``"primal"`` or ``"dual"``; the smaller by default.
        standardize: see above.
        constant: what to do with responses that are the same for every event: ``"refuse"``, or ``"nan"``.

    Raises:
        ValueError: fewer events than folds need, responses that do not vary, NaN or infinity.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(200, 4, generator=g)
    >>> found = encode(x, x[:, :2] + 0.1 * torch.randn(200, 2, generator=g))
    >>> bool((found.test > 0.9).all())
    True
    """
    x, y, ceiling = _given(features, responses, constant)
    penalties, parts = _settings(x, alphas, split, gap, choose, intercept, side)
    return _encode(x, y, penalties, parts, choose, intercept, side, standardize, ceiling)


@dataclass(frozen=True)
class Bootstrapped:
    """Scores of models fitted to events drawn again.

    Args:
        val, test: (R, T), a row per resample.
    """

    val: Tensor
    test: Tensor

    def interval(self, of: str = "val", confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """(T,) twice: percentiles over resamples of ``"val"`` or ``"test"``."""
        check_choice("of", of, ("val", "test"))
        check_real("confidence", confidence, above=0, below=1)
        ends = torch.tensor([0.5 - confidence / 2, 0.5 + confidence / 2], dtype=torch.float64)
        low, high = torch.nanquantile(getattr(self, of).double().cpu(), ends, 0)
        return low, high


def bootstrap(
    features: Tensor,
    responses: Tensor,
    rows: Tensor | int = 1000,
    *,
    seed: int = 0,
    alphas: Sequence[float] = ALPHAS,
    split: int | Sequence[Fold] = 5,
    gap: int = 0,
    choose: Literal["fold", "shared"] = "fold",
    intercept: Intercept = "free",
    side: Side | None = None,
    standardize: bool = True,
    constant: Literal["refuse", "nan"] = "refuse",
) -> Bootstrapped:
    """:func:`encode` again and again on events that are drawn with replacement, after they were split into folds.

    Args:
        features, responses: as there; repeats are averaged.
        rows: (R, N) places, as :func:`resamples` draws them, or how many to draw. Models whose scores are compared
            must be given the same rows: equal models then differ by exactly 0.
        seed: of the draws.
        alphas, split, gap, choose, intercept, side, standardize, constant: as there.
    """
    x, y, _ = _given(features, responses, constant)
    penalties, parts = _settings(x, alphas, split, gap, choose, intercept, side)
    if not isinstance(rows, Tensor):
        rows = resamples(parts, len(x), check_int("rows", rows, least=1), seed)
    _check_places("rows", rows, 2, "(R, N)", len(x))
    if rows.shape[1] != len(x):
        raise ValueError(f"rows must be (R, {len(x)}), an event for each place, got {tuple(rows.shape)}")
    done = [
        _encode(x[row], y[row], penalties, parts, choose, intercept, side, standardize) for row in rows.to(x.device)
    ]
    return Bootstrapped(torch.stack([e.val for e in done]), torch.stack([e.test for e in done]))


@shaped(features="float (N, P)", responses="float (N, T) | (R, N, T)")
def _given(features: Tensor, responses: Tensor, constant: str) -> tuple[Tensor, Tensor, Tensor | None]:
    check_choice("constant", constant, ("refuse", "nan"))
    x, y = _floats(features, responses)
    if not x.shape[1] or not y.shape[-1]:
        raise ValueError(f"features and responses must hold a column each at least, got {x.shape[1]} and {y.shape[-1]}")
    _check_finite(features=x, responses=y)
    ceiling = None
    if y.dim() == 3:
        ceiling = noise_ceiling(y) if len(y) > 1 else None
        y = y.mean(0)
    if constant == "refuse":
        still = ((y - y[:1]).abs().amax(0) <= 1e-7 * y.abs().amax(0)).nonzero()[:, 0].tolist() if len(y) else []
        if still:
            raise ValueError(
                f"responses {still[:10]}{' and more' if len(still) > 10 else ''} are the same for every event, so that "
                "nothing correlates with them; leave them out, or say constant='nan'"
            )
    return x, y, ceiling


def _settings(
    x: Tensor, alphas: Any, split: Any, gap: int, choose: str, intercept: str, side: str | None
) -> tuple[Tensor, list[Fold]]:
    check_choice("choose", choose, CHOICES)
    check_choice("intercept", intercept, INTERCEPTS)
    if side is not None:
        check_choice("side", side, SIDES)
    penalties = check_alphas("alphas", alphas if isinstance(alphas, Tensor) else to_list("alphas", alphas), x)
    if isinstance(split, int):
        return penalties, folds(len(x), split, gap)
    parts = [Fold(*fold) for fold in split]
    if gap:
        raise ValueError("gap is for folds that are made here; the folds that were given have their own")
    for i, fold in enumerate(parts):
        for name, places in fold._asdict().items():
            _check_places(f"split[{i}].{name}", places, 1, "(n,)", len(x))
        whole = torch.cat(fold)
        if len(whole.unique()) != len(whole):
            raise ValueError(f"split[{i}] has an event in two parts, or twice in one")
    if not parts:
        raise ValueError("split holds no folds")
    return penalties, parts


def _check_places(name: str, places: Any, rank: int, layout: str, events: int) -> None:
    check_rank(name, places, rank, layout)
    if places.dtype != torch.long or not places.numel() or int(places.min()) < 0 or int(places.max()) >= events:
        raise ValueError(f"{name} must hold places of the {events} events as torch.long, at least one")


def _encode(
    x: Tensor, y: Tensor, alphas: Tensor, parts: list[Fold], choose: str, intercept: Intercept, side: Side | None,
    standardize: bool, ceiling: Tensor | None = None,
) -> Encoding:  # fmt: skip
    val, test, paths = [], [], []
    for fold in parts:
        train, chooses, held = (places.to(x.device) for places in fold)
        scaler = Scaler.of(x[train]) if standardize else lambda rows: rows
        path = ridge_path(scaler(x[train]), y[train], scaler(x[torch.cat([chooses, held])]), alphas, intercept, side)
        val.append(pearson(path[:, : len(chooses)], y[chooses].expand(len(alphas), -1, -1)))
        test.append(pearson(path[:, len(chooses) :], y[held].expand(len(alphas), -1, -1)))
        paths.append(path[:, len(chooses) :])
    vals, tests = torch.stack(val), torch.stack(test)  # (F, A, T)
    scores = vals if choose == "fold" else vals.nanmean(0, keepdim=True).expand_as(vals)
    best = scores.nan_to_num(-2.0).argmax(1, keepdim=True)  # (F, 1, T)
    val_folds, test_folds = vals.gather(1, best)[:, 0], tests.gather(1, best)[:, 0]
    predicted = torch.full_like(y, torch.nan)
    for fold, path, which in zip(parts, paths, best, strict=True):
        predicted[fold.test.to(y.device)] = path.gather(0, which.expand(1, path.shape[1], -1))[0]
    return Encoding(
        val_folds.nanmean(0), test_folds.nanmean(0), alphas[best[:, 0]], val_folds, test_folds, predicted, ceiling
    )


@torch.no_grad()
def features_of(
    model: nn.Module, *inputs: Any, modules: Sequence[str], tokens: str = "flat", chunk: int | None = None, **named: Any
) -> dict[str, Tensor]:
    """Activations of modules as features, one row per sample.

    Args:
        model: any module, in evaluation mode.
        inputs, named: of the model, the batch first.
        modules: paths or patterns, as ``named_modules`` gives them.
        tokens: ``"flat"`` puts all numbers of a sample in a row, ``"mean"`` averages all axes but the first and the
            last (channels last), ``"first"`` takes the first token, such as a class token.
        chunk: samples at a time.

    Returns:
        (N, P) by module. A module that is called several times has ``name#0``, ``name#1``, ...

    >>> list(features_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(5, 3), modules=["0"]))
    ['0']
    """
    check_choice("tokens", tokens, ("flat", "mean", "first"))
    names: list[str] = []

    def reduce(entry: Entry) -> Tensor:
        out = entry.output
        if out is None:
            raise ValueError(f"modules: {entry.name!r} gives no tensor")
        if tokens != "flat" and out.dim() < 3:
            raise ValueError(f"tokens={tokens!r} needs tokens, but {entry.name!r} gives {tuple(out.shape)}")
        names.append(f"{entry.name}#{entry.call}")
        if tokens == "mean":
            return out.flatten(1, -2).mean(1)
        return out.flatten(1, -2)[:, 0] if tokens == "first" else out.flatten(1)

    taped = Tape(model, modules).run(*inputs, chunk=chunk, reduce=reduce, **named)
    names = names[: len(taped.reduced)]  # every chunk names them again
    several = {name for name in names if not name.endswith("#0")}
    twice = {name.rpartition("#")[0] for name in several}
    return {
        name if name.rpartition("#")[0] in twice else name.rpartition("#")[0]: rows
        for name, rows in zip(names, taped.reduced, strict=True)
    }


@shaped(features="float (N, P)")
def project(features: Tensor, eps: float = 0.1, seed: int = 0, always: bool = False) -> Tensor:
    """Sparse random projection to as many features as keep distances of N events within a share ``eps``.

    Args:
        features: (N, P).
        eps: share of the Johnson-Lindenstrauss bound.
        seed: of the projection.
        always: project also where there are fewer features than that, so that they become more. By default such
            features are kept as they are.

    >>> project(torch.randn(20, 8)).shape
    torch.Size([20, 8])
    """
    check_real("eps", eps, above=0, below=1)
    projection = need("sklearn.random_projection", "a random projection")
    size = int(projection.johnson_lindenstrauss_min_dim(len(features), eps=eps))
    if features.shape[1] <= size and not always:
        return features
    made = projection.SparseRandomProjection(size, random_state=seed).fit_transform(features.detach().cpu().numpy())
    return torch.as_tensor(made).to(features)

"""Ridge regression with a penalty per target, solved by himalaya on the smaller of features and events."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...checks import check_choice, check_real, shaped
from ...extras import need

#: How the offset is found: free, by the means of the data; or a column of ones whose weight is penalised as any other.
INTERCEPTS = ("free", "penalised")
#: The unknowns: a weight per feature, or one per event.
SIDES = ("primal", "dual")
Intercept = Literal["free", "penalised"]
Side = Literal["primal", "dual"]

_ONE = threading.RLock()  # himalaya's backend is a global


@contextmanager
def _himalaya(like: Tensor) -> Iterator[None]:
    backends = need("himalaya.backend", "ridge regression")
    with _ONE:
        before = backends.get_backend().name
        backends.set_backend("torch_cuda" if like.is_cuda else "torch")
        try:
            yield
        finally:
            backends.set_backend(before)


@dataclass(frozen=True)
class Scaler:
    """What makes features of mean 0 and variance 1; a feature that is the same everywhere is 0."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scaler:
        """From the features of training events, (N, P)."""
        mean = x.mean(0)
        std = (x - mean).square().mean(0).sqrt()
        flat = std <= 8 * torch.finfo(x.dtype).eps * x.abs().amax(0)  # rounding of a constant is no variance
        return cls(mean, torch.where(flat, torch.inf, std))

    def __call__(self, x: Tensor) -> Tensor:
        """(M, P) -> (M, P)."""
        return (x - self.mean) / self.std


def smaller_side(events: int, features: int) -> Side:
    """The cheaper unknowns.

    >>> smaller_side(100, 5000)
    'dual'
    """
    return "primal" if features <= events else "dual"


def _with_ones(x: Tensor, intercept: str) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1) if intercept == "penalised" else x


def ridge_path(
    x: Tensor, y: Tensor, new: Tensor, alphas: Tensor, intercept: Intercept = "free", side: Side | None = None
) -> Tensor:
    """What ridge regression predicts with every penalty: one decomposition serves them all.

    Args:
        x, y: (N, P) features and (N, T) responses of the events that train.
        new: (M, P).
        alphas: (A,) penalties ``a`` of ``|y - x w|^2 + a |w|^2``.
        intercept: one of :data:`INTERCEPTS`.
        side: one of :data:`SIDES`, the smaller by default.

    Returns:
        (A, M, T).
    """
    x, new = _with_ones(x, intercept), _with_ones(new, intercept)
    side = smaller_side(*x.shape) if side is None else side
    offset = y.new_zeros(())
    if intercept == "free":
        mean, offset = x.mean(0), y.mean(0)
        x, new, y = x - mean, new - mean, y - offset
    found: list[Tensor] = []

    def keep(truth: Tensor, predicted: Tensor) -> Tensor:  # himalaya scores what is held out: here, it is handed over
        found.append(predicted + offset)
        return predicted.new_zeros(predicted.shape[0], predicted.shape[2])

    rows = torch.cat([x, new])
    held = torch.cat([y, y.new_zeros(len(new), y.shape[1])])
    places = torch.arange(len(rows), device=x.device)
    common: dict[str, Any] = {
        "alphas": alphas, "score_func": keep, "cv": [(places[: len(x)], places[len(x) :])], "progress_bar": False,
        "n_iter": x.new_ones(1, 1),
    }  # fmt: skip
    with _himalaya(x):
        if side == "primal":
            solve = need("himalaya.ridge", "ridge regression").solve_group_ridge_random_search
            solve([rows], held, return_weights=False, warn=False, **common)
        else:
            solve = need("himalaya.kernel_ridge", "ridge regression").solve_multiple_kernel_ridge_random_search
            solve((rows @ rows.T)[None], held, return_weights=None, **common)
    return found[0]


@dataclass(frozen=True)
class Ridge:
    """A fitted map from features to responses.

    Args:
        weight: (P, T), of features as they are scaled.
        bias: (T,).
        scaler: of features; ``None`` where they are taken as they are.
        alpha: (T,) penalties.
    """

    weight: Tensor
    bias: Tensor
    alpha: Tensor
    scaler: Scaler | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """(M, P) -> (M, T) predictions."""
        x = features.to(self.weight.dtype)
        return (x if self.scaler is None else self.scaler(x)) @ self.weight + self.bias


@shaped(features="float (N, P)", responses="float (N, T)")
def ridge(
    features: Tensor,
    responses: Tensor,
    alpha: Tensor | float = 1.0,
    *,
    intercept: Intercept = "free",
    side: Side | None = None,
    standardize: bool = True,
) -> Ridge:
    """Ridge regression of responses on features, each response with its own penalty.

    Args:
        features: (N, P).
        responses: (N, T).
        alpha: penalty, one or (T,); above 0.
        intercept: ``"free"``, or ``"penalised"``: a column of ones whose weight is penalised too.
        side: ``"primal"`` or ``"dual"``: whether features or events are the unknowns; the fewer by default.
        standardize: bring each feature to mean 0 and variance 1 first.

    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> model = ridge(x, x @ torch.ones(3, 2), alpha=torch.tensor([1e-3, 1e3]))
    >>> bool(model(x)[:, 0].std() > model(x)[:, 1].std())
    True
    """
    check_choice("intercept", intercept, INTERCEPTS)
    if side is not None:
        check_choice("side", side, SIDES)
    x, y = _floats(features, responses)
    if not len(x):
        raise ValueError("features hold no events")
    _check_finite(features=x, responses=y)
    penalties = check_alphas("alpha", alpha, x)
    if len(penalties) not in (1, y.shape[1]):
        raise ValueError(
            f"alpha must be one number or one for each of the {y.shape[1]} responses, got {len(penalties)}"
        )
    penalties = penalties.expand(y.shape[1])
    scaler = Scaler.of(x) if standardize else None
    scaled = _with_ones(x if scaler is None else scaler(x), intercept)
    side = smaller_side(*scaled.shape) if side is None else side
    weight, bias = y.new_zeros(scaled.shape[1], y.shape[1]), y.new_zeros(y.shape[1])
    with _himalaya(x):
        primal = need("himalaya.ridge", "ridge regression").solve_ridge_svd
        dual = need("himalaya.kernel_ridge", "ridge regression").solve_kernel_ridge_eigenvalues
        for a in penalties.unique():  # those of one penalty share a decomposition
            which = penalties == a
            mean = scaled.mean(0) if intercept == "free" else scaled.new_zeros(scaled.shape[1])
            level = y[:, which].mean(0) if intercept == "free" else y.new_zeros(int(which.sum()))
            centred = scaled - mean
            if side == "primal":
                found = primal(centred, y[:, which] - level, alpha=a, warn=False).to(y)
            else:
                found = centred.T @ dual(centred @ centred.T, y[:, which] - level, alpha=a).to(y)
            weight[:, which], bias[which] = found, level - mean @ found
    if intercept == "penalised":
        weight, bias = weight[:-1], weight[-1]
    return Ridge(weight, bias, penalties, scaler)


def _floats(features: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, float32 at least."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, responses.dtype), torch.float32)
    return features.detach().to(dtype), responses.detach().to(dtype)


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            bad = (~tensor.isfinite()).reshape(-1, tensor.shape[-1]).any(0).nonzero()[:, 0].tolist()
            raise ValueError(f"{name} must be finite, got NaN or infinity in columns {bad[:10]}")


def check_alphas(name: str, value: Any, like: Tensor) -> Tensor:
    """Penalties as (A,) of the type and on the device of ``like``; each above 0."""
    values = value.tolist() if isinstance(value, Tensor) else value
    numbers = values if isinstance(values, (list, tuple)) else [values]
    if not len(numbers):
        raise ValueError(f"{name} is empty; name at least one penalty")
    return torch.tensor([check_real(name, a, above=0) for a in numbers], dtype=like.dtype, device=like.device)

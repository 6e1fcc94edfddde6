"""Feature maps of linear attention, plain functions on the last axis: ``phi(q) . phi(k)`` replaces a score."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_device, check_flag, check_float, check_int, check_real, check_type

FeatureMap = Callable[[Tensor], Tensor]


def _check_features(z: Tensor, fullspace: bool = True, eps: float = 0.0) -> None:
    check_float("z", z)
    if not z.dim() or not z.shape[-1]:
        raise ValueError(f"z must be (..., F) with at least one feature, got {tuple(z.shape)}")
    check_flag("fullspace", fullspace)
    check_real("eps", eps, least=0)


def _check_directions(x: Tensor, directions: Tensor) -> None:
    check_float("x", x)
    check_float("directions", directions)
    if directions.dim() != 2 or not len(directions) or not x.dim() or directions.shape[1] != x.shape[-1]:
        raise ValueError(
            f"directions must be (m, D) with m at least 1 for x (..., D), got {tuple(directions.shape)} and "
            f"{tuple(x.shape)}"
        )
    check_device(x=x, directions=directions)


def identity(x: Tensor) -> Tensor:
    """``x`` itself."""
    check_float("x", x)
    return x


def elu1(x: Tensor) -> Tensor:
    """``1 + elu(x)``, positive everywhere.

    Reference: Katharopoulos et al., 2020, arXiv 2006.16236, equation 7.
    """
    check_float("x", x)
    return F.elu(x) + 1.0


def exp_features(z: Tensor, fullspace: bool = True, stable: bool = True, eps: float = 1e-12) -> Tensor:
    """``[exp(z), exp(-z)]``, the paper's form of Hedgehog features.

    Args:
        z: (..., F) projected queries or keys.
        fullspace: append the features of ``-z``, which doubles the width.
        stable: subtract each token's maximum before the exponential. On queries the normaliser cancels it; on keys it
            does not, so this is another function than ``stable=False``, which overflows in half precision.
        eps: lower bound of every feature.

    Reference: Zhang et al., 2024, arXiv 2402.04347; the stable form is that of LoLCATs, arXiv 2410.10254.

    >>> exp_features(torch.zeros(2, 3)).shape
    torch.Size([2, 6])
    """
    _check_features(z, fullspace, eps)
    check_flag("stable", stable)
    top = z.amax(-1, keepdim=True) if stable else 0.0
    parts = [torch.exp(z - top)]
    if fullspace:
        bottom = z.amin(-1, keepdim=True) if stable else 0.0
        parts.append(torch.exp(bottom - z))
    return torch.cat(parts, -1).clamp(min=eps)


def softmax_features(z: Tensor, fullspace: bool = True, eps: float = 1e-12) -> Tensor:
    """``[softmax(z), softmax(-z)]`` over the feature axis, the stable form of Hedgehog features.

    Args:
        z: (..., F) projected queries or keys.
        fullspace: append the features of ``-z``, which doubles the width.
        eps: lower bound of every feature.

    Reference: Zhang et al., 2024, arXiv 2402.04347; LoLCATs, arXiv 2410.10254.

    >>> softmax_features(torch.randn(2, 3)).sum(-1).round(decimals=4).tolist()
    [2.0, 2.0]
    """
    _check_features(z, fullspace, eps)
    parts = [torch.softmax(z, -1)]
    if fullspace:
        parts.append(torch.softmax(-z, -1))
    return torch.cat(parts, -1).clamp(min=eps)


def joint_softmax_features(z: Tensor) -> Tensor:
    """``softmax([2 z, -2 z])`` over both halves together, the form Hedgehog has in flash-linear-attention."""
    _check_features(z)
    return torch.softmax(torch.cat([2.0 * z, -2.0 * z], -1), -1)


def positive_random_features(x: Tensor, directions: Tensor, stable: bool = False) -> Tensor:
    """``m^(-1/2) exp(w_r . x - |x|^2 / 2)``: with ``w_r ~ N(0, I)``, the mean of ``phi(q) . phi(k)`` is ``exp(q . k)``.

    Args:
        x: (..., D).
        directions: (m, D) the ``w_r``.
        stable: divide each token by its largest feature; a normaliser cancels that for queries, not for keys.

    Returns:
        (..., m).

    Reference: Choromanski et al., 2021, arXiv 2009.14794, lemma 1.

    >>> positive_random_features(torch.zeros(1, 3), torch.randn(4, 3)).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    """
    _check_directions(x, directions)
    check_flag("stable", stable)
    z = x @ directions.to(x.dtype).t()
    z = z - z.detach().amax(-1, keepdim=True) if stable else z - x.square().sum(-1, keepdim=True) / 2
    return torch.exp(z) * directions.shape[0] ** -0.5


def trigonometric_random_features(x: Tensor, directions: Tensor) -> Tensor:
    """``m^(-1/2) exp(|x|^2 / 2) [sin(w_r . x), cos(w_r . x)]``: the same mean, but weights that may be negative.

    Args:
        x: (..., D).
        directions: (m, D) the ``w_r``.

    Returns:
        (..., 2 m).

    Reference: Rahimi and Recht, 2007; Choromanski et al., 2021, arXiv 2009.14794, section 2.3.

    >>> trigonometric_random_features(torch.zeros(1, 3), torch.randn(4, 3)).tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]]
    """
    _check_directions(x, directions)
    z = x @ directions.to(x.dtype).t()
    scale = torch.exp(x.square().sum(-1, keepdim=True) / 2) * directions.shape[0] ** -0.5
    return torch.cat([z.sin(), z.cos()], -1) * scale


def random_directions(
    count: int, dim: int, orthogonal: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """(count, dim) standard normal directions; blocks of ``dim`` of them at right angles when ``orthogonal``.

    >>> w = random_directions(3, 3, orthogonal=True)
    >>> bool((w @ w.t()).fill_diagonal_(0).abs().max() < 1e-5)
    True
    """
    check_int("count", count, least=0)
    check_int("dim", dim, least=1)
    check_flag("orthogonal", orthogonal)
    check_type("generator", generator, (torch.Generator, type(None)), "a torch.Generator or None")
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # right angles need digits
    w = torch.randn(count, dim, generator=generator, dtype=dtype)
    if not orthogonal:
        return w
    norms = w.norm(dim=1, keepdim=True)
    blocks = [
        torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=dtype))[0] for _ in range(-(-count // dim))
    ]
    return torch.cat([*blocks, w[:0]])[:count] * norms


def taylor_features(x: Tensor, packed: bool = True) -> Tensor:
    """Features of D channels with ``phi(q) . phi(k) = 1 + s + s^2 / 2``, ``s = q . k / sqrt(D)``.

    Args:
        x: (..., D).
        packed: each product of two channels once (``1 + D + D (D + 1) / 2`` features) instead of twice
            (``1 + D + D^2``); the dot products are the same.

    Reference: Arora et al., 2024, arXiv 2402.18668.

    >>> taylor_features(torch.zeros(1, 16)).shape, taylor_features(torch.zeros(1, 16), packed=False).shape
    (torch.Size([1, 153]), torch.Size([1, 273]))
    """
    check_float("x", x)
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"x must be (..., D) with at least one channel, got {tuple(x.shape)}")
    check_flag("packed", packed)
    d = x.shape[-1]
    if packed:
        first, second = torch.triu_indices(d, d, device=x.device)
        # products of two different channels stand for two
        factor = x.new_ones(len(first)).masked_fill(first == second, 0.5**0.5)
        products = x.index_select(-1, first) * x.index_select(-1, second) * factor
    else:
        products = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x * d**-0.25, products * d**-0.5], -1)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": identity,
    "relu": F.relu,
    "elu1": elu1,
    "silu": F.silu,
    "exp": exp_features,
    "softmax": softmax_features,
    "joint-softmax": joint_softmax_features,
}


def feature_map(name: str) -> FeatureMap:
    """The feature map of that name.

    >>> feature_map("relu")(torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    check_choice("feature_map", name, FEATURE_MAPS)
    return FEATURE_MAPS[name]

"""Attention by a Gaussian kernel instead of a softmax, read through a few landmarks; Newton's inverse of their kernel.

``K(a, b) = exp(-|a - b|^2 / 2)``. With queries that are their own keys the whole kernel ``K(q, q)`` is symmetric and
positive, so that a few landmarks ``l`` stand for it (Nystrom): ``K(q, l) K(l, l)^-1 K(l, q) v``, for O(N m D) instead
of O(N^2 D). The small inverse is found by products alone: ``V <- 2 V - V A V``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import (
    check_device,
    check_dtype,
    check_flag,
    check_float,
    check_int,
    check_rank,
    check_real,
    check_valid,
    describe,
)
from ..types import exactly, stats_dtype

#: How often the first guess of :func:`newton_inverse` may be halved.
HALVINGS = 10


class _Closed(torch.autograd.Function):
    """Newton's steps, whose gradient is that of the inverse: ``dA = -V^T dV V^T``, without a graph of the steps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, guess: Tensor, steps: int) -> Tensor:
        return _iterated(matrix, guess, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT), None, None


def finely(x: Tensor) -> Tensor:
    """``x`` in float64 where it is float32 and its device has float64: for what is small and ill-conditioned."""
    return x.double() if x.dtype == torch.float32 and x.device.type != "mps" else x


def _iterated(matrix: Tensor, inverse: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        inverse = 2 * inverse - inverse @ matrix @ inverse
    return inverse


def newton_inverse(
    matrix: Tensor,
    steps: int = 20,
    jitter: float = 0.01,
    start: float = 1.8,
    closed: bool = True,
    halve: bool = False,
    shared: int = 0,
    check: bool = True,
) -> Tensor:
    """The inverse of ``A + jitter I`` by Newton's steps ``V <- 2 V - V A V`` from ``V = start / c^2 A``.

    ``c`` is the largest sum of a row of ``|A|``. For symmetric positive matrices this converges, the small eigenvalues
    last: what has not converged yet is a damped inverse.

    Args:
        matrix: (..., m, m), symmetric and positive semidefinite.
        steps: how many.
        jitter: added to the diagonal.
        start: of the first guess.
        closed: the gradient is that of the inverse, ``-V^T dV V^T``; else that of the steps.
        halve: halve the first guess, at most :data:`HALVINGS` times, while a column of ``|I - A V|`` sums to more than
            1.01.
        shared: so many axes before the last two have one first guess, that of the largest.
        check: look whether the matrices are what they have to be. Under a compiler nothing is looked at.

    Returns:
        The same shape, float32 at least.

    Raises:
        ValueError: a matrix that is not square, not symmetric or not positive.

    Reference: Lu et al., 2021, arXiv 2110.11945, algorithm 1, and the gradient in its section 3.3.

    >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> (newton_inverse(a, jitter=0.0) @ a - torch.eye(2)).abs().max().item() < 1e-5
    True
    """
    check_float("matrix", matrix)
    check_int("steps", steps, least=0)
    check_real("jitter", jitter, least=0)
    check_int("shared", shared, least=0)
    check_real("start", start, above=0)
    for name, flag in (("closed", closed), ("halve", halve), ("check", check)):
        check_flag(name, flag)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be square, (..., m, m), got {describe(matrix)}")
    with exactly(matrix):
        matrix = matrix.to(stats_dtype(matrix.dtype))
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        damped = matrix + jitter * eye if jitter else matrix
        if check and not torch.compiler.is_compiling() and not matrix.is_meta:
            _check_positive(damped.detach())
        if not matrix.numel():
            return damped
        scale = start / _largest(matrix.abs().sum(-1, keepdim=True), shared) ** 2
        if halve:
            with torch.no_grad():
                square = damped @ damped
                for _ in range(HALVINGS):
                    off = (eye - scale * square).abs().sum(-2, keepdim=True)
                    scale = torch.where(_largest(off, shared) > 1.01, scale / 2, scale)
            # How often it was halved is a choice; what is halved has a gradient.
            whole = start / _largest(matrix.abs().sum(-1, keepdim=True), shared) ** 2
            scale = whole * (scale / whole).detach()
        guess = scale * damped
        if not steps:
            return guess
        return _Closed.apply(damped, guess, steps) if closed else _iterated(damped, guess, steps)


def _largest(sums: Tensor, shared: int) -> Tensor:
    return sums.amax(tuple(range(max(-sums.dim(), -2 - shared), 0)), keepdim=True)


def _check_positive(matrix: Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("matrix must hold finite numbers")
    if not torch.allclose(matrix, matrix.mT, rtol=1e-3, atol=1e-4 * float(matrix.abs().max() if matrix.numel() else 0)):
        raise ValueError("matrix must be symmetric for Newton's steps to find its inverse")
    if matrix.numel() and bool((torch.linalg.cholesky_ex(matrix.double()).info > 0).any()):
        raise ValueError(
            "matrix must be positive definite with its jitter, or Newton's steps do not find its inverse; its smallest "
            f"eigenvalue is {float(torch.linalg.eigvalsh(matrix.double()).min()):.3g}"
        )


def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    """``exp(-|a_i - b_j|^2 / 2)``: (..., N, D) and (..., M, D) -> (..., N, M).

    >>> gaussian_kernel(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]])).round(decimals=3)
    tensor([[1., 0.]])
    """
    check_float("a", a)
    check_float("b", b)
    if a.shape[-1:] != b.shape[-1:] or a.dim() < 2 or b.dim() < 2:
        raise ValueError(f"a and b must be (..., N, D) and (..., M, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    with exactly(a):
        a, b = a.to(stats_dtype(a.dtype)), b.to(stats_dtype(b.dtype))
        apart = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2) - 2 * (a @ b.mT)
        return torch.exp(-apart / 2)


def nystrom_attention(
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    *,
    valid: Tensor | None = None,
    landmarks_valid: Tensor | None = None,
    normalize: bool = False,
    steps: int = 20,
    shared: bool = False,
    return_weights: bool = False,
) -> Any:
    """``K(q, l) K(l, l)^-1 K(l, q) v`` with the Gaussian kernel ``K``: queries are their own keys.

    Args:
        q: (B, H, N, D), scaled already.
        landmarks: (B, H, m, D).
        v: (B, H, N, Dv).
        valid: (B, N) boolean, which tokens exist.
        landmarks_valid: (B, m) boolean, which landmarks exist.
        normalize: the inverse is divided on both sides by the root of the sums of the rows of ``K(l, l)``, so that its
            norm does not grow with the number of landmarks. It is found without jitter, from a first guess that is
            halved where it is too large, and its gradient is that of the steps. In float32 it is ill-conditioned when
            landmarks are nearly equal or more than the tokens: outputs were off by up to half of their size, and NaN
            at 37 steps; float64 is the way there.
        steps: Newton's.
        shared: with ``normalize``, one first guess for the whole batch instead of one per sample.
        return_weights: return ``(out, weights)`` with the whole kernel (B, H, N, N).

    Returns:
        (B, H, N, Dv). Cost: O(N m D + steps m^3).

    Reference: Lu et al., 2021, arXiv 2110.11945, eq. 8 to 12; Lu et al., 2022, arXiv 2207.03341, eq. 15 (normalized).

    >>> q = 4 * torch.randn(1, 1, 6, 8)
    >>> exact = gaussian_kernel(q, q) @ torch.ones(1, 1, 6, 2)
    >>> (nystrom_attention(q, q, torch.ones(1, 1, 6, 2)) - exact).abs().max().item() < 0.1
    True
    """
    for name, t in (("q", q), ("landmarks", landmarks), ("v", v)):
        check_rank(name, t, 4, "(B, H, N, D)")
        check_float(name, t)
    check_dtype(q=q, landmarks=landmarks, v=v)
    check_device(q=q, landmarks=landmarks, v=v, valid=valid, landmarks_valid=landmarks_valid)
    if (*q.shape[:2], q.shape[3]) != (*landmarks.shape[:2], landmarks.shape[3]):
        raise ValueError(
            f"landmarks must have the batch, heads and width of q {tuple(q.shape)}, got {tuple(landmarks.shape)}"
        )
    if q.shape[:3] != v.shape[:3]:
        raise ValueError(f"v must have the batch, heads and tokens of q {tuple(q.shape)}, got {tuple(v.shape)}")
    check_valid("valid", valid, (q.shape[0], q.shape[2]))
    check_valid("landmarks_valid", landmarks_valid, (q.shape[0], landmarks.shape[2]))
    for name, flag in (("normalize", normalize), ("shared", shared), ("return_weights", return_weights)):
        check_flag(name, flag)
    dtype = stats_dtype(q.dtype)
    with exactly(q):
        if valid is not None:
            gone = ~valid[:, None, :, None]
            q, v = q.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
        if landmarks_valid is not None:
            landmarks = landmarks.masked_fill(~landmarks_valid[:, None, :, None], 0.0)
        read, among = gaussian_kernel(q, landmarks), gaussian_kernel(landmarks, landmarks)
        if valid is not None:
            read = read.masked_fill(~valid[:, None, :, None], 0.0)
        if landmarks_valid is not None:
            read = read.masked_fill(~landmarks_valid[:, None, None], 0.0)
            # One that does not exist stands alone: the inverse of the others is as without it.
            eye = torch.eye(among.shape[-1], dtype=among.dtype, device=among.device)
            pairs = landmarks_valid[:, None, None] & landmarks_valid[:, None, :, None]
            among = torch.where(pairs, among, eye)
        if normalize:
            root = among.sum(-1, keepdim=True).rsqrt()
            inverse = newton_inverse(
                finely(among), steps, 0.0, 2.0, closed=False, halve=True, shared=2 if shared else 1, check=False
            ).to(dtype)
            inverse = root * inverse * root.mT
        else:
            inverse = newton_inverse(finely(among), steps, check=False).to(dtype)
        left = read @ inverse
        out = (left @ (read.mT @ v.to(dtype))).to(v.dtype)
        return (out, left @ read.mT) if return_weights else out

"""What a place contributes to the gradient of an identity layer, added up over channels: NormGrad and its relatives.

Behind a module, activations ``x_u`` at places ``u`` with gradients ``g_u = ds / dx_u``, put a layer that does nothing.
The gradient of its weights is a sum over places, ``sum_u m_u``, and ``m_u`` (of the kind of layer) is what place ``u``
brings. The saliency of ``u`` is an aggregate of the entries of ``m_u``:

=====================  ===========================================  =======
extract                m_u                                          entries
=====================  ===========================================  =======
``bias``               ``g_u``                                      C
``scaling``            ``x_u * g_u``                                C
``conv1x1``            ``g_u x_u^T``                                C^2
``convkxk``            ``g_u p_u^T``, p_u the k x k around u        C^2 k^2
``convkxk_depthwise``  ``g_u[c] p_u[c]``                            C k^2
=====================  ===========================================  =======

``aggregate`` is ``sum``, ``max``, ``norm`` (Euclidean), ``filter_norm`` (the norm of the positive entries) or
``max_abs``. Every entry is a product of one number of ``g_u`` and one of ``p_u``, so all of these follow from sums,
norms and extremes of the two: no ``m_u`` is ever built. ``conv1x1`` with ``norm`` is NormGrad, ``|x_u| |g_u|``;
``scaling`` with ``filter_norm`` its selective form, with ``sum`` gradient times input; ``bias`` with ``max_abs`` the
gradient.

Reference: Rebuffi, Fong, Ji and Vedaldi, 2020, "There and Back Again: Revisiting Backpropagation Saliency Methods"
(https://arxiv.org/abs/2004.02866).
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_tensor, check_type

#: How the entries of ``m_u`` become one number.
AGGREGATES = ("sum", "max", "norm", "filter_norm", "max_abs")

_CONV = re.compile(r"conv(\d+)x(\d+)(_depthwise)?")


def _kernel(extract: str) -> tuple[int, bool]:
    """Side of the kernel and whether it is depthwise; 0 for the layers that are no convolution."""
    check_type("extract", extract, str, "a string")
    if extract in ("bias", "scaling"):
        return 0, True
    found = _CONV.fullmatch(extract)
    if not found or found[1] != found[2] or int(found[1]) % 2 == 0:
        raise ValueError(
            "extract must be 'bias', 'scaling', 'conv1x1', 'conv3x3', 'conv3x3_depthwise' or one of these with another "
            f"odd side, got {extract!r}"
        )
    return int(found[1]), bool(found[3])


def _box(x: Tensor, k: int, kind: str) -> Tensor:
    """Sum or maximum over the k x k places around each, zeros beyond the border; x: (B, C, h, w)."""
    if k == 1:
        return x
    x = F.pad(x, [k // 2] * 4)
    return F.avg_pool2d(x, k, stride=1) * (k * k) if kind == "sum" else F.max_pool2d(x, k, stride=1)


def extract_aggregate(x: Tensor, g: Tensor, extract: str = "conv1x1", aggregate: str = "norm") -> Tensor:
    """The saliency of each place from activations and their gradients.

    Args:
        x: (B, C, *grid) activations; convolutions wider than 1 x 1 want a grid of two axes.
        g: the gradient of the score, of the same shape.
        extract: kind of the identity layer.
        aggregate: over the entries of ``m_u``.

    Returns:
        (B, *grid).

    >>> x, g = torch.tensor([[[3.0], [4.0]]]), torch.tensor([[[0.0], [2.0]]])
    >>> extract_aggregate(x, g).tolist(), extract_aggregate(x, g, "scaling", "sum").tolist()
    ([[10.0]], [[8.0]])
    """
    k, by_channel = _kernel(extract)
    check_choice("aggregate", aggregate, AGGREGATES)
    for name, t in (("x", x), ("g", g)):
        check_tensor(name, t)
    if x.shape != g.shape or x.dim() < 3:
        raise ValueError(f"x and g must both be (B, C, *grid), got {tuple(x.shape)} and {tuple(g.shape)}")
    if k > 1 and x.dim() != 4:
        raise ValueError(f"extract={extract!r} wants a grid of two axes, (B, C, h, w), got {tuple(x.shape)}")
    if extract in ("bias", "scaling"):
        m = g if extract == "bias" else x * g
        if aggregate == "sum":
            return m.sum(1)
        if aggregate == "max":
            return m.amax(1)
        if aggregate == "max_abs":
            return m.abs().amax(1)
        return torch.linalg.vector_norm(m.clamp_min(0) if aggregate == "filter_norm" else m, dim=1)
    if by_channel:
        return _depthwise(x, g, k, aggregate)
    if aggregate == "sum":
        return _box(x.sum(1, keepdim=True), k, "sum")[:, 0] * g.sum(1)
    if aggregate == "norm":
        return _length(x, k) * torch.linalg.vector_norm(g, dim=1)
    if aggregate == "filter_norm":  # a product is positive where both have one sign
        both = [_length(s.clamp_min(0), k) * torch.linalg.vector_norm(t.clamp_min(0), dim=1)
                for s, t in ((x, g), (-x, -g))]  # fmt: skip
        return torch.hypot(*both)
    if aggregate == "max_abs":
        return _box(x.abs().amax(1, keepdim=True), k, "max")[:, 0] * g.abs().amax(1)
    top, bottom = (_box(s.amax(1, keepdim=True), k, "max")[:, 0] for s in (x, -x))
    ends = [a * b for a in (top, -bottom) for b in (g.amax(1), g.amin(1))]
    return torch.stack(ends).amax(0)


def _length(x: Tensor, k: int) -> Tensor:
    """(B, *grid) the norm of all channels at the k x k places around each."""
    if k == 1:
        return torch.linalg.vector_norm(x, dim=1)
    return _box(x.square().sum(1, keepdim=True), k, "sum")[:, 0].sqrt()


def _depthwise(x: Tensor, g: Tensor, k: int, aggregate: str) -> Tensor:
    if aggregate == "sum":
        return (g * _box(x, k, "sum")).sum(1)
    if aggregate == "norm":
        return (g.square() * _box(x.square(), k, "sum")).sum(1).sqrt()
    if aggregate == "filter_norm":
        parts = [s.clamp_min(0).square() * _box(t.clamp_min(0).square(), k, "sum") for s, t in ((g, x), (-g, -x))]
        return (parts[0] + parts[1]).sum(1).sqrt()
    if aggregate == "max_abs":
        return (g.abs() * _box(x.abs(), k, "max")).amax(1)
    return torch.maximum(g * _box(x, k, "max"), -g * _box(-x, k, "max")).amax(1)

"""Losses and scores that several tasks share: masks, depth up to a scale, survival, answers with a spread, pictures.

Each gives one number and refuses what has none: no NaN comes out of a batch without labels, depth or events.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_axes,
    check_choice,
    check_flag,
    check_float,
    check_int,
    check_real,
    describe,
    extremes,
    readable,
)
from ..types import stats_dtype

# --------------------------------------------------------------------------------------------------------------------
# Overlap


def dice_scores(
    share: Tensor, truth: Tensor, *, smooth: float = 1.0, squared: bool = True, axes: tuple[int, ...] | None = None
) -> Tensor:
    """``(2 sum p t + s) / (sum p^(2) + sum t^(2) + s)`` over ``axes``; all but the first by default.

    Args:
        share: probabilities p.
        truth: of the same shape, t, of 0 and 1 or between.
        smooth: s.
        squared: squares in the denominator.
        axes: that are summed.
    """
    axes = tuple(range(1, share.dim())) if axes is None else axes
    below = (share.square() + truth.square() if squared else share + truth).sum(axes)
    return (2 * (share * truth).sum(axes) + smooth) / (below + smooth)


def dice_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    foreground_only: bool = True,
    smooth: float = 1.0,
    squared: bool = True,
    per_sample: bool = False,
    ignore_index: int | None = None,
    compat: str | None = None,
) -> Tensor:
    """One minus the mean overlap of classes.

    Args:
        prediction: logits (B, K, *grid); of one channel, of the foreground.
        target: (B, *grid) classes; with one channel 0 and 1.
        foreground_only: leave class 0 out; needs two classes or more.
        smooth, squared: of :func:`dice_scores`.
        per_sample: overlap of each sample; that of the whole batch by default.
        ignore_index: the label of places that count nowhere.
        compat: ``"authors"``: of AGUNet and DAUNet: the sum over all K classes over K - 1, and what is subtracted from
            one clipped to [0, 1). A mean overlap above (K - 1) / K has no gradient then.

    Raises:
        ValueError: shapes that do not fit, labels that are no class.

    >>> y = torch.tensor([[[0, 1], [2, 1]]])
    >>> float(dice_loss(50 * F.one_hot(y, 3).movedim(-1, 1).float(), y))
    0.0
    """
    check_choice("compat", compat, (None, "authors"))
    check_real("smooth", smooth, least=0)
    for name, flag in (("foreground_only", foreground_only), ("squared", squared), ("per_sample", per_sample)):
        check_flag(name, flag)
    share, truth = class_shares(prediction, target, ignore_index)
    if share.shape[1] > 1 and foreground_only and compat is None:
        share, truth = share[:, 1:], truth[:, 1:]
    axes = tuple(i for i in range(share.dim()) if i != 1 and (i or not per_sample))
    scores = dice_scores(share, truth, smooth=smooth, squared=squared, axes=axes)
    if compat is None:
        return 1 - scores.mean()
    if prediction.shape[1] < 2:
        raise ValueError("compat='authors' needs two classes or more, got one channel")
    scores = scores.sum(-1) / (prediction.shape[1] - 1)
    return (1 - scores).clamp(0.0, 1.0 - 1e-10).mean()


def class_shares(prediction: Tensor, target: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities and what they should be, both (B, K, *grid): logits and classes, checked; zeros where ignored."""
    check_float("prediction", prediction)
    if prediction.dim() < 3:
        raise ValueError(f"prediction must be logits (B, K, *grid), got {describe(prediction)}")
    shape, classes = (prediction.shape[0], *prediction.shape[2:]), prediction.shape[1]
    if not isinstance(target, Tensor) or target.is_complex() or tuple(target.shape) != shape:
        raise ValueError(f"target must be classes {shape}, got {describe(target)}")
    if classes > 1 and (target.is_floating_point() or target.dtype == torch.bool):
        raise ValueError(f"target must be whole numbers {shape}, got {describe(target)}")
    labels = target.long()
    if target.is_floating_point() and readable(target) and bool((target != labels).any()):
        raise ValueError(f"target must hold 0 and 1, got {float(target[target != labels][0])}")
    known = None if ignore_index is None else labels != check_int("ignore_index", ignore_index)
    if known is not None:
        labels = labels.masked_fill(~known, 0)
    most = max(classes, 2) - 1
    if labels.numel() and readable(labels):
        low, high = extremes(labels, (0, most))
        if low < 0 or high > most:
            ignored = "" if ignore_index is None else f", and {ignore_index} for none"
            raise ValueError(f"target holds the class {low if low < 0 else high}; possible: 0 to {most}{ignored}")
    logits = prediction.to(stats_dtype(prediction.dtype))
    share = logits.sigmoid() if classes == 1 else logits.softmax(1)
    truth = labels[:, None] if classes == 1 else F.one_hot(labels, classes).movedim(-1, 1)
    truth = truth.to(share.dtype)
    if known is not None:
        share, truth = (t * known[:, None] for t in (share, truth))
    return share, truth


# --------------------------------------------------------------------------------------------------------------------
# Depth


def silog_loss(
    prediction: Tensor, target: Tensor, valid: Tensor | None = None, *, focus: float = 0.85, scale: float = 1.0
) -> Tensor:
    """``scale * sqrt(mean(d^2) - focus * mean(d)^2)`` with ``d = log(prediction) - log(target)``.

    Eigen et al., 2014, arXiv 1406.2283; with the root, as depth models train it. ``focus=1`` does not see a factor
    common to all places. At a perfect prediction the gradient is 0.

    Args:
        prediction: depth above 0, any shape.
        target: of that shape.
        valid: of that shape, boolean; where the target is finite and above 0 by default.
        focus: how much of a common factor is forgiven.
        scale: of the whole.

    Raises:
        ValueError: shapes that differ, no valid place, depth that has no logarithm where it is valid.
    """
    check_float("prediction", prediction)
    check_real("focus", focus, least=0, most=1)
    check_real("scale", scale, least=0)
    if not isinstance(target, Tensor) or target.shape != prediction.shape:
        raise ValueError(f"target must have the shape of prediction {tuple(prediction.shape)}, got {describe(target)}")
    target = target.to(stats_dtype(prediction.dtype))
    if valid is None:
        valid = target.isfinite() & (target > 0)
    elif not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.shape != prediction.shape:
        raise ValueError(f"valid must be boolean {tuple(prediction.shape)}, got {describe(valid)}")
    if readable(prediction):
        if not valid.any():
            raise ValueError("valid holds no place: there is no depth to compare")
        for name, depth in (("prediction", prediction), ("target", target)):
            wrong = valid & ~((depth > 0) & depth.isfinite())
            if wrong.any():
                raise ValueError(
                    f"{name} must be finite and above 0 where valid, got {float(depth.detach()[wrong][0])}"
                )
    one = torch.ones((), dtype=target.dtype, device=target.device)
    d = torch.where(valid, prediction.to(target.dtype), one).log() - torch.where(valid, target, one).log()
    count = valid.sum().clamp(min=1)
    spread = d.square().sum() / count - focus * (d.sum() / count).square()
    some = spread > 0
    return scale * torch.where(some, torch.where(some, spread, one).sqrt(), 0.0)


# --------------------------------------------------------------------------------------------------------------------
# Survival


def cox_loss(
    risk: Tensor, time: Tensor, event: Tensor, *, ties: str = "breslow", weights: Tensor | None = None
) -> Tensor:
    """Negative partial log likelihood of Cox's proportional hazards, a mean over events.

    With ``R_i = sum_{t_j >= t_i} exp(r_j)``, ``-(1 / sum w) sum_i w_i (r_i - log R_i)`` over events i. Of d events
    at one time, Efron's l-th (from 0) subtracts ``l / d`` of their hazards from R. Sums are of ``logcumsumexp`` from
    the last time on, in float32 at least.

    Args:
        risk: (N,) log hazards.
        time: (N,) at least 0, of the event or of the last that was heard.
        event: (N,) boolean or of 0 and 1: whether it happened.
        ties: ``"breslow"`` or ``"efron"``.
        weights: (N,) at least 0, of the terms of events; 1 by default.

    Raises:
        ValueError: shapes that differ, times below 0 or not finite, no event.

    >>> float(cox_loss(torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([1, 0])).exp())
    2.0
    """
    check_choice("ties", ties, ("breslow", "efron"))
    check_float("risk", risk)
    if risk.dim() != 1:
        raise ValueError(f"risk must be (N,), got {describe(risk)}")
    for name, given in (("time", time), ("event", event), ("weights", weights)):
        if given is None and name == "weights":
            continue
        if not isinstance(given, Tensor) or given.shape != risk.shape:
            raise ValueError(f"{name} must be ({len(risk)},), got {describe(given)}")
    happened = event.bool()
    if readable(risk) and not bool(risk.isfinite().all()):
        raise ValueError(f"risk must be finite, got {float(risk.detach()[~risk.isfinite()][0])}")
    if readable(time):
        if time.is_floating_point() and not time.isfinite().all():
            raise ValueError("time must be finite")
        if bool((time < 0).any()):
            raise ValueError(f"time must be at least 0, got {float(time.min())}")
        if not bool(((event == 0) | (event == 1)).all()):
            raise ValueError("event must hold 0 and 1 only")
        if not bool(happened.any()):
            raise ValueError("event holds none: a batch without an event has no partial likelihood")
        if weights is not None and not bool(
            ((weights >= 0) & weights.isfinite()).all() and (weights[happened] > 0).any()
        ):
            raise ValueError("weights must be finite, at least 0, and above 0 for some event")
    r = risk.to(stats_dtype(risk.dtype))
    order = torch.sort(time, descending=True, stable=True).indices
    r, happened, at = r[order], happened[order], time[order]
    # Everyone of one time shares a group; the last of it has seen the whole risk set.
    _, group, sizes = torch.unique_consecutive(at, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0) - 1
    log_sum = r.logcumsumexp(0)[last][group]
    if ties == "efron":
        count = torch.zeros_like(sizes).index_add(0, group, happened.long())
        before = happened.long().cumsum(0) - happened.long()  # events before, then those of earlier groups taken off
        rank = before - (count.cumsum(0) - count)[group]
        part = rank.to(r.dtype) / count[group].clamp(min=1).to(r.dtype)
        hidden = r.masked_fill(~happened, -torch.inf)
        top = torch.full_like(sizes, 0, dtype=r.dtype).scatter_reduce(
            0, group, hidden.detach(), "amax", include_self=False
        )
        top = top.masked_fill(top.isinf(), 0.0)
        own = torch.zeros_like(top).index_add(0, group, torch.where(happened, (r - top[group]).exp(), 0.0))
        own = torch.where(own > 0, own, 1.0).log() + top
        ratio = (own[group] - log_sum).clamp(max=0.0).exp()
        log_sum = log_sum + torch.where(happened & (rank > 0), torch.log1p(-part * ratio), 0.0)
    w = happened.to(r.dtype) if weights is None else torch.where(happened, weights[order].to(r.dtype), 0.0)
    return (w * (log_sum - r)).sum() / w.sum()


def concordance(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Harrell's C: of the pairs whose order is known, the share that the risks put in it; equal risks count half.

    Args:
        risk, time, event: (N,); finite, events of 0 and 1.

    Raises:
        ValueError: shapes that differ, other numbers, no pair whose order is known.

    >>> float(concordance(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)))
    1.0
    """
    check_axes("risk", risk, N=None)
    for name, given in (("time", time), ("event", event)):
        check_axes(name, given, N=len(risk))
    for name, given in (("risk", risk), ("time", time)):
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name} must be finite: what is not has no place in an order")
    if not bool(((event == 0) | (event == 1)).all()):
        raise ValueError("event must hold 0 and 1 only")
    happened = event.bool()
    known = happened[:, None] & ((time[:, None] < time) | ((time[:, None] == time) & ~happened))
    if not bool(known.any()):
        raise ValueError("time and event leave no pair of patients whose order is known")
    gap = risk[:, None] - risk
    agreed = (gap > 0).double() + 0.5 * (gap == 0).double()
    return (agreed * known).sum() / known.sum()


#: How a number c becomes the spread of a Laplacian: ``e^c``; between .25 and 4; ``e^c'`` with c' between -3 and 3.
SPREADS = ("log", "bounded", "bounded-log")


def laplacian_loss(
    prediction: Tensor, spread: Tensor, target: Tensor, kind: str = "log", most: float | None = None
) -> Tensor:
    """``mean |p - t|_1 / s + log s``: how likely the truth is under a Laplacian of spread s about the prediction.

    Weinzaepfel et al., 2023, "CroCo v2", arXiv 2211.10408, without the constant log 2. Kendall and Gal, 2017, arXiv
    1703.04977.

    Args:
        prediction: (B, C, *grid).
        spread: (B, 1, *grid), any numbers c: ``"log"``: ``s = e^c``; ``"bounded"``: ``s = 3.75 sigmoid(c) + .25``;
            ``"bounded-log"``: ``log s = 6 sigmoid(c / 3) - 3``.
        target: (B, C, *grid); where its first channel is not finite nothing counts.
        kind: of ``SPREADS``.
        most: places whose target is this long or longer do not count, either.

    Raises:
        ValueError: shapes that do not fit, or no place that counts.

    >>> x = torch.zeros(1, 2, 3, 3)
    >>> float(laplacian_loss(x, torch.zeros(1, 1, 3, 3), x + 1))
    2.0
    """
    check_choice("kind", kind, SPREADS)
    check_float("prediction", prediction)
    if not isinstance(target, Tensor) or target.shape != prediction.shape:
        raise ValueError(f"target must be {tuple(prediction.shape)}, got {describe(target)}")
    place = (len(prediction), 1, *prediction.shape[2:])
    if not isinstance(spread, Tensor) or tuple(spread.shape) != place:
        raise ValueError(f"spread must be {place}, got {describe(spread)}")
    known = target[:, 0].isfinite()
    if most is not None:
        known = known & (target.norm(dim=1) < check_real("most", most, above=0))
    if not bool(known.any()):
        raise ValueError("target has no finite place to learn from")
    high = stats_dtype(prediction.dtype)
    gap = (prediction - torch.where(known.unsqueeze(1), target, 0.0)).to(high).abs().sum(1)[known]
    c = spread.squeeze(1).to(high)[known]
    if kind == "bounded":
        size = 3.75 * c.sigmoid() + 0.25
        return (gap / size + size.log()).mean()
    log = c if kind == "log" else 6 * (c / 3).sigmoid() - 3
    return (gap * (-log).exp() + log).mean()


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def local_similarity(a: Tensor, b: Tensor, mean: Callable[[Tensor], Tensor], share: float = 1.0) -> Tensor:
    """Structural similarity of pictures in [0, 1] around every place (Wang et al., 2004, IEEE TIP 13(4)).

    ``(2 m_a m_b + .01^2) (2 c + .03^2) / ((m_a^2 + m_b^2 + .01^2) (v_a + v_b + .03^2))`` of local means m, variances v
    and the covariance c.

    Args:
        a, b: pictures, of one shape.
        mean: of the window around every place.
        share: what variances are multiplied by: 1, or ``n / (n - 1)`` of n pixels for those of samples.

    >>> x = torch.rand(1, 1, 4, 4)
    >>> local_similarity(x, x, lambda t: F.avg_pool2d(t, 3, 1)).allclose(torch.ones(1, 1, 2, 2))
    True
    """
    ma, mb = mean(a), mean(b)
    va, vb, both = (share * (mean(x * y) - m * n) for x, y, m, n in ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb)))
    one, two = 0.01**2, 0.03**2
    return (2 * ma * mb + one) * (2 * both + two) / ((ma**2 + mb**2 + one) * (va + vb + two))
